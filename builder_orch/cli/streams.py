"""Standard input, output and error as a caller left them: closed, full, or with nobody there."""

import os
import sys
from contextlib import suppress
from typing import TextIO


def open_missing() -> None:
    """Put /dev/null where a standard stream was closed: what we open would get its number, and
    what a program of ours prints would end in there."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null == number:
                os.set_inheritable(null, True)
            else:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def give_up(stream: TextIO) -> None:
    """Let what is and will be printed there go nowhere, without further complaint."""
    with suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def leave() -> None:
    """Before the end: Python would complain of what cannot be written, by a code of its own."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            give_up(stream)

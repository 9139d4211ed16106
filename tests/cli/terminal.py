"""A terminal behind a real pty: what a program writes to it, and what a person sees in the end."""

import fcntl
import os
import re
import struct
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TextIO
from unicodedata import east_asian_width

_CONTROL = re.compile(r"\x1b\[(\??)([0-9;]*)([A-Za-z])|\r|\n|\x07|\x1b.|[^\r\n\x07\x1b]")


@dataclass
class Seen:
    """Rows as they stand; understands what is needed to draw progress, and nothing else."""

    columns: int
    rows: list[list[str]] = field(default_factory=lambda: [[]])
    row: int = 0
    column: int = 0
    cursor: bool = True
    widest: int = 0

    def feed(self, text: str) -> "Seen":
        for found in _CONTROL.finditer(text):
            self._take(found)
        return self

    def lines(self) -> list[str]:
        made = ["".join(row).rstrip() for row in self.rows]
        while made and not made[-1]:
            made.pop()
        return made

    def _take(self, found: re.Match[str]) -> None:
        text = found[0]
        if text == "\r":
            self.column = 0
        elif text == "\n":
            self._down()
        elif text.startswith("\x1b["):
            self._control(found[1], found[2], found[3])
        elif text.startswith("\x1b") or text == "\x07":
            raise AssertionError(f"nobody should write {text!r}")
        else:
            self._put(text)

    def _down(self) -> None:
        self.row += 1
        while len(self.rows) <= self.row:
            self.rows.append([])

    def _put(self, char: str) -> None:
        width = 2 if east_asian_width(char) in "WF" else 1
        if self.column + width > self.columns:
            self.column = 0
            self._down()
        row = self.rows[self.row]
        row += " " * (self.column + width - len(row))
        row[self.column : self.column + width] = [char, *[""] * (width - 1)]
        self.column += width
        self.widest = max(self.widest, self.column)

    def _control(self, private: str, numbers: str, verb: str) -> None:
        match private, verb:
            case "", "A":
                self.row = max(0, self.row - int(numbers or 1))
            case "", "K":
                assert numbers == "2"
                self.rows[self.row] = []
            case "", "m":
                pass
            case "?", "h" | "l":
                assert numbers == "25"
                self.cursor = verb == "h"
            case _:
                raise AssertionError(f"nobody should write ESC[{private}{numbers}{verb}")


@dataclass
class Pty:
    """One terminal: `end` is what a program has for its stderr."""

    main: int
    end: TextIO
    _got: bytearray = field(default_factory=bytearray)
    _reader: threading.Thread | None = None

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.main, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def read(self) -> None:
        """From now on; a pty holds little, and who writes to a full one waits."""

        def work() -> None:
            while True:
                try:
                    octets = os.read(self.main, 65536)
                except OSError:
                    return  # EIO: the other end was closed
                if not octets:
                    return
                self._got.extend(octets)

        self._reader = threading.Thread(target=work)
        self._reader.start()

    def written(self) -> str:
        """Everything that was written, after the program's end was closed."""
        self.end.close()
        assert self._reader is not None
        self._reader.join()
        return self._got.decode()


@contextmanager
def pty(columns: int = 80, rows: int = 24, encoding: str = "utf-8") -> Iterator[Pty]:
    """A new one."""
    main, end = os.openpty()
    made = Pty(main, os.fdopen(end, "w", encoding=encoding))
    try:
        made.resize(columns, rows)
        made.read()
        yield made
    finally:
        if not made.end.closed:
            made.written()
        os.close(main)

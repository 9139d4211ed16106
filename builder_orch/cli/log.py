"""The log of a process that stays: lines of names and values, for people and for grep."""

from collections.abc import MutableMapping
from contextlib import suppress
from typing import NoReturn, TextIO


def write_log(*streams: TextIO) -> None:
    """Have everything that is logged written to these, as far as they take it: a full disk or a
    terminal that was closed must not keep a platform from its work."""
    import structlog

    # repr of each value: what others wrote can neither start a line nor move a cursor
    render = structlog.processors.KeyValueRenderer(key_order=["timestamp", "level", "event"])

    def write(logger: object, name: str, event: MutableMapping[str, object]) -> NoReturn:
        line = render(logger, name, event)
        for stream in streams:
            with suppress(OSError):
                stream.write(f"{line}\n")
                stream.flush()
        raise structlog.DropEvent

    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.ExceptionRenderer(),
            write,
        ]
    )

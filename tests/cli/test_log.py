"""The log of a process that stays: one line for each event, whatever becomes of the disk."""

import errno
import io
from collections.abc import Iterator

import pytest
import structlog

from builder_orch.cli.log import write_log


class Full(io.StringIO):
    """A file on a disk without room."""

    def write(self, _text: str, /) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    structlog.reset_defaults()


def test_a_full_disk_keeps_nobody_from_work_nor_other_places_from_the_line() -> None:
    other = io.StringIO()
    write_log(Full(), other)
    structlog.get_logger().warning("the door\nis open", who="\x1b[2Jsomebody")
    (line,) = other.getvalue().splitlines()
    assert "level='warning' event='the door\\nis open' who='\\x1b[2Jsomebody'" in line

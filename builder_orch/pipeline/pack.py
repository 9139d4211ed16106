"""The build context as an archive that is written while it is sent; no copy rests on disk."""

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from tarfile import BLOCKSIZE, DIRTYPE, PAX_FORMAT, REGTYPE, SYMTYPE, TarInfo
from typing import ClassVar

from builder_orch.errors import ContextRefused
from builder_orch.events import Emit, Event
from builder_orch.pipeline.context import Context, Directory, scan
from builder_orch.pipeline.lock import check_lock
from builder_orch.pipeline.thread import in_thread
from builder_orch.pipeline.walk import Entry, Kind, kind_of, unreadable

CHUNK = 256 * 1024
"""Octets handed on at a time: small files travel together, large ones in pieces of this."""

_TYPES = {Kind.FILE: REGTYPE, Kind.DIRECTORY: DIRTYPE, Kind.LINK: SYMTYPE}


@dataclass(frozen=True, slots=True)
class Pack:
    """Look through the directory and refuse what cannot be built, before anything is asked for."""

    name: ClassVar[str] = "preflight"

    async def run(self, given: Directory, emit: Emit) -> Context:
        stop = threading.Event()
        # The walk says little, so what it says is kept until it is over.
        said: list[Event] = []
        try:
            return await in_thread(
                lambda: _checked(given, said.append, lambda: not stop.is_set()), give_up=stop.set
            )
        finally:
            for event in said:
                emit(event)


def _checked(given: Directory, emit: Emit, going_on: Callable[[], bool]) -> Context:
    context = scan(given, emit, going_on=going_on)
    if given.check:
        check_lock(context, going_on=going_on)
    return context


def archive(context: Context) -> Iterator[bytes]:
    """The octets of a POSIX tar (pax) in chunks; ContextRefused names a file that changes.

    Owner and group are 0, modes and times are the files' own. Whoever sends it must break the
    transfer off when this raises: what came so far would pass for a whole archive.
    """
    pending = bytearray()
    for entry in context.entries:
        for octets in _member(entry):
            pending += octets
            if len(pending) >= CHUNK:
                yield bytes(pending)
                pending.clear()
    pending += bytes(2 * BLOCKSIZE)
    yield bytes(pending)


def archive_size(context: Context) -> int:
    """About how long `archive` will be, if nothing changes."""
    blocks = sum(1 + -(-entry.size // BLOCKSIZE) for entry in context.entries)
    return (blocks + 2) * BLOCKSIZE


def _member(entry: Entry) -> Iterator[bytes]:
    try:
        if entry.kind is Kind.FILE:
            yield from _file(entry)
            return
        status = os.lstat(entry.path)
        _same_kind(entry, status)
        is_link = entry.kind is Kind.LINK
        target = os.readlink(entry.path) if is_link else ""  # noqa: PTH115 - Path would tidy it
        yield _header(entry, status, target=target)
    except FileNotFoundError:
        raise _changed(entry, "vanished") from None
    except PermissionError:
        raise unreadable(entry.name) from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _changed(entry, "became a link") from None
        raise _changed(entry, f"could not be read ({error.strerror})") from None


def _file(entry: Entry) -> Iterator[bytes]:
    # O_NONBLOCK: were it a pipe by now, opening it must not wait for a writer. O_NOFOLLOW: a link
    # that took its place could lead out of the context.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
    descriptor = os.open(entry.path, flags)
    try:
        before = os.fstat(descriptor)
        _same_kind(entry, before)
        file = FileIO(descriptor, closefd=False)
        yield _header(entry, before, size=before.st_size)
        yield from _content(entry, file, before.st_size)
        after = os.fstat(descriptor)
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise _changed(entry, "changed")
    finally:
        os.close(descriptor)


def _content(entry: Entry, file: FileIO, size: int) -> Iterator[bytes]:
    left = size
    while left:
        octets = file.read(min(CHUNK, left))
        if not octets:
            raise _changed(entry, "shrank")
        left -= len(octets)
        yield octets
    if file.read(1):
        raise _changed(entry, "grew")
    yield bytes(-size % BLOCKSIZE)


def _header(entry: Entry, status: os.stat_result, *, size: int = 0, target: str = "") -> bytes:
    info = TarInfo(entry.name)
    info.type = _TYPES[entry.kind]
    info.mode = stat.S_IMODE(status.st_mode)
    info.mtime = int(status.st_mtime)
    info.size = size
    info.linkname = target
    return info.tobuf(PAX_FORMAT, "utf-8", "surrogateescape")


def _same_kind(entry: Entry, status: os.stat_result) -> None:
    kind = kind_of(status.st_mode)
    if kind is not entry.kind:
        raise _changed(entry, f"became {kind.value if kind else 'something special'}")


def _changed(entry: Entry, how: str) -> ContextRefused:
    return ContextRefused(
        f"{entry.name} {how} while the build context was sent",
        hint="Wait until whatever writes it is done, or list it in .dockerignore; then run again.",
    )

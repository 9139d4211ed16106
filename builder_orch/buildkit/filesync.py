"""FileSync: the engine compares our list of files with its own and asks for what differs.

We send a STAT for every member in their order; it answers a REQ for those whose content it lacks,
while the list is still going on. A file that cannot be read as it was listed fails the build: the
engine would take whatever came for all there is.
"""

import asyncio
import errno
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import unquote_plus

from builder_orch.buildkit.grpc import Call, Code, Failed
from builder_orch.buildkit.http2 import Lost
from builder_orch.buildkit.messages import Packet, PacketKind, Stat
from builder_orch.buildkit.tree import Member, Stats, Tree, Wanted
from builder_orch.errors import ContextRefused
from builder_orch.tunnel.machine import Malformed

CHUNK = 128 * 1024
"""Octets of a file in one packet; old engines take messages of at most 4 MB."""
LISTED = 256
"""Members that are looked at in one go."""
SMALL = 64 * 1024
"""A file up to this size is read without the detour of a thread."""


@dataclass(frozen=True, slots=True)
class Synced:
    """One directory, as far as it was wanted, as the engine has it now.

    Of its `members` the content of `asked` was sent, which is `octets` long.
    """

    name: str
    wanted: Wanted
    members: int
    asked: int
    octets: int


@dataclass(slots=True)
class FileSync:
    """Serves trees by their names; `moved` hears of octets on their way, `synced` of the end."""

    trees: Mapping[str, Tree]
    moved: Callable[[str, int], None] = field(repr=False)
    synced: Callable[[Synced], None] = field(repr=False)

    async def diff_copy(self, call: Call) -> None:
        """Answer one DiffCopy; ContextRefused names the file that could not be sent."""
        names, wanted = _asked_for(call.metadata)
        name = names[0] if names else ""
        tree = self.trees.get(name)
        if tree is None:
            raise Failed(Code.NOT_FOUND, f"no access to {name!r}")
        try:
            members = await asyncio.to_thread(tree.select, wanted)
        except ValueError as error:
            raise Failed(Code.INVALID_ARGUMENT, f"a pattern for {name!r}: {error}") from None
        call.bulk()
        copy = _Copy(call, members, lambda octets: self.moved(name, octets))
        await copy.run()
        self.synced(Synced(name, wanted, len(members), copy.asked, copy.octets))


class _Copy:
    """One DiffCopy under way."""

    def __init__(self, call: Call, members: Sequence[Member], moved: Callable[[int], None]) -> None:
        self._call = call
        self._members = members
        self._moved = moved
        self._files: dict[int, os.stat_result | None] = {}
        self._queue: asyncio.Queue[int | None] = asyncio.Queue()
        self.asked = 0
        self.octets = 0

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._list())
                group.create_task(self._answer())
                group.create_task(self._listen())
        except BaseExceptionGroup as group_of:
            error = _worst(group_of)
            if isinstance(error, ContextRefused):
                said = str(error).encode("utf-8", "replace")
                with suppress(Failed, Lost):
                    await self._call.send(Packet(PacketKind.ERR, octets=said).encode())
            raise error from None

    async def _list(self) -> None:
        stats = Stats()
        for start in range(0, len(self._members), LISTED):
            part = self._members[start : start + LISTED]
            looked = await asyncio.to_thread(_look, stats, part)
            for number, (told, found) in enumerate(looked, start):
                if stat.S_ISREG(found.st_mode if found else stat.S_IFREG) and not told.linkname:
                    self._files[number] = found
            await self._call.send(
                *(Packet(PacketKind.STAT, stat=told).encode() for told, _ in looked)
            )
        await self._call.send(Packet(PacketKind.STAT).encode())

    async def _listen(self) -> None:
        while (message := await self._call.receive()) is not None:
            try:
                packet = Packet.decode(message)
            except Malformed as error:
                raise Failed(Code.INVALID_ARGUMENT, str(error)) from None
            match packet.kind:
                case PacketKind.REQ:
                    self._queue.put_nowait(packet.number)
                case PacketKind.FIN:
                    self._queue.put_nowait(None)
                    return
                case PacketKind.ERR:
                    said = packet.octets.decode("utf-8", "replace")
                    raise Failed(Code.ABORTED, f"the engine could not take it: {said}")
                case PacketKind.STAT | PacketKind.DATA:
                    raise Failed(Code.INVALID_ARGUMENT, "only the sender sends those")
        raise Failed(Code.CANCELLED, "the engine left before it had everything")

    async def _answer(self) -> None:
        """One file after the other; the small ones travel together."""
        pending: list[bytes] = []
        size = 0
        while (number := await self._queue.get()) is not None:
            if number not in self._files:
                raise Failed(Code.INVALID_ARGUMENT, f"there is no file number {number}")
            self.asked += 1
            member, found = self._members[number], self._files.pop(number)
            chunks = _content(member, found)
            slow = found is not None and found.st_size > SMALL
            while (
                octets := await asyncio.to_thread(next, chunks, b"") if slow else next(chunks, b"")
            ):
                pending.append(Packet(PacketKind.DATA, number, octets).encode())
                size += len(octets)
                if size >= CHUNK:
                    await self._flush(pending, size)
                    pending, size = [], 0
            pending.append(Packet(PacketKind.DATA, number).encode())
            if self._queue.empty():
                await self._flush(pending, size)
                pending, size = [], 0
        await self._call.send(*pending, Packet(PacketKind.FIN).encode())

    async def _flush(self, packets: list[bytes], size: int) -> None:
        await self._call.send(*packets)
        self.octets += size
        self._moved(size)


def _worst(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What made the others fail: never that something was cancelled because of it."""
    found = [
        _worst(error) if isinstance(error, BaseExceptionGroup) else error
        for error in group.exceptions
    ]
    return min(found, key=lambda error: not isinstance(error, ContextRefused))


def _look(stats: Stats, part: Sequence[Member]) -> list[tuple[Stat, os.stat_result | None]]:
    looked: list[tuple[Stat, os.stat_result | None]] = []
    for member in part:
        try:
            looked.append(stats.look(member))
        except OSError as error:
            raise _refused(member, _how(error)) from None
    return looked


def _content(member: Member, listed: os.stat_result | None) -> Iterator[bytes]:
    """A file in pieces; ContextRefused when it is not, or does not stay, what was listed."""
    if member.path is None or listed is None:
        yield from (member.content[at : at + CHUNK] for at in range(0, len(member.content), CHUNK))
        return
    # O_NONBLOCK: were it a pipe by now, opening it must not wait for a writer. O_NOFOLLOW: a link
    # that took its place could lead out of the context.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
    try:
        descriptor = os.open(member.path, flags)
    except OSError as error:
        raise _refused(member, _how(error)) from None
    try:
        _same(member, listed, os.fstat(descriptor))
        left = listed.st_size
        while left:
            octets = os.read(descriptor, min(CHUNK, left))
            if not octets:
                raise _refused(member, "shrank")
            left -= len(octets)
            yield octets
        if os.read(descriptor, 1):
            raise _refused(member, "grew")
        _same(member, listed, os.fstat(descriptor))
    except OSError as error:
        raise _refused(member, _how(error)) from None
    finally:
        os.close(descriptor)


def _same(member: Member, before: os.stat_result, now: os.stat_result) -> None:
    kinds = stat.S_IFMT(before.st_mode), stat.S_IFMT(now.st_mode)
    if kinds[0] != kinds[1]:
        raise _refused(member, "became something else")
    if (before.st_size, before.st_mtime_ns) != (now.st_size, now.st_mtime_ns):
        raise _refused(member, "changed")


def _how(error: OSError) -> str:
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return "vanished"
        case errno.ELOOP:
            return "became a link"
        case errno.EACCES | errno.EPERM:
            return "could not be read (permission denied)"
        case _:
            return f"could not be read ({error.strerror})"


def _refused(member: Member, how: str) -> ContextRefused:
    return ContextRefused(
        f"{member.name} {how} while the build context was sent",
        hint="Wait until whatever writes it is done, or list it in .dockerignore; then run again.",
    )


def _asked_for(metadata: Sequence[tuple[str, str]]) -> tuple[list[str], Wanted]:
    """The name of the directory and the patterns; new engines escape what is no plain ASCII."""
    found: dict[str, list[str]] = {}
    for name, value in metadata:
        found.setdefault(name, []).append(value)
    for name in list(found):
        if found.get(f"{name}-encoded"):
            found[name] = [unquote_plus(value, errors="surrogateescape") for value in found[name]]
    wanted = Wanted(
        found.get("exclude-patterns", []),
        found.get("include-patterns", []),
        found.get("followpaths", []),
    )
    return found.get("dir-name", []), wanted

"""FileSend: what a build leaves on this machine, as one file or as the files of a directory.

What arrives lies beside its place, readable by its owner only, until the engine has said that the
whole build succeeded; then it is moved there. The engine is not trusted with paths: nothing is
written but what lies below the directory that was named, and never through a link.
"""

import errno
import os
import posixpath
import secrets
import shutil
import stat
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

from builder_orch.buildkit.grpc import Call, Code, Failed
from builder_orch.buildkit.messages import Packet, PacketKind, Stat, single, st_mode

PREFIX = ".fly-build-"
"""How what has not arrived yet is called, beside its place."""
KEPT_BITS = 0o777 | stat.S_ISVTX
"""Of a file's mode: whose program it is when somebody runs it is not for a builder to say."""
OWN_XATTRS = "user."
"""How the extended attributes begin that mean nothing to the system."""


class Unsafe(Exception):
    """The engine sent what may not be written here; the text says what."""


class Target(Protocol):
    """A place for a result. `commit` when the build has succeeded, `discard` in any case."""

    octets: int

    async def receive(self, call: Call) -> None:
        """Take what the engine sends: OSError where it cannot be written, Unsafe, or Failed."""
        ...

    def commit(self) -> None:
        """Move it to its place. OSError leaves the place as it was."""
        ...

    def discard(self) -> None:
        """Remove what was not moved."""
        ...


@dataclass(slots=True)
class FileTarget:
    """One file: an archive of whatever kind."""

    place: Path
    octets: int = 0
    _written: Path | None = None

    async def receive(self, call: Call) -> None:
        if self._written is not None:
            raise Unsafe("a second archive")
        with self._fresh() as file:
            while (message := await call.receive()) is not None:
                piece = single(1, message)
                file.write(piece)
                self.octets += len(piece)

    def _fresh(self) -> BinaryIO:
        self.place.parent.mkdir(parents=True, exist_ok=True)
        self._written = self.place.with_name(f"{PREFIX}{secrets.token_hex(8)}")
        return self._written.open("xb")

    def commit(self) -> None:
        if self._written is None:
            raise FileNotFoundError(errno.ENOENT, "the engine sent nothing")
        self._written.replace(self.place)
        self._written = None

    def discard(self) -> None:
        if self._written is not None:
            self._written.unlink(missing_ok=True)
            self._written = None
        self.octets = 0


@dataclass(slots=True)
class DirectoryTarget:
    """A directory; what is in it already stays, unless the result has a file of that name.

    An engine may send several trees at the same time, one for each platform.
    """

    place: Path
    octets: int = 0
    files: int = 0
    _staging: Path | None = None
    _trees: list[tuple[Path, dict[str, Stat]]] = field(default_factory=list)

    async def receive(self, call: Call) -> None:
        if self._staging is None:
            self.place = self.place.resolve()
            self.place.parent.mkdir(parents=True, exist_ok=True)
            self._staging = Path(tempfile.mkdtemp(prefix=PREFIX, dir=self.place.parent))
        root = self._staging / secrets.token_hex(8)
        root.mkdir()
        with _Receiving(call, root) as receiving:
            await receiving.run()
        self._trees.append((root, receiving.directories))
        self.files += receiving.files
        self.octets += receiving.octets

    def commit(self) -> None:
        if not self._trees:
            raise FileNotFoundError(errno.ENOENT, "the engine sent nothing")
        for moving in (False, True):
            for root, directories in self._trees:
                if os.path.lexists(self.place):
                    self._merge(root, directories, moving=moving)
                elif moving:
                    root.rename(self.place)
                    _finish(self.place, directories, list(directories))
        self.discard()

    def _merge(self, root: Path, directories: dict[str, Stat], *, moving: bool) -> None:
        with _open_directory(root) as source, _open_directory(self.place) as sink:
            moved = set(_merge(source.fd, sink.fd, self.place, moving=moving))
        _finish(self.place, directories, [name for name in directories if _is_below(name, moved)])

    def discard(self) -> None:
        if self._staging is not None:
            shutil.rmtree(self._staging)
            self._staging = None
        self._trees.clear()
        self.octets = self.files = 0


class _Receiving:
    """One DiffCopy in which we are the receiver (fsutil): lists come, we ask, contents come."""

    def __init__(self, call: Call, root: Path) -> None:
        self.directories: dict[str, Stat] = {}
        self.octets = 0
        self.files = 0
        self._call = call
        self._root = root
        self._seen: dict[str, Stat] = {}
        self._asked: dict[int, tuple[str, Stat, int]] = {}
        self._open: dict[int, int] = {}
        self._listed = 0

    def __enter__(self) -> "_Receiving":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    async def run(self) -> None:
        complete = False
        while (message := await self._call.receive()) is not None:
            packet = Packet.decode(message)
            match packet.kind:
                case PacketKind.STAT if packet.stat is None:
                    complete = True
                case PacketKind.STAT if not complete:
                    await self._list(packet.stat)
                case PacketKind.DATA:
                    self._data(packet.number, packet.octets)
                case PacketKind.ERR:
                    said = packet.octets.decode("utf-8", "replace")
                    raise Failed(Code.ABORTED, f"the engine could not send it: {said}")
                case PacketKind.FIN if complete and not self._asked:
                    return
                case _:
                    raise Failed(Code.INVALID_ARGUMENT, f"not now: {packet.kind.name}")
            if complete and not self._asked:
                await self._call.send(Packet(PacketKind.FIN).encode())
        raise Failed(Code.CANCELLED, "the engine left before everything was here")

    async def _list(self, told: Stat | None) -> None:
        assert told is not None
        number, self._listed = self._listed, self._listed + 1
        if self._make(told):
            self._asked[number] = (told.path, told, 0)
            await self._call.send(Packet(PacketKind.REQ, number).encode())

    def _make(self, told: Stat) -> bool:
        """Make what has no content; is there any to ask for?"""
        path = self._root / self._checked(told.path)
        self._seen[told.path] = told
        mode = st_mode(told.mode)
        if stat.S_ISDIR(mode):
            path.mkdir(mode=0o700)
            self.directories[told.path] = told
            return False
        self.files += 1
        if stat.S_ISLNK(mode):
            path.symlink_to(told.linkname)
            _set_time(path, told)
            return False
        if not stat.S_ISREG(mode):
            raise Unsafe(f"{told.path} is neither a file nor a directory nor a link")
        if told.linkname:
            path.hardlink_to(self._root / self._first(told))
            return False
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        return True

    def _checked(self, name: str) -> str:
        above = posixpath.dirname(name)
        if (
            not name
            or "\0" in name
            or name.startswith(("/", "../"))
            or name in {".", ".."}
            or posixpath.normpath(name) != name
            or (above and above not in self.directories)
            or name in self._seen
        ):
            raise Unsafe(f"{name[:200]!r} is no path that may be written")
        return name

    def _first(self, told: Stat) -> str:
        name = told.linkname.lstrip("/")
        first = self._seen.get(name)
        if first is None or not stat.S_ISREG(st_mode(first.mode)) or name == told.path:
            raise Unsafe(f"{told.path} is to be a second name of {name[:200]!r}, which is no file")
        return name

    def _data(self, number: int, octets: bytes) -> None:
        if number not in self._asked:
            raise Unsafe(f"content of a file that was not asked for (number {number})")
        name, told, size = self._asked[number]
        path = self._root / name
        if octets:
            if number not in self._open:
                self._open[number] = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            view = memoryview(octets)
            while view:
                view = view[os.write(self._open[number], view) :]
            self._asked[number] = (name, told, size + len(octets))
            self.octets += len(octets)
            return
        del self._asked[number]
        if number in self._open:
            os.close(self._open.pop(number))
        if size != told.size:
            raise Unsafe(f"{name} has {size} bytes instead of {told.size}")
        _set_marks(path, told)


@dataclass(frozen=True, slots=True)
class _Directory:
    fd: int

    def __enter__(self) -> "_Directory":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


def _open_directory(path: str | Path, above: int | None = None) -> _Directory:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    return _Directory(os.open(path, flags, dir_fd=above))


def _merge(source: int, sink: int, place: Path, *, moving: bool) -> list[str]:
    """Move what is in one directory into another, or (not `moving`) see whether that will do.

    The paths that were new. OSError names what is in the way.
    """
    moved: list[str] = []
    for name in sorted(os.listdir(source)):
        ours = os.lstat(name, dir_fd=source)
        try:
            theirs = os.stat(name, dir_fd=sink, follow_symlinks=False)
        except FileNotFoundError:
            theirs = None
        if theirs is not None and stat.S_ISDIR(ours.st_mode) != stat.S_ISDIR(theirs.st_mode):
            kind = "a directory" if stat.S_ISDIR(theirs.st_mode) else "no directory"
            raise FileExistsError(errno.EEXIST, f"{place / name} is there, and is {kind}")
        if theirs is not None and stat.S_ISDIR(ours.st_mode):
            with ExitStack() as opened:
                inner = opened.enter_context(_open_directory(name, source)).fd
                outer = opened.enter_context(_open_directory(name, sink)).fd
                below = _merge(inner, outer, place / name, moving=moving)
            moved += [f"{name}/{path}" for path in below]
        elif moving:
            os.replace(name, name, src_dir_fd=source, dst_dir_fd=sink)
            moved.append(name)
    return moved


def _is_below(name: str, tops: set[str]) -> bool:
    while name:
        if name in tops:
            return True
        name = posixpath.dirname(name)
    return False


def _finish(place: Path, directories: dict[str, Stat], names: list[str]) -> None:
    """Modes and times of directories, the innermost first: nothing changes in them any more."""
    for name in reversed(names):
        _set_marks(place / name, directories[name])


def _set_marks(path: Path, told: Stat) -> None:
    """Attributes, mode and time of what is whole; of a file or a directory that we have made."""
    for name, value in told.xattrs.items():
        # All others mean something to the system: capabilities, labels, rights of access.
        if name.startswith(OWN_XATTRS):
            with suppress(OSError, ValueError):
                # Not every file system has them, or room for that many; ValueError: a NUL in it.
                os.setxattr(path, name, value, follow_symlinks=False)
    path.chmod(st_mode(told.mode) & KEPT_BITS)
    _set_time(path, told)


def _set_time(path: Path, told: Stat) -> None:
    os.utime(path, ns=(told.mtime_ns, told.mtime_ns), follow_symlinks=False)

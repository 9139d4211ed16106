"""Where the agent of a user is found: a directory of the user's alone, a lock and a socket in it.

Whoever has the lock is the agent, and only that one touches the socket: one that is left by a
killed agent is replaced by the next, one that belongs to another is never removed.
"""

import fcntl
import os
import socket
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from builder_orch.errors import NO_ROOM, AlreadyRunning, LocalDiskFull, UsageFailure

SOCKET_PATH_OCTETS = 103
"""What every system takes as the path of a Unix socket (sun_path is 104 octets on macOS)."""
BACKLOG = 512
LOCK_PATIENCE_S = 1.0
_CREDENTIALS = struct.Struct("3i")


class Stranger(NamedTuple):
    """Who is at the other end of a socket, by the kernel's word (SO_PEERCRED, unix(7))."""

    pid: int
    uid: int


def stranger(sock: socket.socket) -> Stranger | None:
    """The process that connected, or that listens; None where the system does not tell."""
    if not hasattr(socket, "SO_PEERCRED"):
        return None
    found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(found)
    return Stranger(pid, uid)


class Place:
    """The agent's directory and the names in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.socket = self.folder / "agent.sock"
        self.lock = self.folder / "agent.lock"
        self.start_lock = self.folder / "start.lock"
        self.log = self.folder / "agent.log"
        self.stamps = self.folder / "stamps"

    def has_socket(self) -> bool:
        """Whether it is worth while to connect; also False where we may not look."""
        try:
            self.socket.lstat()
        except OSError:
            return False
        return True

    def prepare(self) -> None:
        """Make the directory, or make sure that it is ours and nobody else's to enter."""
        if len(os.fsencode(self.socket)) > SOCKET_PATH_OCTETS:
            raise UsageFailure(
                f"the path of the agent's socket is too long: {self.socket}",
                hint="Set FLY_BUILD_HOME to a shorter path, or use --agent off.",
            )
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.folder.lstat()
        except OSError as error:
            raise UsageFailure(
                f"{self.folder} cannot be used: {error.strerror}",
                hint="Set FLY_BUILD_HOME to a directory of your own, or use --agent off.",
            ) from None
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise UsageFailure(
                f"{self.folder} is not a directory of yours",
                hint="Remove it, or set FLY_BUILD_HOME to a directory of your own.",
            )
        if stat.S_IMODE(found.st_mode) != 0o700:
            self.folder.chmod(0o700)

    def take(self) -> "Tenure":
        """Become the agent of this place; AlreadyRunning when there is one."""
        self.prepare()
        lock = locked(self.lock, LOCK_PATIENCE_S)
        if lock is None:
            raise AlreadyRunning(
                f"the agent in {self.folder} runs already",
                hint="fly-build agent status shows it, fly-build agent stop ends it.",
            )
        try:
            return Tenure(self.socket, lock)
        except BaseException:
            os.close(lock)
            raise

    def connect(self, timeout_s: float) -> socket.socket | None:
        """A blocking socket to the agent; None when none listens."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout_s)
            sock.connect(str(self.socket))
            _check_owner(sock, self.socket)
        except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
            sock.close()
            return None
        except BaseException:
            sock.close()
            raise
        return sock


def _check_owner(sock: socket.socket, path: Path) -> None:
    found = stranger(sock)
    if found is not None and found.uid != os.geteuid():
        raise UsageFailure(
            f"{path} belongs to another user",
            hint="Set FLY_BUILD_HOME to a directory of your own, or use --agent off.",
        )


class Tenure:
    """Being the agent of a place, from the lock that is held until `end`."""

    def __init__(self, path: Path, lock: int) -> None:
        self._path = path
        self._lock: int | None = lock
        # The lock is ours, so a socket that is there has nobody behind it.
        with suppress(FileNotFoundError):
            path.unlink()
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            self.listener.bind(str(path))
        except BaseException:
            self.listener.close()
            raise
        finally:
            os.umask(before)
        self.listener.setblocking(False)
        self.listener.listen(BACKLOG)

    def end(self) -> None:
        """Let the next agent come; may be called again."""
        if self._lock is None:
            return
        with suppress(FileNotFoundError):
            self._path.unlink()
        self.listener.close()
        os.close(self._lock)
        self._lock = None


def locked(path: Path, patience_s: float) -> int | None:
    """The descriptor of a locked file, which frees it when closed; None if it stays taken."""
    until = time.monotonic() + patience_s
    while True:
        found = _try_lock(path)
        if found is not None or time.monotonic() >= until:
            return found
        time.sleep(0.02)


def _try_lock(path: Path) -> int | None:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise disk_failure(path, error) from None
    with suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Somebody may have removed the file between its opening and its locking.
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    os.close(descriptor)
    return None


@contextmanager
def trying(path: Path) -> Iterator[bool]:
    """Hold a lock for the block if it is free now, and say whether."""
    descriptor = locked(path, 0.0)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def disk_failure(path: Path, error: OSError) -> UsageFailure | LocalDiskFull:
    """What it is to a user that a file here cannot be written."""
    if error.errno in NO_ROOM:
        return LocalDiskFull(
            f"no room left for {path}", hint="Free some space, or use --agent off."
        )
    return UsageFailure(
        f"{path} cannot be used: {error.strerror}",
        hint="Set FLY_BUILD_HOME to a directory of your own, or use --agent off.",
    )

"""Where one platform keeps its state, who runs it, and how others find it.

Commands that only look for a platform read this; it imports none of the platform's parts.
"""

import contextlib
import errno
import fcntl
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from builder_orch.errors import NO_ROOM, AlreadyRunning, LocalDiskFull, UsageFailure

FORMAT_VERSION = 1
NOT_OURS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST})
LOCK_PATIENCE_S = 1.0
"""Somebody who only looks whether the lock is held holds it for microseconds; wait that out."""


@dataclass(frozen=True, slots=True)
class Record:
    """What a client has to know of a platform that is up; `platform.json` on disk.

    `websocket_port` is where the gateway's wgtcpd listens, 0 without one; `websocket_pin` the
    SHA-256 of its public key, in hexadecimal.
    """

    api_url: str
    token: str
    registry: str
    pid: int
    organization: str
    websocket_port: int = 0
    websocket_pin: str = ""


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that has the platform's lock.

    `started` is its start time in clock ticks since boot, which tells it from a later process that
    was given the same pid; `prefix` is the Python environment that it runs from.
    """

    pid: int
    started: int
    prefix: str

    def is_alive(self) -> bool:
        """Whether the pid still belongs to that very process."""
        return start_time(self.pid) == self.started


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot (proc(5), field 22); None: it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The second field is the program's name in brackets and may hold anything.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else int(fields[19])


class Home:
    """The state directory of one platform and the lock that makes its owner the only one."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.platform = self.root / "platform.json"
        self.store = self.root / "state.db"
        self.log = self.root / "selfhost.log"
        self.lock = self.root / "selfhost.lock"

    def prepare(self) -> None:
        """Make the directory, readable by its owner alone."""
        with disk_failures(self.root):
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.root.stat().st_uid != os.getuid():
                raise UsageFailure(
                    f"{self.root} belongs to another user",
                    hint="set FLY_BUILD_HOME to a directory of your own",
                )
            self.root.chmod(0o700)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Own the platform until the context ends; AlreadyRunning names who owns it now."""
        with lock_file(self.lock, patience_s=LOCK_PATIENCE_S) as lock:
            if lock is None:
                raise self.taken(self.holder())
            own = Holder(os.getpid(), start_time(os.getpid()) or 0, sys.prefix)
            with disk_failures(self.root):
                os.ftruncate(lock, 0)
                os.pwrite(lock, json.dumps(asdict(own)).encode(), 0)
            yield

    def holder(self) -> Holder | None:
        """The process that holds the lock now; None when nobody does."""
        try:
            with disk_failures(self.root):
                lock = os.open(self.lock, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None
            return Holder(**json.loads(os.pread(lock, 4096, 0)))
        except (ValueError, TypeError):
            # Its owner is between taking the lock and writing its name.
            return None
        finally:
            os.close(lock)

    def taken(self, holder: Holder | None) -> AlreadyRunning:
        """The failure to start one more."""
        who = f"pid {holder.pid}" if holder else "a process that is starting"
        return AlreadyRunning(
            f"the platform in {self.root} runs already ({who})",
            hint="fly-build selfhost status shows it, fly-build selfhost stop ends it",
        )

    def record(self) -> Record | None:
        """The platform that is up, as it described itself; None when none is."""
        try:
            fields = json.loads(self.platform.read_text(encoding="utf-8"))
            if fields.pop("version") != FORMAT_VERSION:
                return None
            record = Record(**fields)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        holder = self.holder()
        return record if holder is not None and holder.pid == record.pid else None

    def publish(self, record: Record) -> None:
        """Let clients find the platform."""
        write_private(self.platform, json.dumps({"version": FORMAT_VERSION, **asdict(record)}))

    def withdraw(self) -> None:
        """Let clients find no platform."""
        self.platform.unlink(missing_ok=True)


@contextmanager
def lock_file(path: Path, *, patience_s: float) -> Iterator[int | None]:
    """Hold an exclusive lock on a file; None when it stayed taken for `patience_s`."""
    with disk_failures(path.parent):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor if _acquired(descriptor, patience_s) else None
    finally:
        os.close(descriptor)


def _acquired(descriptor: int, patience_s: float) -> bool:
    until = time.monotonic() + patience_s
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if time.monotonic() >= until:
            return False
        time.sleep(0.02)


def write_private(path: Path, text: str) -> None:
    """Replace a file at once by one that only its owner can read."""
    with disk_failures(path.parent):
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


@contextmanager
def disk_failures(folder: Path) -> Iterator[None]:
    """Translate what a file system refuses into failures with a next step."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise LocalDiskFull(
                f"no room left on the disk of {folder}",
                hint="free some space there, or set FLY_BUILD_HOME to a directory on another disk",
            ) from error
        # Without a file name it is something else that is not permitted.
        if error.errno in NOT_OURS and error.filename is not None:
            raise UsageFailure(
                f"{folder} cannot be used: {error.strerror}",
                hint="set FLY_BUILD_HOME to a directory of your own",
            ) from error
        raise

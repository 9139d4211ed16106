"""A WireGuard key belongs to one process at a time.

A gateway answers where a key was heard last: two processes with one key take each other's session
away, for ever. The lock is named by the key and lies outside every state directory, so that a copy
of the state is found out as well. It ends with its process, however that ends.
"""

import contextlib
import fcntl
import json
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from builder_orch.errors import AlreadyRunning, UsageFailure
from builder_orch.tunnel.config import PublicKey

RUN = Path("/run")
SHORT = Path("/tmp")  # noqa: S108 (a directory of our own below it, whose owner is looked at)
PATIENCE_S = 0.2
"""Somebody who only looks whether a key is in use holds the lock for microseconds."""


@dataclass(frozen=True, slots=True)
class User:
    """The process that has a key; `pid` is 0 while it is still writing that down."""

    pid: int


def lock_folder() -> Path:
    """Where this user's locks are, whatever the environment says; UsageFailure if taken by others.

    /run belongs to the system and is nobody else's to make names in; /tmp is the second choice.
    """
    uid = os.geteuid()
    own = RUN / "user" / str(uid)
    if os.access(own, os.W_OK) and own.stat().st_uid == uid:
        return _private(own / "fly-build-keys")
    if uid == 0 and os.access(RUN, os.W_OK):
        return _private(RUN / "fly-build-keys")
    return _private(SHORT / f"fly-build-keys-{uid}")


def _private(folder: Path) -> Path:
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise UsageFailure(
            f"{folder} is not a directory that is ours alone",
            hint=f"Look who made it, remove it and run the command again: ls -ld {folder}",
        )
    return folder


@contextmanager
def hold_key(key: PublicKey, what: str, *, folder: Path | None = None) -> Iterator[None]:
    """Be the only process with this key until the block ends; AlreadyRunning if another has it.

    `what` names the peer in that failure.
    """
    path = _path(key, folder)
    descriptor = _take(path)
    if descriptor is None:
        user = key_user(key, folder=folder)
        who = f"pid {user.pid}" if user is not None and user.pid else "another process"
        raise AlreadyRunning(
            f"the key of {what} is in use by {who}",
            hint="Two processes with one key knock each other off: wait for that one, or make "
            "another peer with fly-build wireguard create.",
        )
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid()}).encode(), 0)
        yield
    finally:
        # Before the lock is let go: whoever waits for the old file sees that its name is gone.
        path.unlink(missing_ok=True)
        os.close(descriptor)


def key_user(key: PublicKey, *, folder: Path | None = None) -> User | None:
    """Who has this key now; None for nobody."""
    try:
        descriptor = os.open(_path(key, folder), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        try:
            found = json.loads(os.pread(descriptor, 4096, 0))
        except ValueError:
            return User(0)
        pid = found.get("pid") if isinstance(found, dict) else None
        return User(pid if isinstance(pid, int) else 0)
    finally:
        os.close(descriptor)


def _path(key: PublicKey, folder: Path | None) -> Path:
    return (folder or lock_folder()) / f"{sha256(key).hexdigest()[:32]}.lock"


def _take(path: Path) -> int | None:
    """The locked descriptor; None when somebody else has it."""
    until = time.monotonic() + PATIENCE_S
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(path, flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            named = path.stat()
        except BlockingIOError:
            os.close(descriptor)
            if time.monotonic() >= until:
                return None
            time.sleep(0.01)
            continue
        except FileNotFoundError:
            # Its last owner removed it between our opening and locking it.
            os.close(descriptor)
            continue
        if named.st_ino == os.fstat(descriptor).st_ino:
            return descriptor
        os.close(descriptor)

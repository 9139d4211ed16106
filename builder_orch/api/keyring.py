"""The WireGuard peers that this user made, each in a file of its own, and who uses them now.

    with Keyring(folder).hold("laptop") as held:
        async with open_tunnel(held.config, stamps=Stamps(held.stamps)): ...

A file is replaced as a whole (written, synced, renamed, the directory synced), so that a crash
leaves the old or the new one. A peer of a single run is written down without its private key, only
to be removed from the platform if that run does not live to do it.
"""

import contextlib
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from hashlib import sha256
from ipaddress import IPv6Address
from pathlib import Path

from builder_orch.api.keylock import User, hold_key, key_user
from builder_orch.api.models import Organization
from builder_orch.errors import NO_ROOM, AlreadyRunning, LocalDiskFull, UsageFailure
from builder_orch.tunnel.config import PublicKey, TunnelConfig, decode_key, encode_key

VERSION = 1
SIZE_LIMIT = 1 << 16
SUFFIX = ".peer"
LOCK_PATIENCE_S = 10.0
"""For the writers of one directory to take their turns."""
ROTATE_AFTER_S = 30 * 86400.0
"""Age from which a key is better replaced."""
MACHINE_ID = Path("/etc/machine-id")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,199}\Z")


class Purpose(Enum):
    """What a peer was made for."""

    RUN = "run"
    """One run of a command, which removes it; its key is not in the file."""
    KEPT = "kept"
    """To be used by this tool again and again."""
    EXPORTED = "exported"
    """For another program, which has the only copy of its key."""


@dataclass(frozen=True, slots=True)
class Record:
    """One peer. `platform` is who granted it (see `Keyring`), `made_at` Unix seconds, `machine`
    where it was made ("": unknown)."""

    name: str
    platform: str
    organization: Organization
    public_key: PublicKey
    purpose: Purpose
    made_at: float
    machine: str = ""
    region: str = ""
    ephemeral: bool = False
    address: IPv6Address | None = None
    config: TunnelConfig | None = field(default=None, repr=False)

    def dump(self) -> str:
        """The text of its file, which may hold the private key."""
        fields = {
            "version": VERSION,
            "name": self.name,
            "platform": self.platform,
            "organization": [self.organization.id, self.organization.slug],
            "public_key": encode_key(self.public_key),
            "purpose": self.purpose.value,
            "made_at": self.made_at,
            "machine": self.machine,
            "region": self.region,
            "ephemeral": self.ephemeral,
            "address": str(self.address or ""),
            "config": self.config.dump() if self.config else "",
        }
        return json.dumps(fields, indent=1) + "\n"

    @classmethod
    def parse(cls, text: str | bytes) -> "Record":
        """The inverse of `dump`; ValueError for anything else."""
        match json.loads(text):
            case {
                "version": 1,
                "name": str(name),
                "platform": str(platform),
                "organization": [str(identifier), str(slug)],
                "public_key": str(key),
                "purpose": str(purpose),
                "made_at": int(made_at) | float(made_at),
                "machine": str(machine),
                "region": str(region),
                "ephemeral": bool(ephemeral),
                "address": str(address),
                "config": str(config),
            } if _NAME.match(name):
                return cls(
                    name,
                    platform,
                    Organization(identifier, slug, slug),
                    PublicKey(decode_key(key)),
                    Purpose(purpose),
                    float(made_at),
                    machine,
                    region,
                    ephemeral,
                    IPv6Address(address) if address else None,
                    TunnelConfig.parse(config) if config else None,
                )
            case _:
                raise ValueError("not the file of a peer")


@dataclass(frozen=True, slots=True)
class Held:
    """A peer whose key is ours while we hold it; `stamps` is where its last handshake is kept."""

    record: Record
    config: TunnelConfig = field(repr=False)
    stamps: Path


@dataclass(frozen=True, slots=True)
class Entry:
    """A file in the ring; `record` is None when it cannot be read, `user` who has its key now."""

    path: Path
    record: Record | None
    user: User | None = None
    trouble: str = ""


class Keyring:
    """One directory of peers, readable by its owner alone. Nothing is made before it is needed.

    Peers of all platforms lie beside each other; a platform is named by its URL, or, as ours has
    another port each time, by its directory.
    LocalDiskFull and UsageFailure say what the file system refuses. `locks` is where keys are
    locked, `machine` what this machine is called, both for tests.
    """

    def __init__(
        self, folder: Path, *, locks: Path | None = None, machine: str | None = None
    ) -> None:
        self.folder = folder
        self._locks = locks
        self.machine = machine_id() if machine is None else machine

    def path(self, name: str) -> Path:
        """Where the peer of that name is; UsageFailure for a name that no platform takes."""
        if not _NAME.match(name):
            raise UsageFailure(
                f"{name!r} is no name for a peer",
                hint="Names are made of letters, digits and hyphens, 200 at most.",
            )
        return self.folder / f"{name}{SUFFIX}"

    def entries(self) -> list[Entry]:
        """All there are, by name, and who uses them."""
        with file_failures(self.folder):
            paths = sorted(self.folder.glob(f"*{SUFFIX}")) if self.folder.is_dir() else []
        return [self._entry(path) for path in paths]

    def find(self, name: str) -> Record:
        """The peer of that name; UsageFailure when there is none, or its file is unreadable."""
        return load(self.path(name))

    def write(self, record: Record) -> Path:
        """Put a peer's file in place of the one before."""
        path = self.path(record.name)
        with self._writing():
            replace_file(path, record.dump())
        return path

    def forget(self, name: str) -> None:
        """Take a peer's file away, and what it knows of handshakes."""
        path = self.path(name)
        with self._writing():
            path.unlink(missing_ok=True)
            _stamps(path).unlink(missing_ok=True)
            _sync(self.folder)

    @contextmanager
    def hold(self, peer: str | Path) -> Iterator[Held]:
        """Use a peer, by its name or its file, as the only process that does.

        AlreadyRunning when another process has the key; UsageFailure when there is no such peer, or
        its key is not kept here.
        """
        path = peer if isinstance(peer, Path) else self.path(peer)
        record = load(path)
        with self.lock(record):
            # Only now: it may have been replaced or removed before the key was ours.
            first, record = record, load(path)
            if record.public_key != first.public_key:
                raise AlreadyRunning(
                    f"the peer {record.name} was replaced at this moment",
                    hint="Run the command again.",
                )
            if record.config is None:
                raise UsageFailure(
                    f"the key of the peer {record.name} is not kept here",
                    hint="Make one that is: fly-build wireguard create.",
                )
            with file_failures(self.folder):
                path.chmod(0o600)
            yield Held(record, record.config, _stamps(path))

    def lock(self, record: Record) -> contextlib.AbstractContextManager[None]:
        """Have its key for ourselves, and do with the record what has to be done."""
        return hold_key(record.public_key, f"the peer {record.name}", folder=self._locks)

    def user(self, record: Record) -> User | None:
        """The process that has its key."""
        return key_user(record.public_key, folder=self._locks)

    def is_ours(self, record: Record) -> bool:
        """Was it made on this machine, as far as that can be told?"""
        return not (record.machine and self.machine) or record.machine == self.machine

    def mark_for_removal(self, record: Record) -> None:
        """From now on it is only waited for until nobody uses it; its key is taken out."""
        self.write(replace(record, purpose=Purpose.RUN, config=None))

    def _entry(self, path: Path) -> Entry:
        try:
            record = load(path)
        except UsageFailure as failure:
            return Entry(path, None, trouble=str(failure))
        return Entry(path, record, self.user(record))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One writer at a time, in a directory that is ours alone."""
        with file_failures(self.folder):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.folder.stat().st_uid != os.geteuid():
                raise UsageFailure(
                    f"{self.folder} belongs to another user",
                    hint="Set FLY_BUILD_HOME to a directory of your own.",
                )
            self.folder.chmod(0o700)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            descriptor = os.open(self.folder / ".lock", flags, 0o600)
            try:
                _await_turn(descriptor, self.folder)
                yield
            finally:
                os.close(descriptor)


def machine_id() -> str:
    """A name for this machine that tells nothing else about it; "" where it has none."""
    try:
        text = MACHINE_ID.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
    return sha256(b"fly-build peer " + text.encode()).hexdigest()[:16] if text else ""


def load(path: Path) -> Record:
    """A peer's file; UsageFailure says what is wrong with it."""
    try:
        with path.open("rb") as file:
            octets = file.read(SIZE_LIMIT + 1)
    except FileNotFoundError:
        raise UsageFailure(
            f"there is no peer {path.stem}",
            hint="fly-build wireguard list shows those there are; wireguard create makes one.",
        ) from None
    except OSError as error:
        raise UsageFailure(
            f"{path} cannot be read: {error.strerror}", hint="Check its permissions."
        ) from None
    try:
        if len(octets) > SIZE_LIMIT:
            raise ValueError("too long")  # noqa: TRY301
        record = Record.parse(octets)
    except (ValueError, RecursionError):
        raise UsageFailure(
            f"{path} is not what this version of fly-build writes",
            hint=f"Remove it and make another: fly-build wireguard remove {path.stem}.",
        ) from None
    return record


def replace_file(path: Path, text: str) -> None:
    """Replace a file by one that only its owner can read; OSError leaves the old one.

    The caller sees to it that nobody else does the same at the same time.
    """
    new = path.with_name(f".{path.name}.new")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        descriptor = os.open(new, flags, 0o600)
        try:
            os.fchmod(descriptor, 0o600)
            octets = text.encode()
            while octets:
                octets = octets[os.write(descriptor, octets) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(new, path)  # noqa: PTH105 (the tests make each step of `os` fail)
    except OSError:
        new.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def write_export(path: Path, text: str, *, force: bool) -> None:
    """Write a key into a file of the user's choice, readable by its owner alone.

    UsageFailure when it is there already and `force` is not said; LocalDiskFull.
    """
    with file_failures(path.parent):
        if force:
            replace_file(path, text)
            return
        try:
            path.touch(mode=0o600, exist_ok=False)
        except FileExistsError:
            raise UsageFailure(
                f"{path} is there already", hint="Name another file, or add --force."
            ) from None
        try:
            replace_file(path, text)
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def _sync(folder: Path) -> None:
    """Have the directory itself on disk: a rename is a change of it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _stamps(path: Path) -> Path:
    return path.with_suffix(".stamp")


def _await_turn(descriptor: int, folder: Path) -> None:
    until = time.monotonic() + LOCK_PATIENCE_S
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        if time.monotonic() >= until:
            raise AlreadyRunning(
                f"another process writes in {folder} and does not come to an end",
                hint=f"Look which one has {folder}/.lock open, and end it.",
            )
        time.sleep(0.01)


@contextmanager
def file_failures(folder: Path) -> Iterator[None]:
    """Translate what a file system refuses into failures with a next step."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise LocalDiskFull(
                f"no room left on the disk of {folder}",
                hint="Free some space there, or set FLY_BUILD_HOME to a directory on another disk.",
            ) from error
        raise UsageFailure(
            f"{folder} cannot be used: {error.strerror or error}",
            hint="Set FLY_BUILD_HOME to a directory of your own.",
        ) from error

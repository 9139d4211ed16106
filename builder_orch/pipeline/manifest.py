"""What a context held: of every path its kind, mode, size and the hash of its content."""

import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256

from builder_orch.errors import ContextRefused
from builder_orch.pipeline.walk import Entry, Kind, unreadable

CHUNK = 1 << 20
SETTLED_NS = 2_000_000_000
"""A file that changed this shortly before it was read may have changed again within one tick of
the file system's clock, so what is known of it is not trusted."""

Signature = tuple[int, int, int]
"""Inode, time of the last change of content and of anything, in ns."""


@dataclass(frozen=True, slots=True)
class Mark:
    """One path. `mode` are the permission bits, `digest` is SHA-256 in hexadecimal: of a file's
    content or a link's target, "" for a directory."""

    kind: Kind
    mode: int
    size: int
    digest: str
    signature: Signature = (0, 0, 0)

    def differs(self, other: "Mark") -> str:
        """In what it is another one, in a word; "" if it is the same to a builder."""
        if self.kind is not other.kind:
            return "kind"
        if self.digest != other.digest:
            return "target" if self.kind is Kind.LINK else "content"
        return "mode" if self.mode != other.mode and self.kind is not Kind.LINK else ""


Marks = dict[str, Mark]


def marks_of(
    entries: Iterable[Entry],
    known: Mapping[str, Mark],
    known_ns: int = 0,
    *,
    going_on: Callable[[], bool] = lambda: True,
) -> Marks:
    """Read everything once, but not what is as it was when `known` was made at `known_ns`.

    ContextRefused for a file that cannot be read, and when `going_on` says no.
    """
    made: Marks = {}
    for entry in entries:
        if not going_on():
            raise ContextRefused("reading was given up", hint="Run the command again.")
        try:
            made[entry.name] = _mark(entry, known.get(entry.name), known_ns)
        except PermissionError:
            raise unreadable(entry.name) from None
        except OSError as error:
            raise ContextRefused(
                f"{entry.name} cannot be read: {error.strerror}",
                hint="Something else changes this directory; wait for it, then run again.",
            ) from None
    return made


def changes(before: Mapping[str, Mark], now: Mapping[str, Mark]) -> dict[str, str]:
    """What became of paths, by their names: `new`, `gone`, or in what they differ."""
    made = {name: "gone" for name in before if name not in now}
    for name, mark in now.items():
        was = before.get(name)
        how = "new" if was is None else mark.differs(was)
        if how:
            made[name] = how
    return dict(sorted(made.items()))


def _mark(entry: Entry, known: Mark | None, known_ns: int) -> Mark:
    found = entry.path.lstat() if entry.kind is Kind.LINK else entry.path.stat()
    signature = (found.st_ino, found.st_mtime_ns, found.st_ctime_ns)
    mode = stat.S_IMODE(found.st_mode)
    if entry.kind is Kind.DIRECTORY:
        return Mark(entry.kind, mode, 0, "", signature)
    if (
        known is not None
        and known.kind is entry.kind
        and (known.size, known.signature) == (found.st_size, signature)
        and max(signature[1:]) + SETTLED_NS < known_ns
    ):
        return Mark(entry.kind, mode, known.size, known.digest, signature)
    if entry.kind is Kind.LINK:
        target = os.fsencode(os.readlink(entry.path))  # noqa: PTH115 - Path would tidy it
        return Mark(entry.kind, mode, 0, sha256(target).hexdigest(), signature)
    return Mark(entry.kind, mode, found.st_size, _content(entry), signature)


def _content(entry: Entry) -> str:
    # O_NONBLOCK: were it a pipe by now, opening it must not wait for a writer.
    descriptor = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    hashed = sha256()
    try:
        while octets := os.read(descriptor, CHUNK):
            hashed.update(octets)
    finally:
        os.close(descriptor)
    return hashed.hexdigest()

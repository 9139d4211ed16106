"""What of a directory the engine is shown: chosen by its patterns, in the order it demands.

The order (fsutil's validator): a directory before what is in it, the names of one directory by
their octets.
"""

import os
import posixpath
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from builder_orch.buildkit.messages import Stat, go_mode

Matches = Callable[[str], bool]
"""Does a path, or a directory above it, match? Asked for paths in their order."""
Compile = Callable[[Sequence[str]], Matches]
"""From patterns as in .dockerignore; ValueError for one that is none."""


@dataclass(frozen=True, slots=True)
class Member:
    """One path of a tree: where it lies on disk, or what it holds if it lies nowhere."""

    name: str
    path: Path | None = None
    content: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the engine asks for: all, without the excluded, of the included only."""

    exclude: Sequence[str] = ()
    include: Sequence[str] = ()
    follow: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Tree:
    """The members of one directory that may leave this machine."""

    members: Sequence[Member]
    compile: Compile = field(repr=False)
    root: Path | None = None

    def select(self, wanted: Wanted) -> list[Member]:
        """Those the engine asks for, and every directory above them; ValueError for a pattern."""
        include = list(wanted.include)
        if wanted.follow:
            followed = self._follow(wanted.follow)
            if followed is not None:
                include += map(_literal, followed)
        excluded = self.compile(wanted.exclude) if wanted.exclude else None
        included = self.compile(include) if include else None
        chosen: dict[str, Member] = {}
        for member in sorted(self.members, key=in_order):
            if included is not None and not included(member.name):
                continue
            if excluded is not None and excluded(member.name):
                continue
            for above in _above(member.name):
                if above not in chosen and self.root is not None:
                    chosen[above] = Member(above, self.root / above)
            chosen[member.name] = member
        return list(chosen.values())

    def _follow(self, paths: Iterable[str]) -> list[str] | None:
        """The paths and whatever links on the way lead to; None where that is everything."""
        followed = _Links(self).follow(paths)
        return None if "." in followed else followed


def in_order(member: Member) -> list[bytes]:
    """The key of the order."""
    return [os.fsencode(part) for part in member.name.split("/")]


def _literal(name: str) -> str:
    """As a pattern; one that begins with an exclamation mark would be an exception."""
    return f"./{name}"


def _above(name: str) -> Iterator[str]:
    at = name.find("/")
    while at >= 0:
        yield name[:at]
        at = name.find("/", at + 1)


class _Links:
    """Follows links inside the tree; as on the engine, `..` and `/` never lead out of it."""

    def __init__(self, tree: Tree) -> None:
        self._compile = tree.compile
        self._members: Mapping[str, Member] = {member.name: member for member in tree.members}
        self._below: dict[str, list[str]] = {}
        for name in self._members:
            self._below.setdefault(posixpath.dirname(name), []).append(name)
        self._found: set[str] = set()

    def follow(self, paths: Iterable[str]) -> list[str]:
        pending = [_inside(path) for path in paths]
        while pending:
            pending.extend(self._step(pending.pop()))
        return sorted(self._found)

    def _step(self, path: str) -> list[str]:
        """Go along one path up to its end or its first link; the paths that it leads to."""
        current, rest = "", path
        while True:
            first, _, rest = rest.partition("/")
            current = posixpath.join(current, first)
            targets = self._targets(current)
            if (not rest or targets is not None) and current in self._found:
                return []
            if targets is not None:
                self._found.add(current)
                return [_inside(posixpath.join(target, rest)) for target in targets]
            if not rest:
                self._found.add(current)
                return []

    def _targets(self, path: str) -> list[str] | None:
        """Where a link, or the links that a wildcard matches, lead to; None if there is none."""
        base = posixpath.basename(path)
        if not any(char in base for char in "*?["):
            target = self._target(path)
            return None if target is None else [target]
        matches = self._compile([_literal(base)])
        names = self._below.get(posixpath.dirname(path), [])
        found = [self._target(name) for name in names if matches(posixpath.basename(name))]
        return [target for target in found if target is not None] or None

    def _target(self, name: str) -> str | None:
        member = self._members.get(name)
        if member is None or member.path is None or not member.path.is_symlink():
            return None
        target = os.readlink(member.path)  # noqa: PTH115 - Path would tidy it
        return posixpath.join("/", posixpath.dirname(name), target)


def _inside(path: str) -> str:
    return posixpath.normpath(f"/{path}").lstrip("/") or "."


class Stats:
    """Looks at members one after the other; a second name of a file becomes a hard link."""

    def __init__(self) -> None:
        self._first: dict[tuple[int, int], str] = {}

    def look(self, member: Member) -> tuple[Stat, os.stat_result | None]:
        """What the engine is told, and what it was on disk; OSError where that cannot be seen."""
        if member.path is None:
            return _written(member), None
        found = member.path.lstat()
        kind = stat.S_IFMT(found.st_mode)
        linkname = ""
        if kind == stat.S_IFLNK:
            linkname = os.readlink(member.path)  # noqa: PTH115 - Path would tidy it
        elif kind == stat.S_IFREG and found.st_nlink > 1:
            first = self._first.setdefault((found.st_dev, found.st_ino), member.name)
            linkname = "" if first == member.name else first
        made = Stat(
            member.name,
            go_mode(found.st_mode),
            0 if kind == stat.S_IFDIR else found.st_size,
            found.st_mtime_ns,
            linkname,
            _xattrs(member.path),
        )
        return made, found


def _written(member: Member) -> Stat:
    """Of a file that lies nowhere: its time is made of its content, because the engine takes a file
    of the same size and time for the same."""
    moment = int.from_bytes(sha256(member.content).digest()[:7], "big")
    return Stat(member.name, 0o644, len(member.content), moment)


def _xattrs(path: Path) -> dict[str, bytes]:
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError:
        # A file system without them has none to lose.
        return {}
    found: dict[str, bytes] = {}
    for name in names:
        try:
            found[name] = os.getxattr(path, name, follow_symlinks=False)
        except OSError:
            # Some are for the administrator's eyes only; the docker CLI leaves them out as well.
            continue
    return found

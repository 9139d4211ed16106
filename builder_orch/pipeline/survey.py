"""What a context is made of: how heavy it is, what each file is there for, what could stay away."""

import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from builder_orch.events import ContextWeighed
from builder_orch.pipeline.dockerfile import Dockerfile
from builder_orch.pipeline.ignore import Ignore
from builder_orch.pipeline.sources import Taker, first_taker, read_link, takers
from builder_orch.pipeline.walk import Entry, Kind, looks_secret

LARGEST = 5
"""Paths that are named as the largest."""
NOTABLE = 0.01
"""What makes less of the whole is not named as large."""
MOSTLY = 0.8
"""A directory most of which is one member is named by that member."""
USUAL = frozenset(
    {".git", ".hg", ".svn", ".venv", "__pycache__", ".pytest_cache", ".mypy_cache", ".DS_Store"}
    | {"node_modules", ".terraform", ".idea", ".vscode"}
)
"""Names that hardly any image needs, wherever they are."""


@dataclass(frozen=True, slots=True)
class Member:
    """A directory or file with all that is below it."""

    name: str
    octets: int
    files: int


@dataclass(frozen=True, slots=True)
class Saving:
    """A line for an ignore file, and what would then stay away.

    `why` is `unused` (no step can take it), `secret` or `usual`.
    """

    line: str
    why: str
    octets: int
    files: int


@dataclass(frozen=True, slots=True)
class Survey:
    """A context with what its Dockerfile takes of it. `own` are its Dockerfile and ignore file."""

    entries: Sequence[Entry]
    takers: Sequence[Taker] = field(repr=False)
    own: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls, entries: Sequence[Entry], dockerfile: Dockerfile, target: str, own: frozenset[str]
    ) -> "Survey":
        """Look at every entry."""
        links = {one.name: read_link(one.path) for one in entries if one.kind is Kind.LINK}
        return cls(entries, takers(dockerfile.takings(target), links), own)

    def taker(self, name: str) -> Taker | None:
        """The first step that takes a path; None where no step can."""
        return first_taker(self.takers, name)

    def unused(self) -> list[Entry]:
        """The files that no step can reach."""
        return [
            entry
            for entry in self.entries
            if entry.kind is not Kind.DIRECTORY
            and entry.name not in self.own
            and self.taker(entry.name) is None
        ]

    def weighed(self) -> ContextWeighed:
        """All of it in one value."""
        files = sum(entry.kind is not Kind.DIRECTORY for entry in self.entries)
        octets = sum(entry.size for entry in self.entries)
        largest = tuple((one.name, one.octets) for one in largest_of(self.entries))
        return ContextWeighed(files, octets, largest, sum(one.size for one in self.unused()))

    def savings(self) -> list[Saving]:
        """Lines for the ignore file, the one that saves most first; none overlap."""
        reasons = dict(self._reasons())
        made = [
            saving
            for why in ("unused", "secret", "usual")
            for saving in _whole(
                self.entries, {n for n, said in reasons.items() if said == why}, why
            )
        ]
        return sorted(made, key=lambda one: (-one.octets, one.line))

    def _reasons(self) -> Iterator[tuple[str, str]]:
        unused = {entry.name for entry in self.unused()}
        for entry in self.entries:
            if entry.name in unused:
                yield entry.name, "unused"
            elif entry.name not in self.own and entry.kind is not Kind.DIRECTORY:
                if looks_secret(entry):
                    yield entry.name, "secret"
                elif not USUAL.isdisjoint(entry.name.split("/")):
                    yield entry.name, "usual"


def largest_of(entries: Sequence[Entry], count: int = LARGEST) -> list[Member]:
    """The heaviest paths, which do not overlap; directories end in a slash."""
    members = _members(entries)
    below: dict[str, list[str]] = {}
    for name in members:
        if name:
            below.setdefault(posixpath.dirname(name), []).append(name)
    made: list[Member] = []
    for top in below.get("", []):
        name = top
        while children := below.get(name):
            heaviest = max(children, key=lambda child: members[child][0])
            if members[heaviest][0] <= MOSTLY * members[name][0]:
                break
            name = heaviest
        octets, files = members[name]
        made.append(Member(f"{name}/" if name in below else name, octets, files))
    made.sort(key=lambda one: (-one.octets, one.name))
    least = max(1, round(sum(entry.size for entry in entries) * NOTABLE))
    return [one for one in made[:count] if one.octets >= least]


def _members(entries: Sequence[Entry]) -> dict[str, tuple[int, int]]:
    """Octets and files of every path and of every directory above one."""
    made: dict[str, tuple[int, int]] = {}
    sums: dict[str, list[int]] = {"": [0, 0]}
    for entry in entries:
        above = entry.name if entry.kind is Kind.DIRECTORY else posixpath.dirname(entry.name)
        while above not in sums:
            sums[above] = [0, 0]
            above = posixpath.dirname(above)
        if entry.kind is not Kind.DIRECTORY:
            made[entry.name] = entry.size, 1
            _add(sums[posixpath.dirname(entry.name)], made[entry.name])
    for name in sorted(sums, key=_depth, reverse=True):
        octets, files = sums[name]
        made[name] = octets, files
        if name:
            _add(sums[posixpath.dirname(name)], made[name])
    return made


def _add(to: list[int], more: tuple[int, int]) -> None:
    to[0] += more[0]
    to[1] += more[1]


def _depth(name: str) -> int:
    return name.count("/") + bool(name)


def _whole(entries: Sequence[Entry], chosen: set[str], why: str) -> Iterator[Saving]:
    """The fewest lines for the chosen files: a directory where all of it is chosen."""
    files = [entry for entry in entries if entry.kind is not Kind.DIRECTORY]
    wanted = [entry for entry in files if entry.name in chosen]
    every, these = _members(files), _members(wanted)
    told: set[str] = set()
    for entry in wanted:
        top = entry.name
        while (above := posixpath.dirname(top)) and these[above] == every[above]:
            top = above
        if top not in told:
            told.add(top)
            if line := line_for(top):
                yield Saving(line, why, *these[top])


def line_for(name: str) -> str:
    """A line of an ignore file that matches that path and nothing beside it; "" for a name that no
    line can hold, because it has a line's end in it or a blank at its end."""
    if "\n" in name or name != name.rstrip():
        return ""
    made = "".join(f"\\{char}" if char in "*?[\\" else char for char in name)
    # From the top, so that neither a `!` nor a `#` nor a blank in front means anything.
    return f"/{made}"


def decision(ignore: Ignore, name: str) -> str:
    """Which rule keeps or drops a path, in words."""
    rule = ignore.decides(name)
    if rule is None:
        source = ignore.source or "an ignore file (there is none)"
        return f"kept: no rule of {source} matches"
    verb = "kept" if rule.keep else "dropped"
    return f"{verb} by {ignore.source}:{rule.number} ({rule.text})"

"""Which step of a Dockerfile takes which file of the context, and which files none can take."""

import os
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from builder_orch.pipeline.dockerfile import Taking
from builder_orch.pipeline.ignore import Ignore

EVERYTHING = "."
LINKS = 40
"""Links that a pattern may lead through before it is taken for a circle, as Linux has it."""


@dataclass(frozen=True, slots=True)
class Taker:
    """A step that takes files; asked for paths in their order it is quickest."""

    line: int
    step: str
    takes: Callable[[str], bool] = field(repr=False)


def takers(takings: Iterable[Taking], links: Mapping[str, str]) -> list[Taker]:
    """The steps that take files out of a context whose symbolic links are these.

    In doubt a step takes a file: what no taker takes, no step can reach.
    """
    known = _Links(links)
    return [
        Taker(taking.line, taking.step, _matching(known.through(taking.patterns)))
        for taking in takings
    ]


def first_taker(among: Sequence[Taker], name: str) -> Taker | None:
    """The first step that takes a path."""
    return next((taker for taker in among if taker.takes(name)), None)


def _matching(patterns: set[str] | None) -> Callable[[str], bool]:
    if patterns is None or EVERYTHING in patterns:
        return lambda _: True
    try:
        # One that begins with an exclamation mark would be an exception.
        return Ignore.of([f"./{pattern}" for pattern in sorted(patterns)]).matcher()
    except ValueError:
        return lambda _: True


class _Links:
    """Patterns lead on where a link lies on their way; `..` and `/` never out of the context."""

    def __init__(self, links: Mapping[str, str]) -> None:
        self._links = links

    def through(self, patterns: Sequence[str] | None) -> set[str] | None:
        """The patterns and those that they lead to; None for everything."""
        if patterns is None:
            return None
        pending = [_inside(pattern) for pattern in patterns]
        found: set[str] = set()
        while pending:
            pattern = pending.pop()
            if pattern in found:
                continue
            found.add(pattern)
            if len(found) > LINKS * len(patterns):
                return None
            pending += self._beyond(pattern)
        return found

    def _beyond(self, pattern: str) -> Iterator[str]:
        parts = pattern.split("/")
        for depth in range(1, len(parts) + 1):
            try:
                rule = Ignore.of([f"./{'/'.join(parts[:depth])}"]).rules[0]
            except ValueError:
                return
            for name, target in self._links.items():
                if name.count("/") == depth - 1 and rule.matches(name):
                    there = posixpath.join("/", posixpath.dirname(name), target)
                    yield _inside(posixpath.join(there, *parts[depth:]))


def _inside(path: str) -> str:
    return posixpath.normpath(f"/{path}").lstrip("/") or EVERYTHING


def read_link(path: str | os.PathLike[str]) -> str:
    """Where a link leads; "" when it is none any more, which is found when it is sent."""
    try:
        return os.readlink(path)  # noqa: PTH115 - Path would tidy it
    except OSError:
        return ""

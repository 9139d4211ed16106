"""The last good build of each context, kept here: what it held, which steps it had, how long.

By it a later build is told which file broke the cache of which step, with no help of the engine's.
Files of the user alone, bounded in size and number.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path

from builder_orch.events import EngineStatus, Event, Step, StepFinished
from builder_orch.pipeline.manifest import Mark, Marks
from builder_orch.pipeline.walk import Kind

VERSION = 1
KEPT = 50
"""Contexts that are remembered; the one that was not built for longest is forgotten first."""
FILES = 100_000
"""A context of more is not remembered."""
LARGEST = 64 << 20
"""Octets of one record that is still read."""


@dataclass(frozen=True, slots=True)
class Ran:
    """A step of a build; `elapsed_s` is what it took when it was last built."""

    number: int
    total: int
    name: str
    stage: str
    cached: bool
    elapsed_s: float

    @property
    def step(self) -> Step:
        """As in events."""
        return Step(self.number, self.total, self.name, self.cached, self.stage)

    @property
    def text(self) -> str:
        """The instruction alone."""
        return self.name.removesuffix(f" ({self.stage})") if self.stage else self.name


@dataclass(frozen=True, slots=True)
class Run:
    """One good build: on which builder, with which arguments (their hashes), of what.

    `stages` are those of its Dockerfile: name, and what each begins with.
    """

    builder: str
    arguments: Mapping[str, str]
    steps: tuple[Ran, ...]
    marks: Marks = field(repr=False)
    stages: tuple[tuple[str, str], ...] = ()
    taken_ns: int = 0


@dataclass(slots=True)
class Steps:
    """Listens to a build for what its steps are."""

    kit: bool = False
    _ran: dict[tuple[str, int, int, str], Ran] = field(default_factory=dict)

    def take(self, event: Event) -> None:
        """Take one event."""
        match event:
            case EngineStatus():
                self.kit = True
            case Step(number, total, name, cached, stage):
                self._ran[stage, number, total, name] = Ran(number, total, name, stage, cached, 0.0)
            case StepFinished(Step(number, total, name, _, stage), elapsed_s):
                self._ran[stage, number, total, name] = Ran(
                    number, total, name, stage, False, elapsed_s
                )
            case _:
                pass

    def ran(self, before: Run | None) -> tuple[Ran, ...]:
        """What there was, stage by stage; what a cached step once took is known from before."""
        took = {(one.stage, one.name): one.elapsed_s for one in (before.steps if before else ())}
        return tuple(
            Ran(*_fields(one), one.cached, took.get((one.stage, one.name), 0.0))
            if one.cached
            else one
            for one in self._ran.values()
        )


def _fields(one: Ran) -> tuple[int, int, str, str]:
    return one.number, one.total, one.name, one.stage


@dataclass(frozen=True, slots=True)
class Memory:
    """A directory of records, one a context."""

    folder: Path

    def load(self, key: str) -> Run | None:
        """What is known of a context; None for nothing, or what cannot be read."""
        path = self._path(key)
        try:
            if path.stat().st_size > LARGEST:
                return None
            return _read(json.loads(path.read_bytes()))
        except (OSError, ValueError, RecursionError):
            return None

    def save(self, key: str, run: Run) -> None:
        """Keep a run in the place of the one before, and forget the oldest contexts.

        OSError where it cannot be kept.
        """
        if len(run.marks) > FILES:
            self._path(key).unlink(missing_ok=True)
            return
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._path(key)
        new = path.with_name(f"{path.name}.{os.getpid()}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(new, flags, 0o600), "w", encoding="ascii") as file:
            json.dump(_written(run), file)
        new.replace(path)
        self._prune()

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def _prune(self) -> None:
        found = sorted(self.folder.iterdir(), key=_age, reverse=True)
        for path in found[KEPT:]:
            path.unlink(missing_ok=True)


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        # Another process forgot it first.
        return 0.0


def key_of(root: Path, *more: str) -> str:
    """The name of a context's record: by its directory and what else makes it another build."""
    parts = [os.fsencode(root.resolve()), *(part.encode("utf-8", "replace") for part in more)]
    return sha256(b"\0".join(parts)).hexdigest()


def hashed(arguments: Mapping[str, str], node: str) -> dict[str, str]:
    """Build arguments as they are remembered: not what they are, only whether they changed."""
    return {
        name: sha256(f"{node}\0{name}\0{value}".encode("utf-8", "surrogateescape")).hexdigest()
        for name, value in arguments.items()
    }


def _written(run: Run) -> dict[str, object]:
    marks = {
        name: [mark.kind.name, mark.mode, mark.size, mark.digest, *mark.signature]
        for name, mark in run.marks.items()
    }
    return {
        "version": VERSION,
        "taken_ns": run.taken_ns,
        "builder": run.builder,
        "arguments": dict(run.arguments),
        "stages": [list(one) for one in run.stages],
        "steps": [asdict(one) for one in run.steps],
        "marks": marks,
    }


def _read(found: object) -> Run | None:
    match found:
        case {
            "version": int(version),
            "taken_ns": int(taken_ns),
            "builder": str(builder),
            "arguments": dict(arguments),
            "stages": list(stages),
            "steps": list(steps),
            "marks": dict(marks),
        } if version == VERSION:
            ran = tuple(_read_steps(steps))
            read = dict(_read_marks(marks))
            if len(ran) == len(steps) and len(read) == len(marks):
                texts = {name: str(value) for name, value in arguments.items()}
                pairs = tuple(_read_stages(stages))
                return Run(builder, texts, ran, read, pairs, taken_ns)
        case _:
            pass
    return None


def _read_stages(stages: list[object]) -> Iterator[tuple[str, str]]:
    for one in stages:
        match one:
            case [str(name), str(base)]:
                yield name, base
            case _:
                yield "", ""


def _read_steps(steps: list[object]) -> Iterator[Ran]:
    for one in steps:
        match one:
            case {
                "number": int(number),
                "total": int(total),
                "name": str(name),
                "stage": str(stage),
                "cached": bool(cached),
                "elapsed_s": int(elapsed_s) | float(elapsed_s),
            }:
                yield Ran(number, total, name, stage, cached, elapsed_s)
            case _:
                pass


def _read_marks(marks: dict[str, object]) -> Iterator[tuple[str, Mark]]:
    for name, one in marks.items():
        match one:
            case [str(kind), int(mode), int(size), str(digest), int(a), int(b), int(c)] if (
                kind in Kind.__members__
            ):
                yield name, Mark(Kind[kind], mode, size, digest, (a, b, c))
            case _:
                pass

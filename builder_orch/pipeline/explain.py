"""Why steps were not cached: which file, argument, stage or line of the Dockerfile did it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from builder_orch.events import Rebuilt
from builder_orch.pipeline.dockerfile import Instruction, instruction, taken_by
from builder_orch.pipeline.history import Ran, Run
from builder_orch.pipeline.manifest import changes
from builder_orch.pipeline.sources import takers

NAMED = 5
"""Files that one explanation names."""

_STEPS = {"RUN", "COPY", "ADD", "WORKDIR"}
_WORDS = {"new": "new", "gone": "gone", "mode": "other permissions"}


@dataclass(frozen=True, slots=True)
class Difference:
    """What is not as it was at the last good build: paths and how, names of build arguments.

    `links` are the context's symbolic links, by which a step may reach a file.
    """

    paths: Mapping[str, str]
    arguments: frozenset[str] = frozenset()
    links: Mapping[str, str] | None = None
    other_builder: bool = False
    no_cache: bool = False

    @classmethod
    def between(
        cls, before: Run, now: Run, links: Mapping[str, str], *, no_cache: bool = False
    ) -> "Difference":
        """Of two builds of one context."""
        every = before.arguments.keys() | now.arguments.keys()
        return cls(
            changes(before.marks, now.marks),
            frozenset(n for n in every if before.arguments.get(n) != now.arguments.get(n)),
            links,
            before.builder != now.builder,
            no_cache,
        )

    def taken(self, text: str) -> dict[str, str]:
        """The changed paths that a step takes out of the context."""
        among = takers(taken_by(instruction(text)), self.links or {})
        return {
            path: how
            for path, how in self.paths.items()
            if any(taker.takes(path) for taker in among)
        }


def explain(before: Run, now: Run, difference: Difference) -> list[Rebuilt]:
    """For each stage the first step that was built anew, why, and what that cost."""
    stages = _stages(now)
    broken = {at for at, stage in stages.items() if stage.first_built is not None}
    was = {at: {one.number: one.text for one in stage.ran} for at, stage in _stages(before).items()}
    made: list[Rebuilt] = []
    for at, stage in stages.items():
        first = stage.first_built
        if first is not None:
            cause, paths = _cause(first, stage, was.get(at, {}), difference, broken)
            built = (one for one in stage.ran if not one.cached and one.number >= first.number)
            made.append(_rebuilt(first, cause, paths, sum(one.elapsed_s for one in built)))
    return made


def forecast(before: Run, difference: Difference) -> list[Rebuilt]:
    """For each stage the first step that will have to be built anew because of changed files, and
    what it and those after it took last time."""
    broken: set[int] = set()
    made: list[Rebuilt] = []
    for at, stage in sorted(_stages(before).items()):
        for one in stage.steps:
            cause, paths = _inherited(one, stage, difference, broken)
            if cause:
                broken.add(at)
                later = (each.elapsed_s for each in stage.ran if each.number >= one.number)
                made.append(_rebuilt(one, cause, paths, sum(later)))
                break
    return made


def _rebuilt(ran: Ran, cause: str, paths: tuple[str, ...], cost_s: float) -> Rebuilt:
    return Rebuilt(ran.step, cause, paths[:NAMED], max(0, len(paths) - NAMED), cost_s)


@dataclass(frozen=True, slots=True)
class _Stage:
    """One stage of a run: its steps by number, which stage it begins with, what all are called."""

    ran: tuple[Ran, ...]
    base: int | None
    names: tuple[str, ...]

    @property
    def steps(self) -> Iterator[Ran]:
        """Those that cost something; FROM and what only says something about the image does not,
        and is never called cached."""
        return (one for one in self.ran if instruction(one.text).name in _STEPS)

    @property
    def first_built(self) -> Ran | None:
        """The first that was not cached."""
        return next((one for one in self.steps if not one.cached), None)

    def called(self, at: int) -> str:
        """A stage as people call it."""
        return self.names[at] or f"number {at + 1}"


def _stages(run: Run) -> dict[int, _Stage]:
    """By their places in the Dockerfile. A classic build names none, but each begins with FROM."""
    names = tuple(name.lower() for name, _ in run.stages)
    made: dict[int, list[Ran]] = {}
    unnamed = -1
    for one in run.steps:
        unnamed += not one.stage and one.text.upper().startswith("FROM ")
        # Of builds for several platforms each stage is there several times: "linux/arm64 name".
        word = one.stage.rpartition(" ")[2].lower()
        at = _place(word, names) if word else max(0, unnamed)
        made.setdefault(0 if at is None else at, []).append(one)
    bases = [_place(base.lower(), names[:at]) for at, (_, base) in enumerate(run.stages)]
    return {
        at: _Stage(
            tuple(sorted(ran, key=lambda one: one.number)),
            bases[at] if at < len(bases) else None,
            names,
        )
        for at, ran in sorted(made.items())
    }


def _place(word: str, names: Sequence[str]) -> int | None:
    """Where the stage of that name, number or, in BuildKit's words, `stage-N` is."""
    if word in names:
        return len(names) - 1 - list(reversed(names)).index(word)
    number = word.removeprefix("stage-")
    return int(number) if number.isdecimal() and int(number) < len(names) else None


def _cause(
    first: Ran, stage: _Stage, was: Mapping[int, str], difference: Difference, broken: set[int]
) -> tuple[str, tuple[str, ...]]:
    if difference.no_cache:
        return "--no-cache was given", ()
    if difference.other_builder:
        return "the last good build was by another builder", ()
    before = was.get(first.number)
    if before is not None and before != first.text:
        # BuildKit writes the values of arguments into a step's name.
        if difference.arguments and instruction(first.text).name == "RUN":
            return f"{_arguments(difference)}, or the Dockerfile: it had {before} there", ()
        return f"the Dockerfile had {before} there", ()
    # The step itself first; then those before it, which may be cached although what they take has
    # changed, as another stage has just made the same.
    earlier = [one for one in stage.steps if one.number < first.number]
    for one in (first, *reversed(earlier)):
        cause, paths = _inherited(one, stage, difference, broken)
        if cause:
            return cause, paths
    if before is None:
        return "the last good build had no such step", ()
    if difference.arguments and instruction(first.text).name == "RUN":
        return _arguments(difference), ()
    return "what it begins with is another image, or the builder forgot it", ()


def _arguments(difference: Difference) -> str:
    return f"build arguments changed ({', '.join(sorted(difference.arguments))})"


def _inherited(
    one: Ran, stage: _Stage, difference: Difference, broken: set[int]
) -> tuple[str, tuple[str, ...]]:
    """What changed files, its own or those of other stages, do to a step; "" for nothing."""
    if paths := difference.taken(one.text):
        return _how(paths), tuple(paths)
    for word in _from(instruction(one.text)):
        at = _place(word.lower(), stage.names)
        if at is not None and at in broken:
            return f"the stage {stage.called(at)}, of which it takes files, was built anew", ()
    if stage.base is not None and stage.base in broken:
        return f"the stage {stage.called(stage.base)}, with which it begins, was built anew", ()
    return "", ()


def _how(paths: Mapping[str, str]) -> str:
    hows = set(paths.values())
    return _WORDS.get(next(iter(hows)), "changed") if len(hows) == 1 else "changed"


def _from(step: Instruction) -> Iterator[str]:
    for flag in step.flags:
        name, _, value = flag.partition("=")
        if name == "--from":
            yield value
        elif name == "--mount":
            yield from (word[5:] for word in value.split(",") if word.startswith("from="))

"""Why steps were built anew: from two runs to causes, and from a disk that may hold anything."""

import asyncio
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder_orch.events import EngineStatus, Event, Log, Rebuilt, Step, StepFinished, Warned
from builder_orch.pipeline.context import Context, Directory, scan
from builder_orch.pipeline.deploy import Order, deploy
from builder_orch.pipeline.explain import Difference, explain, forecast
from builder_orch.pipeline.history import KEPT, Memory, Ran, Run, Steps, hashed, key_of
from builder_orch.pipeline.manifest import Mark
from builder_orch.pipeline.remember import Circumstances, key_for, remembering
from builder_orch.pipeline.walk import Kind
from tests.pipeline.fake_world import fake_world

STAGES = (("base", "debian"), ("mid", "base"), ("", "base"))
MARKS = {name: Mark(Kind.FILE, 0o644, 1, "x") for name in ("src/a", "src/b", "lock")}


def ran(number: int, text: str, *, stage: str = "", took: float | None = None) -> Ran:
    """A step of BuildKit's; cached unless it took some time."""
    shown = f"{text} ({stage})" if stage and not stage.startswith("stage-") else text
    return Ran(number, 3, shown, stage, took is None, took or 0.0)


def run(*steps: Ran, builder: str = "b", changed: Iterable[str] = (), **arguments: str) -> Run:
    marks = dict(MARKS)
    for name in changed:
        marks[name] = Mark(Kind.FILE, 0o644, 1, "other")
    return Run(builder, arguments, steps, marks, STAGES)


BEFORE = run(
    ran(1, "COPY lock /", stage="base", took=0.1),
    ran(2, "RUN install", stage="base", took=20.0),
    ran(1, "COPY src /src", stage="mid", took=0.2),
    ran(2, "RUN make", stage="mid", took=5.0),
    ran(1, "COPY --from=mid /out /", stage="stage-2", took=0.3),
    ran(2, "RUN last", stage="stage-2", took=1.0),
)


def told(now: Run, before: Run = BEFORE, *, no_cache: bool = False) -> list[tuple[str, str, float]]:
    difference = Difference.between(before, now, {}, no_cache=no_cache)
    return [
        (one.step.name, one.cause + "".join(f" {path}" for path in one.paths), one.cost_s)
        for one in explain(before, now, difference)
    ]


def test_the_file_that_broke_the_cache_is_named_with_the_step_and_what_it_cost() -> None:
    now = run(
        ran(1, "COPY lock /", stage="base"),
        ran(2, "RUN install", stage="base"),
        ran(1, "COPY src /src", stage="mid", took=0.5),
        ran(2, "RUN make", stage="mid", took=6.0),
        ran(1, "COPY --from=mid /out /", stage="stage-2", took=0.25),
        ran(2, "RUN last", stage="stage-2", took=1.0),
        changed=["src/b"],
    )
    assert told(now) == [
        ("COPY src /src (mid)", "changed src/b", 6.5),
        ("COPY --from=mid /out /", "the stage mid, of which it takes files, was built anew", 1.25),
    ]


def test_a_step_that_another_made_meanwhile_is_cached_and_still_known() -> None:
    now = run(
        ran(1, "COPY src /src", stage="mid"),
        ran(2, "RUN make", stage="mid", took=6.0),
        ran(1, "COPY --from=1 /out /", stage="stage-2"),
        ran(2, "RUN last", stage="stage-2", took=1.0),
        changed=["src/b"],
    )
    assert told(now) == [
        ("RUN make (mid)", "changed src/b", 6.0),
        ("RUN last", "the stage mid, of which it takes files, was built anew", 1.0),
    ]


def test_a_stage_that_begins_with_a_broken_one_says_so() -> None:
    now = run(
        ran(1, "COPY lock /", stage="base", took=0.5),
        ran(2, "RUN install", stage="base", took=22.0),
        ran(1, "COPY src /src", stage="mid", took=0.5),
        changed=["lock"],
    )
    assert told(now) == [
        ("COPY lock / (base)", "changed lock", 22.5),
        ("COPY src /src (mid)", "the stage base, with which it begins, was built anew", 0.5),
    ]


@pytest.mark.parametrize(
    ("now", "cause"),
    [
        (run(ran(2, "RUN make all", stage="mid", took=1)), "the Dockerfile had RUN make there"),
        (run(ran(3, "RUN more", stage="mid", took=1)), "the last good build had no such step"),
        (run(ran(2, "RUN make", stage="mid", took=1), A="2"), "build arguments changed (A)"),
        (run(ran(2, "RUN make 2", stage="mid", took=1), A="2"),
         "build arguments changed (A), or the Dockerfile: it had RUN make there"),
        (run(ran(2, "RUN make", stage="mid", took=1), builder="c"),
         "the last good build was by another builder"),
        (run(ran(2, "RUN make", stage="mid", took=1)),
         "what it begins with is another image, or the builder forgot it"),
        (run(ran(2, "RUN --mount=target=/m make", stage="mid", took=1), changed=["lock"]),
         "the Dockerfile had RUN make there"),
    ],
)  # fmt: skip
def test_other_causes_are_told_apart(now: Run, cause: str) -> None:
    assert [why for _, why, _ in told(now)] == [cause]


def test_no_cache_explains_everything() -> None:
    now = run(ran(1, "COPY src /src", stage="mid", took=1), changed=["src/a"])
    assert [why for _, why, _ in told(now, no_cache=True)] == ["--no-cache was given"]


@pytest.mark.parametrize(
    ("before", "now", "cause"),
    [
        (Mark(Kind.FILE, 0o644, 1, "x"), None, "gone src/a"),
        (None, Mark(Kind.FILE, 0o644, 1, "x"), "new src/a"),
        (Mark(Kind.FILE, 0o644, 1, "x"), Mark(Kind.FILE, 0o600, 1, "x"),
         "other permissions src/a"),
        (Mark(Kind.LINK, 0o777, 0, "x"), Mark(Kind.LINK, 0o777, 0, "y"), "changed src/a"),
        (Mark(Kind.FILE, 0o644, 1, "x"), Mark(Kind.LINK, 0o777, 0, "y"), "changed src/a"),
    ],
)  # fmt: skip
def test_how_a_file_changed_is_said(before: Mark | None, now: Mark | None, cause: str) -> None:
    step = ran(1, "COPY src /", stage="mid", took=1.0)
    marks = [{} if mark is None else {"src/a": mark} for mark in (before, now)]
    runs = [Run("b", {}, (step,), each, STAGES) for each in marks]
    assert [why for _, why, _ in told(runs[1], runs[0])] == [cause]


def test_a_classic_build_has_its_stages_from_its_froms() -> None:
    texts = ["FROM debian AS base", "COPY lock /", "FROM base AS mid", "COPY src /src", "CMD x"]
    steps = [Ran(at, 5, text, "", False, 1.0) for at, text in enumerate(texts, 1)]
    cached = [Ran(2, 5, "COPY lock /", "", True, 0.0)]
    before = run(*steps)
    now = run(*steps[:1], *cached, *steps[2:], changed=["src/a"])
    assert told(now, before) == [("COPY src /src", "changed src/a", 2.0)]


def test_many_files_are_counted() -> None:
    step = ran(1, "COPY src /", stage="mid", took=1.0)
    marks = {f"src/{number}": Mark(Kind.FILE, 0, 1, "x") for number in range(9)}
    before, now = Run("b", {}, (step,), {}, STAGES), Run("b", {}, (step,), marks, STAGES)
    (one,) = explain(before, now, Difference.between(before, now, {}))
    assert (len(one.paths), one.more) == (5, 4)


def test_what_will_be_built_anew_is_forecast_with_what_it_took() -> None:
    difference = Difference({"src/b": "content"})
    assert [(one.step.name, one.paths, one.cost_s) for one in forecast(BEFORE, difference)] == [
        ("COPY src /src (mid)", ("src/b",), 5.2),
        ("COPY --from=mid /out /", (), 1.3),
    ]
    assert forecast(BEFORE, Difference({"README": "content"})) == []


# --- what is listened to


def test_steps_are_known_by_their_events() -> None:
    steps = Steps()
    one, two = Step(1, 2, "COPY a / (x)", stage="x"), Step(2, 2, "RUN b (x)", stage="x")
    story: list[Event] = [one, Log("noise"), two, StepFinished(two, 3.0)]
    for event in (*story, Step(1, 2, "COPY a / (x)", True, "x")):
        steps.take(event)
    before = run(Ran(1, 2, "COPY a / (x)", "x", False, 7.0))
    first, second = steps.ran(before)
    assert (first.cached, first.elapsed_s, first.text) == (True, 7.0, "COPY a /")
    assert (second.cached, second.elapsed_s, second.text) == (False, 3.0, "RUN b")
    assert steps.kit is False
    steps.take(EngineStatus(b""))
    assert steps.kit is True


# --- what is kept


@pytest.fixture
def memory(tmp_path: Path) -> Memory:
    return Memory(tmp_path / "state" / "history")


def test_what_is_kept_is_read_back_and_only_by_its_user(memory: Memory) -> None:
    memory.save("k", BEFORE)
    assert memory.load("k") == BEFORE
    assert memory.load("other") is None
    (path,) = memory.folder.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(memory.folder.stat().st_mode) == 0o700


def test_the_oldest_are_forgotten(memory: Memory) -> None:
    small = Run("b", {}, (), {})
    for number in range(KEPT):
        memory.save(f"k{number}", small)
        os.utime(memory.folder / f"k{number}.json", (number, number))
    memory.save("new", small)
    assert len(list(memory.folder.iterdir())) == KEPT
    assert memory.load("k0") is None
    assert memory.load("k1") == memory.load("new") == small


def test_arguments_are_kept_as_hashes_that_nobody_else_can_compare() -> None:
    one, two = hashed({"TOKEN": "planted"}, "node"), hashed({"TOKEN": "planted"}, "another")
    assert "planted" not in repr(one)
    assert one != two


def test_other_directories_and_targets_are_other_contexts(tmp_path: Path) -> None:
    keys = {key_of(tmp_path, "D", "t"), key_of(tmp_path, "D"), key_of(tmp_path / "x", "D")}
    assert len(keys) == 3


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
KEYS = ("version", "taken_ns", "builder", "arguments", "stages", "steps", "marks")


@given(st.fixed_dictionaries(dict.fromkeys(KEYS, JSON)) | JSON, st.binary(max_size=20))
def test_garbage_on_disk_is_no_memory(
    tmp_path_factory: pytest.TempPathFactory, found: object, octets: bytes
) -> None:
    memory = Memory(tmp_path_factory.mktemp("memory"))
    for content in (json.dumps(found).encode(), octets):
        (memory.folder / "k.json").write_bytes(content)
        loaded = memory.load("k")
        assert loaded is None or (loaded.steps == () and loaded.marks == {})


# --- beside a build


@pytest.fixture
def context(tmp_path: Path) -> Context:
    root = tmp_path / "context"
    (root / "src").mkdir(parents=True)
    (root / "src" / "a").write_text("one")
    (root / "Dockerfile").write_text("FROM scratch\nCOPY src /\n")
    return scan(Directory(root), lambda _: None)


async def build(memory: Memory | None, context: Context, *, cached: bool) -> list[Event]:
    events: list[Event] = []
    async with remembering(memory, context, Circumstances(), events.append) as kept:
        step = Step(1, 1, "COPY src /", cached)
        kept.emit(step)
        if not cached:
            kept.emit(StepFinished(step, 2.0))
        await kept.built("m1")
    return [event for event in events if not isinstance(event, Step | StepFinished)]


async def test_a_second_build_is_explained_by_the_first(memory: Memory, context: Context) -> None:
    assert await build(memory, context, cached=False) == []
    assert await build(memory, context, cached=True) == []
    (context.root / "src" / "a").write_text("two")
    assert await build(memory, context, cached=False) == [
        Rebuilt(Step(1, 1, "COPY src /"), "changed", ("src/a",), 0, 2.0)
    ]


async def test_a_build_that_failed_is_not_the_last_good_one(
    memory: Memory, context: Context
) -> None:
    await build(memory, context, cached=False)
    (context.root / "src" / "a").write_text("two")
    with pytest.raises(ZeroDivisionError):
        async with remembering(memory, context, Circumstances(), print):
            raise ZeroDivisionError
    assert len(await build(memory, context, cached=False)) == 1


async def test_without_a_memory_nothing_is_kept_or_said(context: Context) -> None:
    assert await build(None, context, cached=False) == []


async def test_what_cannot_be_kept_is_warned_of_and_fails_nothing(
    tmp_path: Path, context: Context
) -> None:
    (tmp_path / "file").touch()
    (warned,) = await build(Memory(tmp_path / "file"), context, cached=False)
    assert isinstance(warned, Warned)
    assert warned.id == "not-remembered"


async def test_a_file_that_vanished_meanwhile_is_warned_of(
    memory: Memory, context: Context
) -> None:
    (context.root / "src" / "a").unlink()
    (warned,) = await build(memory, context, cached=False)
    assert isinstance(warned, Warned)
    assert "src/a cannot be read" in warned.message
    assert memory.load(key_for(context, Circumstances())) is None


async def test_a_deploy_remembers_and_explains(tmp_path: Path, memory: Memory) -> None:
    root = tmp_path / "app"
    root.mkdir()
    (root / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    order = Order(Directory(root), "hello", memory=memory, publish=False, release=False)
    events: list[Event] = []
    async with fake_world() as world:
        await deploy(order, world.world, events.append)
        assert not any(isinstance(event, Rebuilt) for event in events)
        (root / "new").touch()
        await deploy(order, world.world, events.append)
    (told,) = [event for event in events if isinstance(event, Rebuilt)]
    assert (told.step, told.cause, told.paths) == (Step(2, 2, "COPY . /"), "new", ("new",))


async def test_giving_a_build_up_gives_the_reading_up(memory: Memory, context: Context) -> None:
    async def given_up() -> None:
        async with remembering(memory, context, Circumstances(), print):
            await asyncio.Event().wait()

    task = asyncio.create_task(given_up())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

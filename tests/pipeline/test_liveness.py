"""Limits of builds, on a clock that jumps; and going back to builders that were lost."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from ipaddress import IPv6Address
from pathlib import Path

import pytest

from builder_orch.api.models import Builder
from builder_orch.buildkit.grpc import Code, Failed
from builder_orch.errors import (
    BuilderFull,
    BuilderLost,
    BuilderOrchError,
    BuildFailed,
    BuildStalled,
    BuildTimedOut,
    Exit,
)
from builder_orch.events import (
    Emit,
    Event,
    Log,
    PhaseStarted,
    Progress,
    Retry,
    Step,
    StepFinished,
    Warned,
)
from builder_orch.pipeline.build import Build, Send, building
from builder_orch.pipeline.context import Directory, scan
from builder_orch.pipeline.deploy import Order, deploy
from builder_orch.pipeline.engine import Engine, Recipe
from builder_orch.pipeline.liveness import RETURNS, Patience, Return, bounded, persist
from builder_orch.pipeline.outside import Limits
from builder_orch.pipeline.stage import perform
from tests import jumping
from tests.buildkit.fake_daemon import IMAGE, FakeDaemon, Session, vertex, whole_context
from tests.pipeline.fake_engine import FakeEngine, running
from tests.pipeline.fake_world import APP, FakeWorld, fake_world

HOUR_S = 3600.0
RUN = Step(2, 3, "RUN make")
FROM = Step(1, 3, "FROM registry.test/large")

Story = Callable[[Emit], Awaitable[None]]


def told(story: Story, patience: Patience) -> tuple[float, BuilderOrchError | None]:
    """How long it went on, and what ended it."""

    async def tell() -> tuple[float, BuilderOrchError | None]:
        began = jumping.now()
        try:
            await bounded(story, patience, lambda _: None)
        except BuilderOrchError as error:
            return jumping.now() - began, error
        return jumping.now() - began, None

    return jumping.run(tell())


# --- limits


def test_a_build_without_limits_takes_as_long_as_it_takes() -> None:
    async def story(emit: Emit) -> None:
        await asyncio.sleep(100 * HOUR_S)

    took_s, error = told(story, Patience())
    assert took_s >= 100 * HOUR_S
    assert error is None


def test_a_build_that_takes_too_long_is_ended_however_busy_it_is() -> None:
    async def story(emit: Emit) -> None:
        emit(RUN)
        while True:
            await asyncio.sleep(1)
            emit(Log("still here"))

    took_s, error = told(story, Patience(build_s=90.0, stall_s=10.0))
    assert took_s == pytest.approx(90, abs=1)
    assert isinstance(error, BuildTimedOut)
    assert error.code == Exit.BUILD_TIMEOUT
    assert str(error) == "the build took longer than 90 s, and was at step 2/3 (RUN make)"
    assert "--build-timeout" in error.hint


def test_a_build_that_is_begun_again_has_no_more_time_than_before() -> None:
    async def twice() -> float:
        patience, began = Patience(build_s=100.0), jumping.now()

        async def lost(emit: Emit) -> None:
            await asyncio.sleep(70)

        async def endless(emit: Emit) -> None:
            await asyncio.Event().wait()

        await bounded(lost, patience, lambda _: None)
        with pytest.raises(BuildTimedOut):
            await bounded(endless, patience, lambda _: None)
        return jumping.now() - began

    assert jumping.run(twice()) == pytest.approx(100, abs=1)


@pytest.mark.parametrize(
    "sign", [Progress("context", 1, None), Log("x"), FROM, replace(RUN, cached=True)]
)
def test_whatever_comes_further_puts_the_end_off(sign: Event) -> None:
    async def story(emit: Emit) -> None:
        for _ in range(10):
            await asyncio.sleep(100)
            emit(sign)
        await asyncio.Event().wait()

    took_s, error = told(story, Patience(stall_s=120.0))
    assert took_s == pytest.approx(1120, abs=1)
    assert isinstance(error, BuildStalled)
    assert error.code == Exit.BUILD_TIMEOUT
    assert "stood still for 120 s" in str(error)


def test_a_warning_is_no_sign_of_life() -> None:
    async def story(emit: Emit) -> None:
        while True:
            await asyncio.sleep(10)
            emit(Warned("builder-silent", "no sign of life"))

    took_s, error = told(story, Patience(stall_s=120.0))
    assert took_s == pytest.approx(120, abs=1)
    assert isinstance(error, BuildStalled)


def test_a_step_may_run_in_silence_but_not_what_comes_after_it() -> None:
    async def story(emit: Emit) -> None:
        emit(PhaseStarted("build"))
        emit(RUN)
        await asyncio.sleep(2 * HOUR_S)
        emit(StepFinished(RUN, 2 * HOUR_S))
        await asyncio.Event().wait()

    took_s, error = told(story, Patience(stall_s=120.0))
    assert took_s == pytest.approx(2 * HOUR_S + 120, abs=1)
    assert isinstance(error, BuildStalled)
    assert "what follows step 2/3" in str(error)


def test_one_that_runs_speaks_for_another_that_waits() -> None:
    async def story(emit: Emit) -> None:
        emit(RUN)
        emit(FROM)
        await asyncio.sleep(HOUR_S)

    assert told(story, Patience(stall_s=120.0))[1] is None


def test_fetching_an_image_is_somebody_elses_silence() -> None:
    async def story(emit: Emit) -> None:
        emit(FROM)
        await asyncio.Event().wait()

    took_s, error = told(story, Patience(stall_s=120.0))
    assert took_s == pytest.approx(120, abs=1)
    assert "step 1/3 (FROM registry.test/large)" in str(error)


def test_a_failure_of_the_work_itself_is_not_taken_for_a_limit() -> None:
    async def story(emit: Emit) -> None:
        raise TimeoutError("of its own")

    with pytest.raises(TimeoutError, match="of its own"):
        told(story, Patience(1000.0, 1000.0))


# --- a build by BuildKit, with everything that might lose its patience


def kit(
    script: Callable[[Session, FakeDaemon], Awaitable[None]], root: Path, patience: Patience
) -> tuple[float, BaseException | None]:
    """A build by a daemon that does this; how long it took, how it ended."""
    (root / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")

    async def never(seconds: float) -> None:
        await asyncio.Event().wait()

    async def tell() -> tuple[float, BaseException | None]:
        began, daemon = jumping.now(), FakeDaemon(script)
        ended: BaseException | None = None
        async with running(FakeEngine(kit=daemon.serve, images={IMAGE})) as fake:
            engine = Engine(IPv6Address("fdaa::2"), fake.dial, "1.41", pause=never)
            context = scan(Directory(root), lambda _: None)
            opening = building(
                engine, context, Recipe("Dockerfile"), lambda _: None, patience=patience
            )
            async with opening as under_way:
                try:
                    await perform(Send(), under_way, lambda _: None)
                    await perform(Build(), under_way, lambda _: None)
                except Exception as error:
                    ended = error
            took_s = jumping.now() - began
            await daemon.cancelled.wait()
            return took_s, ended

    return jumping.run(tell())


def test_a_run_of_two_silent_hours_is_waited_for(tmp_path: Path) -> None:
    async def script(session: Session, daemon: FakeDaemon) -> None:
        await whole_context(session, daemon)
        await daemon.say(vertex("[3/3] RUN make", completed=False))
        await asyncio.sleep(2 * HOUR_S)
        await daemon.say(vertex("[3/3] RUN make"))
        raise Failed(Code.UNKNOWN, "the end of this story")

    took_s, error = kit(script, tmp_path, Patience(stall_s=120.0))
    assert took_s >= 2 * HOUR_S
    # Nothing had given it up by then.
    assert isinstance(error, BuildFailed)
    assert "the end of this story" in str(error)


@pytest.mark.parametrize(
    ("patience", "kind"),
    [(Patience(build_s=300.0), BuildTimedOut), (Patience(stall_s=120.0), BuildStalled)],
)
def test_a_limit_ends_the_build_on_the_engine(
    tmp_path: Path, patience: Patience, kind: type[BuilderOrchError]
) -> None:
    async def script(session: Session, daemon: FakeDaemon) -> None:
        await daemon.say(vertex("[1/2] FROM registry.test/large", completed=False))
        await asyncio.Event().wait()

    took_s, error = kit(script, tmp_path, patience)
    assert isinstance(error, kind)
    assert took_s == pytest.approx(patience.build_s or patience.stall_s, abs=2)


# --- going back


LOST = BuilderLost("the builder was lost during the build: reset", hint="Run it again.")


async def persistent(
    outside: FakeWorld, *ends: BuilderOrchError, changed: Callable[[], None] = lambda: None
) -> tuple[str | BuilderOrchError, list[Event], int]:
    """Work that ends so, one time after the other, then well; what came, and how often."""
    events: list[Event] = []
    left, tries = list(ends), 0

    async def work(engine: Engine) -> str:
        nonlocal tries
        tries += 1
        assert engine.version == ("1.41" if tries > 1 else "1.24")
        if left:
            changed()
            raise left.pop(0)
        return "made"

    builder = Builder("fly-builder", "m1", "started", IPv6Address("fdaa:0:1::b"))
    world = outside.world
    way = Return(world, APP, builder, outside.tunnel, events.append)
    try:
        made: str | BuilderOrchError = await persist(
            Engine(builder.address, outside.tunnel.dial), work, way, events.append
        )
    except BuilderOrchError as error:
        made = error
    return made, events, tries


async def test_work_that_was_lost_is_begun_again_where_the_builder_is_now() -> None:
    async with fake_world() as outside:
        made, events, tries = await persistent(outside, *[LOST] * RETURNS)
        assert (made, tries) == ("made", 1 + RETURNS)
        retries = [event for event in events if isinstance(event, Retry)]
        assert [one.attempt for one in retries] == list(range(1, 1 + RETURNS))
        assert {one.cause for one in retries} == {str(LOST)}
        assert outside.platform.calls.count("ensure_builder") == RETURNS


async def test_a_builder_that_is_lost_every_time_is_given_up() -> None:
    async with fake_world() as outside:
        made, _, tries = await persistent(outside, *[LOST] * 9)
        assert (made, tries) == (LOST, 1 + RETURNS)


@pytest.mark.parametrize(
    "failure",
    [BuildFailed("exit code 3", hint="Correct it."), BuilderFull("no space", hint="Prune.")],
)
async def test_what_is_not_the_builders_loss_is_not_repeated(failure: BuilderOrchError) -> None:
    async with fake_world() as outside:
        made, events, tries = await persistent(outside, failure)
        assert (made, tries, events) == (failure, 1, [])


async def test_a_builder_that_stays_away_is_lost_with_both_reasons() -> None:
    async with fake_world() as outside:
        outside.limits = Limits(return_s=0.02)

        def gone() -> None:
            outside.engine.refuse = 10**9

        made, _, tries = await persistent(outside, LOST, changed=gone)
        assert tries == 1
        assert isinstance(made, BuilderLost)
        assert str(LOST) in str(made)
        assert "it did not come back: the tunnel is up, but the builder's engine" in str(made)


async def test_without_a_tunnel_there_is_no_way_back_to_wait_for() -> None:
    async with fake_world() as outside:

        def gone() -> None:
            outside.tunnel.failure = "route"

        made, _, tries = await persistent(outside, LOST, changed=gone)
        assert tries == 1
        assert isinstance(made, BuilderLost)
        assert "it did not come back: the tunnel has ended" in str(made)


async def test_a_deploy_whose_connection_breaks_sends_nothing_twice(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY . /\nRUN make\n")
    (tmp_path / "large").write_bytes(bytes(300_000))

    async def script(session: Session, daemon: FakeDaemon) -> None:
        await whole_context(session, daemon)
        if len(daemon.requests) == 1:
            await daemon.say(vertex("[3/3] RUN make", completed=False))
            daemon.leave()
            await asyncio.Event().wait()

    daemon = FakeDaemon(script)
    async with fake_world() as outside:
        outside.engine.kit = daemon.serve
        outside.engine.images.add(IMAGE)
        events: list[Event] = []
        order = Order(Directory(tmp_path), "hello", publish=False, release=False)
        made = await deploy(order, outside.world, events.append)
        assert made.built is not None
        assert made.built.image_id == IMAGE
        assert outside.leaves_nothing()
    assert [one.phase for one in events if isinstance(one, Retry)] == ["build"]
    assert len(set(daemon.session_ids)) == 2
    assert sorted(daemon.asked) == ["Dockerfile", "Dockerfile", "large"]


async def test_another_machine_in_its_place_is_said() -> None:
    async with fake_world() as outside:

        def replaced() -> None:
            outside.platform.machine_id = "m2"

        made, events, _ = await persistent(outside, LOST, changed=replaced)
        assert made == "made"
        (warned,) = [event for event in events if isinstance(event, Warned)]
        assert warned.message == "machine m2 takes the place of m1; its cache may be cold"

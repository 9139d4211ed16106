"""A builder that is not there when a run begins: every wait is bounded and names the layer."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from builder_orch.api.models import App, Builder
from builder_orch.errors import BuilderNotProvisioned, Exit
from builder_orch.events import Event, PhaseFailed, PhaseReason
from builder_orch.pipeline.context import Directory
from builder_orch.pipeline.deploy import Order, deploy
from builder_orch.pipeline.engine import (
    ANSWER_S,
    DIAL_S,
    SIGN_S,
    VIGIL_AGAIN_S,
    VIGIL_EVERY_S,
    VIGIL_MISSES,
)
from builder_orch.pipeline.outside import Limits, World
from tests.pipeline.fake_engine import Act, FakeEngine
from tests.pipeline.fake_world import FakeWorld, fake_world

LONGEST_S = 250.0
"""What nobody waits longer than for a builder."""
NOTICED_S = 30.0


@dataclass
class Door(FakeEngine):
    """An engine whose callers meet these failures, one after the other, the last one for ever."""

    failures: tuple[OSError | None, ...] = (None,)
    calls: int = 0

    async def dial(self, host: str, port: int, *, timeout_s: float = 30.0) -> socket.socket:
        failure = self.failures[min(self.calls, len(self.failures) - 1)]
        self.calls += 1
        if failure is not None:
            raise failure
        return await super().dial(host, port, timeout_s=timeout_s)


@pytest.fixture
async def outside() -> AsyncIterator[FakeWorld]:
    async with fake_world() as made:
        made.limits = replace(made.limits, engine_s=0.2, provision_s=0.2)
        yield made


@pytest.fixture
def order(tmp_path: Path) -> Order:
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    return Order(Directory(tmp_path), "hello", publish=False, release=False)


def meeting(*failures: OSError | None) -> Callable[[FakeWorld], None]:
    """Callers of the engine meet these."""

    def spoil(outside: FakeWorld) -> None:
        door = Door(failures=failures, port=outside.engine.port)
        outside.tunnel.engine = door

    return spoil


def never_boots(outside: FakeWorld) -> None:
    outside.platform.held.add("ensure_builder")


def answers_nonsense(outside: FakeWorld) -> None:
    outside.engine.version = {"message": "an nginx"}


def dies_in_its_answer(outside: FakeWorld) -> None:
    outside.engine.told = [b'{"ApiVersion": ', Act.RESET]


REFUSED = ConnectionRefusedError("refused: nothing listens there")


@pytest.mark.parametrize(
    ("spoil", "phase", "said"),
    [
        (never_boots, "provision", "the platform gave no builder within"),
        (meeting(REFUSED), "tunnel", "the builder's engine was not ready in 0.2 s"),
        (meeting(REFUSED), "tunnel", "connection refused"),
        (meeting(TimeoutError("no answer in time")), "tunnel", "no answer in time"),
        (meeting(OSError("unreachable inside the network")), "tunnel", "unreachable inside"),
        (dies_in_its_answer, "tunnel", "connection"),
        (answers_nonsense, "tunnel", "no Docker engine answers there"),
    ],
)
async def test_a_builder_that_is_not_there_is_said_with_its_layer(
    outside: FakeWorld,
    order: Order,
    spoil: Callable[[FakeWorld], None],
    phase: str,
    said: str,
) -> None:
    spoil(outside)
    events: list[Event] = []
    with pytest.raises(BuilderNotProvisioned) as caught:
        await deploy(order, outside.world, events.append)
    assert caught.value.code == Exit.BUILDER_NOT_PROVISIONED
    assert said in str(caught.value)
    assert [one.phase for one in events if isinstance(one, PhaseFailed)] == [phase]
    assert outside.leaves_nothing()


async def test_a_builder_that_boots_late_is_waited_for_and_every_reason_shown(
    outside: FakeWorld, order: Order
) -> None:
    outside.limits = replace(outside.limits, engine_s=30.0)
    failures = [TimeoutError("no answer in time")] * 3 + [REFUSED] * 3
    meeting(*failures, None)(outside)
    events: list[Event] = []
    made = await deploy(order, outside.world, events.append)
    assert made.built is not None
    reasons = [one.reason for one in events if isinstance(one, PhaseReason)]
    assert any("no answer in time" in reason for reason in reasons)
    assert any("connection refused" in reason for reason in reasons)


async def test_a_builder_that_died_after_it_was_asked_for_is_asked_for_again(
    outside: FakeWorld, order: Order
) -> None:
    outside.limits = replace(outside.limits, engine_s=5.0)
    platform = outside.platform
    meeting(REFUSED)(outside)
    dead = outside.tunnel.engine

    async def revive() -> None:
        await platform.arrival("asked-again").wait()
        assert isinstance(dead, Door)
        dead.failures = (None,)

    reviving = asyncio.ensure_future(revive())
    made = await deploy(order, replaced(outside), lambda _: None)
    await reviving
    assert made.built is not None
    assert platform.calls.count("ensure_builder") == 2


def replaced(outside: FakeWorld) -> World:
    """Its platform notices the second time that its engine is dead."""
    platform = outside.platform
    ask = platform.ensure_builder

    async def ensure_builder(app: App, region: str | None) -> Builder:
        builder = await ask(app, region)
        if platform.calls.count("ensure_builder") == 2:
            platform.arrival("asked-again").set()
        return builder

    platform.ensure_builder = ensure_builder  # type: ignore[method-assign]
    return outside.world


def test_nobody_waits_longer_than_was_promised() -> None:
    limits = Limits()
    # A last attempt may begin just before the limit: two connections, two answers.
    attempt_s = 2 * DIAL_S + ANSWER_S + SIGN_S
    assert limits.provision_s <= LONGEST_S
    # To ask for the builder again while its engine is waited for takes time as well.
    assert limits.engine_s + limits.return_s + attempt_s <= LONGEST_S
    assert limits.return_s + attempt_s <= LONGEST_S


def test_an_engine_that_falls_silent_is_noticed_in_time() -> None:
    pauses_s = VIGIL_EVERY_S + (VIGIL_MISSES - 1) * VIGIL_AGAIN_S
    assert pauses_s + VIGIL_MISSES * SIGN_S <= NOTICED_S

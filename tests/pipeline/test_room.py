"""A full disk at the builder: what is thrown away there, how often, and what is said of it."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from builder_orch.buildkit.grpc import Code, Failed
from builder_orch.errors import BuilderFull, Exit
from builder_orch.events import Event, Retry, Warned
from builder_orch.pipeline.context import Directory
from builder_orch.pipeline.deploy import Deployed, Order, deploy
from tests.buildkit.fake_daemon import IMAGE, FakeDaemon, Session, vertex, whole_context
from tests.pipeline.fake_engine import image_id, message, pushed
from tests.pipeline.fake_world import REGISTRY, FakeWorld, fake_world

DIGEST = image_id("manifest")
SAID = "write /large: no space left on device"


@pytest.fixture
async def outside() -> AsyncIterator[FakeWorld]:
    async with fake_world() as made:
        made.engine.images.add(IMAGE)
        made.engine.digests = [f"{REGISTRY}/hello@{DIGEST}"]
        made.engine.pushes = [pushed(DIGEST)]
        yield made
        assert made.leaves_nothing()


def full(outside: FakeWorld, times: int) -> FakeDaemon:
    """A daemon that has no room the first so many times."""

    async def script(session: Session, daemon: FakeDaemon) -> None:
        await whole_context(session, daemon)
        if len(daemon.requests) <= times:
            await daemon.say(vertex("[2/2] COPY . /", error=SAID))
            raise Failed(Code.UNKNOWN, SAID)

    daemon = FakeDaemon(script)
    outside.engine.kit = daemon.serve
    return daemon


async def run(outside: FakeWorld, root: Path, events: list[Event]) -> Deployed:
    (root / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    (root / "large").write_bytes(bytes(100_000))
    order = Order(Directory(root), "hello", release=False)
    return await deploy(order, outside.world, events.append)


def pruned(outside: FakeWorld) -> int:
    """How often the caches were thrown away."""
    return len(outside.engine.asked("POST /build/prune"))


async def test_a_build_that_found_no_room_is_made_again_in_the_room_of_the_caches(
    outside: FakeWorld, tmp_path: Path
) -> None:
    daemon = full(outside, 1)
    events: list[Event] = []
    made = await run(outside, tmp_path, events)
    assert made.pushed is not None
    assert made.pushed.digest == DIGEST
    (again,) = [event for event in events if isinstance(event, Retry)]
    assert "disk is full" in again.cause
    assert "3.0 MB of caches thrown away" in again.cause
    assert pruned(outside) == 1
    # What of the context had arrived is not sent again.
    assert daemon.asked.count("large") == 1


async def test_a_push_that_found_no_room_is_made_again_as_well(
    outside: FakeWorld, tmp_path: Path
) -> None:
    full(outside, 0)
    outside.engine.pushes.insert(0, [message(errorDetail={"message": SAID}, error=SAID)])
    events: list[Event] = []
    made = await run(outside, tmp_path, events)
    assert made.pushed is not None
    assert pruned(outside) == 1
    assert [event.phase for event in events if isinstance(event, Retry)] == ["build"]


async def test_one_that_stays_full_is_emptied_once_and_says_so(
    outside: FakeWorld, tmp_path: Path
) -> None:
    daemon = full(outside, 9)
    with pytest.raises(BuilderFull, match="its caches were thrown away before") as caught:
        await run(outside, tmp_path, [])
    assert caught.value.code == Exit.BUILDER_LOST
    assert "prune --all" in caught.value.hint
    assert (pruned(outside), len(daemon.requests)) == (1, 2)


@pytest.mark.parametrize("answer", [{"SpaceReclaimed": 0}, {"message": "?"}])
async def test_where_nothing_can_be_thrown_away_nothing_is_repeated(
    outside: FakeWorld, tmp_path: Path, answer: dict[str, object]
) -> None:
    daemon = full(outside, 9)
    outside.engine.freed = answer
    events: list[Event] = []
    with pytest.raises(BuilderFull) as caught:
        await run(outside, tmp_path, events)
    assert len(daemon.requests) == 1
    assert not [event for event in events if isinstance(event, Retry)]
    warned = [event.id for event in events if isinstance(event, Warned)]
    assert warned == ([] if "SpaceReclaimed" in answer else ["builder-prune"])
    assert ("thrown away" in str(caught.value)) is ("SpaceReclaimed" in answer)

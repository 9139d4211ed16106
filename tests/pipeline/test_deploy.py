"""Whole runs: what is done in which order, and that nothing is left behind however they end."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from builder_orch.errors import (
    AppUnknown,
    BuilderLost,
    BuilderNotProvisioned,
    BuilderOrchError,
    BuildFailed,
    DockerfileInvalid,
    NotLoggedIn,
    PlatformUnavailable,
    PushDenied,
    ReleaseFailed,
    ResolverDown,
    TunnelNotUp,
)
from builder_orch.events import (
    Event,
    PhaseFailed,
    PhaseFinished,
    PhaseReason,
    PhaseStarted,
    Retry,
    Step,
    Transport,
    Warned,
)
from builder_orch.pipeline.context import Directory
from builder_orch.pipeline.deploy import Deployed, Order, deploy, ulid
from builder_orch.pipeline.liveness import RETURNS
from builder_orch.pipeline.outside import Limits
from builder_orch.pipeline.peer import peer_name
from tests.pipeline.fake_engine import Act, built, image_id, message, pushed
from tests.pipeline.fake_world import REGISTRY, TOKEN, FakeWorld, fake_world

DIGEST = image_id("manifest")
PHASES = ["preflight", "auth", "provision", "tunnel", "context"]
PHASES += ["build", "push", "release", "verify"]


@pytest.fixture
async def outside() -> AsyncIterator[FakeWorld]:
    async with fake_world() as made:
        made.engine.pushes = [pushed(DIGEST)] * 4
        made.engine.digests = [f"{REGISTRY}/hello@{DIGEST}", f"{REGISTRY}/new@{DIGEST}"]
        yield made


@pytest.fixture
def order(tmp_path: Path) -> Order:
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    return Order(Directory(tmp_path), "hello", host="Dev Box.example")


async def run(order: Order, outside: FakeWorld) -> tuple[Deployed, list[Event]]:
    events: list[Event] = []
    return await deploy(order, outside.world, events.append), events


async def test_a_deploy_goes_through_all_phases_and_ends_all_it_began(
    order: Order, outside: FakeWorld
) -> None:
    deployed, events = await run(order, outside)
    assert [event.phase for event in events if isinstance(event, PhaseStarted)] == PHASES
    assert [event.phase for event in events if isinstance(event, PhaseFinished)] == PHASES
    assert deployed.pushed is not None
    assert deployed.pushed.reference == f"{REGISTRY}/hello@{DIGEST}"
    assert deployed.released is not None
    assert deployed.released.release.version == 1
    assert deployed.answered is not None
    assert (deployed.answered.status, deployed.answered.octets) == (200, 5)
    assert deployed.answered.url == "http://hello.internal:8080/"
    assert outside.platform.releases[1].image == f"{REGISTRY}/hello@{DIGEST}"
    assert outside.asked[0].startswith(b"GET / HTTP/1.1\r\nHost: hello.internal:8080\r\n")
    assert any(isinstance(event, Transport) for event in events)
    assert outside.leaves_nothing()
    (record,) = outside.platform.builds.values()
    assert record["status"] == "completed"
    assert record["timings"] == {"builder_init", "context_build", "image_build", "push"}
    assert record["image"] == (image_id("image"), deployed.pushed.tag, 4096)
    assert TOKEN not in repr(events) + repr(deployed)


async def test_the_record_is_finished_before_the_release_and_the_peer_removed_last(
    order: Order, outside: FakeWorld
) -> None:
    await run(order, outside)
    calls = outside.platform.calls
    assert calls.index("finish_build") < calls.index("create_release")
    assert calls[-1] == "remove_peer"


async def test_an_image_of_its_own_name_and_a_key_of_its_own_for_every_run(
    order: Order, outside: FakeWorld
) -> None:
    deploys = [run(order, outside) for _ in range(2)]
    (one, _), (two, _) = await asyncio.gather(*deploys)
    assert one.pushed is not None
    assert two.pushed is not None
    assert one.pushed.tag != two.pushed.tag
    assert one.pushed.tag.startswith(f"{REGISTRY}/hello:deployment-")
    assert len(set(outside.platform.keys)) == 2
    first, second = outside.tunnel.configs
    assert first.private_key != second.private_key
    assert outside.leaves_nothing()


async def test_an_app_that_is_missing_is_created_on_request_only(
    order: Order, outside: FakeWorld
) -> None:
    with pytest.raises(AppUnknown):
        await run(replace(order, app="new"), outside)
    assert "ensure_builder" not in outside.platform.calls
    deployed, _ = await run(replace(order, app="new", create_app=True), outside)
    assert deployed.app == "new"
    assert "new" in outside.platform.apps


@pytest.mark.parametrize(
    ("changes", "last"),
    [({"release": False}, "push"), ({"release": False, "publish": False}, "build")],
)
async def test_a_run_may_end_early(
    order: Order, outside: FakeWorld, changes: dict[str, bool], last: str
) -> None:
    wanted = Order(order.directory, order.app, **changes)  # type: ignore[arg-type]
    deployed, events = await run(wanted, outside)
    finished = [event.phase for event in events if isinstance(event, PhaseFinished)]
    assert finished[-1] == last
    assert deployed.released is None
    assert (deployed.pushed is None) is (last == "build")
    assert outside.platform.releases == {}
    assert outside.leaves_nothing()


async def test_the_port_comes_from_the_order_else_the_image_else_is_8080(
    order: Order, outside: FakeWorld
) -> None:
    await run(order, outside)
    outside.engine.ports = {"9000/tcp": {}, "7000/tcp": {}, "1/udp": {}}
    await run(order, outside)
    service = {"http_service": {"internal_port": 4000}}
    await run(replace(order, port=4000, definition=service), outside)
    asked = [port for host, port in outside.tunnel.dialled if host == "hello.internal"]
    assert asked == [8080, 7000, 4000]
    told = [one["http_service"] for one in outside.platform.definitions]
    assert told == [{"internal_port": port} for port in asked]


async def test_what_the_platform_waits_for_is_shown(order: Order, outside: FakeWorld) -> None:
    outside.platform.turns = [
        ("running", True, "pulling the image"),
        ("running", True, "starting"),
        ("running", True, "starting"),
        ("complete", False, ""),
    ]
    _, events = await run(order, outside)
    reasons = [event.reason for event in events if isinstance(event, PhaseReason)]
    assert reasons.count("v1 is running: starting") == 1
    assert "v1 is running: pulling the image" in reasons


# --- failures, stage by stage

UNAVAILABLE = PlatformUnavailable("the API is down", hint="Wait.")
FAILING = [message(stream="Step 1/1 : RUN x\n"), message(errorDetail={"message": "x", "code": 3})]
DENIED = [message(error="denied: requested access to the resource is denied")]


def no_dockerfile(outside: FakeWorld, order: Order) -> None:
    (order.directory.root / "Dockerfile").unlink()


def token_expired(outside: FakeWorld, order: Order) -> None:
    outside.platform.failures["app"] = NotLoggedIn("the token expired", hint="Log in.")


def no_builder(outside: FakeWorld, order: Order) -> None:
    outside.platform.held.add("ensure_builder")
    outside.limits = replace(outside.limits, provision_s=0.01)


def no_peer(outside: FakeWorld, order: Order) -> None:
    outside.platform.failures["add_peer"] = UNAVAILABLE


def no_handshake(outside: FakeWorld, order: Order) -> None:
    outside.tunnel.failure = "ready"
    outside.limits = replace(outside.limits, handshake_s=0.02)


def no_resolver(outside: FakeWorld, order: Order) -> None:
    outside.tunnel.failure = "resolve"


def no_engine(outside: FakeWorld, order: Order) -> None:
    outside.engine.refuse = 10**9
    outside.limits = replace(outside.limits, engine_s=0.02)


def nothing_inside(outside: FakeWorld, order: Order) -> None:
    outside.tunnel.failure = "inside"


def builder_stopped(outside: FakeWorld, order: Order) -> None:
    no_engine(outside, order)
    outside.platform.machine = "stopped"


def step_fails(outside: FakeWorld, order: Order) -> None:
    outside.engine.build = FAILING


def engine_dies(outside: FakeWorld, order: Order) -> None:
    outside.engine.build = [*built()[:2], Act.RESET]


def push_denied(outside: FakeWorld, order: Order) -> None:
    outside.engine.pushes = [DENIED]


def release_fails(outside: FakeWorld, order: Order) -> None:
    outside.platform.turns = [("failed", False, "it did not answer")]


def release_hangs(outside: FakeWorld, order: Order) -> None:
    outside.platform.held.add("release")
    outside.limits = replace(outside.limits, release_s=0.01)


def no_answer(outside: FakeWorld, order: Order) -> None:
    outside.tunnel.failure = "verify"


def bad_answer(outside: FakeWorld, order: Order) -> None:
    outside.statuses = [503]


@pytest.mark.parametrize(
    ("spoil", "phase", "kind", "said"),
    [
        (no_dockerfile, "preflight", DockerfileInvalid, "there is no Dockerfile"),
        (token_expired, "auth", NotLoggedIn, "expired"),
        (no_builder, "provision", BuilderNotProvisioned, "no builder within"),
        (no_peer, "tunnel", PlatformUnavailable, "down"),
        (no_handshake, "tunnel", TunnelNotUp, "did not answer"),
        (no_resolver, "tunnel", ResolverDown, "no answer in time; it does answer a ping"),
        (nothing_inside, "tunnel", ResolverDown, "no answer in time; nor does it answer a ping"),
        (no_engine, "tunnel", BuilderNotProvisioned, "tunnel is up, but the builder's engine"),
        (builder_stopped, "tunnel", BuilderNotProvisioned, "says its machine m1 is stopped"),
        (step_fails, "build", BuildFailed, "exit code 3"),
        (engine_dies, "build", BuilderLost, "connection reset"),
        (push_denied, "push", PushDenied, "denied"),
        (release_fails, "release", ReleaseFailed, "it did not answer"),
        (release_hangs, "release", ReleaseFailed, "not complete within"),
        (no_answer, "verify", ReleaseFailed, "does not answer at http://hello.internal:8080/"),
        (bad_answer, "verify", ReleaseFailed, "answered 503"),
    ],
)
async def test_a_failure_is_announced_once_and_leaves_nothing_behind(
    order: Order,
    outside: FakeWorld,
    spoil: object,
    phase: str,
    kind: type[BuilderOrchError],
    said: str,
) -> None:
    assert callable(spoil)
    spoil(outside, order)
    events: list[Event] = []
    with pytest.raises(kind) as caught:
        await deploy(order, outside.world, events.append)
    assert type(caught.value) is kind
    assert said in str(caught.value)
    assert caught.value.hint
    *before, failed = [event for event in events if isinstance(event, PhaseFailed)]
    assert (failed.phase, failed.error) == (phase, caught.value)
    # Only who lost the builder goes back to it.
    assert len(before) == (RETURNS if kind is BuilderLost else 0)
    assert outside.leaves_nothing()
    before_release = PHASES.index(phase) < PHASES.index("release")
    statuses = [record["status"] for record in outside.platform.builds.values()]
    assert statuses in ([], ["failed" if before_release else "completed"])
    assert (outside.platform.releases == {}) is before_release


async def test_a_build_that_fails_is_recorded_with_its_last_words(
    order: Order, outside: FakeWorld
) -> None:
    outside.engine.build = FAILING
    with pytest.raises(BuildFailed):
        await run(order, outside)
    (record,) = outside.platform.builds.values()
    assert "exit code 3" in str(record["logs"])
    assert record["image"] is None


async def test_a_release_that_takes_its_time_to_answer_is_asked_again(
    order: Order, outside: FakeWorld
) -> None:
    outside.statuses = [502, 503, 404]
    deployed, events = await run(order, outside)
    assert deployed.answered is not None
    assert deployed.answered.status == 404
    assert [event.attempt for event in events if isinstance(event, Retry)] == [1, 2]


async def test_a_release_that_is_not_complete_in_time_is_marked(
    order: Order, outside: FakeWorld
) -> None:
    release_hangs(outside, order)
    with pytest.raises(ReleaseFailed):
        await run(order, outside)
    assert outside.platform.updates == ["failed"]


async def test_tidying_up_that_fails_is_told_but_does_not_hide_the_result(
    order: Order, outside: FakeWorld
) -> None:
    outside.platform.failures |= {"remove_peer": UNAVAILABLE, "finish_build": UNAVAILABLE}
    deployed, events = await run(order, outside)
    assert deployed.answered is not None
    told = [event.message for event in events if isinstance(event, Warned)]
    assert len(told) == 2
    assert all("the API is down" in text for text in told)


# --- Ctrl-C in each stage


async def hold_platform(outside: FakeWorld, name: str) -> asyncio.Event:
    outside.platform.held.add(name)
    return outside.platform.arrival(name)


@pytest.mark.parametrize(
    ("stage", "record"),
    [
        ("app", []),
        ("ensure_builder", []),
        ("add_peer", ["cancelled"]),
        ("ready", ["cancelled"]),
        ("upload", ["cancelled"]),
        ("build", ["cancelled"]),
        ("push", ["cancelled"]),
        ("release", ["completed"]),
        ("verify", ["completed"]),
    ],
)
async def test_a_run_that_is_interrupted_ends_all_it_began(
    order: Order, outside: FakeWorld, stage: str, record: list[str]
) -> None:
    reached = asyncio.Event()
    step = Step(2, 2, "COPY . /")
    match stage:
        case "ready" | "verify":
            outside.tunnel.hold = stage
            reached = outside.tunnel.arrived
        case "upload":
            with (order.directory.root / "big").open("wb") as file:
                file.truncate(32 << 20)
            outside.engine.reading.clear()
            reached = outside.engine.building
        case "build":
            outside.engine.build = [*built()[:4], Act.HANG]
        case "push":
            outside.engine.pushes = [[*pushed(DIGEST)[:2], Act.HANG]]
        case name:
            reached = await hold_platform(outside, name)
    events: list[Event] = []

    def emit(event: Event) -> None:
        events.append(event)
        if (stage == "build" and event == step) or (
            stage == "push" and isinstance(event, PhaseStarted) and event.phase == "push"
        ):
            reached.set()

    task = asyncio.create_task(deploy(order, outside.world, emit))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert outside.leaves_nothing()
    assert [one["status"] for one in outside.platform.builds.values()] == record
    if stage == "release":
        assert outside.platform.updates == ["interrupted"]
    if stage in {"upload", "build"}:
        outside.engine.reading.set()
        await outside.engine.gone.wait()
    if stage in {"upload", "build", "push"}:
        assert outside.platform.releases == {}


def test_limits_are_those_that_a_slow_platform_needs() -> None:
    assert Limits().handshake_s > 95


@pytest.mark.parametrize("host", ["Dev Box.example", "", "ü", "a" * 300, "-x-", "host.local"])
def test_the_name_of_a_peer_is_plain_whatever_the_host_is_called(host: str) -> None:
    name = peer_name(host)
    assert name.startswith("fly-build-")
    assert len(name) <= 63
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert "--" not in name
    assert peer_name(host) != name


def test_labels_sort_by_time_and_never_meet() -> None:
    made = [ulid() for _ in range(200)]
    assert len(set(made)) == len(made)
    assert all(len(one) == 26 for one in made)
    assert [one[:10] for one in made] == sorted(one[:10] for one in made)

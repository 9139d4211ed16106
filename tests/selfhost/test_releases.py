"""The release runner as stories, with an engine that does as told and a clock that jumps."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from ipaddress import IPv6Address
from socket import socket, socketpair

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder_orch.errors import BuilderFull
from builder_orch.selfhost.engine import Container, EngineRefused, Image
from builder_orch.selfhost.releases import (
    Kept,
    Machine,
    Release,
    Runner,
    container_body,
    status_of,
)

DIGEST = "sha256:" + "ab" * 32
IMAGE = f"127.0.0.1:20001/web@{DIGEST}"


@dataclass
class Life:
    """How a container of the fake engine behaves; times are on the fake clock, after its start."""

    answers_at: float | None = 0.0
    ends_at: float | None = None
    status: int = 200


class World:
    """Clock, engine, ledger and surroundings at once; `said` is everything in its order."""

    def __init__(self) -> None:
        self.time = 0.0
        self.said: list[str] = []
        self.lives: list[Life] = []
        self.boxes: dict[str, tuple[Container, Life, float]] = {}
        self.bodies: list[Mapping[str, object]] = []
        self.pull_fails: Exception | None = None
        self.stop_fails: Exception | None = None
        self.digests: tuple[str, ...] = (IMAGE,)
        self.pulls: list[tuple[str, str, str]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.statuses: dict[tuple[str, int], tuple[str, str | None]] = {}
        self.machines: set[str] = set()
        self.ended: set[tuple[str, int]] = set()
        self.connected: list[tuple[str, int]] = []

    def now(self) -> float:
        return self.time

    async def sleep(self, delay_s: float) -> None:
        self.time += delay_s
        await self.gate.wait()
        await asyncio.sleep(0)

    async def probe(self, address: str, port: int, path: str) -> int:
        for box, life, began in self.boxes.values():
            if box.address == address:
                if life.answers_at is None or self.time < began + life.answers_at:
                    raise ConnectionRefusedError("connection refused")
                return life.status
        raise AssertionError(address)

    # The engine.

    async def pull(self, reference: str, *, username: str, password: str) -> None:
        await self.gate.wait()
        self.pulls.append((reference, username, password))
        if self.pull_fails:
            raise self.pull_fails

    async def image(self, reference: str) -> Image:
        return Image("sha256:1", self.digests, ())

    async def create(self, name: str, body: Mapping[str, object]) -> str:
        number = len(self.bodies) + 1
        self.bodies.append(body)
        labels = body["Labels"]
        assert isinstance(labels, dict)
        box = Container(name, IMAGE, labels, "created", 0, 0, False, f"10.0.0.{number}")
        self.boxes[name] = (box, self.lives.pop(0) if self.lives else Life(), self.time)
        self.said.append(f"create {name}")
        return name

    async def start(self, container: str) -> None:
        box, life, _ = self.boxes[container]
        self.boxes[container] = (replace(box, status="running"), life, self.time)
        self.said.append(f"start {container}")

    async def keep_running(self, container: str) -> None:
        self.said.append(f"keep {container}")

    async def inspect(self, container: str) -> Container:
        if container not in self.boxes:
            raise EngineRefused(404, "no such container")
        box, life, began = self.boxes[container]
        if life.ends_at is not None and self.time >= began + life.ends_at:
            return replace(box, status="restarting", restarts=1, exit_code=3, address="")
        return box

    async def stop(self, container: str, *, grace_s: int) -> None:
        self.said.append(f"stop {container} {grace_s}")
        if self.stop_fails:
            raise self.stop_fails

    async def remove(self, container: str) -> None:
        self.boxes.pop(container, None)
        self.said.append(f"remove {container}")

    async def containers(self, label: str) -> list[str]:
        name, _, value = label.partition("=")
        return [id_ for id_, (box, _, _) in self.boxes.items() if box.labels.get(name) == value]

    async def logs(self, container: str) -> str:
        return f"last words of {container}"

    # The ledger and the surroundings.

    def is_wanted(self, app: str, version: int) -> bool:
        return (app, version) not in self.ended

    def release_status(self, app: str, version: int, status: str, reason: str | None) -> None:
        self.statuses[app, version] = (status, reason)
        self.said.append(f"{app} {version} {status}")

    def machine_started(
        self, app: str, machine_id: str, address: IPv6Address, container: str, image: str
    ) -> None:
        self.machines.add(machine_id)

    def machine_retired(self, app: str, machine_id: str) -> None:
        self.machines.discard(machine_id)

    def allot(self, app: str) -> tuple[str, IPv6Address]:
        return f"m{len(self.bodies) + 1}", IPv6Address("fdaa::1")

    def password(self, app: str) -> str:
        return f"secret of {app}"

    async def routed(self, app: str, machine: Machine) -> None:
        self.said.append(f"route {app} to {machine.id}")

    async def withdrawn(self, app: str, machine: Machine) -> None:
        self.said.append(f"withdraw {machine.id}")

    async def connect(self, address: str, port: int, *, limit_s: float) -> socket:
        self.connected.append((address, port))
        near, far = socketpair()
        far.close()
        return near

    def status(self, version: int, app: str = "web") -> str:
        return self.statuses[app, version][0]

    def reason(self, version: int, app: str = "web") -> str:
        return self.statuses[app, version][1] or ""


@asynccontextmanager
async def runner_in(world: World) -> AsyncGenerator[Runner]:
    async with Runner(
        world,
        owner="o1",
        registry="127.0.0.1:20001",
        ledger=world,
        surroundings=world,
        connect=world.connect,
        report=lambda line: world.said.append(f"report: {line}"),
        now=world.now,
        sleep=world.sleep,
        probe=world.probe,
    ) as runner:
        yield runner


async def settled(condition: Callable[[], object]) -> None:
    """Let the runner go on until something is so; the fake world never makes it wait for long."""
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it did not come about")


async def finish(world: World, version: int, app: str = "web") -> str:
    await settled(
        lambda: world.statuses.get((app, version), ("",))[0] not in {"", "pending", "running"}
    )
    return world.status(version, app)


async def test_a_release_is_pulled_by_digest_checked_routed_and_retires_the_one_before() -> None:
    world = World()
    world.lives = [Life(answers_at=2.0), Life(answers_at=5.0)]
    async with runner_in(world) as runner:
        runner.begin("web", Release(1, IMAGE))
        assert await finish(world, 1) == "complete"
        runner.begin("web", Release(2, IMAGE))
        assert await finish(world, 2) == "complete"
        await settled(lambda: world.said[-1].startswith("remove"))
        assert runner.serving("web") is not None
        assert world.machines == {"m2"}
        assert world.pulls[0] == (IMAGE, "x", "secret of web")
        assert world.said == [
            "web 1 running",
            "create fly-build-web-v1-m1",
            "start fly-build-web-v1-m1",
            "keep fly-build-web-v1-m1",
            "route web to m1",
            "web 1 complete",
            "web 2 running",
            "create fly-build-web-v2-m2",
            "start fly-build-web-v2-m2",
            "keep fly-build-web-v2-m2",
            "route web to m2",
            "withdraw m1",
            "web 2 complete",
            "stop fly-build-web-v1-m1 10",
            "remove fly-build-web-v1-m1",
        ]
        assert world.time == 7.0


async def test_one_that_never_answers_is_removed_after_the_grace_and_the_old_one_stays() -> None:
    world = World()
    world.lives = [Life(), Life(answers_at=None)]
    async with runner_in(world) as runner:
        runner.begin("web", Release(1, IMAGE))
        await finish(world, 1)
        began = world.time
        runner.begin("web", Release(2, IMAGE))
        assert await finish(world, 2) == "failed"
        assert world.time - began == 30.0
        assert "connection refused" in world.reason(2)
        assert "last words of fly-build-web-v2-m2" in world.reason(2)
        assert list(world.boxes) == ["fly-build-web-v1-m1"]
        assert world.machines == {"m1"}
        serving = runner.serving("web")
        assert serving is not None
        assert serving.version == 1


async def test_one_that_ends_early_ends_the_wait_at_once() -> None:
    world = World()
    world.lives = [Life(answers_at=None, ends_at=0.5)]
    async with runner_in(world) as runner:
        runner.begin("web", Release(1, IMAGE))
        assert await finish(world, 1) == "failed"
        assert world.time == 0.5
        assert "exit code 3" in world.reason(1)
        assert "last words" in world.reason(1)
        assert world.boxes == {}
        assert runner.serving("web") is None


@pytest.mark.parametrize(("status", "end"), [(404, "complete"), (499, "complete"), (503, "failed")])
async def test_any_answer_below_500_counts(status: int, end: str) -> None:
    world = World()
    world.lives = [Life(status=status)]
    async with runner_in(world) as runner:
        runner.begin("web", Release(1, IMAGE))
        assert await finish(world, 1) == end


@pytest.mark.parametrize(
    ("deploy", "limit_s"),
    [
        ({"wait_timeout": "2s"}, 2),
        ({"wait_timeout": "2m"}, 120),
        ({"wait_timeout": 7}, 7),
        ({"wait_timeout": "0"}, 30),
        ({"wait_timeout": "90m"}, 240),
        ({"wait_timeout": "-1s"}, 30),
        ({"wait_timeout": ["2s"]}, 30),
        ("2s", 30),
    ],
)
async def test_the_definition_says_how_long_a_machine_may_take(
    deploy: object, limit_s: float
) -> None:
    world = World()
    world.lives = [Life(status=503)]
    async with runner_in(world) as runner:
        runner.begin("web", Release(1, IMAGE, {"deploy": deploy}))
        assert await finish(world, 1) == "failed"
        assert f"within {limit_s:g} s" in world.reason(1)
        assert limit_s <= world.time < limit_s + 1


async def test_a_release_that_was_ended_from_outside_leaves_nothing_and_says_no_more() -> None:
    world = World()
    world.lives = [Life(status=200), Life(status=503)]
    async with runner_in(world) as runner:
        runner.begin("web", Release(1, IMAGE))
        assert await finish(world, 1) == "complete"
        runner.begin("web", Release(2, IMAGE))
        runner.begin("web", Release(3, IMAGE))
        await settled(lambda: len(world.boxes) == 2)
        world.ended |= {("web", 2), ("web", 3)}
        await settled(lambda: len(world.boxes) == 1)
        await settled(lambda: any("broken off" in line for line in world.said))
        assert (world.status(2), world.status(3)) == ("running", "pending")
        serving = runner.serving("web")
        assert serving is not None
        assert serving.version == 1
        runner.begin("web", Release(4, IMAGE))
        assert await finish(world, 4) == "complete"


async def test_a_newer_release_supersedes_the_one_that_waits_not_the_one_at_work() -> None:
    world = World()
    async with runner_in(world) as runner:
        world.gate.clear()
        runner.begin("web", Release(1, IMAGE))
        runner.begin("web", Release(2, IMAGE))
        runner.begin("web", Release(3, IMAGE))
        runner.begin("shop", Release(1, IMAGE))
        assert world.status(2) == "superseded"
        assert "version 3" in world.reason(2)
        assert world.status(3) == "pending"
        world.gate.set()
        assert await finish(world, 3) == "complete"
        assert world.status(1) == "complete"
        assert world.status(2) == "superseded"
        assert await finish(world, 1, "shop") == "complete"


@pytest.mark.parametrize(
    ("image", "digests", "fails", "reason"),
    [
        ("127.0.0.1:20001/web:latest", (IMAGE,), None, "not pinned by a digest"),
        (IMAGE, ("127.0.0.1:20001/web@sha256:" + "cd" * 32,), None, "after it was pulled"),
        (IMAGE, (IMAGE,), EngineRefused(200, "denied: not yours"), "denied: not yours"),
        (IMAGE, (IMAGE,), BuilderFull("the disk is full", hint=""), "the disk is full"),
        (IMAGE, (IMAGE,), RuntimeError("a defect"), "a defect"),
    ],
)
async def test_what_cannot_be_had_fails_before_anything_is_made(
    image: str, digests: tuple[str, ...], fails: Exception | None, reason: str
) -> None:
    world = World()
    world.digests = digests
    world.pull_fails = fails
    async with runner_in(world) as runner:
        runner.begin("web", Release(1, image))
        assert await finish(world, 1) == "failed"
        assert reason in world.reason(1)
        assert world.bodies == []
        # The next one is not held up by it.
        world.pull_fails, world.digests = None, (IMAGE,)
        runner.begin("web", Release(2, IMAGE))
        assert await finish(world, 2) == "complete"


async def test_images_of_others_are_pulled_without_our_credentials() -> None:
    world = World()
    foreign = f"registry.example/thing@{DIGEST}"
    async with runner_in(world) as runner:
        runner.begin("web", Release(1, foreign))
        await finish(world, 1)
    assert world.pulls == [(foreign, "", "")]


async def test_a_stop_breaks_off_what_is_under_way_and_leaves_what_serves() -> None:
    world = World()
    async with runner_in(world) as runner:
        runner.begin("web", Release(1, IMAGE))
        await finish(world, 1)
        world.lives = [Life(answers_at=None)]
        runner.begin("web", Release(2, IMAGE))
        await settled(lambda: "start fly-build-web-v2-m2" in world.said)
        world.gate.clear()
        runner.begin("web", Release(3, IMAGE))
        await settled(lambda: world.status(3) == "pending")
    assert world.status(2) == "failed"
    assert world.status(3) == "failed"
    assert list(world.boxes) == ["fly-build-web-v1-m1"]
    assert world.machines == {"m1"}


async def test_an_old_one_that_will_not_end_does_not_fail_the_new_one() -> None:
    world = World()
    async with runner_in(world) as runner:
        runner.begin("web", Release(1, IMAGE))
        await finish(world, 1)
        world.stop_fails = EngineRefused(500, "it hangs")
        runner.begin("web", Release(2, IMAGE))
        assert await finish(world, 2) == "complete"
        assert any("it hangs" in line for line in world.said)
        assert world.machines == {"m2"}


async def test_after_a_restart_what_should_run_runs_and_nothing_else() -> None:
    world = World()
    async with runner_in(world) as runner:
        for app in ("web", "shop", "gone"):
            runner.begin(app, Release(4, IMAGE))
            await finish(world, 4, app)
        kept = [
            Kept(machine.id, app, machine.address, Release(4, IMAGE))
            for app in ("web", "shop", "gone")
            if (machine := runner.serving(app))
        ]
        older = Kept("m0", "web", IPv6Address("fdaa::9"), Release(3, IMAGE))
    world.machines.add("m0")
    web, shop = "fly-build-web-v4-m1", "fly-build-shop-v4-m2"
    box, life, began = world.boxes[shop]
    world.boxes[shop] = (replace(box, status="exited"), life, began)
    await world.remove("fly-build-gone-v4-m3")
    await world.create("half-made", {"Labels": {"fly-build": "o1", "fly-build.machine": "m9"}})
    await world.create("not-ours", {"Labels": {"fly-build": "o2", "fly-build.machine": "m1"}})
    world.said.clear()
    world.statuses.clear()
    async with runner_in(world) as runner:
        await runner.adopt([*kept, older])
        assert "route web to m1" in world.said
        assert f"start {web}" not in world.said
        assert f"start {shop}" in world.said
        assert "remove half-made" in world.said
        assert await finish(world, 4, "gone") == "complete"
        assert set(world.boxes) == {web, shop, "fly-build-gone-v4-m6", "not-ours"}
        assert world.machines == {"m1", "m2", "m6"}
        web_machine = runner.serving("web")
        assert web_machine is not None
        assert web_machine.port == 8080


async def test_a_connection_goes_where_the_container_is_now() -> None:
    world = World()
    async with runner_in(world) as runner:
        runner.begin("web", Release(1, IMAGE))
        await finish(world, 1)
        machine = runner.serving("web")
        assert machine is not None
        box, life, began = world.boxes[machine.container]
        world.boxes[machine.container] = (replace(box, address="10.0.0.77"), life, began)
        (await runner.connect(machine, 9000)).close()
        assert world.connected == [("10.0.0.77", 9000)]
        life.ends_at = 0.0
        with pytest.raises(ConnectionRefusedError):
            await runner.connect(machine, 9000)
        await runner.remove("web")
        with pytest.raises(ConnectionRefusedError):
            await runner.connect(machine, 9000)
        assert world.machines == set()


def test_a_container_may_do_little_and_publishes_nothing() -> None:
    release = Release(7, IMAGE, {"env": {"GREETING": "hi", "N": 3}})
    body = container_body("m1", "web", release, owner="o1", port=8080)
    assert body["Env"] == [
        "PORT=8080",
        "FLY_APP_NAME=web",
        "FLY_MACHINE_ID=m1",
        "GREETING=hi",
        "N=3",
    ]
    host = body["HostConfig"]
    assert isinstance(host, dict)
    assert host["SecurityOpt"] == ["no-new-privileges"]
    # Only once it has answered is a machine started again by the engine.
    assert "RestartPolicy" not in host
    assert host["Memory"] == host["MemorySwap"] == 512 << 20
    assert 0 < host["PidsLimit"] <= 4096
    assert not host["PublishAllPorts"]
    assert host.keys().isdisjoint({"PortBindings", "Privileged", "Binds", "NetworkMode"})


@given(st.binary(max_size=64) | st.sampled_from([b"HTTP/1.1 200 OK\r\n", b"HTTP/1.0 404\n"]))
def test_a_status_line_is_a_status_or_an_error(line: bytes) -> None:
    try:
        assert 100 <= status_of(line) < 600
    except OSError:
        assert not line.startswith(b"HTTP/1.1 200 OK\r\n")


async def test_the_probe_speaks_http_through_the_given_connection() -> None:
    world = World()
    asked: list[bytes] = []
    answers = [
        b"",
        b"SSH-2.0-x\r\n",
        b"x" * 9000,
        b"HTTP/1.1 503 Busy\r\n\r\n",
        b"HTTP/1.1 302 F\r\n\r\n",
    ]

    async def connect(address: str, port: int, *, limit_s: float) -> socket:
        near, far = socketpair()
        near.setblocking(False)
        far.sendall(answers.pop(0))
        asked.append(f"{address}:{port}".encode())
        conversations.append(far)
        far.shutdown(1)
        return near

    conversations: list[socket] = []
    async with Runner(
        world,
        owner="o1",
        registry="r",
        ledger=world,
        surroundings=world,
        connect=connect,
        report=world.said.append,
        now=world.now,
        sleep=world.sleep,
    ) as runner:
        runner.begin("web", Release(1, IMAGE, {"http_service": {"checks": [{"path": "/up"}]}}))
        async with asyncio.timeout(30):
            while world.statuses.get(("web", 1), ("",))[0] != "complete":  # noqa: ASYNC110
                await asyncio.sleep(0)
    assert answers == []
    assert asked == [b"10.0.0.1:8080"] * 5
    assert world.time == 1.0
    assert conversations[-1].recv(999).startswith(b"GET /up HTTP/1.1\r\nHost: 10.0.0.1:8080\r\n")
    for conversation in conversations:
        conversation.close()

"""A gateway is killed and started again under a build and a push: both come to their good end.

wireguard-go is the gateway and has lost all its sessions; behind it, the kernel's TCP and the
engine of the embedded platform, which never hear of it. Every run takes the quarter of a minute in
which WireGuard finds out, so there are few of them.
"""

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from builder_orch.api.models import App, Build, Builder, Organization, Secret
from builder_orch.events import Event, Log, Progress, Retry
from builder_orch.pipeline.context import Context, Directory, scan
from builder_orch.pipeline.deploy import Deployed, Order, Record, make
from builder_orch.pipeline.engine import BUILDKIT, CLASSIC, Engine, Login, wait_for_engine
from builder_orch.pipeline.liveness import Patience, Return, persist
from builder_orch.pipeline.outside import World
from builder_orch.selfhost.process import run_directory
from builder_orch.tunnel.driver import open_tunnel
from tests.pipeline.fake_world import FakePlatform
from tests.system.conftest import SERVE
from tests.system.conversation import bound, settings
from tests.system.embedded import Embedded, app
from tests.system.lab import THEIRS, Lab, laboratory, run
from tests.tunnel.joined import public

pytestmark = [pytest.mark.system, pytest.mark.long]

STALL_S = 17.0
"""What WireGuard takes to notice, and TCP to go on."""
OCTETS = 200_000_000
DOOR = """
import asyncio, sys
async def pour(reader, writer):
    try:
        while octets := await reader.read(1 << 18):
            writer.write(octets)
            await writer.drain()
        writer.write_eof()
    except OSError:
        writer.transport.abort()
async def meet(reader, writer):
    far_reader, far_writer = await asyncio.open_unix_connection(sys.argv[2])
    await asyncio.gather(pour(reader, far_writer), pour(far_reader, writer))
    far_writer.close()
    writer.close()
async def main():
    server = await asyncio.start_server(meet, "::", 2375)
    print("open", flush=True)
    await server.serve_forever()
asyncio.run(main())
"""
"""python -c DOOR ADDRESS SOCKET: lets callers of port 2375 in to an engine's Unix socket."""


@dataclass
class Gateway:
    """wireguard-go, and what it takes to start the same one again."""

    lab: Lab
    own: bytes
    client: bytes
    port: int = 0
    down_s: float = 0.0
    killed_at: float = 0.0

    def start(self) -> None:
        port = self.lab.wireguard_go(private_key=self.own, our_public_key=public(self.client))
        self.port = self.port or port
        inside = ("ip", "netns", "exec", self.lab.right)
        run(*inside, "wg", "set", self.lab.interface, "listen-port", str(self.port))

    def kill_and_start(self) -> None:
        """As a crash and a supervisor would."""
        self.killed_at = time.monotonic()
        program = self.lab.children.pop()
        program.kill()
        program.wait()
        self.start()
        self.down_s = time.monotonic() - self.killed_at


@dataclass
class Story:
    """What was told, and the longest silence in it after the gateway was killed."""

    gateway: Gateway
    moment: Callable[[Event], bool]
    events: list[Event] = field(default_factory=list)
    silence_s: float = 0.0
    killing: "asyncio.Future[None] | None" = None
    _last: float = 0.0

    def __call__(self, event: Event) -> None:
        now = time.monotonic()
        self.events.append(event)
        if self.killing is not None and isinstance(event, Log | Progress):
            self.silence_s = max(self.silence_s, now - self._last)
        if isinstance(event, Log | Progress):
            self._last = now
        if self.killing is None and self.moment(event):
            self.killing = asyncio.ensure_future(asyncio.to_thread(self.gateway.kill_and_start))


@asynccontextmanager
async def reaching(
    embedded: Embedded, moment: Callable[[Event], bool]
) -> AsyncGenerator[tuple[Engine, Return, Story]]:
    """The embedded platform's engine behind a gateway that is killed at a moment of the story."""
    with laboratory() as lab:
        door = lab.spawn(DOOR, str(THEIRS), str(run_directory(embedded.root) / "docker.sock"))
        assert door.stdout is not None
        assert await asyncio.to_thread(door.stdout.readline) == b"open\n"
        gateway = Gateway(lab, os.urandom(32), os.urandom(32))
        await asyncio.to_thread(gateway.start)
        story = Story(gateway, moment)
        config = settings(gateway.port, gateway.own, gateway.client, None)
        async with open_tunnel(config, carrier=bound(lab)) as tunnel:
            engine = await wait_for_engine(
                Engine(THEIRS, tunnel.dial, emit=story), print, limit_s=30
            )
            builder = Builder("fly-builder", "m1", "started", THEIRS)
            yield engine, Return(world_of(embedded), APP, builder, tunnel, story), story


APP = App("a1", "lasting", Organization("o1", "personal", "Personal"))


class Platform(FakePlatform):
    """Has one builder, which is behind the gateway."""

    async def ensure_builder(self, app: App, region: str | None) -> Builder:
        return Builder("fly-builder", "m1", "started", THEIRS)


def world_of(embedded: Embedded) -> World:
    record = embedded.record

    async def credentials() -> Login:
        return Login("x", Secret(record["token"]))

    def no_tunnel(*_: object) -> None:
        raise AssertionError

    return World(Platform(), no_tunnel, record["registry"], credentials)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def known(embedded: Embedded, tmp_path_factory: pytest.TempPathFactory) -> Embedded:
    """A platform that knows the app, so that its registry takes the image."""
    folder = app(tmp_path_factory.mktemp("lasting") / "app", SERVE, name=APP.name)
    built = embedded.run("build", folder, "--create-app")
    assert built.code == 0, built.said
    return embedded


def context_of(folder: Path) -> tuple[Context, str]:
    """Something to send for a while, to run for a while and to push for a while."""
    loop = "i=0; while [ $i -lt 25 ]; do echo $i; sleep 1; i=$((i+1)); done"
    lines = [
        "COPY large /large",
        'RUN ["/bin/busybox", "sha256sum", "/large"]',
        f'RUN ["/bin/busybox", "sh", "-c", "{loop}"]',
    ]
    app(folder, *[line.replace("sleep", "/bin/busybox sleep") for line in lines], name=APP.name)
    digest = hashlib.sha256()
    with (folder / "large").open("wb") as file:
        for _ in range(OCTETS // 1_000_000):
            octets = os.urandom(1_000_000)
            digest.update(octets)
            file.write(octets)
    return scan(Directory(folder), lambda _: None), digest.hexdigest()


MOMENTS: dict[str, Callable[[Event], bool]] = {
    "upload": lambda event: isinstance(event, Progress) and event.phase == "context",
    "run": lambda event: isinstance(event, Log) and event.text == "3",
    "push": lambda event: isinstance(event, Progress) and event.phase == "push",
}
ROUNDS = [(CLASSIC, "upload"), (CLASSIC, "run"), (CLASSIC, "push")]
ROUNDS += [(BUILDKIT, "upload"), (BUILDKIT, "run")]


@pytest.mark.parametrize(("builder", "moment"), ROUNDS)
async def test_a_gateway_that_is_killed_and_started_again(
    known: Embedded, tmp_path: Path, builder: str, moment: str
) -> None:
    context, digest = await asyncio.to_thread(context_of, tmp_path / "app")
    async with reaching(known, MOMENTS[moment]) as (engine, way, story):
        order = Order(Directory(tmp_path / "app"), APP.name, builder=builder, node="tests")
        record = Record(Build("b1", "running"), story)

        async def work(there: Engine) -> Deployed:
            return await make(order, way.world, there, context, APP, record, Patience())

        made = await persist(engine, work, way, story)
        assert story.killing is not None
        await story.killing
    assert made.pushed is not None
    printed = [event.text for event in story.events if isinstance(event, Log)]
    assert any(line.startswith(digest) for line in printed), "not what was sent"
    assert story.silence_s <= STALL_S + story.gateway.down_s
    again = [event.cause for event in story.events if isinstance(event, Retry)]
    # TCP outlives the gateway; only a session of BuildKit's, which asks more often, may not.
    assert len(again) <= (0 if builder == CLASSIC else 1), again

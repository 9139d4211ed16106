"""A platform, a tunnel and an app that answer as told, and write down what they were asked."""

import asyncio
import socket
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from ipaddress import IPv6Address

from builder_orch.api.models import (
    App,
    Build,
    Builder,
    Organization,
    Peer,
    Region,
    Release,
    Secret,
)
from builder_orch.errors import AppUnknown, TunnelNotUp
from builder_orch.pipeline.engine import Login
from builder_orch.pipeline.outside import Limits, World
from builder_orch.tunnel.carrier import Route, Sign
from builder_orch.tunnel.config import PublicKey, TunnelConfig
from tests.pipeline.fake_engine import FakeEngine, running

REGISTRY = "registry.test:5000"
ORGANIZATION = Organization("o1", "personal", "Personal")
APP = App("a1", "hello", ORGANIZATION)
TOKEN = "planted-token"


@dataclass
class FakePlatform:
    """`failures` are raised by the method of that name, `held` methods never answer."""

    apps: dict[str, App] = field(default_factory=lambda: {"hello": APP})
    failures: dict[str, Exception] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)
    reached: dict[str, asyncio.Event] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    machine_id: str = "m1"
    peers: dict[str, str] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)
    builds: dict[str, dict[str, object]] = field(default_factory=dict)
    releases: dict[int, Release] = field(default_factory=dict)
    updates: list[str] = field(default_factory=list)
    definitions: list[Mapping[str, object]] = field(default_factory=list)
    knows_peers: bool = True
    installed: bool | None = None
    has_gateway: bool = True
    machine: str = "started"
    turns: list[tuple[str, bool, str]] = field(
        default_factory=lambda: [("running", True, "starting"), ("complete", False, "")]
    )

    def arrival(self, name: str) -> asyncio.Event:
        return self.reached.setdefault(name, asyncio.Event())

    async def _called(self, name: str) -> None:
        self.calls.append(name)
        self.arrival(name).set()
        await asyncio.sleep(0)
        if name in self.held:
            await asyncio.Event().wait()
        if name in self.failures:
            raise self.failures[name]

    async def organization(self, slug: str | None) -> Organization:
        await self._called("organization")
        return ORGANIZATION

    async def app(self, name: str) -> App:
        await self._called("app")
        if name not in self.apps:
            raise AppUnknown(f"there is no app {name}", hint="Create it with --create-app.")
        return self.apps[name]

    async def create_app(self, organization: Organization, name: str) -> App:
        await self._called("create_app")
        self.apps[name] = App("a2", name, organization)
        return self.apps[name]

    async def nearest_region(self) -> Region:
        await self._called("nearest_region")
        return Region("here", "Here", self.has_gateway)

    async def add_peer(
        self,
        organization: Organization,
        name: str,
        public_key: str,
        *,
        region: str | None,
        ephemeral: bool,
    ) -> Peer:
        self.peers[name] = public_key
        self.keys.append(public_key)
        await self._called("add_peer")
        return Peer(IPv6Address("fdaa:0:1:a::9"), "192.0.2.1:51820", PublicKey(bytes([7]) * 32))

    async def remove_peer(self, organization: Organization, name: str) -> None:
        await self._called("remove_peer")
        del self.peers[name]

    async def validate_peers(self, addresses: Iterable[IPv6Address]) -> list[IPv6Address]:
        await self._called("validate_peers")
        return [] if self.knows_peers else list(addresses)

    async def is_installed(self, address: IPv6Address) -> bool | None:
        await self._called("is_installed")
        return self.installed

    async def machine_state(self, app_name: str, machine_id: str) -> str:
        await self._called("machine_state")
        return self.machine

    async def ensure_builder(self, app: App, region: str | None) -> Builder:
        await self._called("ensure_builder")
        return Builder("fly-builder", self.machine_id, "started", IPv6Address("fdaa:0:1::b"))

    async def create_build(self, app: App, *, machine_id: str, strategies: Iterable[str]) -> Build:
        await self._called("create_build")
        name = f"b{len(self.builds) + 1}"
        self.builds[name] = {"status": "running"}
        return Build(name, "running")

    async def finish_build(
        self,
        app: App,
        build: Build,
        *,
        status: str,
        image: tuple[str, str, int] | None,
        logs: str,
        timings_ms: Mapping[str, float],
    ) -> Build:
        await self._called("finish_build")
        assert self.builds[build.id]["status"] == "running"
        self.builds[build.id] = {
            "status": status,
            "image": image,
            "logs": logs,
            "timings": set(timings_ms),
        }
        return Build(build.id, status)

    async def create_release(
        self,
        app: App,
        *,
        image: str,
        build: Build,
        strategy: str,
        definition: Mapping[str, object],
    ) -> Release:
        await self._called("create_release")
        version = len(self.releases) + 1
        self.definitions.append(definition)
        release = Release(f"r{version}", version, "pending", True, image=image)
        self.releases[version] = release
        return release

    async def release(self, app: App, version: int) -> Release:
        await self._called("release")
        status, in_progress, reason = self.turns.pop(0) if len(self.turns) > 1 else self.turns[0]
        return replace(
            self.releases[version], status=status, in_progress=in_progress, reason=reason
        )

    async def update_release(
        self, release: Release, *, status: str, metadata: Mapping[str, object]
    ) -> Release:
        await self._called("update_release")
        self.updates.append(status)
        return release


@dataclass
class FakeTunnel:
    """Dials the engine, or the app for a name; `open` says whether its owner still has it."""

    engine: FakeEngine
    app_port: int = 0
    open: bool = False
    opened: int = 0
    failure: str = ""
    hold: str = ""
    dialled: list[tuple[str, int]] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    configs: list[TunnelConfig] = field(default_factory=list)
    moves: list[Route] = field(default_factory=list)
    shown: tuple[Sign, ...] = ()
    usurped: asyncio.Event = field(default_factory=asyncio.Event)

    async def dial(self, host: str, port: int, *, timeout_s: float = 30.0) -> socket.socket:
        self.dialled.append((host, port))
        if not host.endswith(".internal"):
            return await self.engine.dial(host, port)
        if self.hold == "verify":
            self.arrived.set()
            await asyncio.Event().wait()
        if self.failure == "verify":
            raise ConnectionRefusedError("refused")
        return socket.create_connection(("127.0.0.1", self.app_port))

    async def resolve(self, name: str) -> list[IPv6Address]:
        if self.failure in {"resolve", "inside"}:
            raise TimeoutError
        return [IPv6Address("fdaa:0:1::3")]

    async def ready(self, *, timeout_s: float, report: Callable[[str], None]) -> float:
        report("handshake attempt 1 unanswered")
        if self.hold == "ready":
            self.arrived.set()
            await asyncio.Event().wait()
        if self.failure == "ready":
            await asyncio.sleep(timeout_s)
            raise TunnelNotUp("the gateway did not answer", hint="Check UDP.")
        return 0.012

    async def ping(self, address: IPv6Address, *, timeout_s: float = 5.0) -> float:
        if self.failure == "inside":
            raise TimeoutError
        return 0.001

    async def twin(self) -> None:
        await self.usurped.wait()

    async def signs(self) -> tuple[Sign, ...]:
        return self.shown

    async def route(self) -> Route:
        if self.failure == "route":
            raise ConnectionResetError("the tunnel's process has ended")
        return Route("udp", "192.0.2.1:51820", "it answered first")

    async def moved(self, route: Route) -> Route:
        if self.failure == "moved":
            raise ConnectionResetError("the tunnel's process has ended")
        if self.moves:
            return self.moves.pop(0)
        await asyncio.Event().wait()
        return route

    @asynccontextmanager
    async def opening(self, config: TunnelConfig) -> AsyncGenerator["FakeTunnel"]:
        self.configs.append(config)
        self.open = True
        self.opened += 1
        try:
            yield self
        finally:
            self.open = False


@dataclass
class FakeWorld:
    """All of it; `status` is what the app answers."""

    engine: FakeEngine
    platform: FakePlatform
    tunnel: FakeTunnel
    statuses: list[int] = field(default_factory=lambda: [200])
    asked: list[bytes] = field(default_factory=list)
    limits: Limits = field(default_factory=Limits)

    @property
    def world(self) -> World:
        async def credentials() -> Login:
            return Login("x", Secret(TOKEN))

        async def pause(seconds: float) -> None:
            await asyncio.sleep(0)

        return World(self.platform, self.tunnel.opening, REGISTRY, credentials, self.limits, pause)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked.append(await reader.readuntil(b"\r\n\r\n"))
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: 5\r\n\r\nhello".encode())
        await writer.drain()
        writer.close()

    def leaves_nothing(self) -> bool:
        """Is every resource of every run ended?"""
        running_builds = [b for b in self.platform.builds.values() if b["status"] == "running"]
        return not (self.tunnel.open or self.platform.peers or running_builds)


@asynccontextmanager
async def fake_world() -> AsyncGenerator[FakeWorld]:
    """A world in which everything goes well until it is told otherwise."""
    async with running(FakeEngine()) as engine:
        outside = FakeWorld(engine, FakePlatform(), FakeTunnel(engine))
        server = await asyncio.start_server(outside.answer, "127.0.0.1", 0)
        outside.tunnel.app_port = server.sockets[0].getsockname()[1]
        try:
            yield outside
        finally:
            server.close()

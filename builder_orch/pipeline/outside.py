"""What a run needs from outside itself; the command line has the real ones, a test its own."""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from typing import Protocol

from builder_orch.api.keyring import Keyring
from builder_orch.api.models import App, Build, Builder, Organization, Peer, Region, Release
from builder_orch.events import Emit, Warned
from builder_orch.pipeline.engine import Engine, Login, Pause
from builder_orch.tunnel.carrier import Route, Sign
from builder_orch.tunnel.config import TunnelConfig

CLEAN_UP_S = 5.0
"""How long one thing that has to be ended may take; then it is left, and said so."""


class Platform(Protocol):
    """Those operations of `api.client.Platform` that a run uses."""

    async def organization(self, slug: str | None) -> Organization: ...
    async def app(self, name: str) -> App: ...
    async def create_app(self, organization: Organization, name: str) -> App: ...
    async def nearest_region(self) -> Region: ...
    async def add_peer(
        self,
        organization: Organization,
        name: str,
        public_key: str,
        *,
        region: str | None,
        ephemeral: bool,
    ) -> Peer: ...
    async def remove_peer(self, organization: Organization, name: str) -> None: ...
    async def validate_peers(self, addresses: Iterable[IPv6Address]) -> list[IPv6Address]: ...
    async def is_installed(self, address: IPv6Address) -> bool | None: ...
    async def machine_state(self, app_name: str, machine_id: str) -> str: ...
    async def ensure_builder(self, app: App, region: str | None) -> Builder: ...
    async def create_build(
        self, app: App, *, machine_id: str, strategies: Iterable[str]
    ) -> Build: ...
    async def finish_build(
        self,
        app: App,
        build: Build,
        *,
        status: str,
        image: tuple[str, str, int] | None,
        logs: str,
        timings_ms: Mapping[str, float],
    ) -> Build: ...
    async def create_release(
        self,
        app: App,
        *,
        image: str,
        build: Build,
        strategy: str,
        definition: Mapping[str, object],
    ) -> Release: ...
    async def release(self, app: App, version: int) -> Release: ...
    async def update_release(
        self, release: Release, *, status: str, metadata: Mapping[str, object]
    ) -> Release: ...


class Tunnel(Protocol):
    """Those abilities of `tunnel.Tunnel` that a run uses."""

    async def dial(self, host: str, port: int, *, timeout_s: float = 30.0) -> socket.socket: ...
    async def resolve(self, name: str) -> list[IPv6Address]: ...
    async def ready(self, *, timeout_s: float, report: Callable[[str], None]) -> float: ...
    async def ping(self, address: IPv6Address, *, timeout_s: float = 5.0) -> float: ...
    async def route(self) -> Route: ...
    async def signs(self) -> tuple[Sign, ...]: ...
    async def moved(self, route: Route) -> Route: ...
    async def twin(self) -> None: ...


OpenTunnel = Callable[[TunnelConfig], AbstractAsyncContextManager[Tunnel]]
TakePeer = Callable[[Organization, Emit], Awaitable[TunnelConfig]]
Credentials = Callable[[], Awaitable[Login]]
Logins = Callable[[str], Awaitable[Login | None]]
"""For a registry's host; None where there is none."""


async def nobody(host: str) -> Login | None:  # noqa: ARG001
    """For no registry at all."""
    return None


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds after which a wait is given up. A peer may take 95 s to reach its gateway."""

    provision_s: float = 240.0
    handshake_s: float = 120.0
    resolver_s: float = 20.0
    engine_s: float = 120.0
    build_s: float | None = None
    stall_s: float | None = 600.0
    return_s: float = 60.0
    release_s: float = 300.0
    answer_s: float = 10.0


@dataclass(frozen=True, slots=True)
class World:
    """The platform, a way to it and its registry. `credentials` are asked for at each push.

    `keyring` is where peers are written down, so that what a killed run leaves is removed by the
    next one; `identity` names the platform there. `logins` are the user's own, for other
    registries; `here` is an engine on this machine.
    """

    platform: Platform
    open_tunnel: OpenTunnel
    registry: str
    credentials: Credentials
    limits: Limits = field(default_factory=Limits)
    pause: Pause = asyncio.sleep
    shared_peer: TakePeer | None = None
    """Where the peer comes from if it is not one of this run's own."""
    keyring: Keyring | None = None
    identity: str = ""
    logins: Logins = nobody
    here: Engine | None = None

    async def login(self, host: str) -> Login | None:
        """For a registry's host: the platform's own is for its own."""
        if host == self.registry.partition("/")[0]:
            return await self.credentials()
        return await self.logins(host)


async def settle(doing: str, work: Awaitable[object], emit: Emit) -> bool:
    """Finish a piece of tidying up, also while a run is being cancelled; did it work?

    A failure is only told: what brought the run to its end matters more.
    """
    task = asyncio.ensure_future(work)
    await asyncio.wait({task}, timeout=CLEAN_UP_S)
    if not task.done():
        task.cancel()
        emit(Warned("clean-up", f"{doing} took more than {CLEAN_UP_S:g} s and was left"))
        return False
    error = task.exception()
    if error is None:
        return True
    if not isinstance(error, Exception):
        raise error
    emit(Warned("clean-up", f"{doing} failed: {error}"))
    return False

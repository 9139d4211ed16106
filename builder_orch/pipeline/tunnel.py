"""From a builder's address to an engine that answers: peer, handshake, resolver, engine."""

import asyncio
import contextlib
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import ClassVar

from builder_orch.api.models import Builder, Organization
from builder_orch.errors import TunnelNotUp
from builder_orch.events import Emit, PhaseReason, Transport, Warned
from builder_orch.pipeline.engine import Engine, wait_for_engine
from builder_orch.pipeline.outside import Limits, OpenTunnel, Tunnel, World
from builder_orch.pipeline.peer import AddPeer
from builder_orch.tunnel.carrier import Route
from builder_orch.tunnel.config import TunnelConfig

PROBE = "_api.internal"
"""A name that the resolver inside always knows."""


@dataclass(frozen=True, slots=True)
class Reached:
    """A tunnel that works and an engine behind it."""

    tunnel: Tunnel
    engine: Engine
    handshake_s: float

    def __str__(self) -> str:
        return (
            f"up, handshake {self.handshake_s * 1000:.0f} ms, "
            f"engine API {self.engine.version} at [{self.engine.address}]"
        )


@dataclass(frozen=True, slots=True)
class Open:
    """Open the tunnel, wait for the handshake, prove that packets go both ways."""

    open_tunnel: OpenTunnel
    closing: AsyncExitStack
    limits: Limits
    name: ClassVar[str] = "tunnel"

    async def run(self, given: TunnelConfig, emit: Emit) -> tuple[Tunnel, float]:
        tunnel = await self.closing.enter_async_context(self.open_tunnel(given))

        def report(reason: str) -> None:
            emit(PhaseReason(self.name, reason))

        report("waiting for the handshake")
        handshake_s = await tunnel.ready(timeout_s=self.limits.handshake_s, report=report)
        route = await tunnel.route()
        emit(Transport(route.kind, route.endpoint, handshake_s, route.why))
        watching = asyncio.create_task(_tell_moves(tunnel, route, emit))
        self.closing.callback(watching.cancel)
        report(f"asking the resolver inside for {PROBE}")
        try:
            async with asyncio.timeout(self.limits.resolver_s):
                await tunnel.resolve(PROBE)
        except OSError as error:
            raise TunnelNotUp(
                f"the gateway answered the handshake, but the resolver [{given.dns}] inside the "
                f"tunnel does not give {PROBE}: {str(error) or 'no answer in time'}",
                hint="Run it again; if it stays so, the gateway does not forward this peer yet.",
            ) from None
        return tunnel, handshake_s


async def _tell_moves(tunnel: Tunnel, route: Route, emit: Emit) -> None:
    """Say when the gateway is reached in another way than before, until the tunnel ends."""
    with contextlib.suppress(OSError):
        while True:
            route = await tunnel.moved(route)
            emit(Warned("carrier", f"now by {route.kind} {route.endpoint}: {route.why}"))


@dataclass(frozen=True, slots=True)
class Reach:
    """All of it, as one phase: who waits for a tunnel does not care for its parts."""

    world: World
    organization: Organization
    closing: AsyncExitStack
    host: str
    name: ClassVar[str] = "tunnel"

    async def run(self, given: Builder, emit: Emit) -> Reached:
        world = self.world
        config = await AddPeer(world.platform, self.closing, self.host).run(self.organization, emit)
        tunnel, handshake_s = await Open(world.open_tunnel, self.closing, world.limits).run(
            config, emit
        )

        def report(reason: str) -> None:
            emit(PhaseReason(self.name, reason))

        report(f"waiting for the engine at [{given.address}]")
        engine = await wait_for_engine(
            Engine(given.address, tunnel.dial, pause=world.pause, emit=emit),
            report,
            limit_s=world.limits.engine_s,
        )
        return Reached(tunnel, engine, handshake_s)

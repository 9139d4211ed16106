"""From a builder's address to an engine that answers: peer, handshake, resolver, engine."""

import asyncio
import contextlib
from contextlib import AsyncExitStack
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import ClassVar

from builder_orch.api.models import App, Builder
from builder_orch.errors import BuilderNotProvisioned, BuilderOrchError, ResolverDown
from builder_orch.events import Emit, PhaseReason, Transport, Warned
from builder_orch.pipeline.engine import Engine, wait_for_engine
from builder_orch.pipeline.outside import Limits, OpenTunnel, Platform, Tunnel, World
from builder_orch.pipeline.peer import AddPeer
from builder_orch.pipeline.provision import Provision
from builder_orch.pipeline.readiness import Readiness, Witness
from builder_orch.tunnel.carrier import Route
from builder_orch.tunnel.config import TunnelConfig

PING_S = 3.0
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
    platform: Platform | None = None
    name: ClassVar[str] = "tunnel"

    async def run(self, given: TunnelConfig, emit: Emit) -> tuple[Tunnel, float]:
        tunnel = await self.closing.enter_async_context(self.open_tunnel(given))

        def report(reason: str) -> None:
            emit(PhaseReason(self.name, reason))

        report("waiting for the handshake")
        witness = Witness(self.platform, given.address) if self.platform is not None else None
        handshake_s = await Readiness(tunnel, witness, self.limits.handshake_s, report).wait()
        route = await tunnel.route()
        emit(Transport(route.kind, route.endpoint, handshake_s, route.why))
        watching = asyncio.create_task(_tell_moves(tunnel, route, emit))
        self.closing.callback(watching.cancel)
        report(f"asking the resolver inside for {PROBE}")
        try:
            async with asyncio.timeout(self.limits.resolver_s):
                await tunnel.resolve(PROBE)
        except OSError as error:
            cause = str(error) or "no answer in time"
            raise await _no_names(tunnel, given, cause) from None
        return tunnel, handshake_s


async def _no_names(tunnel: Tunnel, config: TunnelConfig, cause: str) -> ResolverDown:
    """The gateway answered the handshake; does anything else come back from behind it?"""
    said = (
        f"the gateway answered the handshake, but the resolver [{config.dns}] inside the "
        f"tunnel does not give {PROBE}: {cause}"
    )
    if config.dns is not None:
        try:
            await tunnel.ping(config.dns, timeout_s=PING_S)
        except OSError:
            return ResolverDown(
                f"{said}; nor does it answer a ping",
                hint="Run it again; if it stays so, the gateway does not forward this peer's "
                "packets, which those who run the platform can mend.",
            )
    return ResolverDown(
        f"{said}; it does answer a ping",
        hint="Run it again; if it stays so, the resolver has failed, which those who run the "
        "platform can mend.",
    )


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
    app: App
    closing: AsyncExitStack
    host: str
    name: ClassVar[str] = "tunnel"

    async def run(self, given: Builder, emit: Emit) -> Reached:
        world = self.world
        take = world.shared_peer
        if take is None:
            own = AddPeer(world.platform, self.closing, self.host, world.keyring, world.identity)
            take = own.run
        config = await take(self.app.organization, emit)
        opening = Open(world.open_tunnel, self.closing, world.limits, world.platform)
        tunnel, handshake_s = await opening.run(config, emit)

        def report(reason: str) -> None:
            emit(PhaseReason(self.name, reason))

        async def again() -> IPv6Address:
            provision = Provision(world.platform, world.limits.return_s)
            return (await provision.run(self.app, emit)).builder.address

        report(f"waiting for the engine at [{given.address}]")
        try:
            engine = await wait_for_engine(
                Engine(given.address, tunnel.dial, pause=world.pause, emit=emit),
                report,
                limit_s=world.limits.engine_s,
                again=again,
            )
        except BuilderNotProvisioned as error:
            says = await _machine_state(world.platform, given)
            raise BuilderNotProvisioned(f"{error}; {says}", hint=error.hint) from None
        return Reached(tunnel, engine, handshake_s)


async def _machine_state(platform: Platform, builder: Builder) -> str:
    """What the platform says of a builder that does not answer."""
    machine = f"machine {builder.machine_id}"
    try:
        state = await platform.machine_state(builder.app_name, builder.machine_id)
    except BuilderOrchError as error:
        return f"the platform cannot be asked about its {machine} ({error})"
    if not state:
        return f"the platform has no {machine} any more"
    return f"the platform says its {machine} is {state}"

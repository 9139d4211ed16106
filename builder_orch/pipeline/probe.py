"""Bring a tunnel up only to see whether it comes up, by which carrier and why."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import ClassVar

from builder_orch.events import Emit, Warned
from builder_orch.pipeline.outside import Limits, OpenTunnel, Platform, Tunnel
from builder_orch.pipeline.tunnel import Open
from builder_orch.tunnel.carrier import Route
from builder_orch.tunnel.config import TunnelConfig

WATCH_EVERY_S = 1.0


GetConfig = Callable[[AsyncExitStack, Emit], Awaitable[TunnelConfig]]
"""A peer to try; what has to be undone afterwards is pushed onto the stack."""


@dataclass(frozen=True, slots=True)
class Probed:
    """A tunnel that came up: by which carrier and why, and how quickly.

    `twin` says whether somebody else was found to use the same key while it was watched.
    """

    route: Route
    handshake_s: float
    round_trip_s: float | None
    twin: bool = False

    def __str__(self) -> str:
        return f"{self.route.kind} {self.route.endpoint} carries"

    def values(self) -> dict[str, object]:
        """In JSON types."""
        trip = self.round_trip_s
        return {
            "carrier": self.route.kind,
            "endpoint": self.route.endpoint,
            "why": self.route.why,
            "handshake_ms": round(self.handshake_s * 1000, 1),
            "round_trip_ms": None if trip is None else round(trip * 1000, 1),
        }


@dataclass(frozen=True, slots=True)
class Probe:
    """Bring a tunnel up, see that names and pings are answered, and keep it for `watch_s`."""

    open_tunnel: OpenTunnel
    platform: Platform
    limits: Limits
    watch_s: float = 0.0
    name: ClassVar[str] = "tunnel"

    async def run(self, given: GetConfig, emit: Emit) -> Probed:
        async with AsyncExitStack() as closing:
            config = await given(closing, emit)
            opening = Open(self.open_tunnel, closing, self.limits, self.platform)
            tunnel, handshake_s = await opening.run(config, emit)
            trip = None if config.dns is None else await tunnel.ping(config.dns)
            twin = await _watch(tunnel, config, self.watch_s, emit)
            return Probed(await tunnel.route(), handshake_s, trip, twin)


async def _watch(tunnel: Tunnel, config: TunnelConfig, watch_s: float, emit: Emit) -> bool:
    """Keep talking, since only a tunnel that is used notices anything; was there a twin?"""
    if not watch_s or config.dns is None:
        return False
    twin = asyncio.ensure_future(tunnel.twin())
    try:
        async with asyncio.timeout(watch_s):
            while not twin.done():
                await _ask_again(tunnel, config.dns, emit)
                await asyncio.wait({twin}, timeout=WATCH_EVERY_S)
    except TimeoutError:
        return twin.done()
    finally:
        twin.cancel()
    return True


async def _ask_again(tunnel: Tunnel, address: IPv6Address, emit: Emit) -> None:
    try:
        await tunnel.ping(address, timeout_s=WATCH_EVERY_S)
    except OSError:
        emit(Warned("silence", f"no answer from [{address}] within {WATCH_EVERY_S:g} s"))

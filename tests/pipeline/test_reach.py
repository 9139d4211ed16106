"""How a run tells by what carrier the gateway is reached, and when that changes."""

import asyncio
from contextlib import AsyncExitStack
from ipaddress import IPv6Address, IPv6Network

from builder_orch.events import Event, Transport, Warned
from builder_orch.pipeline.outside import Limits
from builder_orch.pipeline.tunnel import Open
from builder_orch.tunnel.carrier import Route
from builder_orch.tunnel.config import PeerConfig, PrivateKey, PublicKey, TunnelConfig
from tests.pipeline.fake_engine import FakeEngine
from tests.pipeline.fake_world import FakeTunnel

PEER = PeerConfig(PublicKey(bytes([7]) * 32), (IPv6Network("fdaa:0:1::/48"),), ("192.0.2.1", 51820))
CONFIG = TunnelConfig(PrivateKey(bytes([1]) * 32), IPv6Address("fdaa:0:1:a::9"), (PEER,))


async def test_the_carrier_and_why_it_is_that_one_are_told_and_every_change_of_it() -> None:
    tunnel = FakeTunnel(FakeEngine())
    tunnel.moves = [
        Route("websocket", "wss://192.0.2.1:443", "UDP went silent"),
        Route("udp", "192.0.2.1:51820", "UDP answers again (3 probes)"),
    ]
    events: list[Event] = []
    told = asyncio.Event()

    def emit(event: Event) -> None:
        events.append(event)
        if sum(isinstance(event, Warned) for event in events) == 2:
            told.set()

    async with AsyncExitStack() as closing:
        await Open(tunnel.opening, closing, Limits()).run(CONFIG, emit)
        async with asyncio.timeout(10):
            await told.wait()
    (transport,) = [event for event in events if isinstance(event, Transport)]
    assert (transport.kind, transport.why) == ("udp", "it answered first")
    assert [event.message for event in events if isinstance(event, Warned)] == [
        "now by websocket wss://192.0.2.1:443: UDP went silent",
        "now by udp 192.0.2.1:51820: UDP answers again (3 probes)",
    ]

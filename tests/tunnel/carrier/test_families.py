"""UDP by two families at once. The second one is played by another loopback address, which every
machine has; nothing in the carrier looks at what kind of address it is.
"""

import asyncio
import os
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from ipaddress import IPv6Network
from typing import Any

import pytest

from builder_orch.errors import TunnelNotUp
from builder_orch.tunnel.carrier import REFUSED, SILENT
from builder_orch.tunnel.carrier.choice import AUTO, UDP, Choice
from builder_orch.tunnel.carrier.families import UdpFamilies
from builder_orch.tunnel.carrier.opening import open_carrier
from builder_orch.tunnel.carrier.udp import UdpCarrier
from builder_orch.tunnel.config import PeerConfig, PrivateKey, TunnelConfig
from builder_orch.tunnel.driver import Tunnel, open_tunnel
from builder_orch.tunnel.machine import Datagrams, Endpoint
from tests.tunnel.carrier.gate import Received
from tests.tunnel.joined import CLIENT, GATEWAY, NETWORK, public

FIRST, SECOND = "127.0.0.1", "127.0.0.2"
INITIATION = Datagrams(bytes([1]) + bytes(147), 148, ("", 0))
DATA = Datagrams(bytes([4]) + bytes(99), 100, ("", 0))


@asynccontextmanager
async def listening() -> AsyncGenerator[tuple[UdpFamilies, list[UdpCarrier], list[Received]]]:
    """Both families, and what each gateway hears."""
    gateways = [UdpCarrier.bind(host, 0) for host in (FIRST, SECOND)]
    heard = [Received(), Received()]
    for gateway, received in zip(gateways, heard, strict=True):
        gateway.start(received.deliver, received.settled)
    both = UdpFamilies(tuple(UdpCarrier.connect(gateway.endpoint) for gateway in gateways))
    try:
        yield both, gateways, heard
    finally:
        both.close()
        for gateway in gateways:
            gateway.close()


async def test_the_same_initiation_goes_both_ways_until_one_has_answered() -> None:
    async with listening() as (both, gateways, heard):
        back = Received()
        both.start(back.deliver, back.settled)
        both.send(INITIATION)
        await heard[0].until(lambda: len(heard[0].datagrams) == 1)
        await heard[1].until(lambda: len(heard[1].datagrams) == 1)
        assert heard[0].datagrams == heard[1].datagrams == [INITIATION.octets]
        (source,) = heard[1].sources
        gateways[1].send(Datagrams(b"answer", 6, source))
        await back.until(lambda: len(back.datagrams) == 1)
        assert both.far == gateways[0].endpoint, "what only came may be forged"
        assert both.heard(gateways[1].endpoint, session=True)
        assert both.far == gateways[1].endpoint

        both.send(DATA)
        both.send(INITIATION)
        await heard[1].until(lambda: len(heard[1].datagrams) == 3)
        assert len(heard[0].datagrams) == 1
        # It stays unanswered: the next one asks both families again.
        both.send(INITIATION)
        await heard[0].until(lambda: len(heard[0].datagrams) == 2)
        assert not both.heard(gateways[1].endpoint, session=False)


async def test_udp_is_refused_when_both_families_are() -> None:
    async with listening() as (both, gateways, _):
        told = Received()
        both.start(told.deliver, told.settled)
        gateways[0].close()
        both.send(INITIATION)
        await told.until(lambda: both.signs()[0].state == REFUSED)
        assert (both.refusals, both.signs()[1].state) == (0, SILENT)
        gateways[1].close()
        both.send(INITIATION)
        await told.until(lambda: both.refusals > 0)
        assert both.waiting(1).count("refuses datagrams") == 2


async def joined(
    gateway: UdpCarrier,
    towards: list[Endpoint],
    use: Callable[[Tunnel], Awaitable[None]],
) -> None:
    ours, theirs = PrivateKey(os.urandom(32)), PrivateKey(os.urandom(32))
    caller = PeerConfig(public(ours), (IPv6Network(f"{CLIENT}/128"),))
    server = TunnelConfig(theirs, GATEWAY, (caller,))
    peer = PeerConfig(public(theirs), (NETWORK,), towards[0])
    both = UdpFamilies(tuple(map(UdpCarrier.connect, towards)))
    async with (
        open_tunnel(server, carrier=gateway),
        open_tunnel(TunnelConfig(ours, CLIENT, (peer,)), carrier=both) as client,
    ):
        await use(client)


@pytest.mark.parametrize("answering", [0, 1])
async def test_a_tunnel_comes_up_by_the_family_that_works(answering: int) -> None:
    gateway = UdpCarrier.bind((FIRST, SECOND)[answering], 0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(((SECOND, FIRST)[answering], 0))
        towards = [gateway.endpoint, silent.getsockname()]

        async def use(client: Tunnel) -> None:
            await client.ready(timeout_s=20)
            assert await client.ping(GATEWAY) < 20
            host, port = gateway.endpoint
            assert (await client.route()).endpoint == f"{host}:{port}"

        await joined(gateway, towards if answering == 0 else towards[::-1], use)


@pytest.mark.parametrize("kind", [AUTO, UDP])
async def test_a_name_with_both_families_gets_both(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [
        (socket.AF_INET6, socket.SOCK_DGRAM, 17, "", ("::1", 51820, 0, 0)),
        (socket.AF_INET6, socket.SOCK_DGRAM, 17, "", ("::2", 51820, 0, 0)),
        (socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("127.0.0.1", 51820)),
    ]

    async def getaddrinfo(*_: Any, **__: Any) -> list[Any]:
        return found

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    peer = PeerConfig(public(bytes(32)), (NETWORK,), ("gateway.example", 51820))
    config = TunnelConfig(PrivateKey(os.urandom(32)), CLIENT, (peer,))
    resolved, carrier = await open_carrier(config, Choice(kind))
    assert resolved.peers[0].endpoint == ("::1", 51820)
    states = [sign.where for sign in carrier.signs()]
    assert states[-1] == "127.0.0.1:51820"
    carrier.close()
    found.clear()
    with pytest.raises(TunnelNotUp, match="no UDP socket"):
        await open_carrier(config, Choice(UDP))

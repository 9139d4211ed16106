"""UDP by the train, with and without the kernel's help, over the loopback interface."""

import asyncio
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from builder_orch.tunnel.carrier.udp import UdpCarrier
from builder_orch.tunnel.machine import Datagrams, Endpoint


class Received:
    """What a carrier delivered, cut into datagrams."""

    def __init__(self) -> None:
        self.datagrams: list[bytes] = []
        self.sources: set[Endpoint] = set()
        self.changed = asyncio.Event()

    def deliver(self, octets: memoryview, segment: int, source: Endpoint) -> None:
        self.datagrams += [
            bytes(octets[at : at + segment]) for at in range(0, len(octets), segment)
        ]
        self.sources.add(source)

    def settled(self) -> None:
        self.changed.set()

    async def until(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.datagrams) < count:
                self.changed.clear()
                await self.changed.wait()


@asynccontextmanager
async def joined(*, offload: bool) -> AsyncGenerator[tuple[UdpCarrier, UdpCarrier, Received]]:
    server = UdpCarrier.bind("127.0.0.1", 0)
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.connect(server.endpoint)
    client = UdpCarrier(sock, offload=offload)
    received = Received()
    server.start(received.deliver, received.settled)
    client.start(lambda *_: None, lambda: None)
    try:
        yield client, server, received
    finally:
        client.close()
        server.close()


@pytest.mark.parametrize("offload", [True, False])
async def test_a_train_arrives_as_its_datagrams(offload: bool) -> None:
    async with joined(offload=offload) as (client, _, received):
        sent = [bytes([number]) * 1452 for number in range(40)] + [b"short"]
        client.send(Datagrams(b"".join(sent), 1452, ("ignored", 0)))
        await received.until(len(sent))
        assert received.datagrams == sent
        assert received.sources == {client.endpoint}


async def test_a_full_buffer_delays_but_loses_nothing_that_was_queued() -> None:
    async with joined(offload=False) as (client, server, received):
        train = Datagrams(bytes(1452) * 40, 1452, server.endpoint)
        for _ in range(20):
            client.send(train)
        await received.until(800)
        assert len(received.datagrams) == 800
        assert not client.blocked


async def test_a_refusal_of_the_far_host_is_counted() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as gone:
        gone.bind(("127.0.0.1", 0))
        endpoint = gone.getsockname()
    client = UdpCarrier.connect(endpoint)
    heard = asyncio.Event()
    client.start(lambda *_: None, heard.set)
    try:
        client.send(Datagrams(b"anybody?", 8, endpoint))
        async with asyncio.timeout(10):
            await heard.wait()
        assert client.refusals == 1
    finally:
        client.close()


async def test_a_taken_port_is_an_error_at_once() -> None:
    first = UdpCarrier.bind("127.0.0.1", 0)
    try:
        with pytest.raises(OSError, match="in use"):
            UdpCarrier.bind(*first.endpoint)
    finally:
        first.close()

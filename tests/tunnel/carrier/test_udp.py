"""UDP by the train, with and without the kernel's help, over the loopback interface."""

import asyncio
import socket
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from builder_orch.tunnel.carrier.udp import SO_RCVBUFFORCE, SOCKET_BUFFER, UdpCarrier
from builder_orch.tunnel.machine import Datagrams, Endpoint
from tests.tunnel.carrier.gate import Received


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
        await received.until(lambda: len(received.datagrams) >= len(sent))
        assert received.datagrams == sent
        assert received.sources == {client.endpoint}


@pytest.mark.skipif(sys.platform != "linux", reason="the options are Linux's")
@pytest.mark.parametrize(
    ("host", "level", "option"),
    [("127.0.0.1", socket.IPPROTO_IP, 10), ("::1", socket.IPPROTO_IPV6, 23)],
    ids=["IPv4", "IPv6"],
)
def test_a_lone_datagram_may_be_cut_on_its_way(host: str, level: int, option: int) -> None:
    """IP_MTU_DISCOVER of ip(7), IPV6_MTU_DISCOVER of ipv6(7)."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    carrier = UdpCarrier(sock)
    try:
        assert sock.getsockopt(level, option) == 0
    finally:
        carrier.close()


@pytest.mark.skipif(sys.platform != "linux", reason="the option is Linux's")
def test_buffers_are_as_large_as_this_user_may_have_them() -> None:
    """Who may administer the network may have more than net.core.rmem_max."""
    plain = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    carrier = UdpCarrier(sock := socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    try:
        try:
            plain.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, SOCKET_BUFFER)
        except PermissionError:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER)
        allowed = plain.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == allowed
    finally:
        carrier.close()
        plain.close()


async def test_a_full_buffer_delays_but_loses_nothing_that_was_queued() -> None:
    async with joined(offload=False) as (client, server, received):
        train = Datagrams(bytes(1452) * 40, 1452, server.endpoint)
        for _ in range(20):
            client.send(train)
        await received.until(lambda: len(received.datagrams) >= 800)
        assert len(received.datagrams) == 800
        assert not client.blocked


async def test_what_waits_is_taken_before_anything_is_answered() -> None:
    """Otherwise the acknowledgements of many streams would be answered one by one, ever later."""
    async with joined(offload=False) as (client, _, received):
        for number in range(50):
            client.send(Datagrams(bytes([number]), 1, ("ignored", 0)))
        await received.until(lambda: len(received.datagrams) >= 50)
        assert received.bursts == 1


async def test_equal_datagrams_that_came_one_by_one_are_handed_up_as_trains() -> None:
    sizes = [80] * 50 + [96, 80, 96, 96, 60_000, 60_000] + [1452] * 5
    sent = [bytes([number]) * size for number, size in enumerate(sizes)]
    async with joined(offload=False) as (client, server, received):
        for datagram in sent:
            client.send(Datagrams(datagram, len(datagram), ("ignored", 0)))
        await received.until(lambda: len(received.datagrams) >= len(sent))
        assert received.datagrams == sent
        assert received.trains == [44, 6, 1, 1, 2, 2, 5]
        assert not server.drops


async def test_a_defect_above_does_not_make_it_deaf() -> None:
    """Each of these fills half of the room that there is."""
    server, heard = UdpCarrier.bind("127.0.0.1", 0), Received()
    failed: asyncio.Queue[object] = asyncio.Queue()
    asyncio.get_running_loop().set_exception_handler(
        lambda _, context: failed.put_nowait(context.get("exception"))
    )
    defects = iter(range(5))

    def deliver(octets: memoryview, segment: int, source: Endpoint) -> None:
        heard.deliver(octets, segment, source)
        if next(defects, None) is not None:
            raise RuntimeError("a defect")

    client = UdpCarrier.connect(server.endpoint)
    server.start(deliver, heard.settled)
    try:
        for number in range(6):
            client.send(Datagrams(bytes([number]) * 60_000, 60_000, server.endpoint))
            if number < 5:
                async with asyncio.timeout(10):
                    assert isinstance(await failed.get(), RuntimeError)
        await heard.until(lambda: len(heard.datagrams) >= 6)
        assert heard.datagrams == [bytes([number]) * 60_000 for number in range(6)]
        assert not server.drops
    finally:
        client.close()
        server.close()


async def test_datagrams_of_two_senders_are_told_apart() -> None:
    async with joined(offload=False) as (client, server, received):
        other = UdpCarrier.connect(server.endpoint)
        try:
            for number, sender in enumerate((client, client, other, client)):
                sender.send(Datagrams(bytes([number]), 1, ("ignored", 0)))
            await received.until(lambda: len(received.datagrams) >= 4)
            assert received.datagrams == [b"\0", b"\1", b"\2", b"\3"]
            assert received.trains == [2, 1, 1]
            assert received.sources == {client.endpoint, other.endpoint}
        finally:
            other.close()


async def test_another_address_of_ours_is_taken_when_the_way_begins_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a laptop that is carried to another network; here the way is said to begin anew."""
    monkeypatch.setattr("builder_orch.tunnel.carrier.udp.LOOK_S", 0.01)
    server = UdpCarrier.bind("127.0.0.1", 0)
    heard, back, moved = Received(), Received(), asyncio.Event()
    address = "127.0.0.1"

    def reopen() -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((address, 0))
        sock.connect(server.endpoint)
        return sock

    client = UdpCarrier(reopen(), reopen=reopen)
    client.relocated = moved.set
    server.start(heard.deliver, heard.settled)
    client.start(back.deliver, back.settled)
    try:
        before = client.endpoint
        client.send(Datagrams(b"before", 6, server.endpoint))
        await heard.until(lambda: heard.datagrams == [b"before"])
        address = "127.0.0.2"
        async with asyncio.timeout(10):
            await moved.wait()
        client.send(Datagrams(b"after", 5, server.endpoint))
        await heard.until(lambda: heard.datagrams == [b"before", b"after"])
        assert client.endpoint[0] == "127.0.0.2"
        assert heard.sources == {before, client.endpoint}
        server.send(Datagrams(b"back", 4, client.endpoint))
        await back.until(lambda: back.datagrams == [b"back"])
    finally:
        client.close()
        server.close()


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

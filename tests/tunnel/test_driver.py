"""The whole tunnel over real sockets on the loopback interface: both ends are ours."""

import asyncio
import hashlib
import os
import socket
import struct
from ipaddress import IPv6Address

import dns.message
import dns.rrset
import pytest

from builder_orch.errors import TunnelNotUp
from builder_orch.tunnel.config import PeerConfig
from builder_orch.tunnel.driver import open_tunnel
from builder_orch.tunnel.failures import NameUnknown
from builder_orch.tunnel.forward import forward_port
from builder_orch.tunnel.machine import Address
from tests.tunnel.joined import CLIENT, GATEWAY, pair, public, until

ABORT = struct.pack("ii", 1, 0)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while octets := await reader.read(65536):
        writer.write(octets)
        await writer.drain()
    writer.close()


async def digest_at_eof(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(hashlib.sha256(await reader.read()).digest())
    writer.close()


async def test_a_stream_carries_octets_both_ways_and_keeps_half_closes() -> None:
    async with pair() as ends:
        await ends.serve(7, digest_at_eof)
        octets = os.urandom(8 << 20)
        reader, writer = await asyncio.open_connection(sock=await ends.client.dial(str(GATEWAY), 7))
        writer.write(octets)
        writer.write_eof()
        async with asyncio.timeout(60):
            assert await reader.read() == hashlib.sha256(octets).digest()
        writer.close()


async def test_a_stream_that_is_read_late_is_over_after_that() -> None:
    """The connection has long ended by then; it is forgotten together with the socket."""
    octets = os.urandom(900_000)

    async def tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.write(octets)
        writer.close()

    async with pair() as ends:
        await ends.serve(7, tell)
        ours, theirs = socket.socketpair()
        await ends.client.attach(theirs, str(GATEWAY), 7, timeout_s=10)
        await until(lambda: ends.gateway.streams == 1)
        ours.shutdown(socket.SHUT_WR)
        # It has our word for everything, but less fits between the two sockets here.
        await until(lambda: ends.gateway.streams == 0)
        assert ends.client.streams == 1
        reader, writer = await asyncio.open_connection(sock=ours)
        assert await reader.read() == octets
        writer.close()
        await until(lambda: ends.client.streams == 0)


async def test_many_streams_at_once_do_not_mix() -> None:
    async with pair() as ends:
        await ends.serve(7, echo)

        async def converse(number: int) -> None:
            octets = bytes([number]) * 100_000
            sock = await ends.client.dial(f"[{GATEWAY}]", 7)
            reader, writer = await asyncio.open_connection(sock=sock)
            writer.write(octets)
            writer.write_eof()
            assert await reader.read() == octets
            writer.close()

        async with asyncio.timeout(60):
            await asyncio.gather(*(converse(number) for number in range(20)))


async def test_a_thread_gets_a_socket_like_any_other() -> None:
    async with pair() as ends:
        await ends.serve(7, echo)

        def converse() -> bytes:
            with ends.client.dial_blocking(str(GATEWAY), 7) as sock:
                assert sock.gettimeout() is None
                sock.sendall(b"hello")
                sock.shutdown(socket.SHUT_WR)
                return b"".join(iter(lambda: sock.recv(100), b""))

        assert await asyncio.to_thread(converse) == b"hello"


async def test_a_reset_by_the_far_end_is_a_reset_here() -> None:
    async def slam(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        writer.transport.abort()

    async with pair() as ends:

        async def backend(*_: object) -> socket.socket:
            ours, theirs = tcp_pair()
            reader, writer = await asyncio.open_connection(sock=theirs)
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
            tasks.append(asyncio.ensure_future(slam(reader, writer)))
            return ours

        tasks: list[asyncio.Future[None]] = []
        ends.gateway.serve(GATEWAY, 7, backend)
        reader, writer = await asyncio.open_connection(sock=await ends.client.dial(str(GATEWAY), 7))
        writer.write(b"x")
        with pytest.raises(ConnectionResetError):
            async with asyncio.timeout(10):
                await reader.read()
        writer.close()


async def test_a_reset_here_is_a_reset_at_the_far_end() -> None:
    heard: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.read()
            heard.set_result("end of file")
        except ConnectionResetError:
            heard.set_result("reset")
        writer.close()

    async with pair() as ends:

        async def backend(*_: object) -> socket.socket:
            ours, theirs = tcp_pair()
            reader, writer = await asyncio.open_connection(sock=theirs)
            tasks.append(asyncio.ensure_future(listen(reader, writer)))
            return ours

        tasks: list[asyncio.Future[None]] = []
        ends.gateway.serve(GATEWAY, 7, backend)
        sock = await ends.client.dial(str(GATEWAY), 7)
        sock.send(b"half of it")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
        sock.close()
        async with asyncio.timeout(10):
            assert await heard == "reset"


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    return one, other


async def test_a_closed_port_refuses_at_once() -> None:
    async with pair() as ends:
        with pytest.raises(ConnectionRefusedError, match=r"\[fdaa:0:7::3\]:9"):
            await ends.client.dial(str(GATEWAY), 9)


async def test_a_backend_that_is_away_resets_the_caller() -> None:
    async def away(*_: object) -> socket.socket:
        raise ConnectionRefusedError("nobody")

    async with pair() as ends:
        ends.gateway.serve(GATEWAY, None, away)
        sock = await ends.client.dial(str(GATEWAY), 80)
        reader, writer = await asyncio.open_connection(sock=sock)
        with pytest.raises(ConnectionResetError):
            async with asyncio.timeout(10):
                await reader.read()
        writer.close()


async def test_names_are_resolved_inside() -> None:
    async with pair() as ends:

        def answer(payload: bytes, _: Address) -> bytes | None:
            query = dns.message.from_wire(payload)
            reply = dns.message.make_response(query)
            name = query.question[0].name
            if str(name) == "hello.internal.":
                reply.answer.append(dns.rrset.from_text(name, 5, "IN", "AAAA", str(GATEWAY)))
            return reply.to_wire()

        ends.gateway.answer_datagrams(53, answer)
        await ends.serve(7, echo)
        assert await ends.client.resolve("hello.internal") == [GATEWAY]
        (await ends.client.dial("hello.internal", 7)).close()
        with pytest.raises(NameUnknown):
            await ends.client.resolve("other.internal")


async def test_echo_requests_come_back() -> None:
    async with pair() as ends:
        assert await ends.client.ping(GATEWAY) > 0
        with pytest.raises(TimeoutError):
            await ends.client.ping(IPv6Address("fdaa:0:7::99"), timeout_s=0.05)


async def test_a_peer_that_is_installed_late_is_waited_for() -> None:
    async with pair(known=False) as ends:
        reasons: list[str] = []
        with pytest.raises(TunnelNotUp, match="attempt 1 unanswered"):
            await ends.client.ready(timeout_s=0.05, report=reasons.append)
        # An answer is not overdue yet.
        assert reasons == []
        caller = PeerConfig(
            public(ends.config.private_key), (ends.config.peers[0].allowed[0],), None
        )
        ends.gateway.add_peer(caller)


async def test_a_gateway_that_is_not_there_is_said_to_refuse() -> None:
    async with pair() as ends:
        config = ends.config
    async with open_tunnel(config) as alone:
        reasons: list[str] = []
        with pytest.raises(TunnelNotUp, match="refuses datagrams"):
            await alone.ready(timeout_s=0.6, report=reasons.append)
        assert "refuses datagrams" in reasons[0]


async def test_what_is_open_is_reset_when_the_tunnel_closes() -> None:
    async with pair() as ends:
        await ends.serve(7, echo)
        sock = await ends.client.dial(str(GATEWAY), 7)
    with sock, pytest.raises(ConnectionResetError):
        sock.recv(1)


async def test_local_callers_are_forwarded() -> None:
    async with pair() as ends:
        await ends.serve(7, echo)
        async with forward_port(ends.client, str(GATEWAY), 7) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"through")
            writer.write_eof()
            assert await reader.read() == b"through"
            writer.close()


async def test_a_forward_says_whom_it_could_not_connect() -> None:
    failures: list[OSError] = []
    async with (
        pair() as ends,
        forward_port(ends.client, str(GATEWAY), 9, failed=failures.append) as port,
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()
    assert isinstance(failures[0], ConnectionRefusedError)


async def test_the_tunnel_knows_what_it_did() -> None:
    async with pair() as ends:
        await ends.client.ping(GATEWAY)
        (status,) = ends.client.status()
        assert status.sent_octets > 0
        assert status.received_octets > 0
        assert ends.client.drops() == {}
        assert ends.client.address == CLIENT

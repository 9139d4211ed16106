"""Streams in the tunnel's own loop, without a socket in between; both ends are ours."""

import asyncio
import hashlib
import os
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import cast

import pytest

from builder_orch.tunnel import open_connection
from builder_orch.tunnel.transport import ConnectionTransport
from tests.tunnel.joined import GATEWAY, Pair, pair, until

LARGE = os.urandom(12 << 20)
"""More than a connection and the sockets at the far end hold."""


class Listener(asyncio.Protocol):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.heard = bytearray()
        self.paused = 0
        self.lost: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self.heard += data

    def pause_writing(self) -> None:
        self.paused += 1

    def resume_writing(self) -> None:
        self.paused -= 1

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set_result(exc)


class Filled(asyncio.BufferedProtocol):
    """Has room of its own, less than comes."""

    def __init__(self) -> None:
        self.room = bytearray(1000)
        self.heard = bytearray()
        self.ended = asyncio.Event()

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.room

    def buffer_updated(self, nbytes: int) -> None:
        self.heard += self.room[:nbytes]

    def eof_received(self) -> None:
        self.ended.set()


class Broken(Listener):
    """Has a defect."""

    def data_received(self, data: bytes) -> None:
        raise ZeroDivisionError("a defect")


async def digest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(hashlib.sha256(await reader.read()).digest())
    writer.close()


async def tell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readexactly(1)
    writer.write(LARGE)
    await writer.drain()
    writer.close()


async def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"half of it")
    await reader.read()
    writer.close()


@asynccontextmanager
async def listening(
    ends: Pair, protocol: asyncio.BaseProtocol
) -> AsyncGenerator[ConnectionTransport]:
    """A connection to port 7 of the gateway for `protocol`."""
    made, told = await ends.client.create_connection(lambda: protocol, str(GATEWAY), 7)
    assert told is protocol
    transport = cast("ConnectionTransport", made)
    try:
        yield transport
    finally:
        transport.abort()


async def test_a_stream_carries_octets_both_ways_and_keeps_half_closes() -> None:
    async with pair() as ends, asyncio.timeout(60):
        await ends.serve(7, digest)
        reader, writer = await open_connection(ends.client, str(GATEWAY), 7)
        assert writer.get_extra_info("peername") == (str(GATEWAY), 7, 0, 0)
        for start in range(0, len(LARGE), 1 << 20):
            writer.write(LARGE[start : start + (1 << 20)])
            await writer.drain()
        writer.write_eof()
        assert await reader.read() == hashlib.sha256(LARGE).digest()
        writer.close()
        await writer.wait_closed()
        await until(lambda: ends.client.streams == 0)


async def test_what_was_written_before_a_close_is_delivered() -> None:
    async with pair() as ends, asyncio.timeout(60):
        heard: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            heard.set_result(await reader.read())
            writer.close()

        await ends.serve(7, hear)
        listener = Listener()
        async with listening(ends, listener) as transport:
            transport.write(LARGE[: 8 << 20])
            transport.write(LARGE[8 << 20 :])
            assert listener.paused == 1
            assert transport.get_write_buffer_size() > 0
            transport.close()
            assert transport.is_closing()
            assert await heard == LARGE
            assert await listener.lost is None
            assert listener.paused == 0


async def test_who_reads_late_gets_all_of_it() -> None:
    """Nothing is handed up meanwhile, and the far end has to wait: no queue of ours grows."""
    async with pair() as ends, asyncio.timeout(60):
        await ends.serve(7, tell)
        listener, other = Listener(), Listener()
        async with listening(ends, listener) as transport, listening(ends, other) as at_once:
            transport.pause_reading()
            transport.write(b"!")
            at_once.write(b"!")
            # Asked later, it has all of its answer, and so some of the first has come too.
            assert await other.lost is None
            assert other.heard == LARGE
            assert not listener.heard
            assert not transport.is_reading()
            transport.resume_reading()
            assert await listener.lost is None
            assert listener.heard == LARGE


async def test_who_has_room_of_its_own_is_handed_pieces_that_fit() -> None:
    async with pair() as ends, asyncio.timeout(60):
        await ends.serve(7, tell)
        filled = Filled()
        async with listening(ends, filled) as transport:
            transport.write(b"!")
            await filled.ended.wait()
            assert filled.heard == LARGE


async def test_who_aborts_is_told_of_no_failure() -> None:
    async with pair() as ends, asyncio.timeout(60):
        await ends.serve(7, begin)
        listener = Listener()
        async with listening(ends, listener) as transport:
            transport.abort()
            assert await listener.lost is None
            await until(lambda: ends.client.streams == 0)
            await until(lambda: ends.gateway.streams == 0)


async def test_nobody_there_is_refused() -> None:
    async with pair() as ends, asyncio.timeout(60):
        with pytest.raises(ConnectionRefusedError):
            await open_connection(ends.client, str(GATEWAY), 8)
        assert ends.client.streams == 0


async def test_a_reset_does_not_read_as_an_end() -> None:
    async def refuse(*_: object) -> socket.socket:
        raise ConnectionRefusedError("nobody behind it")

    async with pair() as ends, asyncio.timeout(60):
        ends.gateway.serve(GATEWAY, 7, refuse)
        reader, _ = await open_connection(ends.client, str(GATEWAY), 7)
        with pytest.raises(ConnectionResetError):
            await reader.read()
        await until(lambda: ends.client.streams == 0)


async def test_the_end_of_the_tunnel_does_not_read_as_an_end() -> None:
    async with pair() as ends, asyncio.timeout(60):
        await ends.serve(7, begin)
        reader, _ = await open_connection(ends.client, str(GATEWAY), 7)
        assert await reader.readexactly(10) == b"half of it"
        await ends.client.aclose()
        with pytest.raises(ConnectionAbortedError):
            await reader.read()


async def test_a_defect_costs_its_own_connection_only() -> None:
    told: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    async with pair() as ends, asyncio.timeout(60):
        await ends.serve(7, tell)
        broken, listener = Broken(), Listener()
        async with listening(ends, broken) as one, listening(ends, listener) as other:
            one.write(b"!")
            assert isinstance(await broken.lost, ZeroDivisionError)
            other.write(b"!")
            assert await listener.lost is None
            assert listener.heard == LARGE
    (context,) = told
    assert context["protocol"] is broken


async def test_limits_are_what_was_asked_for() -> None:
    async with pair() as ends, asyncio.timeout(60):
        await ends.serve(7, digest)
        async with listening(ends, Listener()) as transport:
            transport.set_write_buffer_limits(high=10, low=5)
            assert transport.get_write_buffer_limits() == (5, 10)
            with pytest.raises(ValueError, match="must be"):
                transport.set_write_buffer_limits(high=1, low=2)
            transport.write_eof()
            with pytest.raises(RuntimeError):
                transport.write(b"more")

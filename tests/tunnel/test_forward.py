"""Callers of a local listener meet who was dialled for them, down to how each direction ends."""

import asyncio
import os
import socket
import stat
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from builder_orch.tunnel.forward import Dialled, forward_port, forward_unix, splice

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass
class FarEnd:
    """A server inside; a test takes its connections one by one."""

    port: int = 0
    failure: OSError | None = None
    dialled: list[tuple[str, int]] = field(default_factory=list)
    connections: "asyncio.Queue[Streams]" = field(default_factory=asyncio.Queue)

    async def dial(self, host: str, port: int) -> socket.socket:
        self.dialled.append((host, port))
        if self.failure is not None:
            raise self.failure
        return socket.create_connection(("127.0.0.1", self.port))


@pytest.fixture
async def far() -> AsyncIterator[FarEnd]:
    made = FarEnd()
    writers: list[asyncio.StreamWriter] = []

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        made.connections.put_nowait((reader, writer))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()
        await asyncio.sleep(0)


@asynccontextmanager
async def calling(kind: str, far: FarEnd, folder: Path) -> AsyncGenerator[Streams]:
    """A caller of a forward of that kind."""
    if kind == "unix":
        async with forward_unix(Dialled(far.dial), "fd::1", 7, str(folder / "s")) as path:
            reader, writer = await asyncio.open_unix_connection(path)
            yield reader, writer
    else:
        async with forward_port(Dialled(far.dial), "fd::1", 7) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            yield reader, writer
    writer.close()


BOTH = pytest.mark.parametrize("kind", ["unix", "port"])


@BOTH
async def test_either_end_may_stop_speaking_and_still_listen(
    kind: str, far: FarEnd, home: Path
) -> None:
    for first in ("caller", "far"):
        async with calling(kind, far, home) as caller:
            other = await far.connections.get()
            ends = [caller, other] if first == "caller" else [other, caller]
            (reader, writer), (other_reader, other_writer) = ends
            writer.write(b"the first to stop")
            writer.write_eof()
            assert await other_reader.read() == b"the first to stop"
            other_writer.write(b"still " * 100_000)
            other_writer.write_eof()
            assert await reader.read() == b"still " * 100_000
    assert far.dialled == [("fd::1", 7)] * 2


@BOTH
async def test_much_goes_both_ways_at_once(kind: str, far: FarEnd, home: Path) -> None:
    there, back = os.urandom(3_000_000), os.urandom(2_000_000)
    async with calling(kind, far, home) as (reader, writer):
        far_reader, far_writer = await far.connections.get()

        async def send(to: asyncio.StreamWriter, octets: bytes) -> None:
            to.write(octets)
            await to.drain()
            to.write_eof()

        sending = [send(writer, there), send(far_writer, back)]
        got = await asyncio.gather(far_reader.read(), reader.read(), *sending)
        assert (got[0], got[1]) == (there, back)


async def test_a_reset_inside_is_a_reset_here(far: FarEnd, home: Path) -> None:
    async with calling("port", far, home) as (reader, _):
        _, far_writer = await far.connections.get()
        far_writer.write(b"half an answer")
        await far_writer.drain()
        assert await reader.readexactly(14) == b"half an answer"
        sock = far_writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        far_writer.transport.abort()
        with pytest.raises(ConnectionResetError):
            await reader.read()


async def test_a_caller_that_is_reset_resets_what_was_dialled(far: FarEnd, home: Path) -> None:
    async with calling("port", far, home) as (_, writer):
        far_reader, far_writer = await far.connections.get()
        far_writer.write(b"x")
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        writer.transport.abort()
        with pytest.raises(ConnectionResetError):
            await far_reader.read()


@BOTH
async def test_what_is_open_at_the_end_is_ended_as_a_reset_inside(
    kind: str, far: FarEnd, home: Path
) -> None:
    async with calling(kind, far, home) as (_, writer):
        writer.write(b"unfinished")
        far_reader, _ = await far.connections.get()
        assert await far_reader.readexactly(10) == b"unfinished"
    with pytest.raises(ConnectionResetError):
        await far_reader.read()


@BOTH
async def test_who_could_not_be_connected_is_told_of(kind: str, far: FarEnd, home: Path) -> None:
    failures: list[OSError] = []
    far.failure = ConnectionRefusedError("refused")
    if kind == "unix":
        opening = forward_unix(
            Dialled(far.dial), "fd::1", 7, str(home / "s"), failed=failures.append
        )
        async with opening as path:
            reader, writer = await asyncio.open_unix_connection(path)
            assert await reader.read() == b""
    else:
        async with forward_port(Dialled(far.dial), "fd::1", 7, failed=failures.append) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with pytest.raises(ConnectionResetError):
                await reader.read()
    writer.close()
    assert failures == [far.failure]


class Wrong:
    """What does not do what a tunnel does, as by a mistake of ours."""

    async def attach(self, sock: socket.socket, host: str, port: int, *, timeout_s: float) -> None:
        raise AttributeError("no such thing")


@BOTH
async def test_a_defect_ends_the_forward_and_lets_its_caller_go(kind: str, home: Path) -> None:
    path, loop = str(home / "s"), asyncio.get_running_loop()
    family = socket.AF_UNIX if kind == "unix" else socket.AF_INET

    async def forward(caller: socket.socket) -> None:
        if kind == "unix":
            async with forward_unix(Wrong(), "fd::1", 7, path):
                await loop.sock_connect(caller, path)
                await asyncio.Event().wait()
        else:
            async with forward_port(Wrong(), "fd::1", 7) as port:
                await loop.sock_connect(caller, ("127.0.0.1", port))
                await asyncio.Event().wait()

    with socket.socket(family) as caller:
        caller.setblocking(False)
        async with asyncio.timeout(10):
            with pytest.raises(AttributeError, match="no such thing"):
                await forward(caller)
            with suppress(ConnectionResetError):
                assert await loop.sock_recv(caller, 1) == b""


async def test_a_failure_of_the_block_is_its_own(far: FarEnd, home: Path) -> None:
    async def fail() -> None:
        async with forward_unix(Dialled(far.dial), "fd::1", 7, str(home / "s")):
            raise ValueError("the block's")

    with pytest.raises(ValueError, match="the block's"):
        await fail()


async def test_a_unix_socket_is_its_owners_alone_and_gone_afterwards(
    far: FarEnd, home: Path
) -> None:
    path = home / "s"
    async with forward_unix(Dialled(far.dial), "fd::1", 7, str(path)):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(OSError, match="in use"):
            async with forward_unix(Dialled(far.dial), "fd::1", 7, str(path)):
                raise AssertionError
        assert path.exists()
    assert not path.exists()


async def test_a_port_that_is_taken_is_an_error(far: FarEnd) -> None:
    with pytest.raises(OSError, match="in use"):
        async with forward_port(Dialled(far.dial), "fd::1", 7, local_port=far.port):
            raise AssertionError


def narrow_pair() -> tuple[socket.socket, socket.socket]:
    """Two joined TCP sockets that hold next to nothing on their way."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        caller = socket.create_connection(listener.getsockname())
        called, _ = listener.accept()
    caller.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return caller, called


async def test_what_was_not_taken_when_both_had_ended_still_is() -> None:
    """The last octets wait in our own buffer then, and go when the far end listens again."""
    loop = asyncio.get_running_loop()
    near, theirs = narrow_pair()
    ours, far_end = narrow_pair()
    asked = os.urandom(50_000)
    for sock in (theirs, far_end):
        sock.setblocking(False)
    splicing = asyncio.create_task(splice(near, ours))
    try:
        far_end.shutdown(socket.SHUT_WR)
        sending = asyncio.create_task(loop.sock_sendall(theirs, asked))
        assert await loop.sock_recv(theirs, 1) == b""
        await sending
        theirs.shutdown(socket.SHUT_WR)
        for _ in range(1_000_000):  # until both ends are heard, and both sides being closed
            if near.fileno() < 0:
                break
            await asyncio.sleep(0)
        assert near.fileno() < 0
        heard = b""
        while octets := await loop.sock_recv(far_end, 1 << 16):
            heard += octets
        await splicing
        assert heard == asked
    finally:
        splicing.cancel()
        theirs.close()
        far_end.close()

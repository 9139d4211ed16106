"""Local listeners whose callers are spliced, each to an inside connection of its own."""

import asyncio
import socket
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

BACKLOG = 128
DIAL_TIMEOUT_S = 30.0
CHUNK = 256 << 10
"""Octets moved at once between a caller and a connection that was dialled for it."""
FULL_HOUSE_S = 0.1
"""How long nobody is let in while this process has no descriptors left."""

Failed = Callable[[OSError], None]
Dial = Callable[[str, int], Awaitable[socket.socket]]


class Attaching(Protocol):
    """A tunnel, or whatever else can lead a caller inside."""

    async def attach(self, sock: socket.socket, host: str, port: int, *, timeout_s: float) -> None:
        """Join a stream socket to a new inside connection; owns the socket in any case."""
        ...


@dataclass(frozen=True, slots=True)
class Dialled:
    """Leads callers inside by dialling, for tunnels of another process; until their end."""

    dial: Dial

    async def attach(self, sock: socket.socket, host: str, port: int, *, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                far = await self.dial(host, port)
        except BaseException:
            _reset(sock)
            raise
        await splice(sock, far)


@asynccontextmanager
async def forward_port(
    tunnel: Attaching,
    host: str,
    port: int,
    *,
    bind: str = "127.0.0.1",
    local_port: int = 0,
    failed: Failed = lambda _: None,
) -> AsyncGenerator[int]:
    """Listen on a local TCP port (0: a free one, which is yielded) and forward callers to
    `host`:`port` inside. OSError (EADDRINUSE) if it is taken; `failed` hears of callers that could
    not be connected, who see a reset. What is still open at the end of the block is reset. Any
    other failure than an OSError is a defect: it resets its caller and is raised out of the block.
    """
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    with socket.create_server((bind, local_port), family=family, backlog=BACKLOG) as listener:
        async with _accepting(tunnel, listener, host, port, failed):
            yield listener.getsockname()[1]


@asynccontextmanager
async def forward_unix(
    tunnel: Attaching, host: str, port: int, path: str, *, failed: Failed = lambda _: None
) -> AsyncGenerator[str]:
    """The same from a Unix socket, which only this user can open and which is removed again.

    It should lie in a directory that only this user can enter.
    """
    with _bound(Path(path)) as listener:
        async with _accepting(tunnel, listener, host, port, failed):
            yield path


@contextmanager
def _bound(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        try:
            path.chmod(0o600)
            listener.listen(BACKLOG)
            yield listener
        finally:
            path.unlink(missing_ok=True)


@asynccontextmanager
async def _accepting(
    tunnel: Attaching, listener: socket.socket, host: str, port: int, failed: Failed
) -> AsyncGenerator[None]:
    listener.setblocking(False)
    loop = asyncio.get_running_loop()
    callers: set[asyncio.Task[None]] = set()
    defects: list[BaseException] = []
    owner = asyncio.current_task()
    assert owner is not None

    def ended(task: asyncio.Task[None]) -> None:
        callers.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not ending:
            defects.append(error)
            ending.append(task)
            owner.cancel()

    async def connect(caller: socket.socket) -> None:
        try:
            await tunnel.attach(caller, host, port, timeout_s=DIAL_TIMEOUT_S)
        except OSError as error:
            failed(error)
        except BaseException:
            # Whatever it did before it failed: nobody may be left waiting.
            _reset(caller)
            raise

    async def accept() -> None:
        while True:
            try:
                caller, _ = await loop.sock_accept(listener)
            except OSError as error:
                failed(error)
                await asyncio.sleep(FULL_HOUSE_S)
                continue
            caller.setblocking(False)
            task = asyncio.create_task(connect(caller))
            callers.add(task)
            task.add_done_callback(ended)

    ending: list[asyncio.Task[None]] = []
    accepting = asyncio.create_task(accept())
    accepting.add_done_callback(ended)
    try:
        try:
            yield
        finally:
            ending += [accepting, *callers]
            for task in ending:
                task.cancel()
            await asyncio.gather(*ending, return_exceptions=True)
    except asyncio.CancelledError:
        # Only if nobody else cancelled us as well.
        if defects and owner.uncancel() == 0:
            raise defects[0] from None
        raise


async def splice(near: socket.socket, far: socket.socket) -> None:
    """Move octets both ways until both directions have ended; owns both sockets.

    The end of one direction is passed on and leaves the other open, as hijacked streams need it;
    anything else than two orderly ends (also being cancelled) resets both sides.
    """
    streams = []
    try:
        for sock in (near, far):
            sock.setblocking(False)
            _linger(sock, abort=True)
            streams.append(await asyncio.open_connection(sock=sock, limit=CHUNK))
    except BaseException:
        for sock in (near, far):
            sock.close()
        raise
    (near_reader, near_writer), (far_reader, far_writer) = streams
    pouring = [
        asyncio.create_task(_pour(near_reader, far_writer)),
        asyncio.create_task(_pour(far_reader, near_writer)),
    ]
    try:
        await asyncio.gather(*pouring)
        for sock, (_, writer) in zip((near, far), streams, strict=True):
            _linger(sock, abort=False)
            # What the other side has not taken yet is sent before.
            writer.close()
            await writer.wait_closed()
    except OSError:
        # Nobody is told: either side sees the reset that it would have seen of the other.
        return
    finally:
        for task in pouring:
            task.cancel()
        await asyncio.gather(*pouring, return_exceptions=True)
        for sock, writer in ((near, near_writer), (far, far_writer)):
            # One that was closed with something left to send cannot be aborted when that is sent.
            if sock.fileno() >= 0:
                writer.transport.abort()


async def _pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while octets := await reader.read(CHUNK):
        writer.write(octets)
        await writer.drain()
    writer.write_eof()


def _reset(sock: socket.socket) -> None:
    _linger(sock, abort=True)
    sock.close()


def _linger(sock: socket.socket, *, abort: bool) -> None:
    """A Unix socket has no resets: there, an end is all that can be said."""
    if sock.family != socket.AF_UNIX and sock.fileno() >= 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", abort, 0))

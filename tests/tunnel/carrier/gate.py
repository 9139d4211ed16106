"""A gate to call and a proxy to call it through, on the loopback interface; aiohttp is the gate."""

import asyncio
import contextlib
import ssl
from base64 import b64encode
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from aiohttp import WSMsgType, web

from builder_orch.selfhost.wgtcpd import Certificate
from builder_orch.tunnel.carrier.proxy import Outside
from builder_orch.tunnel.carrier.websocket import Gate, WebSocketCarrier
from builder_orch.tunnel.machine import Endpoint

Pause = Callable[[float], Awaitable[None]]


@dataclass
class Heard:
    """What a gate was told: heads, and the messages of all connections in order."""

    requests: list[web.Request] = field(default_factory=list)
    messages: list[tuple[WSMsgType, bytes]] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    sockets: list["web.WebSocketResponse[bool]"] = field(default_factory=list)

    async def until(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.messages) < count:
                self.changed.clear()
                await self.changed.wait()


@asynccontextmanager
async def gate(certificate: Certificate, heard: Heard) -> AsyncGenerator[Gate]:
    """A WebSocket server that has nothing to do with our code."""

    async def attend(request: web.Request) -> web.StreamResponse:
        heard.requests.append(request)
        socket: web.WebSocketResponse[bool] = web.WebSocketResponse(
            decode_text=False, compress=False
        )
        await socket.prepare(request)
        heard.sockets.append(socket)
        async for message in socket:
            heard.messages.append((message.type, message.data))
            heard.changed.set()
        return socket

    application = web.Application()
    application.router.add_get("/", attend)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=certificate.context())
        await site.start()
        yield Gate("127.0.0.1", runner.addresses[0][1])
    finally:
        for socket in heard.sockets:
            await socket.close()
        await runner.cleanup()
        await turns()


@dataclass
class Proxy:
    """A CONNECT proxy. `answer` is said instead of connecting; None hangs up without a word."""

    credentials: str = ""
    answer: bytes | None = b""
    port: int = 0
    asked: list[str] = field(default_factory=list)
    passed: bytearray = field(default_factory=bytearray)
    """What it was given to pass on, of all connections."""
    tasks: set[asyncio.Future[None]] = field(default_factory=set)

    async def attend(self, near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        with contextlib.closing(back):
            head = (await near.readuntil(b"\r\n\r\n")).decode("latin-1")
            self.asked.append(head)
            expected = b64encode(self.credentials.encode()).decode()
            if self.credentials and f"Proxy-Authorization: Basic {expected}\r\n" not in head:
                back.write(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
                return
            if self.answer is None:
                back.transport.abort()
                return
            if self.answer:
                back.write(self.answer)
                return
            # Whatever name was asked for, there is only this machine.
            port = int(head.split()[1].rpartition(":")[2])
            far, forth = await asyncio.open_connection("127.0.0.1", port)
            back.write(b"HTTP/1.1 200 Connection established\r\nVia: a test\r\n\r\n")
            with contextlib.closing(forth):
                await asyncio.gather(_copy(near, forth, self.passed), _copy(far, back))

    @asynccontextmanager
    async def running(self, tls: ssl.SSLContext | None = None) -> AsyncGenerator[str]:
        """Its authority."""
        async with serving(self.attend, tls) as self.port:
            yield f"127.0.0.1:{self.port}"


@dataclass
class Socks:
    """A SOCKS 5 proxy (RFC 1928) with a login (RFC 1929) if there are `credentials`.

    `answer` is said at the first word instead of all that follows; `reply` is its last word.
    """

    credentials: str = ""
    answer: bytes | None = None
    reply: int = 0
    asked: list[str] = field(default_factory=list)

    async def attend(self, near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        with contextlib.closing(back):
            version, count = await near.readexactly(2)
            offered = await near.readexactly(count)
            if self.answer is not None:
                back.write(self.answer)
                return
            assert version == 5
            method = 2 if self.credentials else 0
            back.write(bytes([5, method if method in offered else 255]))
            if method not in offered or (method and not await self._is_known(near, back)):
                return
            assert await near.readexactly(3) == b"\5\1\0"
            kind = (await near.readexactly(1))[0]
            if kind == 3:
                host = (await near.readexactly((await near.readexactly(1))[0])).decode()
            else:
                host = str(ip_address(await near.readexactly(4 if kind == 1 else 16)))
            port = int.from_bytes(await near.readexactly(2))
            self.asked.append(f"{host} {port}")
            back.write(bytes([5, self.reply, 0, 1, *bytes(6)]))
            if self.reply == 0:
                # Whatever host was asked for, there is only this machine.
                far, forth = await asyncio.open_connection("127.0.0.1", port)
                with contextlib.closing(forth):
                    await asyncio.gather(_copy(near, forth), _copy(far, back))

    async def _is_known(self, near: asyncio.StreamReader, back: asyncio.StreamWriter) -> bool:
        assert await near.readexactly(1) == b"\1"
        words = [await near.readexactly((await near.readexactly(1))[0]) for _ in range(2)]
        known = b":".join(words).decode() == self.credentials
        back.write(bytes([1, not known]))
        return known

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[str]:
        """Its authority."""
        async with serving(self.attend) as port:
            yield f"127.0.0.1:{port}"


@asynccontextmanager
async def serving(
    attend: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    tls: ssl.SSLContext | None = None,
) -> AsyncGenerator[int]:
    """A server at a free port, which it yields; nothing of it is left afterwards."""
    writers: list[asyncio.StreamWriter] = []
    tasks: list[asyncio.Task[None]] = []

    async def attended(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        task = asyncio.current_task()
        assert task is not None
        tasks.append(task)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await attend(reader, writer)

    server = await asyncio.start_server(attended, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in writers:
            # A TLS transport that was closed twice does not know whose it is (Python 3.11.2).
            with contextlib.suppress(AttributeError):
                writer.transport.abort()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        await turns()


async def turns() -> None:
    """The loop frees what was closed in its next turns."""
    for _ in range(10):
        await asyncio.sleep(0)


async def _copy(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seen: bytearray | None = None
) -> None:
    with contextlib.suppress(ConnectionError):
        while octets := await reader.read(65536):
            if seen is not None:
                seen += octets
            writer.write(octets)
            await writer.drain()
    writer.close()


class Received:
    """What a carrier delivered, and a way to wait for more, or for another state."""

    def __init__(self) -> None:
        self.datagrams: list[bytes] = []
        self.trains: list[int] = []
        self.sources: set[Endpoint] = set()
        self.bursts = 0
        self.changed = asyncio.Event()

    def deliver(self, octets: memoryview, segment: int, source: Endpoint) -> None:
        self.datagrams += [
            bytes(octets[at : at + segment]) for at in range(0, len(octets), segment)
        ]
        self.trains.append(-(-len(octets) // segment))
        self.sources.add(source)

    def settled(self) -> None:
        self.bursts += 1
        self.changed.set()

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not true():
                self.changed.clear()
                await self.changed.wait()


@asynccontextmanager
async def calling(
    target: Gate,
    received: Received,
    *,
    outside: Outside | None = None,
    pause: Pause = asyncio.sleep,
) -> AsyncGenerator[WebSocketCarrier]:
    """A carrier that calls a gate."""
    carrier = WebSocketCarrier(target, outside or Outside(), pause=pause)
    carrier.start(received.deliver, received.settled)
    try:
        yield carrier
    finally:
        carrier.close()
        await turns()


def certificate_in(folder: Path, name: str = "wgtcpd.pem") -> Certificate:
    return Certificate.at(folder / name)

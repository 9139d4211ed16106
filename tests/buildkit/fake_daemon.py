"""A BuildKit on a loopback port: takes an upgrade, keeps the files it was sent, builds nothing.

It speaks HTTP/2 by the same library in the other role, so what it proves is the conversation; that
a real engine understands it as well is for the system tests.
"""

import asyncio
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from builder_orch.buildkit.grpc import Call, Channel, Code, Failed, Service, serving
from builder_orch.buildkit.http2 import Connection, Lost, Pipe, SocketPipe
from builder_orch.buildkit.session import CallPipe
from builder_orch.buildkit.wire import (
    bytes_field,
    entry,
    fields,
    map_field,
    message_field,
    number_field,
    raw,
    text,
    text_field,
    whole,
)

UPGRADED = (
    b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n"
    b"Content-Type: application/grpc\r\n\r\n"
)
IMAGE = "sha256:" + "ab" * 32
CONTROL = "/moby.buildkit.v1.Control/"
DIR, LINK = 1 << 31, 1 << 27

Copy = dict[str, tuple[bytes, bytes]]
"""By path: the octets of its stat and its content."""


class Ending:
    """A pipe that tells when it has come to its end."""

    def __init__(self, pipe: Pipe) -> None:
        self.over = asyncio.Event()
        self._pipe = pipe
        self.write = pipe.write
        self.close = pipe.close

    async def read(self) -> bytes:
        octets = b""
        try:
            octets = await self._pipe.read()
        finally:
            if not octets:
                self.over.set()
        return octets


@dataclass
class Session:
    """What the client offers: how it introduced itself, and a way to ask it."""

    metadata: Mapping[str, str]
    methods: list[str]
    channel: Channel
    daemon: "FakeDaemon"

    async def sync(self, name: str, **wanted: list[str]) -> Copy:
        """Have a directory as the client has it, asking only for what is not here already."""
        metadata = [("dir-name", name)]
        for key, values in wanted.items():
            metadata += [(key.replace("_", "-"), value) for value in values]
        call = self.channel.call("/moby.filesync.v1.FileSync/DiffCopy", metadata)
        key = f"{name}:{self.metadata['x-docker-expose-session-sharedkey']}"
        kept = self.daemon.kept.setdefault(key, {})
        made: Copy = {}
        numbers: dict[int, str] = {}
        listed, at = False, 0
        try:
            while not listed or numbers:
                message = await call.receive()
                assert message is not None, "the client ended before it was told to"
                packet = dict(fields(message))
                match whole(packet.get(1)):
                    case 0 if 2 not in packet:
                        listed = True
                    case 0:
                        stat = raw(packet[2])
                        path, is_file = described(stat)
                        made[path] = (stat, b"")
                        if kept.get(path, (b"",))[0] == stat:
                            made[path] = kept[path]
                        elif is_file:
                            numbers[at] = path
                            await call.send(number_field(1, 1) + number_field(3, at))
                        at += 1
                    case 2:
                        number = whole(packet.get(3))
                        octets = raw(packet.get(4))
                        path = numbers[number]
                        made[path] = (made[path][0], made[path][1] + octets)
                        if not octets:
                            del numbers[number]
                            self.daemon.asked.append(path)
                    case 4:
                        raise Failed(Code.UNKNOWN, f"error from sender: {raw(packet[4]).decode()}")
                    case other:
                        raise AssertionError(other)
            await call.send(number_field(1, 3))
            assert dict(fields(await call.receive() or b"")) == {1: 3}
            assert await call.receive() is None
        finally:
            call.cancel()
        self.daemon.kept[key] = made
        return made

    async def ask(self, method: str, request: bytes) -> bytes:
        return await self.channel.ask(method, request)


def described(stat: bytes) -> tuple[str, bool]:
    """Path, and whether it is a file with content of its own."""
    found = dict(fields(stat))
    mode = whole(found.get(2))
    return text(found[1]), not mode & (DIR | LINK) and 7 not in found


def vertex(
    name: str,
    *,
    started: bool = True,
    completed: bool = True,
    cached: bool = False,
    error: str = "",
) -> bytes:
    """A StatusResponse about one vertex, whose digest is its name."""
    return message_field(
        1,
        text_field(1, name)
        + text_field(3, name)
        + number_field(4, cached)
        + (message_field(5, b"\x08\x01") if started else b"")
        + (message_field(6, b"\x08\x01") if completed else b"")
        + text_field(7, error),
    )


def log(name: str, octets: bytes, stream: int = 1) -> bytes:
    """A StatusResponse with output of a vertex."""
    return message_field(3, text_field(1, name) + number_field(3, stream) + bytes_field(4, octets))


Script = Callable[[Session, "FakeDaemon"], Awaitable[None]]


async def whole_context(session: Session, daemon: "FakeDaemon") -> None:
    """What any build of `COPY . /` does."""
    daemon.dockerfile = await session.sync("dockerfile", followpaths=["Dockerfile"])
    await daemon.say(vertex("[1/2] FROM scratch"))
    daemon.context = await session.sync("context")
    await daemon.say(vertex("[2/2] COPY . /", completed=False), vertex("[2/2] COPY . /"))


@dataclass
class FakeDaemon:
    """`script` is what a solve does; an exception of gRPC in it is the solve's answer."""

    script: Script = whole_context
    upgrade: bytes = UPGRADED
    workers: tuple[dict[str, str], ...] = ({},)
    response: dict[str, str] = field(default_factory=lambda: {"containerimage.digest": IMAGE})
    kept: dict[str, Copy] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    requests: list[dict[int, list[bytes]]] = field(default_factory=list)
    session_ids: list[str] = field(default_factory=list)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    solving: asyncio.Event = field(default_factory=asyncio.Event)
    dockerfile: Copy = field(default_factory=dict)
    context: Copy = field(default_factory=dict)
    port: int = 0
    said: list[bytes] = field(default_factory=list)
    leave: Callable[[], None] = lambda: None
    _heard: asyncio.Condition = field(default_factory=asyncio.Condition)
    _over: bool = False
    _sessions: "dict[str, asyncio.Future[Session]]" = field(default_factory=dict)

    async def say(self, *statuses: bytes) -> None:
        """Add to the status stream."""
        async with self._heard:
            self.said += statuses
            self._heard.notify_all()

    def attributes(self) -> dict[str, str]:
        """Of the last solve's frontend."""
        return dict(entry(octets) for octets in self.requests[-1].get(7, []))

    async def dial(self, host: str = "", port: int = 0) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port))
        sock.setblocking(False)
        return sock

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take a connection whose request for an upgrade was read."""
        writer.write(self.upgrade)
        if self.upgrade is not UPGRADED:
            return
        handlers = {
            f"{CONTROL}ListWorkers": self._workers,
            f"{CONTROL}Session": self._attach,
            f"{CONTROL}Solve": self._solve,
            f"{CONTROL}Status": self._status,
        }
        service = Service(handlers, failed)
        pipe = Ending(SocketPipe(reader, writer))
        self.leave = pipe.over.set
        self._over = False
        self.said.clear()
        connection = Connection(pipe, client=False, accept=service.accept)
        # The first frames follow the head at once, and may be read together with it.
        async with serving(service), connection:
            await pipe.over.wait()
        self.cancelled.set()

    def _expected(self, session_id: str) -> "asyncio.Future[Session]":
        future: asyncio.Future[Session] = asyncio.get_running_loop().create_future()
        return self._sessions.setdefault(session_id, future)

    async def _workers(self, call: Call) -> None:
        await call.receive()
        workers = [message_field(1, map_field(2, labels)) for labels in self.workers]
        await call.send(b"".join(workers))

    async def _attach(self, call: Call) -> None:
        metadata = dict(call.metadata)
        key = "x-docker-expose-session-grpc-method"
        methods = [value for name, value in call.metadata if name == key]
        pipe = Ending(CallPipe(call))
        async with Connection(pipe, client=True) as connection:
            session = Session(metadata, methods, Channel(connection), self)
            self._expected(metadata["x-docker-expose-session-uuid"]).set_result(session)
            await pipe.over.wait()

    async def _solve(self, call: Call) -> None:
        request: dict[int, list[bytes]] = {}
        for number, value in fields(await call.receive() or b""):
            request.setdefault(number, []).append(raw(value))
        self.requests.append(request)
        self.session_ids.append(request[5][0].decode())
        session = await self._expected(self.session_ids[-1])
        self.solving.set()
        working = asyncio.create_task(self._run(session))
        left = asyncio.create_task(call.receive())
        try:
            await asyncio.wait({working})
            await working
            await call.send(map_field(1, dict(self.response)))
        finally:
            left.cancel()
            working.cancel()
            await asyncio.gather(left, working, return_exceptions=True)

    async def _run(self, session: Session) -> None:
        self._over = False
        try:
            await self.script(session, self)
        finally:
            async with self._heard:
                self._over = True
                self._heard.notify_all()

    async def _status(self, call: Call) -> None:
        await call.receive()
        at = 0
        while True:
            async with self._heard:
                while not self._over and len(self.said) == at:
                    await self._heard.wait()
                new, at = self.said[at:], len(self.said)
            if not new:
                return
            await call.send(*new)


def failed(error: Exception) -> None:
    """A defect of the fake itself, unless the client just left."""
    if not isinstance(error, Lost):
        raise error


@asynccontextmanager
async def running(daemon: FakeDaemon) -> AsyncGenerator[FakeDaemon]:
    """The daemon, listening; its connections end with the block."""
    tasks: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"POST /grpc HTTP/1.1\r\n")
            await daemon.serve(reader, writer)
        except (asyncio.CancelledError, ConnectionError, asyncio.IncompleteReadError):
            writer.transport.abort()
        finally:
            writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    daemon.port = server.sockets[0].getsockname()[1]
    try:
        yield daemon
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

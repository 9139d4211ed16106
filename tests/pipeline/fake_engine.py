"""An engine on a loopback port that speaks just enough of Docker's API, and misbehaves."""

import asyncio
import hashlib
import json
import re
import socket
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from urllib.parse import parse_qs, unquote, urlsplit


class Act(Enum):
    """What a script may do besides sending octets."""

    RESET = auto()
    CUT = auto()
    HANG = auto()


Script = Sequence[bytes | Act]


class End(Enum):
    """How a request's body ended."""

    WHOLE = auto()
    RESET = auto()
    CUT = auto()


@dataclass
class Request:
    """One request as it came."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes = b""
    end: End = End.CUT


def image_id(seed: str) -> str:
    return "sha256:" + hashlib.sha256(seed.encode()).hexdigest()


def message(**fields: object) -> bytes:
    return json.dumps(fields).encode() + b"\r\n"


def built(seed: str = "image") -> list[bytes]:
    """A build that succeeds."""
    return [
        message(stream="Step 1/2 : FROM scratch"),
        message(stream="\n"),
        message(stream=" ---> \n"),
        message(stream="Step 2/2 : COPY . /\n"),
        message(aux={"ID": image_id(seed)}),
        message(stream=f"Successfully built {image_id(seed)[7:19]}\n"),
    ]


def pushed(digest: str) -> list[bytes]:
    """A push that succeeds."""
    return [
        message(status="The push refers to repository [r/app]"),
        message(id="a1", status="Pushing", progressDetail={"current": 512, "total": 2048}),
        message(id="a1", status="Pushed"),
        message(status=f"latest: digest: {digest} size: 528"),
        message(progressDetail={}, aux={"Tag": "latest", "Digest": digest, "Size": 528}),
    ]


@dataclass
class FakeEngine:
    """Scripts in, records out. `digests` is what an inspect of any image shows."""

    build: Script = field(default_factory=built)
    build_status: int = 200
    pushes: list[Script] = field(default_factory=list)
    images: set[str] = field(default_factory=lambda: {image_id("image")})
    digests: list[str] = field(default_factory=list)
    ports: dict[str, object] = field(default_factory=dict)
    tag_status: int = 201
    ping: Script = (b"OK",)
    told: Script = ()
    version: object = field(default_factory=lambda: {"ApiVersion": "1.41"})
    info: object = field(
        default_factory=lambda: {"ServerVersion": "20.10.24", "NCPU": 2, "MemTotal": 4_000_000_000}
    )
    held: object = field(
        default_factory=lambda: {
            "LayersSize": 7_000_000,
            "Images": [{}, {}],
            "BuildCache": [{"Size": 2_000_000}, {"Size": 1_000_000}, "garbage"],
        }
    )
    freed: object = field(default_factory=lambda: {"SpaceReclaimed": 1_500_000})
    reading: asyncio.Event = field(default_factory=asyncio.Event)
    refuse: int = 0
    kit: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]] | None = None
    requests: list[Request] = field(default_factory=list)
    building: asyncio.Event = field(default_factory=asyncio.Event)
    tags: dict[str, str] = field(default_factory=dict)
    stolen: dict[str, str] = field(default_factory=dict)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    port: int = 0

    def __post_init__(self) -> None:
        self.reading.set()

    async def dial(self, host: str, port: int, *, timeout_s: float = 30.0) -> socket.socket:
        if self.refuse:
            self.refuse -= 1
            raise ConnectionRefusedError("refused")
        sock = socket.create_connection(("127.0.0.1", self.port))
        # A small buffer, so that an upload soon has to wait for its reader.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        return sock

    def asked(self, pattern: str) -> list[Request]:
        return [one for one in self.requests if re.search(pattern, f"{one.method} {one.path}")]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = await self._head(reader)
            self.requests.append(request)
            if request.path == "/grpc" and self.kit is not None:
                await self.kit(reader, writer)
                return
            await self._body(reader, request)
            await self._watched(reader, self._answer(request, writer))
        except (ConnectionResetError, BrokenPipeError):
            self.gone.set()
        finally:
            writer.close()

    async def _watched(
        self, reader: asyncio.StreamReader, answering: Coroutine[None, None, None]
    ) -> None:
        """Answer until the other end leaves."""
        left = asyncio.create_task(reader.read(1))
        task = asyncio.create_task(answering)
        try:
            await asyncio.wait({left, task}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                self.gone.set()
                return
            await task
        finally:
            left.cancel()
            task.cancel()
            await asyncio.gather(left, task, return_exceptions=True)

    async def _head(self, reader: asyncio.StreamReader) -> Request:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = head[0].split(" ")
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in head[1:] if line)
        }
        split = urlsplit(target)
        path = re.sub(r"\A/v[\d.]+", "", unquote(split.path))
        return Request(method, path, parse_qs(split.query), headers)

    async def _body(self, reader: asyncio.StreamReader, request: Request) -> None:
        if "chunked" not in request.headers.get("transfer-encoding", ""):
            request.body = await reader.readexactly(int(request.headers.get("content-length", "0")))
            request.end = End.WHOLE
            return
        try:
            while size := int(await reader.readline() or b"0", 16):
                request.body += await reader.readexactly(size)
                await reader.readexactly(2)
                # From here on the upload is under way; a test may hold it up.
                self.building.set()
                await self.reading.wait()
            request.end = End.WHOLE if await reader.readline() == b"\r\n" else End.CUT
        except ConnectionResetError:
            request.end = End.RESET
            raise
        except (asyncio.IncompleteReadError, ValueError):
            request.end = End.CUT
            raise ConnectionResetError from None
        finally:
            if request.end is not End.WHOLE:
                self.gone.set()

    async def _answer(self, request: Request, writer: asyncio.StreamWriter) -> None:
        match request.method, request.path.split("/")[1:]:
            case _, ["_ping"]:
                await self._play(writer, 200, self.ping)
            case _, ["version"]:
                await self._play(writer, 200, self.told or [json.dumps(self.version).encode()])
            case "GET", ["info"]:
                await self._play(writer, 200, [json.dumps(self.info).encode()])
            case "GET", ["system", "df"]:
                await self._play(writer, 200, [json.dumps(self.held).encode()])
            case "POST", ["images" | "build", "prune"]:
                await self._play(writer, 200, [json.dumps(self.freed).encode()])
            case "POST", ["grpc"]:
                await self._play(writer, 404, [message(message="page not found")])
            case "POST", ["build"]:
                await self._play(writer, self.build_status, self.build)
            case "POST", ["images", *_, "tag"]:
                name = f"{request.query['repo'][0]}:{request.query['tag'][0]}"
                self.tags[name] = request.path.split("/")[2]
                await self._play(writer, self.tag_status, [message(message="no such tag")])
            case "POST", ["images", *_, "push"]:
                await self._play(writer, 200, self.pushes.pop(0))
            case "GET", ["images", *name, "json"]:
                await self._inspect(writer, "/".join(name))
            case other:
                raise AssertionError(f"nobody asks for {other}")

    async def _inspect(self, writer: asyncio.StreamWriter, name: str) -> None:
        found = self.stolen.get(name) or self.tags.get(name, name)
        if found not in self.images:
            await self._play(writer, 404, [message(message=f"No such image: {name}")])
            return
        shown = {
            "Id": found,
            "Size": 4096,
            "RepoDigests": self.digests,
            "Config": {"ExposedPorts": self.ports},
        }
        await self._play(writer, 200, [json.dumps(shown).encode()])

    async def _play(self, writer: asyncio.StreamWriter, status: int, script: Script) -> None:
        writer.write(
            f"HTTP/1.1 {status} Whatever\r\nContent-Type: application/json\r\n"
            "Transfer-Encoding: chunked\r\n\r\n".encode()
        )
        for item in script:
            match item:
                case bytes():
                    writer.write(b"%x\r\n%b\r\n" % (len(item), item))
                    await writer.drain()
                case Act.HANG:
                    await asyncio.Event().wait()
                case Act.RESET | Act.CUT:
                    sock = writer.get_extra_info("socket")
                    on = item is Act.RESET
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", on, 0))
                    return
        writer.write(b"0\r\n\r\n")
        await writer.drain()


@asynccontextmanager
async def running(engine: FakeEngine) -> AsyncGenerator[FakeEngine]:
    """The engine, listening; its connections end with the block."""
    tasks: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await engine.serve(reader, writer)
        except asyncio.CancelledError:
            # Only `running` cancels it, at the end of the test.
            writer.transport.abort()

    server = await asyncio.start_server(accept, "127.0.0.1", 0, limit=1 << 20)
    engine.port = server.sockets[0].getsockname()[1]
    try:
        yield engine
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

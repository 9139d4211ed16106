"""A server that goes wrong as it is told, and a platform of fakes behind the real API."""

import asyncio
import json
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from io import BytesIO
from ipaddress import IPv6Address
from pathlib import Path

from aiohttp import ClientSession, web
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from builder_orch.api.client import IDEMPOTENT_SELFHOST, Platform
from builder_orch.api.models import Secret
from builder_orch.events import Emit
from builder_orch.selfhost.api import application
from builder_orch.selfhost.names import Plan
from builder_orch.selfhost.rows import AppRow, OrganizationRow, ReleaseRow
from builder_orch.selfhost.store import Store
from builder_orch.tunnel.config import Door, PublicKey
from builder_orch.tunnel.machine import Endpoint

CANARY = "fo1_canary-token"
GATEWAY_KEY = PublicKey(bytes(range(32)))


# --- a server by script


@dataclass
class Request:
    """What a client sent."""

    headers: dict[str, str]
    body: dict[str, object]


Step = Callable[[asyncio.StreamWriter], Awaitable[None]]


def answer(data: object, *, status: int = 200, errors: object = None, headers: str = "") -> Step:
    """A GraphQL answer."""
    body: dict[str, object] = {"data": data}
    if errors is not None:
        body["errors"] = errors
    return octets(json.dumps(body).encode(), status=status, headers=headers)


def octets(body: bytes, *, status: int = 200, headers: str = "", length: int | None = None) -> Step:
    """Any HTTP answer; a `length` over the body's makes it one that is cut short."""

    async def step(writer: asyncio.StreamWriter) -> None:
        shown = len(body) if length is None else length
        writer.write(
            f"HTTP/1.1 {status} Said\r\nContent-Type: application/json\r\n"
            f"Content-Length: {shown}\r\nConnection: close\r\n{headers}\r\n".encode()
        )
        writer.write(body)
        await writer.drain()

    return step


async def reset(writer: asyncio.StreamWriter) -> None:
    """A connection that breaks after the request was read."""
    inner = writer.get_extra_info("socket")
    inner.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def hang(writer: asyncio.StreamWriter) -> None:
    """No answer, ever."""
    await asyncio.Event().wait()


async def slow_headers(writer: asyncio.StreamWriter) -> None:
    """The beginning of an answer, and then nothing."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-")
    await writer.drain()
    await asyncio.Event().wait()


@dataclass
class Script:
    """Takes one step for each request; a request after the last step is a failed test."""

    steps: list[Step]
    requests: list[Request] = field(default_factory=list)
    url: str = ""
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[1:-2]
            headers = {n.lower(): v for n, _, v in (line.partition(": ") for line in head)}
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            self.requests.append(Request(headers, json.loads(body)))
            await self.steps.pop(0)(writer)
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client went away, as some steps make it
        finally:
            self._tasks.discard(task)
            writer.close()

    async def serve(
        self, listener: socket.socket, tls: ssl.SSLContext | None = None
    ) -> asyncio.Server:
        """Begin to listen on a socket that is bound."""
        return await asyncio.start_server(self.talk, sock=listener, ssl=tls)

    def stop(self) -> None:
        """End what hangs."""
        for task in self._tasks:
            task.cancel()


def bound() -> socket.socket:
    """A loopback port that refuses connections until somebody listens."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    return listener


@asynccontextmanager
async def scripted(
    *steps: Step, certificate: Path | None = None, host: str = "127.0.0.1"
) -> AsyncIterator[Script]:
    """A server that takes these steps; over TLS with a certificate, which `host` names."""
    tls, scheme = None, "http"
    if certificate is not None:
        tls, scheme = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), "https"
        tls.load_cert_chain(certificate)
    listener = bound()
    url = f"{scheme}://{host}:{listener.getsockname()[1]}/graphql"
    script = Script(list(steps), url=url)
    server = await script.serve(listener, tls)
    try:
        yield script
    finally:
        server.close()
        script.stop()
        await server.wait_closed()


@dataclass
class Waits:
    """A sleep that returns at once and remembers how long it was asked for."""

    seconds: list[float] = field(default_factory=list)

    async def __call__(self, seconds: float) -> None:
        """What asyncio.sleep would have waited for."""
        self.seconds.append(seconds)


# --- certificates


def certificate_for(
    folder: Path,
    host: str = "localhost",
    *,
    begins: timedelta = -timedelta(days=1),
    ends: timedelta = timedelta(days=1),
) -> Path:
    """A self-signed certificate for a host with its key, as one PEM file."""
    now, key = datetime.now(UTC), generate_private_key(SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + begins)
        .not_valid_after(now + ends)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, SHA256())
    )
    path = folder / "server.pem"
    pkcs8 = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(built.public_bytes(Encoding.PEM) + pkcs8)
    return path


# --- the platform with fakes behind it


@dataclass
class FakeGateway:
    """Remembers who is in; fails when told to."""

    public_key: PublicKey = GATEWAY_KEY
    endpoint: Endpoint = ("127.0.0.1", 40000)
    websocket: Door | None = None
    peers: dict[PublicKey, IPv6Address] = field(default_factory=dict)
    installs: int = 0
    broken: bool = False

    async def install(self, public_key: PublicKey, address: IPv6Address) -> None:
        """Let a peer in."""
        await asyncio.sleep(0)
        if self.broken:
            raise OSError("the gateway's secret reason")
        self.installs += 1
        self.peers[public_key] = address

    async def remove(self, public_key: PublicKey) -> None:
        """Shut a peer out."""
        self.peers.pop(public_key, None)

    def installed(self) -> set[IPv6Address]:
        """Whom it answers."""
        return set(self.peers.values())


@dataclass
class FakeBuilder:
    """One machine for everybody."""

    asked: list[str] = field(default_factory=list)

    async def ensure(self, app: str) -> tuple[str, str, IPv6Address]:
        """It is always up."""
        self.asked.append(app)
        return "builder1", "started", Plan(1).builder(1)


@dataclass
class FakeRunner:
    """Remembers what it was told to run."""

    begun: list[tuple[str, int]] = field(default_factory=list)
    broken: bool = False

    def begin(self, app: AppRow, release: ReleaseRow) -> None:
        """Take it up, or not."""
        if self.broken:
            raise OSError("no engine")
        self.begun.append((app.name, release.version))


@dataclass
class Clock:
    """Unix seconds that move when told."""

    now: float = 1_800_000_000.0

    def __call__(self) -> float:
        """The time."""
        return self.now


@dataclass
class Selfhost:
    """The real store and API, with fakes for what has side effects."""

    store: Store
    url: str
    token: str
    organization: OrganizationRow
    gateway: FakeGateway
    builder: FakeBuilder
    runner: FakeRunner
    clock: Clock

    def platform(self, token: str | None = None, emit: Emit | None = None) -> Platform:
        """The real client."""
        secret = Secret(self.token if token is None else token)
        return Platform(self.url, secret, idempotent=IDEMPOTENT_SELFHOST, sleep=Waits(), emit=emit)


@asynccontextmanager
async def serving(app: web.Application) -> AsyncIterator[str]:
    """The base URL of an application on a port that was free."""
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.SockSite(runner, listener := bound())
    await site.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def selfhost(folder: Path, *, introspection: bool = False) -> AsyncIterator[Selfhost]:
    """A platform with its state in `folder`, one organization and one token for everything."""
    clock = Clock()
    store = Store(f"sqlite:///{folder / 'state.db'}", clock=clock)
    organization = store.ensure_organization("personal", name="Personal", personal=True)
    token = store.issue_token("someone", lifetime_s=3600)
    gateway, builder, runner = FakeGateway(), FakeBuilder(), FakeRunner()
    app = application(
        store,
        gateway=gateway,
        builder=builder,
        runner=runner,
        clock=clock,
        introspection=introspection,
    )
    try:
        async with serving(app) as base:
            yield Selfhost(
                store, f"{base}/graphql", token, organization, gateway, builder, runner, clock
            )
    finally:
        store.close()


async def post(
    host: Selfhost,
    body: object,
    *,
    token: str | None = None,
    headers: dict[str, str] | None = None,
) -> tuple[int, dict[str, object]]:
    """Status and JSON of one raw request."""
    octets = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {
        "Content-Type": "application/json",
        "Authorization": f"Bearer {host.token if token is None else token}",
        **(headers or {}),
    }
    async with (
        ClientSession() as session,
        session.post(host.url, data=BytesIO(octets), headers=sent) as response,
    ):
        answer = await response.json()
        assert isinstance(answer, dict)
        return response.status, answer


def codes(answer: dict[str, object]) -> list[str]:
    """The codes of an answer's errors."""
    errors = answer["errors"]
    assert isinstance(errors, list)
    return [error["extensions"]["code"] for error in errors]

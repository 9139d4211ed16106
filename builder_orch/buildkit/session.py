"""What the engine may ask of us during a build, and the connection inside the call that carries it.

`Control/Session` is a stream of octets in which the engine is the client of a second HTTP/2
connection. Every session has an id of its own; its shared key is the same for the same context
directory, because by it the engine finds the files that it already has.
"""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

from builder_orch.buildkit.export import Target, Unsafe
from builder_orch.buildkit.filesync import FileSync
from builder_orch.buildkit.grpc import Call, Channel, Code, Failed, Handler, Service, serving
from builder_orch.buildkit.http2 import Connection, Headers, Lost
from builder_orch.buildkit.messages import single
from builder_orch.buildkit.sshagent import Agent
from builder_orch.buildkit.wire import bytes_field, text_field
from builder_orch.errors import ContextRefused
from builder_orch.tunnel.machine import Malformed

CONTROL = "/moby.buildkit.v1.Control"
SERVING = b"\x08\x01"
"""HealthCheckResponse with the status SERVING."""
LARGEST_SECRET = 500 * 1024
"""Octets; the engine takes no more."""
PIECE = 1 << 20
"""Octets of the inner connection in one message of the outer; old engines take at most 4 MB."""
_ID_LETTERS = "0123456789abcdefghijklmnopqrstuvwxyz"

GetSecret = Callable[[], bytes]
"""Reads a secret when it is asked for; OSError when it cannot be had."""
Credentials = Callable[[str], Awaitable[tuple[str, str] | None]]
"""User and password for a registry's host; None to go there as nobody."""


async def nobody(host: str) -> tuple[str, str] | None:  # noqa: ARG001
    """Credentials for no registry at all."""
    return None


@dataclass(frozen=True, slots=True)
class Offer:
    """All that a build may use of this machine."""

    files: FileSync
    shared_key: str
    secrets: Mapping[str, GetSecret] = field(default_factory=dict, repr=False)
    agents: Mapping[str, Agent] = field(default_factory=dict)
    credentials: Credentials = field(default=nobody, repr=False)
    target: Target | None = None
    """Where the result goes, if it comes here."""


class Session:
    """One session: its id, what it serves, and what went wrong on our side."""

    def __init__(self, offer: Offer) -> None:
        self.id = new_id()
        self.failure: Exception | None = None
        self._offer = offer

    def metadata(self) -> Headers:
        """How the session introduces itself."""
        yielded = [
            ("x-docker-expose-session-uuid", self.id),
            ("x-docker-expose-session-name", "fly-build"),
            ("x-docker-expose-session-sharedkey", self._offer.shared_key),
        ]
        methods = [("x-docker-expose-session-grpc-method", name) for name in self.handlers()]
        return yielded + methods

    def handlers(self) -> Mapping[str, Handler]:
        """By method; SSH only where there is an agent, because offering it is a promise."""
        found: dict[str, Handler] = {
            "/grpc.health.v1.Health/Check": self._check,
            "/moby.filesync.v1.FileSync/DiffCopy": self._offer.files.diff_copy,
            "/moby.filesync.v1.Auth/Credentials": self._credentials,
            "/moby.buildkit.secrets.v1.Secrets/GetSecret": self._secret,
        }
        if self._offer.agents:
            found["/moby.sshforward.v1.SSH/CheckAgent"] = self._check_agent
            found["/moby.sshforward.v1.SSH/ForwardAgent"] = self._forward_agent
        if self._offer.target is not None:
            found["/moby.filesync.v1.FileSend/DiffCopy"] = self._export
        return found

    def failed(self, error: Exception) -> None:
        """Keep the first thing that went wrong here: the engine only knows that something did."""
        self.failure = self.failure or error

    async def _check(self, call: Call) -> None:
        await call.receive()
        await call.send(SERVING)

    async def _credentials(self, call: Call) -> None:
        host = _text(await call.receive())
        login = await self._offer.credentials(host)
        user, password = login or ("", "")
        await call.send(text_field(1, user) + text_field(2, password))

    async def _secret(self, call: Call) -> None:
        name = _text(await call.receive())
        get = self._offer.secrets.get(name)
        if get is None:
            raise Failed(Code.NOT_FOUND, f"there is no secret {name}")
        try:
            octets = await asyncio.to_thread(get)
        except OSError as error:
            refusal = ContextRefused(
                f"the secret {name} cannot be read: {error.strerror or error}",
                hint="Check the file that --secret names.",
            )
            self.failed(refusal)
            raise Failed(Code.UNKNOWN, str(refusal)) from None
        if len(octets) > LARGEST_SECRET:
            refusal = ContextRefused(
                f"the secret {name} has {len(octets)} bytes; an engine takes {LARGEST_SECRET}",
                hint="Give a smaller one, for example a key to the rest.",
            )
            self.failed(refusal)
            raise Failed(Code.UNKNOWN, str(refusal))
        await call.send(bytes_field(1, octets))

    async def _check_agent(self, call: Call) -> None:
        self._agent(_text(await call.receive()))
        await call.send(b"")

    async def _forward_agent(self, call: Call) -> None:
        agent = self._agent(dict(call.metadata).get("buildkit.ssh.id", ""))

        async def answer(octets: bytes) -> None:
            await call.send(bytes_field(1, octets))

        try:
            async with aclosing(_octets(call)) as incoming:
                await agent.converse(incoming, answer)
        except OSError as error:
            raise Failed(Code.UNAVAILABLE, f"the ssh agent: {error.strerror or error}") from None

    def _agent(self, name: str) -> Agent:
        agent = self._offer.agents.get(name or "default")
        if agent is None:
            raise Failed(Code.NOT_FOUND, f"there is no ssh agent {name or 'default'}")
        return agent

    async def _export(self, call: Call) -> None:
        assert self._offer.target is not None
        try:
            await self._offer.target.receive(call)
        except Malformed as error:
            self.failed(Unsafe(str(error)))
            raise Failed(Code.INVALID_ARGUMENT, str(error)) from None
        except (Unsafe, OSError) as error:
            self.failed(error)
            raise Failed(Code.ABORTED, f"the result cannot be kept: {error}") from None


async def _octets(call: Call) -> AsyncGenerator[bytes]:
    while (message := await call.receive()) is not None:
        yield _single(message)


def _single(message: bytes | None) -> bytes:
    try:
        return single(1, message or b"")
    except Malformed as error:
        raise Failed(Code.INVALID_ARGUMENT, str(error)) from None


def _text(message: bytes | None) -> str:
    return _single(message).decode("utf-8", "surrogateescape")


def new_id() -> str:
    """25 characters of chance, as identifiers of sessions and builds have."""
    return "".join(secrets.choice(_ID_LETTERS) for _ in range(25))


class CallPipe:
    """The octets inside a call of BytesMessages, as a pipe for another connection."""

    def __init__(self, call: Call) -> None:
        self._call = call

    async def read(self) -> bytes:
        while True:
            try:
                message = await self._call.receive()
                if message is None:
                    return b""
                if octets := single(1, message):
                    return octets
            except (Failed, Malformed) as error:
                raise Lost(f"the session broke off: {error}") from None

    async def write(self, octets: bytes) -> None:
        try:
            await self._call.send(*_pieces(octets))
        except Failed as error:
            raise Lost(f"the session broke off: {error}") from None

    def close(self) -> None:
        self._call.cancel()


def _pieces(octets: bytes) -> Iterator[bytes]:
    for at in range(0, len(octets), PIECE):
        yield bytes_field(1, octets[at : at + PIECE])


@asynccontextmanager
async def attached(channel: Channel, offer: Offer) -> AsyncGenerator[Session]:
    """A session that the engine may use during the block."""
    session = Session(offer)
    call = channel.call(f"{CONTROL}/Session", session.metadata())
    service = Service(session.handlers(), session.failed)
    async with (
        serving(service),
        Connection(CallPipe(call), client=False, accept=service.accept),
    ):
        yield session

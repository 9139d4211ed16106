"""The Docker engine: one of our own where this machine allows it, else the one that is there."""

import asyncio
import errno
import json
import socket
from base64 import urlsafe_b64encode
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError

from builder_orch.errors import BuilderFull, BuilderLost, EngineMissing, LocalDiskFull
from builder_orch.selfhost.dockerd import OwnEngine, lacking
from builder_orch.selfhost.process import ProgramFailed, Report, State, printable

HOST_ENGINE: Final = "/var/run/docker.sock"
CALL_LIMIT_S: Final = 60.0
PING_LIMIT_S: Final = 3.0
STREAM_SILENCE_S: Final = 600.0
"""How long the engine may say nothing while it unpacks a large layer."""
LOG_OCTETS: Final = 256 << 10
CONNECT_LIMIT_S: Final = 10.0


class EngineRefused(Exception):
    """The engine answered, with an error; `status` is the HTTP status (200 inside a stream)."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Container:
    """What the engine says of one container."""

    id: str
    image: str
    labels: Mapping[str, str]
    status: str
    exit_code: int
    restarts: int
    out_of_memory: bool
    address: str
    """IPv4 on the engine's bridge; empty while it does not run."""

    @property
    def running(self) -> bool:
        """Whether its process runs; one that the engine starts again and again does not."""
        return self.status == "running" and bool(self.address)

    @property
    def ended(self) -> bool:
        """Whether its process has ended at least once, by itself."""
        return self.restarts > 0 or self.status in {"exited", "restarting", "dead", "removing"}

    @classmethod
    def parse(cls, found: Mapping[str, object]) -> Self:
        """Read the answer of /containers/ID/json."""
        state, config = _object(found.get("State")), _object(found.get("Config"))
        settings = _object(found.get("NetworkSettings"))
        networks = [_object(one) for one in _object(settings.get("Networks")).values()]
        addresses = [str(one.get("IPAddress") or "") for one in networks]
        return cls(
            id=str(found.get("Id", "")),
            image=str(config.get("Image", "")),
            labels={name: str(value) for name, value in _object(config.get("Labels")).items()},
            status=str(state.get("Status", "")),
            exit_code=_number(state.get("ExitCode")),
            restarts=_number(found.get("RestartCount")),
            out_of_memory=state.get("OOMKilled") is True,
            address=next((address for address in addresses if address), ""),
        )


@dataclass(frozen=True, slots=True)
class Image:
    """What the engine says of one image; `digests` are repo@sha256 names that registries gave."""

    id: str
    digests: tuple[str, ...]
    ports: tuple[int, ...]
    """TCP ports that the image exposes."""


class EngineClient:
    """The few calls of the Engine API that the platform makes itself; an async context manager.

    Raises `EngineRefused` for an answer that is an error, `BuilderLost` when there is no answer or
    it breaks off, `BuilderFull` when the engine's disk is full.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        # No connection is kept: a restarted engine would reset it under the next call.
        self._session = aiohttp.ClientSession(
            "http://engine", connector=aiohttp.UnixConnector(str(self.path), force_close=True)
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def ping(self) -> bool:
        """Tell whether the engine answers within 3 s."""
        try:
            async with self._call("GET", "/_ping", limit_s=PING_LIMIT_S) as answer:
                return (await answer.read()).strip() == b"OK"
        except (BuilderLost, EngineRefused):
            return False

    async def info(self) -> dict[str, object]:
        """Return what the engine says of itself."""
        return await self._ask("GET", "/info")

    async def pull(self, reference: str, *, username: str = "", password: str = "") -> None:
        """Fetch an image by name and digest or tag; a failure inside the stream is raised."""
        headers = {}
        if password:
            server = reference.partition("/")[0]
            auth = {"username": username, "password": password, "serveraddress": server}
            headers["X-Registry-Auth"] = urlsafe_b64encode(json.dumps(auth).encode()).decode()
        name, at, digest = reference.partition("@")
        query = {"fromImage": name, "tag": digest} if at else {"fromImage": reference}
        async with self._call(
            "POST", "/images/create", query=query, headers=headers, limit_s=None
        ) as answer:
            async for said in _stream(answer):
                if "error" in said:
                    raise _failure(200, str(said["error"]))

    async def image(self, reference: str) -> Image:
        """Read an image back; 404 in `EngineRefused` when it is not there."""
        found = await self._ask("GET", f"/images/{reference}/json")
        ports = _object(_object(found.get("Config")).get("ExposedPorts"))
        digests = found.get("RepoDigests")
        return Image(
            id=str(found.get("Id", "")),
            digests=tuple(map(str, digests)) if isinstance(digests, list) else (),
            ports=tuple(
                int(port)
                for port, _, kind in (name.partition("/") for name in ports)
                if port.isdecimal() and kind in {"", "tcp"}
            ),
        )

    async def create(self, name: str, body: Mapping[str, object]) -> str:
        """Make a container and return its id; 409 in `EngineRefused` when the name is taken."""
        made = await self._ask("POST", "/containers/create", query={"name": name}, body=body)
        return str(made["Id"])

    async def start(self, container: str) -> None:
        """Start a container; one that runs already is fine."""
        async with self._call("POST", f"/containers/{container}/start"):
            pass

    async def keep_running(self, container: str) -> None:
        """Have the engine start a container again whenever its program ends by itself."""
        policy = {"RestartPolicy": {"Name": "unless-stopped"}}
        async with self._call("POST", f"/containers/{container}/update", body=policy):
            pass

    async def inspect(self, container: str) -> Container:
        """Read a container back, by id or name."""
        return Container.parse(await self._ask("GET", f"/containers/{container}/json"))

    async def stop(self, container: str, *, grace_s: int = 10) -> None:
        """SIGTERM, `grace_s` seconds, SIGKILL; returns when it has stopped."""
        query = {"t": str(grace_s)}
        path = f"/containers/{container}/stop"
        async with self._call("POST", path, query=query, limit_s=grace_s + CALL_LIMIT_S):
            pass

    async def remove(self, container: str) -> None:
        """Remove a container, running or not, and its own volumes; one that is gone is fine."""
        try:
            async with self._call(
                "DELETE", f"/containers/{container}", query={"force": "1", "v": "1"}
            ):
                pass
        except EngineRefused as refusal:
            if refusal.status != 404:
                raise

    async def containers(self, label: str) -> list[str]:
        """Return the ids of all containers with a label `name=value`, running or not."""
        query = {"all": "1", "filters": json.dumps({"label": [label]})}
        async with self._call("GET", "/containers/json", query=query) as answer:
            listed = await answer.json(content_type=None)
        return [str(one["Id"]) for one in listed]

    async def logs(self, container: str, *, lines: int = 20) -> str:
        """Return the last lines that a container wrote, at most 4 KiB, made printable."""
        query = {"stdout": "1", "stderr": "1", "tail": str(lines)}
        async with self._call("GET", f"/containers/{container}/logs", query=query) as answer:
            octets = bytearray()
            async for piece in answer.content.iter_chunked(1 << 16):
                octets += piece
                if len(octets) > LOG_OCTETS:
                    break
        return printable(demultiplex(bytes(octets)).decode(errors="replace"))[-4096:]

    async def _ask(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, object] | None = None,
    ) -> dict[str, object]:
        async with self._call(method, path, query=query, body=body) as answer:
            return _object(await answer.json(content_type=None))

    @asynccontextmanager
    async def _call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, object] | None = None,
        headers: Mapping[str, str] | None = None,
        limit_s: float | None = CALL_LIMIT_S,
    ) -> AsyncGenerator[aiohttp.ClientResponse]:
        assert self._session is not None, "used outside its context"
        limits = aiohttp.ClientTimeout(total=limit_s, sock_read=STREAM_SILENCE_S)
        try:
            async with self._session.request(
                method, path, params=query, json=body, headers=headers, timeout=limits
            ) as answer:
                if answer.status >= 400:
                    raise await _refusal(answer)
                yield answer
        except (
            aiohttp.ClientError,
            HttpProcessingError,
            OSError,
            ValueError,
            RecursionError,
        ) as error:
            cause = printable(str(error))[:200] or type(error).__name__
            raise BuilderLost(
                f"the Docker engine did not answer {method} {path}: {cause}",
                hint="see the engine's log in the state directory, then try again",
            ) from error


def demultiplex(octets: bytes) -> bytes:
    """Take the frame headers out of a container's log (Engine API, "stream format").

    What does not begin like a frame comes from a container with a terminal and is returned as is.
    """
    pieces = []
    at = 0
    while at + 8 <= len(octets) and octets[at] <= 2 and octets[at + 1 : at + 4] == bytes(3):
        size = int.from_bytes(octets[at + 4 : at + 8])
        pieces.append(octets[at + 8 : at + 8 + size])
        at += 8 + size
    return b"".join(pieces) if pieces else octets


async def _stream(answer: aiohttp.ClientResponse) -> AsyncIterator[dict[str, object]]:
    async for line in answer.content:
        if line.strip():
            yield _object(json.loads(line))


async def _refusal(answer: aiohttp.ClientResponse) -> Exception:
    text = (await answer.content.read(LOG_OCTETS)).decode(errors="replace")
    try:
        message = str(_object(json.loads(text)).get("message") or text)
    except ValueError:
        message = text
    return _failure(answer.status, printable(message) or f"HTTP status {answer.status}")


def _failure(status: int, message: str) -> Exception:
    if "no space left on device" in message:
        return BuilderFull(
            f"the engine's disk is full: {message}", hint="free some space there and try again"
        )
    return EngineRefused(status, printable(message))


def _object(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


class Engine:
    """The engine that builds and runs everything; an async context manager.

    `own` tells whether it is ours, `why` how it came to be chosen. `existing` names the unix socket
    of an engine to use where ours cannot be (as in DOCKER_HOST; by default the usual one), and
    `may_own` says whether to try one of our own at all. `environment` is what our dockerd is given
    besides a search path: proxies. Raises `EngineMissing` when there is neither.
    """

    def __init__(
        self,
        state: Path,
        *,
        report: Report,
        existing: str | None = None,
        may_own: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.own = False
        self.why = ""
        self.docker_host = Path()
        self._state = state
        self._report = report
        self._existing = existing
        self._may_own = may_own
        self._environment = environment or {}
        self._daemon: OwnEngine | None = None
        self._client: EngineClient | None = None
        self._stack = AsyncExitStack()

    @property
    def client(self) -> EngineClient:
        """The open client of this engine."""
        assert self._client is not None, "used outside its context"
        return self._client

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            missing = await self._start_own(stack)
            if missing:
                await self._take_existing(missing)
            self._client = await stack.enter_async_context(EngineClient(self.docker_host))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def state(self) -> State:
        """Say what the engine is doing now; STARTED only when it answers."""
        if await self.client.ping():
            return State.STARTED
        if self._daemon is not None and self._daemon.state is not State.STARTED:
            return self._daemon.state
        return State.STOPPED

    async def ensure(self) -> State:
        """Say what the engine is doing after ours, if it was given up, was started once more."""
        if self._daemon is not None:
            try:
                await self._daemon.ensure()
            except ProgramFailed as error:
                self._report(f"the engine does not start: {error}")
        return await self.state()

    async def connect(self) -> socket.socket:
        """Return a fresh, non-blocking connection to the engine's API."""
        return await _connect(socket.AF_UNIX, str(self.docker_host), CONNECT_LIMIT_S)

    async def connect_container(
        self, address: str, port: int, *, limit_s: float = CONNECT_LIMIT_S
    ) -> socket.socket:
        """Return a non-blocking stream to a port of a container; raises as `connect` does."""
        if self._daemon is not None:
            return await self._daemon.namespace.connect(address, port, limit_s=limit_s)
        return await _connect(socket.AF_INET, (address, port), limit_s)

    async def listen(self, port: int) -> socket.socket:
        """Return a socket that listens on what the engine takes for 127.0.0.1."""
        if self._daemon is not None:
            return await self._daemon.namespace.listen(port)
        stream = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            stream.setblocking(False)
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            stream.bind(("127.0.0.1", port))
            stream.listen(128)
        except BaseException:
            stream.close()
            raise
        return stream

    async def _start_own(self, stack: AsyncExitStack) -> str:
        """Start an engine of ours; say why it could not be, or nothing."""
        if not self._may_own:
            return "one of our own was not wanted"
        reason = lacking(self._state)
        if reason:
            return reason
        daemon = OwnEngine(
            self._state, report=self._report, answers=_answers, environment=self._environment
        )
        try:
            await stack.enter_async_context(daemon)
        except (OSError, ProgramFailed) as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise LocalDiskFull(
                    f"no room for the engine in {self._state}", hint="free some space there"
                ) from error
            return printable(str(error))
        self._daemon = daemon
        self.docker_host = daemon.socket
        self.own = True
        self.why = f"dockerd of our own in the network namespace {daemon.namespace.name}"
        return ""

    async def _take_existing(self, missing: str) -> None:
        named = self._existing or HOST_ENGINE
        self.docker_host = Path(named.removeprefix("unix://"))
        if await _answers(self.docker_host):
            self.why = f"the engine at {self.docker_host} ({missing})"
            return
        raise EngineMissing(
            f"no Docker engine: {missing}; none answers at {named}",
            hint="as root, install the packages docker.io and docker-registry; "
            "or start a Docker engine that you may use",
        )


async def _answers(path: Path) -> bool:
    """Tell whether an engine is ready at a socket: it answers a ping and knows what it is."""
    async with EngineClient(path) as client:
        try:
            return await client.ping() and bool(await client.info())
        except (BuilderLost, EngineRefused):
            return False


async def _connect(
    family: socket.AddressFamily, address: str | tuple[str, int], limit_s: float
) -> socket.socket:
    stream = socket.socket(family, socket.SOCK_STREAM)
    try:
        stream.setblocking(False)
        async with asyncio.timeout(limit_s):
            await asyncio.get_running_loop().sock_connect(stream, address)
    except BaseException:
        stream.close()
        raise
    return stream

"""The image registry: Debian's docker-registry behind a door of ours that asks who may do what.

The program listens on a unix socket that only we can reach. What the engine talks to is a listener
of ours on the engine's own loopback; it decides by token, repository and action, and passes the
octets on as they are.
"""

import errno
import json
import os
import re
import secrets
import shutil
import socket
from base64 import b64decode
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final, Self
from urllib.parse import parse_qsl, urlencode

import aiohttp
from aiohttp import hdrs, web
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from builder_orch.errors import EngineMissing, LocalDiskFull, PortInUse
from builder_orch.selfhost.process import (
    Program,
    ProgramFailed,
    Report,
    State,
    dying_with_us,
    find_program,
    private_directory,
    remove_if_empty,
    run_directory,
)

USER: Final = "x"
"""The user name of every token, as clients of this kind of platform send it."""
PORTS: Final = range(20_000, 32_000)
"""Below the ports that systems hand out by themselves, so that a kept one stays free."""
PORT_TRIES: Final = 20
CHALLENGE: Final = 'Basic realm="fly-build registry"'
ANSWER_OCTETS: Final = 64 << 10
PIECE_OCTETS: Final = 256 << 10
SILENCE_S: Final = 300.0
LEAST_ROOM: Final = 1 << 20
"""Octets on the registry's disk below which it may have lost what it took: it answers that it has
small pieces of an upload before they are written, and then does not know of them (404)."""
HOP_BY_HOP: Final = frozenset(
    {
        "authorization",
        "connection",
        "expect",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""Headers of one connection (RFC 9110 section 7.6.1), and the token, which ends here."""
FORM_TYPES: Final = ("application/x-www-form-urlencoded", "multipart/")
_NAME: Final = r"[a-z0-9]+(?:[._-]+[a-z0-9]+)*(?:/[a-z0-9]+(?:[._-]+[a-z0-9]+)*)*"
_PATH: Final = re.compile(
    rf"/v2/(?P<name>{_NAME})/"
    r"(?P<rest>tags/list|manifests/[A-Za-z0-9_][A-Za-z0-9_.:+-]*"
    r"|blobs/[a-z0-9]+:[0-9a-f]+|blobs/uploads/[A-Za-z0-9_=-]*)"
)
"""The paths of the distribution API that we pass on. Nothing in them needs escaping, so that what
we decide on is what the program below will see."""


class Action(StrEnum):
    """What a token may be allowed to do with a repository."""

    PULL = "pull"
    PUSH = "push"


Authorize = Callable[[str, str, Action], bool]
"""Given password, repository and action. The repository "" stands for any: is the token known?"""
Ensure = Callable[[], Awaitable[None]]
"""Returns when the program serves; `ProgramFailed` if it does not come up."""
Listen = Callable[[int], Awaitable[socket.socket]]
"""Given a port (0: any): a listening socket at what the engine takes for 127.0.0.1."""


@dataclass(frozen=True, slots=True)
class Errand:
    """A request that we would pass on: whose repository, and what is done to it."""

    repository: str
    action: Action

    @classmethod
    def of(cls, method: str, path: str) -> Self | None:
        """Read method and raw path; None for what is not served here.

        Manifests and blobs are deleted by the platform alone, never with a token.
        """
        found = _PATH.fullmatch(path)
        if found is None:
            return None
        rest = found["rest"]
        upload = rest.startswith("blobs/uploads/")
        if method in {"GET", "HEAD"}:
            return cls(found["name"], Action.PUSH if upload else Action.PULL)
        allowed = {"POST", "PATCH", "PUT", "DELETE"} if upload else {"PUT"}
        if method in allowed and (upload or rest.startswith("manifests/")):
            return cls(found["name"], Action.PUSH)
        return None


def password_of(authorization: str | None) -> str | None:
    """Return the password of Basic credentials for our one user, or None."""
    scheme, _, coded = (authorization or "").partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        user, colon, password = b64decode(coded, validate=True).decode().partition(":")
    except ValueError:
        return None
    return password if colon and user == USER and password else None


def configuration(path: Path, data: Path, secret: str) -> dict[str, object]:
    """Return the program's configuration (it reads YAML, of which JSON is a part)."""
    return {
        "version": 0.1,
        "log": {"level": "info", "accesslog": {"disabled": True}},
        "storage": {
            "filesystem": {"rootdirectory": str(data)},
            "delete": {"enabled": True},
            "cache": {"blobdescriptor": "inmemory"},
            "maintenance": {
                "uploadpurging": {
                    "enabled": True,
                    "age": "24h",
                    "interval": "6h",
                    "dryrun": False,
                }
            },
        },
        "http": {
            "net": "unix",
            "addr": str(path),
            "relativeurls": True,
            "secret": secret,
            "headers": {"X-Content-Type-Options": ["nosniff"]},
        },
    }


def failure(status: int, code: str, message: str, **headers: str) -> web.Response:
    """Return an error in the registry's own form, which engines show to their users.

    `detail` may not be null: dockerd would drop the message, and repeat the request for 50 s.
    """
    return web.json_response(
        {"errors": [{"code": code, "message": message, "detail": {}}]},
        status=status,
        headers={name.replace("_", "-"): value for name, value in headers.items()},
    )


class Door:
    """Passes requests of known tokens on to the program at a unix socket; an aiohttp handler.

    Bodies are passed on by the piece. A client that goes away in the middle takes the request below
    with it: its body is broken off, never ended in order.
    """

    def __init__(
        self,
        path: Path,
        authorize: Authorize,
        report: Report,
        ensure: Ensure | None = None,
        room: Callable[[], int] = lambda: LEAST_ROOM,
    ) -> None:
        self._path = path
        self._room = room
        self._authorize = authorize
        self._report = report
        self._ensure = ensure
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(str(self._path), limit=0, force_close=True),
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_read=SILENCE_S),
            skip_auto_headers=(
                hdrs.USER_AGENT,
                hdrs.ACCEPT,
                hdrs.ACCEPT_ENCODING,
                hdrs.CONTENT_TYPE,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def answers(self) -> bool:
        """Tell whether the program below serves the distribution API."""
        assert self._session is not None, "used outside its context"
        with suppress(aiohttp.ClientError, OSError):
            async with self._session.get(
                "http://registry/v2/", timeout=aiohttp.ClientTimeout(total=3.0)
            ) as answer:
                return answer.status == 200
        return False

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one request of an engine."""
        password = password_of(request.headers.get(hdrs.AUTHORIZATION))
        path = request.rel_url.raw_path
        if password is None:
            return failure(
                401, "UNAUTHORIZED", "authentication required", WWW_Authenticate=CHALLENGE
            )
        if path in {"/v2", "/v2/"}:
            if not self._authorize(password, "", Action.PULL):
                return failure(
                    401, "UNAUTHORIZED", "authentication required", WWW_Authenticate=CHALLENGE
                )
            return web.json_response(
                {}, headers={"Docker-Distribution-Api-Version": "registry/2.0"}
            )
        errand = Errand.of(request.method, path)
        if errand is None:
            return failure(405, "UNSUPPORTED", "the operation is unsupported")
        if not self._authorize(password, errand.repository, errand.action):
            return failure(403, "DENIED", "requested access to the resource is denied")
        if self._ensure is not None:
            try:
                # One that has just ended is about to be there again.
                await self._ensure()
            except ProgramFailed as error:
                self._report(f"the registry does not start: {error}")
                # Not a 5xx: see `_fault`.
                return failure(424, "UNSUPPORTED", "the registry does not start; see its log")
        return await self._pass_on(request, password)

    async def _pass_on(self, request: web.Request, password: str) -> web.StreamResponse:
        assert self._session is not None, "used outside its context"
        query = self._allowed_query(request, password)
        target = URL(f"http://registry{request.rel_url.raw_path}{query}", encoded=True)
        try:
            async with self._session.request(
                request.method,
                target,
                headers=_passed_headers(request.headers),
                data=_pieces(request) if request.body_exists else None,
                allow_redirects=False,
            ) as answer:
                if answer.status >= 500:
                    return await self._fault(answer)
                if answer.status == 404 and request.method == "PUT" and self._room() < LEAST_ROOM:
                    return self._full()
                return await _pass_back(request, answer)
        except (aiohttp.ClientError, TimeoutError) as error:
            if request.transport is None or request.transport.is_closing():
                raise ConnectionResetError("the engine went away") from error
            self._report(f"the registry did not answer: {error}")
            return failure(503, "UNAVAILABLE", "the registry does not answer")

    def _allowed_query(self, request: web.Request, password: str) -> str:
        """Return the query without a mount of layers from a repository the token may not read.

        The registry then starts an ordinary upload instead, as its specification has it.
        """
        pairs = parse_qsl(request.rel_url.raw_query_string, keep_blank_values=True)
        sources = [value for name, value in pairs if name == "from"]
        if not all(self._authorize(password, source, Action.PULL) for source in sources):
            pairs = [pair for pair in pairs if pair[0] not in {"from", "mount"}]
        return f"?{urlencode(pairs)}" if pairs else ""

    async def _fault(self, answer: aiohttp.ClientResponse) -> web.StreamResponse:
        text = (await answer.content.read(ANSWER_OCTETS)).decode(errors="replace")
        if "no space left on device" in text or '"Err":28' in text:
            return self._full()
        self._report(f"the registry failed ({answer.status}): {text[:500]}")
        return web.Response(
            status=answer.status, text=text, content_type=answer.content_type, charset="utf-8"
        )

    def _full(self) -> web.Response:
        self._report("the registry's disk is full")
        # Not a 5xx: engines repeat those for a minute and then hide the text.
        return failure(413, "UNSUPPORTED", "no space left on device: the registry's disk is full")


def _passed_headers(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    """Copy the headers that go to the next hop.

    A form's fields would be read by the program beside the query that was checked here.
    """
    named = {name.strip().lower() for name in headers.get(hdrs.CONNECTION, "").split(",")}
    passed = CIMultiDict(
        (name, value)
        for name, value in headers.items()
        if name.lower() not in HOP_BY_HOP and name.lower() not in named
    )
    if passed.get(hdrs.CONTENT_TYPE, "").strip().lower().startswith(FORM_TYPES):
        del passed[hdrs.CONTENT_TYPE]
    return passed


async def _pieces(request: web.Request) -> AsyncIterator[bytes]:
    async for piece in request.content.iter_chunked(PIECE_OCTETS):
        yield piece


async def _pass_back(request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
    response = web.StreamResponse(status=answer.status, reason=answer.reason)
    response.headers.extend(_passed_headers(answer.headers))
    await response.prepare(request)
    if request.method != "HEAD":
        async for piece in answer.content.iter_chunked(PIECE_OCTETS):
            await response.write(piece)
    await response.write_eof()
    return response


def serving(door: Door) -> web.AppRunner:
    """Return the server of a door, without a socket yet."""
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", door.handle)
    # Bodies may be compressed layers; their octets are what the digest is of.
    return web.AppRunner(
        application,
        access_log=None,
        handler_cancellation=True,
        auto_decompress=False,
        shutdown_timeout=2.0,
    )


class Registry:
    """The registry program and the door in front of it; an async context manager.

    `address` ("127.0.0.1:PORT") is the first part of image names as the engine sees it; the port is
    chosen once and kept in the state directory. Raises `EngineMissing` without the program,
    `PortInUse` when another program has the kept port, `LocalDiskFull`.
    """

    def __init__(
        self, state: Path, *, listen: Listen, authorize: Authorize, report: Report
    ) -> None:
        self.port = 0
        self._state = state
        self._listen = listen
        self._authorize = authorize
        self._report = report
        self._door: Door | None = None
        self._program: Program | None = None
        self._stack = AsyncExitStack()

    @property
    def address(self) -> str:
        """Host and port that image names begin with."""
        return f"127.0.0.1:{self.port}"

    @property
    def state(self) -> State:
        """What the registry program is doing."""
        return self._program.state if self._program else State.CREATED

    async def __aenter__(self) -> Self:
        program = find_program("docker-registry")
        if program is None:
            raise EngineMissing(
                "no registry: the program docker-registry is not installed",
                hint="install the package docker-registry",
            )
        try:
            async with AsyncExitStack() as stack:
                await self._start(program, stack)
                self._stack = stack.pop_all()
        except ProgramFailed as error:
            raise EngineMissing(
                f"the registry did not start: {error}",
                hint=f"see {self._state / 'registry.log'}",
            ) from error
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise LocalDiskFull(
                f"no room for the registry in {self._state}", hint="free some space there"
            ) from error
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def ping(self) -> bool:
        """Tell whether the registry serves its API."""
        return self.state is State.STARTED and self._door is not None and await self._door.answers()

    async def _start(self, program: str, stack: AsyncExitStack) -> None:
        folder = private_directory(self._state / "engine")
        path = run_directory(self._state) / "registry.sock"
        stack.callback(remove_if_empty, path.parent)
        stack.callback(path.unlink, missing_ok=True)
        path.unlink(missing_ok=True)
        listener = await self._listener(folder / "registry.port")
        stack.callback(listener.close)
        config = folder / "registry.yml"
        data = private_directory(folder / "registry")
        secret = _kept(folder / "registry.secret", secrets.token_hex(32))
        _write(config, json.dumps(configuration(path, data, secret), indent=2))
        door = Door(
            path,
            self._authorize,
            self._report,
            ensure=self._ensure,
            room=lambda: shutil.disk_usage(data).free,
        )
        self._door = await stack.enter_async_context(door)
        self._program = Program(
            "docker-registry",
            [*dying_with_us("TERM"), program, "serve", str(config)],
            log=self._state / "registry.log",
            ready=door.answers,
            report=self._report,
        )
        stack.push_async_callback(self._program.stop)
        await self._program.start()
        runner = serving(self._door)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.SockSite(runner, listener).start()

    async def _ensure(self) -> None:
        assert self._program is not None
        await self._program.ensure()

    async def _listener(self, file: Path) -> socket.socket:
        """Listen on the port that is in image names already, or on a new one, which is kept."""
        self.port = _kept_port(file)
        if self.port:
            try:
                return await self._listen(self.port)
            except OSError as error:
                raise PortInUse(
                    f"the registry's address {self.address} cannot be had: {error.strerror}",
                    hint="end the program that listens there; or remove "
                    f"{file} for a new port, and deploy again what ran here",
                ) from error
        for port in (secrets.choice(PORTS) for _ in range(PORT_TRIES)):
            with suppress(OSError):
                listener = await self._listen(port)
                self.port = port
                _write(file, str(port))
                return listener
        raise PortInUse(
            f"no port from {PORTS.start} to {PORTS.stop} can be had for the registry",
            hint="end a program that listens on one of them",
        )


def _kept_port(file: Path) -> int:
    try:
        return int(file.read_text())
    except (FileNotFoundError, ValueError):
        return 0


def _kept(file: Path, fresh: str) -> str:
    """Return what a file of ours holds, or what it holds from now on."""
    if not file.exists():
        _write(file, fresh)
    return file.read_text()


def _write(file: Path, text: str) -> None:
    """Replace a file by one that we alone can read."""
    part = file.with_name(f".{file.name}.part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
        opened.write(text)
    part.replace(file)

"""From a dialled stream to the engine's Control API.

Docker 29.2 and later (API 1.53) takes HTTP/2 on its socket as it is; before, one HTTP/1.1 request
turns the connection into one. Its head is read here and nowhere else: the engine's first frames may
come in the same segment.
"""

import asyncio
import re
import socket
import ssl
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from builder_orch.buildkit.grpc import Channel, Failed
from builder_orch.buildkit.http2 import Connection, Lost, SocketPipe, Vigilance
from builder_orch.buildkit.messages import worker_labels
from builder_orch.buildkit.session import CONTROL
from builder_orch.tunnel.machine import Malformed

UPGRADED_BELOW = (1, 53)
NATIVE = "1.53"
"""What a daemon is like that is nothing but BuildKit: it takes HTTP/2 as it is."""
OLDEST = (1, 39)
"""The first API version with BuildKit in it (Docker 18.09)."""
ANSWER_S = 30.0
"""How long the engine may take to agree and to say what it has."""
HEAD_LIMIT = 64 * 1024
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})\b *([^\r\n]*)")
_UPGRADE = (
    b"POST /grpc HTTP/1.1\r\nHost: docker\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n"
    b"Content-Length: 0\r\n\r\n"
)


class Unavailable(Exception):
    """The engine has no BuildKit for us; the text says how it said so."""


@dataclass(frozen=True, slots=True)
class Tls:
    """How a daemon is known, and how we are known to it."""

    context: ssl.SSLContext
    name: str


@dataclass(frozen=True, slots=True)
class Control:
    """An open Control API."""

    channel: Channel
    pipe: SocketPipe
    containerd_store: bool
    """Whether images lie in containerd's own store, where an image's id is its manifest's."""


def version_of(text: str) -> tuple[int, int]:
    """`1.41` as numbers; (0, 0) for what is no version."""
    major, _, minor = text.partition(".")
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else (0, 0)


@asynccontextmanager
async def connected(
    sock: socket.socket,
    api_version: str,
    vigilance: Vigilance | None = None,
    tls: Tls | None = None,
) -> AsyncGenerator[Control]:
    """The Control API over a connected socket, which is closed with the block.

    Unavailable when the engine has none, Lost when the connection breaks meanwhile; that it did
    without a word is noticed by `vigilance`.
    """
    reader, writer = await _opened(sock, tls)
    pipe = SocketPipe(reader, writer)
    try:
        await _agree(reader, pipe, api_version)
        async with Connection(pipe, client=True, vigilance=vigilance) as connection:
            channel = Channel(connection)
            yield Control(channel, pipe, await _probe(channel))
    finally:
        pipe.close()


async def _opened(
    sock: socket.socket, tls: Tls | None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if tls is None:
        return await asyncio.open_connection(sock=sock, limit=HEAD_LIMIT)
    try:
        return await asyncio.open_connection(
            sock=sock,
            limit=HEAD_LIMIT,
            ssl=tls.context,
            server_hostname=tls.name,
            ssl_handshake_timeout=ANSWER_S,
        )
    except ssl.SSLError as error:
        raise Unavailable(f"TLS: {error.reason or error}") from None
    except OSError as error:
        raise Lost(error.strerror or type(error).__name__) from None


async def _agree(reader: asyncio.StreamReader, pipe: SocketPipe, api_version: str) -> None:
    """Make the connection one of HTTP/2, if it is not from the start."""
    version = version_of(api_version)
    if version < OLDEST:
        raise Unavailable(f"its API {api_version} is older than BuildKit")
    if version >= UPGRADED_BELOW:
        return
    try:
        async with asyncio.timeout(ANSWER_S):
            await _upgrade(reader, pipe)
    except TimeoutError:
        raise Unavailable(f"it does not answer /grpc within {ANSWER_S:g} s") from None
    except OSError as error:
        raise Lost(error.strerror or type(error).__name__) from None


async def _upgrade(reader: asyncio.StreamReader, pipe: SocketPipe) -> None:
    await pipe.write(_UPGRADE)
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if not error.partial:
            raise Lost("the far end closed the connection") from None
        raise Unavailable("it answers /grpc with something else than HTTP") from None
    except asyncio.LimitOverrunError:
        raise Unavailable("it answers /grpc with something else than HTTP") from None
    found = _STATUS.match(head)
    if found is None:
        raise Unavailable("it answers /grpc with something else than HTTP")
    if int(found[1]) != 101:
        said = found[2].decode("latin-1").strip()
        raise Unavailable(f"it answers /grpc with {int(found[1])} {said}".strip())


async def _probe(channel: Channel) -> bool:
    """Prove that a BuildKit answers, and see what kind of store it has."""
    try:
        async with asyncio.timeout(ANSWER_S):
            workers = worker_labels(await channel.ask(f"{CONTROL}/ListWorkers", b""))
    except Failed as error:
        raise Unavailable(f"its BuildKit does not list its workers: {error}") from None
    except TimeoutError:
        raise Unavailable(f"its BuildKit does not answer within {ANSWER_S:g} s") from None
    except Malformed as error:
        raise Unavailable(f"its BuildKit answers with something else: {error}") from None
    if not workers:
        raise Unavailable("its BuildKit has no workers")
    return any("org.mobyproject.buildkit.worker.snapshotter" in labels for labels in workers)

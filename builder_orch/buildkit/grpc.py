"""gRPC over HTTP/2: messages with a length before them, and a status at the end.

As in "gRPC over HTTP2"; nothing is compressed, and no deadline is sent.
"""

import asyncio
import base64
import binascii
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from urllib.parse import quote, unquote

from h2.errors import ErrorCodes

from builder_orch.buildkit.http2 import Connection, Headers, Lost, Reset, Stream
from builder_orch.tunnel.machine import Malformed

PREFIX = 5
LONGEST = 16 << 20
"""Octets of a message that is taken."""


class Code(IntEnum):
    """The status codes of gRPC."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class Failed(Exception):
    """A call ended with a status other than OK."""

    def __init__(self, code: int, message: str, details: bytes = b"") -> None:
        super().__init__(message)
        self.code = code
        self.details = details


def frame(message: bytes) -> bytes:
    """A message with its prefix: not compressed, its length in 4 octets."""
    return b"\0" + len(message).to_bytes(4, "big") + message


@dataclass(slots=True)
class Messages:
    """Cuts octets into messages, however they were cut on the way."""

    _pending: bytearray = field(default_factory=bytearray)

    def feed(self, octets: bytes) -> Iterator[bytes]:
        """The messages that are complete now; Malformed for what cannot be one."""
        self._pending += octets
        at = 0
        while len(self._pending) - at >= PREFIX:
            if self._pending[at]:
                raise Malformed("a compressed message, though nothing was agreed upon")
            size = int.from_bytes(self._pending[at + 1 : at + PREFIX], "big")
            if size > LONGEST:
                raise Malformed(f"a message of {size} octets")
            if len(self._pending) - at - PREFIX < size:
                break
            at += PREFIX
            yield bytes(self._pending[at : at + size])
            at += size
        del self._pending[:at]

    @property
    def complete(self) -> bool:
        """Is nothing left over?"""
        return not self._pending


class Call:
    """One call, seen from either side."""

    def __init__(self, stream: Stream, *, client: bool) -> None:
        self._stream = stream
        self._client = client
        self._messages = Messages()
        self._ready: list[bytes] = []
        self._torn = False

    @property
    def metadata(self) -> Headers:
        """What the client said before its first message."""
        return self._stream.headers

    def bulk(self) -> None:
        """From now on leave room for the short messages of others."""
        self._stream.bulk = True

    async def send(self, *messages: bytes, end: bool = False) -> None:
        """Send messages whole, one after the other; Failed or Lost when nobody takes them."""
        octets = b"".join(map(frame, messages))
        async with self._stream.lock:
            if self._torn:
                raise Failed(Code.ABORTED, "a message before this one was not sent whole")
            try:
                self._torn = True
                await self._stream.write(octets, end=end)
                self._torn = False
            except Reset as error:
                # The far end may have said why before it reset what we were still sending.
                raise self._said() or _cancelled(error) from None

    async def receive(self) -> bytes | None:
        """The next message; None after the last. Failed if it did not end well."""
        while not self._ready:
            try:
                octets = await self._stream.read()
                if octets:
                    self._ready.extend(reversed(list(self._messages.feed(octets))))
                    continue
            except Reset as error:
                raise self._said() or _cancelled(error) from None
            except Malformed as error:
                self._stream.reset(ErrorCodes.PROTOCOL_ERROR)
                raise Failed(Code.INTERNAL, str(error)) from None
            if self._client and (failure := self._said(missing=True)) is not None:
                raise failure
            if not self._messages.complete:
                raise Failed(Code.INTERNAL, "the last message is cut off")
            return None
        return self._ready.pop()

    def cancel(self) -> None:
        """Give the call up, if it has not ended."""
        self._stream.reset(ErrorCodes.CANCEL)

    def _said(self, *, missing: bool = False) -> Failed | None:
        """The status in the trailers, which may be the only headers there are."""
        if not self._client:
            return None
        found = dict(self._stream.headers) | dict(self._stream.trailers)
        status = found.get("grpc-status", "")
        if not status.isdecimal():
            if not missing:
                return None
            why = f"HTTP status {found.get(':status')} and no status of the call"
            return Failed(Code.UNKNOWN, why)
        if int(status) == Code.OK:
            return None
        details = found.get("grpc-status-details-bin", "")
        return Failed(int(status), unquote(found.get("grpc-message", "")), _binary(details))


Handler = Callable[[Call], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Channel:
    """The client's side of a connection."""

    connection: Connection
    authority: str = "localhost"

    def call(self, method: str, metadata: Headers = ()) -> Call:
        """Begin a call of `/service/method`."""
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", method),
            (":authority", self.authority),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            *metadata,
        ]
        return Call(self.connection.open(headers), client=True)

    async def ask(self, method: str, request: bytes) -> bytes:
        """One message there, one back; cancelling it cancels the call."""
        call = self.call(method)
        try:
            await call.send(request, end=True)
            answer = await call.receive()
            if answer is None:
                raise Failed(Code.INTERNAL, f"{method} was answered with nothing")
            await call.receive()
            return answer
        finally:
            call.cancel()


class Service:
    """The server's side: runs a handler for every call. An async context manager is `serving`.

    `failed` is told of whatever a handler raises besides `Failed`.
    """

    def __init__(
        self, handlers: Mapping[str, Handler], failed: Callable[[Exception], None]
    ) -> None:
        self._handlers = handlers
        self._failed = failed
        self._tasks: set[asyncio.Task[None]] = set()

    def accept(self, stream: Stream) -> None:
        """Take a stream that the far end opened."""
        task = asyncio.create_task(self._serve(stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def end(self) -> None:
        """Stop all that is being answered."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, stream: Stream) -> None:
        handler = self._handlers.get(dict(stream.headers).get(":path", ""))
        code, message = Code.OK, ""
        if handler is None:
            code, message = Code.UNIMPLEMENTED, "not served here"
        else:
            stream.answer([(":status", "200"), ("content-type", "application/grpc")])
            try:
                await handler(Call(stream, client=False))
            except Failed as error:
                code, message = Code(error.code), str(error)
            except (Lost, Reset):
                return
            except Exception as error:
                self._failed(error)
                code, message = Code.UNKNOWN, str(error)
        trailers = [("grpc-status", str(int(code)))]
        if message:
            trailers.append(("grpc-message", _escaped(message)))
        if handler is None:
            head = [(":status", "200"), ("content-type", "application/grpc")]
            trailers = head + trailers
        stream.answer(trailers, end=True)


@asynccontextmanager
async def serving(service: Service) -> AsyncGenerator[Service]:
    """Nothing of it goes on after the block."""
    try:
        yield service
    finally:
        await service.end()


def _escaped(message: str) -> str:
    return quote(message, safe=" !#$&'()*+,/:;<=>?@[]^_`{|}~", errors="replace")


def _cancelled(error: Reset) -> Failed:
    if error.code in (ErrorCodes.CANCEL, ErrorCodes.NO_ERROR):
        return Failed(Code.CANCELLED, "the call was cancelled")
    if error.code == ErrorCodes.REFUSED_STREAM:
        return Failed(Code.UNAVAILABLE, "the call was refused")
    return Failed(Code.INTERNAL, str(error))


def _binary(value: str) -> bytes:
    try:
        return base64.b64decode(value + "=" * (-len(value) % 4))
    except binascii.Error:
        return b""

"""HTTP/2 over any stream of octets, in either role (RFC 9113); the one user of `h2`.

What has to be answered at once (PING, SETTINGS) is answered by the task that reads, which never
waits for anybody's window. Writers wait: for the far end's windows and for the stream below.
"""

import asyncio
import os
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    RemoteSettingsChanged,
    RequestReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
    WindowUpdated,
)
from h2.exceptions import H2Error
from h2.settings import SettingCodes, Settings

RESERVE = 16 * 1024
"""Octets of the connection's window that bulk leaves to short answers."""
BACKLOG = 256 * 1024
"""Octets that may wait for the stream below before writers wait too."""
STREAM_WINDOW = 1 << 20
CONNECTION_WINDOW = 4 << 20
"""Octets that the far end may send before somebody reads them."""
HEADER_LIST = 4 << 20
"""Octets of headers: an engine names every file of a COPY and every rule of .dockerignore there."""
STREAMS = 100
UNEARNED = 2
"""Pings in a row, with nothing but their answers between them, that a server of gRPC's own library
puts up with; it ends the connection at the next one that comes within five minutes."""
UNEARNED_EVERY_S = 310.0

Headers = Sequence[tuple[str, str]]


class Lost(Exception):
    """The connection is gone; the text says why."""


class Reset(Exception):
    """The far end gave a stream up; `code` is its reason (RFC 9113 section 7)."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the stream was reset ({_name(code)})")
        self.code = code


@dataclass(frozen=True, slots=True)
class Vigilance:
    """How a far end that is gone is noticed: after `quiet_s` without an octet it is asked for a
    sign of life, and given up after `answer_s` more. `pause` waits."""

    quiet_s: float = 10.0
    answer_s: float = 18.0
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep


class Pipe(Protocol):
    """What is below: octets both ways."""

    async def read(self) -> bytes:
        """Some octets; none at the end."""
        ...

    async def write(self, octets: bytes) -> None:
        """Take all of them; waits while the far end does not keep up."""
        ...

    def close(self) -> None:
        """Let go, whatever is still under way."""
        ...


class SocketPipe:
    """A connected socket as asyncio's streams have it; counts what goes through."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.sent = 0
        self.received = 0

    async def read(self) -> bytes:
        octets = await self._reader.read(BACKLOG)
        self.received += len(octets)
        return octets

    async def write(self, octets: bytes) -> None:
        self._writer.write(octets)
        self.sent += len(octets)
        await self._writer.drain()

    def close(self) -> None:
        self._writer.close()


class Stream:
    """One exchange: headers, octets both ways, trailers. Made by its `Connection`."""

    def __init__(self, connection: "Connection", number: int) -> None:
        self.number = number
        self.headers: Headers = ()
        self.trailers: Headers = ()
        self.lock = asyncio.Lock()
        """Held by whoever writes a message that others must not interleave with."""
        self.bulk = False
        """Leaves a part of the window to the short answers of others."""
        self._connection = connection
        self._inbox: deque[tuple[bytes, int]] = deque()
        self._ended = False
        self._failure: Exception | None = None
        self._broken = False
        self._turn = asyncio.Event()

    async def read(self) -> bytes:
        """What arrived, b"" at the end; Reset or Lost when it broke off."""
        while not self._inbox:
            if self._failure is not None and self._broken:
                raise self._failure
            if self._ended:
                return b""
            self._turn.clear()
            await self._turn.wait()
        octets, counted = self._inbox.popleft()
        self._connection.consumed(self.number, counted)
        return octets

    async def write(self, octets: bytes, *, end: bool = False) -> None:
        """Send all of them; the end closes our half."""
        await self._connection.send(self, octets, end)

    def answer(self, headers: Headers, *, end: bool = False) -> None:
        """Headers first, and trailers (with the end) last."""
        self._connection.send_headers(self, headers, end)

    def reset(self, code: ErrorCodes = ErrorCodes.CANCEL) -> None:
        """Give it up, if it is still open."""
        self._connection.reset(self, code)

    @property
    def failure(self) -> Exception | None:
        """Why it broke off, if it did."""
        return self._failure

    def arrived(self, octets: bytes, counted: int) -> None:
        """Called by the connection, as the next two are."""
        self._inbox.append((octets, counted))
        self._turn.set()

    def ended(self) -> None:
        """The far end has no more to say."""
        self._ended = True
        self._turn.set()

    def failed(self, why: Exception) -> None:
        """It broke off; what had come to its end before stays whole for its reader."""
        self._failure = self._failure or why
        self._broken = self._broken or not self._ended
        self._turn.set()


class Connection:
    """Streams over one pipe; an async context manager. `accept` is given what the far end opens.

    Without `vigilance` a far end that is gone is waited for.
    """

    def __init__(
        self,
        pipe: Pipe,
        *,
        client: bool,
        accept: Callable[[Stream], None] = lambda _: None,
        vigilance: Vigilance | None = None,
    ) -> None:
        self._pipe = pipe
        self._accept = accept
        self._vigilance = vigilance
        self._heard = 0
        self._unearned = 0
        self._streams: dict[int, Stream] = {}
        self._state = H2Connection(H2Configuration(client_side=client, header_encoding=None))
        self._state.local_settings = Settings(
            client=client,
            initial_values={
                SettingCodes.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
                SettingCodes.MAX_CONCURRENT_STREAMS: STREAMS,
                SettingCodes.MAX_HEADER_LIST_SIZE: HEADER_LIST,
            }
            | ({SettingCodes.ENABLE_PUSH: 0} if client else {}),
        )
        self._state.decoder.max_header_list_size = HEADER_LIST
        self._out: list[bytes] = []
        self._waiting = 0
        self._to_write = asyncio.Event()
        self._moved: list[asyncio.Future[None]] = []
        self._lost: Lost | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._state.initiate_connection()
        self._state.increment_flow_control_window(CONNECTION_WINDOW - 65535)
        self._flush()
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]
        if self._vigilance is not None:
            self._tasks.append(asyncio.create_task(self._watch(self._vigilance)))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._lose("it was closed on this side")
        self._pipe.close()

    @property
    def lost(self) -> Lost | None:
        """Why it is gone, if it is."""
        return self._lost

    def open(self, headers: Headers) -> Stream:
        """Begin an exchange, in the client's role."""
        if self._lost is not None:
            raise self._lost
        try:
            stream = Stream(self, self._state.get_next_available_stream_id())
            self._streams[stream.number] = stream
            self.send_headers(stream, headers, False)
        except H2Error as error:
            raise Lost(f"no stream can be opened: {error}") from None
        return stream

    async def drained(self) -> None:
        """Wait until the pipe took all that was written."""
        while self._waiting and self._lost is None:
            await self._until_moved()

    # --- for streams

    async def send(self, stream: Stream, octets: bytes, end: bool) -> None:
        """Send octets as far as windows allow, waiting for more room as often as needed."""
        view = memoryview(octets)
        while view or end:
            if stream.failure is not None:
                raise stream.failure
            if self._waiting >= BACKLOG:
                await self._until_moved()
                continue
            size = min(self._room(stream), len(view))
            if view and not size:
                await self._until_moved()
                continue
            last = end and size == len(view)
            self._state.send_data(stream.number, view[:size], end_stream=last)
            self._flush()
            view = view[size:]
            if last:
                return

    def _room(self, stream: Stream) -> int:
        try:
            room = self._state.local_flow_control_window(stream.number)
        except H2Error as error:
            raise Lost(f"the stream is closed: {error}") from None
        if stream.bulk:
            room = min(room, self._state.outbound_flow_control_window - RESERVE)
        return max(0, min(room, self._state.max_outbound_frame_size))

    def send_headers(self, stream: Stream, headers: Headers, end: bool) -> None:
        """Headers or trailers; dropped when the stream is already gone."""
        if self._lost is None and stream.failure is None:
            encoded = [(_octets(name), _octets(value)) for name, value in headers]
            self._state.send_headers(stream.number, encoded, end_stream=end)
            self._flush()
            if end:
                # An answer that ends is the last thing of its stream.
                del self._streams[stream.number]

    def consumed(self, number: int, counted: int) -> None:
        """Somebody read these octets: the far end may send as many again."""
        if self._lost is None and counted:
            self._state.acknowledge_received_data(counted, number)
            self._flush()

    def reset(self, stream: Stream, code: ErrorCodes) -> None:
        """Give a stream up, if it is still open."""
        if self._lost is None and self._streams.pop(stream.number, None) is not None:
            try:
                self._state.reset_stream(stream.number, code)
            except H2Error:
                # Both halves were closed already.
                return
            self._flush()
            stream.failed(Reset(code))

    # --- the two tasks

    async def _read(self) -> None:
        try:
            while octets := await self._pipe.read():
                self._heard += 1
                events = self._state.receive_data(octets)
                for event in events:
                    self._take(event)
                self._flush()
                self._moving()
            self._lose("the far end closed the connection")
        except H2Error as error:
            self._flush()
            self._lose(f"what came is no HTTP/2: {str(error) or type(error).__name__}")
        except (OSError, Lost) as error:
            self._lose(str(error) or type(error).__name__)

    async def _write(self) -> None:
        try:
            while True:
                await self._to_write.wait()
                self._to_write.clear()
                octets = b"".join(self._out)
                self._out.clear()
                await self._pipe.write(octets)
                self._waiting -= len(octets)
                self._moving()
        except (OSError, Lost) as error:
            self._lose(str(error) or type(error).__name__)

    async def _watch(self, vigilance: Vigilance) -> None:
        """The third task: who says nothing is asked, and lost if that is not answered either."""
        while self._lost is None:
            heard = self._heard
            often = self._unearned < UNEARNED
            await vigilance.pause(vigilance.quiet_s if often else UNEARNED_EVERY_S)
            if self._heard != heard:
                continue
            self._unearned += 1
            self._state.ping(os.urandom(8))
            self._flush()
            await vigilance.pause(vigilance.answer_s)
            if self._heard == heard:
                silence = vigilance.quiet_s + vigilance.answer_s
                self._lose(f"nothing was heard in {silence:g} s, though a ping was sent")

    def _take(self, event: Event) -> None:
        if isinstance(event, RequestReceived):
            number = event.stream_id or 0
            stream = self._streams[number] = Stream(self, number)
            stream.headers = _texts(event.headers)
            self._accept(stream)
            return
        if isinstance(event, ConnectionTerminated):
            if event.error_code:
                said = (event.additional_data or b"").decode("utf-8", "replace")
                self._lose(f"the far end ended it ({_name(int(event.error_code))} {said})")
            return
        if isinstance(event, WindowUpdated | RemoteSettingsChanged):
            return
        self._take_of_stream(event)

    def _take_of_stream(self, event: Event) -> None:
        number = getattr(event, "stream_id", None)
        stream = self._streams.get(number) if isinstance(number, int) else None
        if isinstance(event, DataReceived | ResponseReceived | TrailersReceived):
            self._unearned = 0
        if isinstance(event, DataReceived):
            counted = event.flow_controlled_length or 0
            if stream is None:
                self.consumed(event.stream_id or 0, counted)
            else:
                stream.arrived(event.data or b"", counted)
        elif stream is None:
            return
        elif isinstance(event, ResponseReceived):
            stream.headers = _texts(event.headers)
        elif isinstance(event, TrailersReceived):
            stream.trailers = _texts(event.headers)
        elif isinstance(event, StreamEnded):
            stream.ended()
        elif isinstance(event, StreamReset):
            del self._streams[stream.number]
            stream.failed(Reset(int(event.error_code or 0)))

    # ---

    def _flush(self) -> None:
        octets = self._state.data_to_send()
        if octets:
            self._out.append(octets)
            self._waiting += len(octets)
            self._to_write.set()

    async def _until_moved(self) -> None:
        if self._lost is not None:
            raise self._lost
        moved = asyncio.get_running_loop().create_future()
        self._moved.append(moved)
        await moved

    def _moving(self) -> None:
        moved, self._moved = self._moved, []
        for future in moved:
            if not future.done():
                future.set_result(None)

    def _lose(self, why: str) -> None:
        if self._lost is None:
            self._lost = Lost(why)
        for stream in self._streams.values():
            stream.failed(self._lost)
        self._streams.clear()
        self._moving()


def _texts(headers: Sequence[tuple[bytes, bytes]]) -> Headers:
    return [
        (name.decode("utf-8", "surrogateescape"), value.decode("utf-8", "surrogateescape"))
        for name, value in headers
    ]


def _octets(header: str) -> bytes:
    return header.encode("utf-8", "surrogateescape")


def _name(code: int) -> str:
    try:
        return ErrorCodes(code).name
    except ValueError:
        return f"code {code}"

"""One WebSocket connection as a pipe for datagrams; the same at both ends after the first words."""

import asyncio
import socket
from collections import Counter, deque
from typing import Protocol

from builder_orch.tunnel.carrier.frames import (
    GOING_AWAY,
    PONG,
    PROTOCOL_ERROR,
    TOO_BIG,
    Framer,
    Frames,
    Stream,
    TooLong,
)
from builder_orch.tunnel.carrier.upgrade import Head
from builder_orch.tunnel.machine import Datagrams, Endpoint, Entropy, Malformed

KEEPALIVE_S = 1.0
"""Silence of ours after which a zero-length datagram is sent."""
QUEUE_OCTETS = 1 << 20
"""What may wait for a connection that does not take more; the oldest goes first."""
USER_TIMEOUT_MS = 10_000
"""How long what we sent may stay unacknowledged; keepalives make sure that something was sent."""


class Owner(Protocol):
    """Whose connection it is."""

    drops: Counter[str]

    def opened(self, link: "Link") -> None:
        """Datagrams may go both ways now."""

    def deliver(self, octets: memoryview, segment: int, source: Endpoint) -> None:
        """Some came."""

    def settled(self) -> None:
        """What came at once was delivered, or there is room again."""

    def lost(self, link: "Link", reason: str) -> None:
        """The connection is gone; called once, also when it never opened."""


class Link(asyncio.Protocol):
    """Subclasses know the first words: `greet` and `negotiate`."""

    def __init__(self, owner: Owner, clock: "Clock", entropy: Entropy | None) -> None:
        # Only a client masks its frames, and only a server waits for the magic.
        is_client = entropy is not None
        self._owner = owner
        self._clock = clock
        self._framer = Framer(entropy)
        self._frames = Frames(from_client=not is_client)
        self._stream = Stream(magic=not is_client)
        self._transport: asyncio.Transport | None = None
        self._head: Head | None = Head()
        self._queue: deque[Datagrams] = deque()
        self._queued = 0
        self._reason = ""
        self._gone = False
        self.endpoint: Endpoint = ("", 0)
        self.paused_at: float | None = None
        self.sent_at = self.heard_at = self.began = clock()

    # -- first words ----------------------------------------------------------------------------

    def greet(self, transport: asyncio.Transport) -> None:
        """The connection is there."""

    def negotiate(self, head: Head) -> bool:
        """The other side's first words are whole; whether datagrams follow. Malformed."""
        raise NotImplementedError

    @property
    def is_open(self) -> bool:
        """Whether datagrams may go; at a server, whether the stream has begun."""
        return self._head is None and self._stream.begun and not self._gone

    # -- from the transport ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        sock = transport.get_extra_info("socket")
        host, port = transport.get_extra_info("peername")[:2]
        # Not an address alone: an UDP source may have the same one and the same port.
        self.endpoint = (f"websocket/{host}", port)
        if sock is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
        self.greet(transport)

    def data_received(self, data: bytes) -> None:
        self.heard_at = self._clock()
        try:
            if self._head is not None:
                if not self._head.receive(data):
                    return
                head, self._head = self._head, None
                if not self.negotiate(head):
                    return
                data = head.rest
                if self._stream.begun:
                    self._owner.opened(self)
            self._take(data)
        except TooLong as error:
            self.fail(str(error), TOO_BIG)
        except Malformed as error:
            self.fail(str(error), PROTOCOL_ERROR)

    def _take(self, data: bytes) -> None:
        begun = self._stream.begun
        runs = self._stream.receive(self._frames.receive(data))
        if not begun and self._stream.begun:
            self._owner.opened(self)
        for octets, segment in runs:
            self._owner.deliver(memoryview(octets), segment, self.endpoint)
        for ping in self._frames.pings:
            self.write(self._framer.message(PONG, ping))
        self._frames.pings.clear()
        if self._frames.closed:
            self.fail("closed by the other side", GOING_AWAY)
        if runs:
            self._owner.settled()

    def pause_writing(self) -> None:
        self.paused_at = self._clock()

    def resume_writing(self) -> None:
        self.paused_at = None
        while self._queue and self.paused_at is None:
            datagrams = self._queue.popleft()
            self._queued -= len(datagrams.octets)
            self.write(self._framer.train(datagrams))
        if self.paused_at is None:
            self._owner.settled()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._gone:
            return
        self._gone = True
        self._queue.clear()
        reason = self._reason or (str(exc) if exc else "") or "closed by the other side"
        self._owner.lost(self, reason)

    # -- from the owner -------------------------------------------------------------------------

    def write(self, octets: bytes) -> None:
        """Octets that are frames already, or first words."""
        if self._transport is not None and not self._transport.is_closing():
            self.sent_at = self._clock()
            self._transport.write(octets)

    def send(self, datagrams: Datagrams) -> None:
        """Send at once, or queue while the connection takes no more."""
        if self.paused_at is None:
            self.write(self._framer.train(datagrams))
            return
        self._queue.append(datagrams)
        self._queued += len(datagrams.octets)
        while self._queued > QUEUE_OCTETS:
            self._queued -= len(self._queue.popleft().octets)
            self._owner.drops["websocket queue full"] += 1

    def start_stream(self) -> None:
        """A client's first message."""
        self.write(self._framer.magic())

    def tick(self, now: float) -> None:
        """Called every second or so."""
        if self.is_open and self.paused_at is None and now - self.sent_at >= KEEPALIVE_S:
            self.write(self._framer.keepalive())

    def fail(self, reason: str, code: int = GOING_AWAY) -> None:
        """End the connection, and say why to both sides."""
        if self._reason or self._transport is None:
            return
        self._reason = reason
        if self._head is None:
            self.write(self._framer.close(code))
        self._transport.close()

    def abort(self, reason: str) -> None:
        """End the connection now."""
        self._reason = self._reason or reason
        if self._transport is not None and not self._gone:
            self._transport.abort()


class Clock(Protocol):
    """Seconds on a clock that never goes back."""

    def __call__(self) -> float: ...

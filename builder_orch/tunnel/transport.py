"""An inner TCP connection as a transport of asyncio: for programs whose loop the tunnel runs in.

A socket costs two more passes through the kernel each way, and the turns of the loop that go with
them. Here octets go from the application to the connection and back within one.
"""

import asyncio
from collections.abc import Callable
from ipaddress import IPv6Address
from typing import Protocol, cast

from builder_orch.tunnel.ipv6.connection import Connection
from builder_orch.tunnel.ipv6.state import End
from builder_orch.tunnel.machine import Address
from builder_orch.tunnel.stream import failed

HIGH_WATER = 1 << 16
"""Octets that the connection had no room for, from which on the application is asked to pause. The
connection itself holds megabytes."""
PIECE = 1 << 20
"""As many octets at most are handed up, or down, at once."""

Factory = Callable[[], asyncio.BaseProtocol]


class Connects(Protocol):
    """What a tunnel can do for `open_connection`."""

    async def create_connection(
        self, factory: Factory, host: str, port: int, *, timeout_s: float = 30.0
    ) -> tuple[asyncio.Transport, asyncio.BaseProtocol]:
        """See `Tunnel`."""


async def open_connection(
    tunnel: Connects, host: str, port: int, *, timeout_s: float = 30.0
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """`asyncio.open_connection` to an inside host; failures as of `Tunnel.dial`.

    For TLS use `Tunnel.dial`, whose socket asyncio takes.
    """
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport, _ = await tunnel.create_connection(lambda: protocol, host, port, timeout_s=timeout_s)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


class ConnectionTransport(asyncio.Transport):
    """One connection, for one protocol; belongs to the tunnel's loop.

    The tunnel calls `readable`, `writable` and `ended` within its turn. `pump` is for what the
    application does outside of one.
    """

    def __init__(
        self, connection: Connection, protocol: asyncio.BaseProtocol, pump: Callable[[], None]
    ) -> None:
        super().__init__(
            {"peername": _name(connection.remote), "sockname": _name(connection.local)}
        )
        self._connection = connection
        self._protocol = protocol
        self._pump = pump
        self._loop = asyncio.get_running_loop()
        self._unsent = bytearray()
        self._high, self._low = HIGH_WATER, HIGH_WATER // 4
        self._asked_to_pause = False
        self._reading = True
        self._heard_end = False
        self._eof_wanted = False
        self._closing = False
        self._lost = False
        self._over: Callable[[], object] = lambda: None

    # -- what the tunnel tells

    def start(self) -> None:
        """Introduce the two; what the connection already holds is delivered in the same turn."""
        self._call(self._protocol.connection_made, self)
        self.readable()

    def readable(self) -> None:
        """The connection has octets, or has ended its direction."""
        while self._reading and not self._closing:
            octets = self._connection.read(PIECE)
            if not octets:
                break
            self._call(self._hand_up, octets)
        if self._reading and not self._closing and self._connection.at_eof:
            self._call(self._hand_up_end)

    def writable(self) -> None:
        """The connection has room again."""
        self._flush()

    def ended(self, over: Callable[[], object]) -> None:
        """The connection is gone; `over` is called when nothing of it waits to be read."""
        self._over = over
        self.readable()
        if self._connection.end is not End.FINISHED:
            self._lose(failed(self._connection.end))
        elif self._heard_end or self._closing:
            self._lose(None)

    # -- what the application asks (asyncio.Transport)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Queue octets; `pause_writing` follows when the peer does not keep up."""
        if self._eof_wanted:
            raise RuntimeError("Cannot call write() after write_eof()")
        if self._closing or not data:
            return
        if self._unsent:
            self._unsent += data
        else:
            octets = bytes(data)
            taken = self._connection.write(octets)
            self._unsent += memoryview(octets)[taken:]
            self._pump()
        if len(self._unsent) > self._high and not self._asked_to_pause:
            self._asked_to_pause = True
            self._call(self._protocol.pause_writing)

    def can_write_eof(self) -> bool:
        """TCP half-closes."""
        return True

    def write_eof(self) -> None:
        """End our direction behind what was written; the other one goes on."""
        self._eof_wanted = True
        self._flush()

    def close(self) -> None:
        """What was written is still delivered; nothing is read any more."""
        if self._closing:
            return
        self._closing = True
        self._flush()

    def abort(self) -> None:
        """Reset the connection."""
        self._lose(None)
        self._connection.abort()
        self._pump()

    def is_closing(self) -> bool:
        """Whether it was closed or lost."""
        return self._closing

    def is_reading(self) -> bool:
        """Whether `data_received` may be called."""
        return self._reading and not self._closing

    def pause_reading(self) -> None:
        """Leave octets with the connection, whose window closes in time."""
        self._reading = False

    def resume_reading(self) -> None:
        """The end of `pause_reading`; what waited comes in another turn of the loop."""
        if not self._reading:
            self._reading = True
            self._loop.call_soon(self._resume)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """See asyncio; counted is what the connection had no room for."""
        if high is None:
            high = HIGH_WATER if low is None else 4 * low
        low = high // 4 if low is None else low
        if not high >= low >= 0:
            raise ValueError(f"high ({high!r}) must be >= low ({low!r}) must be >= 0")
        self._high, self._low = high, low

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """Low and high."""
        return self._low, self._high

    def get_write_buffer_size(self) -> int:
        """Octets that the connection had no room for."""
        return len(self._unsent)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Who is told from now on."""
        self._protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Who is told."""
        return self._protocol

    # -- inside

    def _resume(self) -> None:
        self.readable()
        if self._connection.end is not None and self._heard_end:
            self._lose(None)
        self._pump()

    def _hand_up(self, octets: bytes) -> None:
        protocol = self._protocol
        if not isinstance(protocol, asyncio.BufferedProtocol):
            cast("asyncio.Protocol", protocol).data_received(octets)
            return
        rest = memoryview(octets)
        while rest:
            room = memoryview(protocol.get_buffer(len(rest))).cast("B")
            count = min(len(room), len(rest))
            if not count:
                raise RuntimeError("get_buffer() returned an empty buffer")
            room[:count] = rest[:count]
            protocol.buffer_updated(count)
            rest = rest[count:]

    def _hand_up_end(self) -> None:
        if not self._heard_end:
            self._heard_end = True
            if not cast("asyncio.Protocol", self._protocol).eof_received():
                self.close()

    def _flush(self) -> None:
        while self._unsent:
            piece = bytes(memoryview(self._unsent)[:PIECE])
            taken = self._connection.write(piece)
            del self._unsent[:taken]
            if taken < len(piece):
                break
        if self._asked_to_pause and len(self._unsent) <= self._low:
            self._asked_to_pause = False
            self._call(self._protocol.resume_writing)
        if not self._unsent:
            if self._closing:
                self._connection.release()
                self._lose(None)
            elif self._eof_wanted:
                self._connection.close()
        self._pump()

    def _call(self, told: Callable[..., object], *words: object) -> None:
        """Tell the protocol; a defect in it costs its connection, and not the tunnel's turn."""
        try:
            told(*words)
        except Exception as error:
            self._loop.call_exception_handler(
                {
                    "message": f"{told} failed",
                    "exception": error,
                    "transport": self,
                    "protocol": self._protocol,
                }
            )
            self._connection.abort()
            self._lose(error)

    def _lose(self, failure: Exception | None) -> None:
        self._closing = True
        if not self._lost:
            self._lost = True
            self._unsent.clear()
            self._loop.call_soon(self._protocol.connection_lost, failure)
        if self._connection.end is not None:
            self._over()


def _name(address: Address) -> tuple[str, int, int, int]:
    return str(IPv6Address(address[0])), address[1], 0, 0

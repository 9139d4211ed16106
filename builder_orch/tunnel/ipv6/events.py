"""What a stack tells whoever drives it, as frozen values."""

from dataclasses import dataclass

from builder_orch.tunnel.ipv6.connection import Connection
from builder_orch.tunnel.machine import Address


@dataclass(frozen=True, slots=True)
class Opened:
    """A connection of ours was accepted by the peer."""

    connection: Connection


@dataclass(frozen=True, slots=True)
class Accepted:
    """A peer opened a connection to a port that listens."""

    connection: Connection


@dataclass(frozen=True, slots=True)
class Readable:
    """There is something to read where there was nothing, the end of the stream included."""

    connection: Connection


@dataclass(frozen=True, slots=True)
class Writable:
    """There is room again after a `write` that did not take everything."""

    connection: Connection


@dataclass(frozen=True, slots=True)
class Closed:
    """A connection is over; its `end` says how."""

    connection: Connection


@dataclass(frozen=True, slots=True)
class DatagramReceived:
    """A UDP datagram for a bound port; `local` is the address it was sent to."""

    port: int
    local: bytes
    remote: Address
    payload: bytes


@dataclass(frozen=True, slots=True)
class EchoReplied:
    """An answer to a ping, or something that looks like one."""

    remote: bytes
    identifier: int
    sequence: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Unreachable:
    """An ICMPv6 error about a datagram from our `port` to `remote`; `port` is None for a ping.

    `kind` and `code` are those of RFC 4443; 1 and 4 mean that nobody listens on that port.
    """

    remote: Address
    port: int | None
    kind: int
    code: int


Event = (
    Opened | Accepted | Readable | Writable | Closed | DatagramReceived | EchoReplied | Unreachable
)

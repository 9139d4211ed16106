"""TIME-WAIT: the few hundred octets kept of a connection that is over (RFC 9293 §3.6)."""

from builder_orch.tunnel.ipv6.connection import TIME_WAIT, Connection
from builder_orch.tunnel.ipv6.segment import ACK, FIN, RST, SYN, Segment, Template
from builder_orch.tunnel.ipv6.seq import unwrap

MAX_WAITS = 16_384
"""When there are more, the oldest is let go early."""


class _Wait:
    __slots__ = ("expires_at", "rcv_nxt", "snd_nxt", "template")

    def __init__(self, connection: Connection, now: float) -> None:
        self.template = Template(connection.local, connection.remote)
        self.snd_nxt = connection.sender.nxt
        self.rcv_nxt = connection.receiver.nxt
        self.expires_at = now + TIME_WAIT


class TimeWaits:
    """All connections in TIME-WAIT, by demultiplexing key, the first to expire first."""

    def __init__(self) -> None:
        self._waits: dict[bytes, _Wait] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self._waits

    def __len__(self) -> int:
        return len(self._waits)

    def add(self, key: bytes, connection: Connection, now: float) -> None:
        """Wait in the name of a connection."""
        if len(self._waits) >= MAX_WAITS:
            del self._waits[next(iter(self._waits))]
        self._waits[key] = _Wait(connection, now)

    def deadline(self) -> float | None:
        """When the oldest is over."""
        first = next(iter(self._waits.values()), None)
        return None if first is None else first.expires_at

    def expire(self, now: float) -> None:
        """Let go of those whose time has come."""
        while self._waits:
            key, first = next(iter(self._waits.items()))
            if first.expires_at > now:
                return
            del self._waits[key]

    def receive(self, key: bytes, segment: Segment, now: float) -> bytes | None:
        """The answer to a segment, b"" for none; None when it is no business of a wait.

        A new SYN beyond the old numbers ends the wait and opens a connection (§3.10.7.4). A FIN
        that comes again is acknowledged and starts the time anew. Resets are ignored (RFC 1337).
        """
        wait = self._waits.get(key)
        if wait is None:
            return None
        if segment.flags & RST:
            return b""
        seq = unwrap(segment.seq, wait.rcv_nxt)
        if segment.flags & SYN and not segment.flags & ACK and seq >= wait.rcv_nxt:
            del self._waits[key]
            return None
        if segment.flags & FIN:
            del self._waits[key]
            wait.expires_at = now + TIME_WAIT
            self._waits[key] = wait
        elif not segment.length and seq == wait.rcv_nxt:
            return b""
        return wait.template.segment(wait.snd_nxt, wait.rcv_nxt, ACK, 0)

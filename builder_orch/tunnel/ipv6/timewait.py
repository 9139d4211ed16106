"""TIME-WAIT: the few hundred octets kept of a connection that is over (RFC 9293 §3.6)."""

from collections import OrderedDict

from builder_orch.tunnel.ipv6.connection import TIME_WAIT, Connection
from builder_orch.tunnel.ipv6.segment import ACK, FIN, RST, SYN, Segment
from builder_orch.tunnel.ipv6.seq import unwrap

MAX_WAITS = 16_384
"""When there are more, the oldest is let go early."""


class _Wait:
    __slots__ = ("expires_at", "rcv_nxt", "snd_nxt", "template")

    def __init__(self, connection: Connection, now: float) -> None:
        self.template = connection.template
        self.snd_nxt = connection.sender.nxt
        self.rcv_nxt = connection.receiver.nxt
        self.expires_at = now + TIME_WAIT


class TimeWaits:
    """All connections in TIME-WAIT, by demultiplexing key, the first to expire first."""

    def __init__(self) -> None:
        # Not a dict: taking the first of a dict again and again steps over all that were taken.
        self._waits: OrderedDict[bytes, _Wait] = OrderedDict()

    def __contains__(self, key: bytes) -> bool:
        return key in self._waits

    def __len__(self) -> int:
        return len(self._waits)

    def add(self, key: bytes, connection: Connection, now: float) -> None:
        """Wait in the name of a connection."""
        if len(self._waits) >= MAX_WAITS:
            self._waits.popitem(last=False)
        self._waits[key] = _Wait(connection, now)

    def deadline(self) -> float | None:
        """When the oldest is over."""
        return next(iter(self._waits.values())).expires_at if self._waits else None

    def expire(self, now: float) -> None:
        """Let go of those whose time has come."""
        while self._waits and next(iter(self._waits.values())).expires_at <= now:
            self._waits.popitem(last=False)

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
            wait.expires_at = now + TIME_WAIT
            self._waits.move_to_end(key)
        elif not segment.length and seq == wait.rcv_nxt:
            return b""
        return wait.template.segment(wait.snd_nxt, wait.rcv_nxt, ACK, 0)

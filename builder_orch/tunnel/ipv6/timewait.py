"""TIME-WAIT: the few hundred octets kept of a connection that is over (RFC 9293 §3.6)."""

from collections import OrderedDict

from builder_orch.tunnel.ipv6.allowance import Allowance
from builder_orch.tunnel.ipv6.connection import TIME_WAIT, Connection
from builder_orch.tunnel.ipv6.segment import ACK, FIN, RST, SYN, Segment
from builder_orch.tunnel.ipv6.seq import MASK, unwrap

ANSWERS_PER_SECOND = 10
APART = 1 << 16
"""Between the last number of a connection and the first of its successor."""
HALF = 1 << 31
MAX_WAITS = 16_384
"""When there are more, the oldest is let go early."""


class _Wait:
    __slots__ = ("answers", "expires_at", "rcv_nxt", "snd_nxt", "template")

    def __init__(self, connection: Connection, now: float) -> None:
        self.template = connection.template
        self.snd_nxt = connection.sender.nxt
        self.rcv_nxt = connection.receiver.nxt
        self.expires_at = now + TIME_WAIT
        self.answers = Allowance(ANSWERS_PER_SECOND)


class TimeWaits:
    """All connections in TIME-WAIT, by demultiplexing key, the first to expire first."""

    def __init__(self) -> None:
        # Not a dict: taking the first of a dict again and again steps over all that were taken.
        self._waits: OrderedDict[bytes, _Wait] = OrderedDict()
        self._reopened: tuple[bytes, int] | None = None

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
            self._reopened = key, wait.snd_nxt
            return None
        if segment.flags & FIN:
            wait.expires_at = now + TIME_WAIT
            self._waits.move_to_end(key)
        elif not segment.length and seq == wait.rcv_nxt:
            return b""
        if not wait.answers.take(now):
            return b""  # RFC 5961 §7
        return wait.template.segment(wait.snd_nxt, wait.rcv_nxt, ACK, 0)

    def beyond(self, key: bytes, initial: int) -> int:
        """`initial`, or a later number where a wait of that name has just made way.

        A connection that moved more than the clock of the numbers would else be continued inside
        its own old ones (RFC 9293 §3.6.1).
        """
        reopened, self._reopened = self._reopened, None
        if reopened is None or reopened[0] != key:
            return initial
        last = reopened[1] & MASK
        return initial if 0 < (initial - last) & MASK < HALF else (last + APART) & MASK

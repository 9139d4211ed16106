"""TIME-WAIT: the few hundred octets kept of a connection that is over (RFC 9293 §3.6)."""

from collections import OrderedDict

from builder_orch.tunnel.ipv6.allowance import Allowance
from builder_orch.tunnel.ipv6.connection import TIME_WAIT, Connection
from builder_orch.tunnel.ipv6.segment import (
    ACK,
    FIN,
    PACKET_OVERHEAD,
    RST,
    SYN,
    Segment,
    Template,
)
from builder_orch.tunnel.ipv6.seq import MASK, unwrap

ANSWERS_PER_SECOND = 10
APART = 1 << 16
"""Between the last number of a connection and the first of its successor."""
HALF = 1 << 31
MAX_WAITS = 16_384
"""When there are more, the oldest is let go early."""


class _Wait:
    """Ten thousand of them should cost a few megabytes, so what can be made again is not kept."""

    __slots__ = ("answers", "expires_at", "rcv_nxt", "snd_nxt", "template")

    def __init__(self, connection: Connection) -> None:
        plain = connection.template.overhead == PACKET_OVERHEAD
        self.template = None if plain else connection.template
        self.snd_nxt = connection.sender.nxt
        self.rcv_nxt = connection.receiver.nxt
        self.expires_at = 0.0
        self.answers: Allowance | None = None

    def answer(self, key: bytes, now: float) -> bytes:
        """An acknowledgement of everything, b"" when there were too many (RFC 5961 §7)."""
        self.answers = self.answers or Allowance(ANSWERS_PER_SECOND)
        if not self.answers.take(now):
            return b""
        ports = int.from_bytes(key[32:34], "big"), int.from_bytes(key[34:36], "big")
        ours, theirs = (key[16:32], ports[1]), (key[:16], ports[0])
        template = self.template or Template(ours, theirs)
        return template.segment(self.snd_nxt, self.rcv_nxt, ACK, 0)


class TimeWaits:
    """All connections in TIME-WAIT, by demultiplexing key, the first to expire first.

    And the names of those that the peer may have in TIME-WAIT, for as long.
    """

    def __init__(self) -> None:
        # Not a dict: taking the first of a dict again and again steps over all that were taken.
        self._waits: OrderedDict[bytes, _Wait] = OrderedDict()
        self._reopened: dict[bytes, _Wait] = {}
        self._left: OrderedDict[bytes, float] = OrderedDict()

    def __contains__(self, key: bytes) -> bool:
        """Whether one of the two sides may wait in this name."""
        return key in self._waits or key in self._left

    def __len__(self) -> int:
        return len(self._waits)

    def add(self, key: bytes, connection: Connection, now: float) -> None:
        """Wait in the name of a connection."""
        self._keep(key, _Wait(connection), now)

    def leave(self, key: bytes, now: float) -> None:
        """A connection is over and it is the peer who waits, if anybody does.

        Its name is not to be used for as long: numbers of ours that moved faster than the clock
        they begin by would look old to the peer, who then answers no SYN.
        """
        if len(self._left) >= MAX_WAITS:
            self._left.popitem(last=False)
        self._left[key] = now + TIME_WAIT
        self._left.move_to_end(key)

    def deadline(self) -> float | None:
        """When the oldest is over."""
        return next(iter(self._waits.values())).expires_at if self._waits else None

    def expire(self, now: float) -> None:
        """Let go of those whose time has come."""
        while self._waits and next(iter(self._waits.values())).expires_at <= now:
            self._waits.popitem(last=False)
        while self._left and next(iter(self._left.values())) <= now:
            self._left.popitem(last=False)

    def receive(self, key: bytes, segment: Segment, now: float) -> bytes | None:
        """The answer to a segment, b"" for none; None when it is no business of a wait.

        A new SYN beyond the old numbers opens a connection (§3.10.7.4); see `reopen`. A FIN that
        comes again is acknowledged and starts the time anew. Resets are ignored (RFC 1337).
        """
        wait = self._waits.get(key)
        if wait is None:
            return None
        if segment.flags & RST:
            return b""
        seq = unwrap(segment.seq, wait.rcv_nxt)
        if segment.flags & SYN and not segment.flags & ACK and seq >= wait.rcv_nxt:
            return None
        if segment.flags & FIN:
            wait.expires_at = now + TIME_WAIT
            self._waits.move_to_end(key)
        elif not segment.length and seq == wait.rcv_nxt:
            return b""
        return wait.answer(key, now)

    def reopen(self, key: bytes, initial: int) -> int:
        """A wait of that name, if there is one, makes way for a connection; its first number.

        That is `initial`, or a later one: a connection that moved more than the clock of the
        numbers would else be continued inside its own old ones (RFC 9293 §3.6.1). The wait is kept
        aside until `return_to` or `forget`.
        """
        wait = self._waits.pop(key, None)
        if wait is None:
            return initial
        self._reopened[key] = wait
        last = wait.snd_nxt & MASK
        return initial if 0 < (initial - last) & MASK < HALF else (last + APART) & MASK

    def return_to(self, key: bytes, now: float) -> None:
        """The SYN that reopened it was an old one: back to the wait (§3.6.1, MAY-2 (2))."""
        wait = self._reopened.pop(key, None)
        if wait is not None:
            self._keep(key, wait, now)

    def forget(self, key: bytes) -> None:
        """The connection that it made way for is open."""
        self._reopened.pop(key, None)

    def _keep(self, key: bytes, wait: _Wait, now: float) -> None:
        if len(self._waits) >= MAX_WAITS:
            self._waits.popitem(last=False)
        wait.expires_at = now + TIME_WAIT
        self._waits[key] = wait

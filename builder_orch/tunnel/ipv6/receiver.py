"""The receiving half: what has come, what is acknowledged, the window offered (RFC 9293 §3.8)."""

from collections import deque

from builder_orch.tunnel.ipv6.assembler import Assembler
from builder_orch.tunnel.ipv6.segment import Blocks

CAPACITY = 8 << 20
"""How far the window may grow."""
FIRST_WINDOW = 1 << 20
LEAST_RTT = 0.01
"""Stacks in user space answer late under load: the window covers at least this much time."""
DELAYED_ACK = 0.04
MAX_PIECES = 8192
"""A queue of more pieces is joined, so that one-octet segments do not cost a hundred each."""
MAX_BLOCKS = 4


def scale_for(capacity: int) -> int:
    """The smallest window scale by which `capacity` can be told (RFC 7323 §2.2)."""
    scale = 0
    while capacity >> scale > 0xFFFF:
        scale += 1
    return scale


class Receiver:
    """Octets in order for the application. `nxt` is RCV.NXT, `edge` the right edge ever offered."""

    __slots__ = (
        "_assembler",
        "_at_head",
        "_capacity",
        "_duplicate",
        "_full",
        "_limit",
        "_pieces",
        "_round_at",
        "_round_ends",
        "_round_from",
        "_unacked",
        "ack_at",
        "ack_now",
        "edge",
        "fin_at",
        "finished",
        "last_ack",
        "nxt",
        "readable",
        "received",
        "rtt",
        "scale",
    )

    def __init__(self, nxt: int, mss: int, capacity: int = CAPACITY) -> None:
        self.nxt = self.last_ack = nxt
        self.scale = 0
        self.edge = nxt
        self.readable = 0
        self.received = 0
        self.fin_at: int | None = None
        self.finished = False
        self.ack_now = False
        self.ack_at: float | None = None
        self.rtt: float | None = None
        self._capacity = capacity
        self._limit = min(capacity, FIRST_WINDOW)
        self._round_at = 0.0
        self._round_ends = self._round_from = nxt
        self._pieces: deque[bytes] = deque()
        self._at_head = 0
        self._assembler = Assembler()
        self._full = mss
        self._unacked = 0
        self._duplicate: tuple[int, int] | None = None

    @property
    def in_order(self) -> bool:
        """Nothing is waiting behind a hole and no FIN is known: plain data may be appended."""
        return not self._assembler and self.fin_at is None

    @property
    def full(self) -> int:
        """What counts as a full segment."""
        return self._full

    def extend(self, payloads: list[bytes], octets: int, now: float) -> None:
        """Append payloads known to be in order and inside the window, `octets` together."""
        self._pieces += payloads
        self.nxt += octets
        self.readable += octets
        self.received += octets
        self._unacked += octets
        if self._unacked >= 2 * self._full:
            self.ack_now = True
        elif self.ack_at is None:
            self.ack_at = now + DELAYED_ACK
        if self.nxt >= self._round_ends:
            self._end_round(now)
        if len(self._pieces) > MAX_PIECES:
            self._join()

    def accept(self, seq: int, payload: bytes, fin: bool, now: float) -> bool:
        """Take the payload of any segment that touches the window; whether anything got readable.

        A FIN counts once everything before it has come.
        """
        end = seq + len(payload)
        if end > self.edge:
            payload = payload[: max(0, self.edge - seq)]
            fin = False
            self.ack_now = True
        elif fin and self.fin_at is None and end >= self.nxt:
            self.fin_at = end
        if seq < self.nxt:
            if payload:
                self._duplicate = (seq, min(end, self.nxt))
            self.ack_now = True
            payload = payload[self.nxt - seq :]
            seq = self.nxt
        if self.fin_at is not None and end > self.fin_at:
            payload = payload[: max(0, self.fin_at - seq)]
            self.ack_now = True  # a keep-alive may ask with the number that its FIN has (§3.8.4)
        before = self.received
        if payload and seq > self.nxt:
            self.keep(seq, payload)
        elif payload:
            was_whole = not self._assembler
            self.extend([payload], len(payload), now)
            if not was_whole:
                self._take_assembled(now)
                self.ack_now = True
        self._finish()
        if fin and not self.finished:
            self.ack_now = True  # it came behind a hole (RFC 5681 §4.2)
        return self.received > before

    def keep(self, seq: int, payload: bytes) -> None:
        """Put aside what came ahead of a hole, inside the window."""
        if not self._assembler.insert(seq, payload):
            self._duplicate = (seq, seq + len(payload))
        self.ack_now = True

    def read(self, limit: int) -> bytes:
        """Up to `limit` octets."""
        if limit <= 0 or not self.readable:
            return b""
        pieces = self._pieces
        if self._at_head:
            pieces[0] = pieces[0][self._at_head :]
            self._at_head = 0
        if limit >= self.readable:
            taken = b"".join(pieces)
            pieces.clear()
            self.readable = 0
            return taken
        parts: list[bytes] = []
        missing = limit
        while len(pieces[0]) <= missing:
            part = pieces.popleft()
            missing -= len(part)
            parts.append(part)
            if not missing:
                break
        if missing:
            parts.append(pieces[0][:missing])
            self._at_head = missing
        self.readable -= limit
        return b"".join(parts)

    def window(self) -> int:
        """The field to send now: never retreating, nor moving less than a segment (§3.8.6.2.2)."""
        offer = self.nxt + max(0, self._limit - self.readable)
        if offer - self.edge < min(self._full, self._capacity // 2):
            offer = self.edge
        # A FIN may come behind a full window, and is then beyond the edge itself.
        field = min(max(0, offer - self.nxt) >> self.scale, 0xFFFF)
        if self.nxt + (field << self.scale) < self.edge:
            field = -((self.nxt - self.edge) >> self.scale)
        return field

    def announced(self, field: int) -> None:
        """A segment with the current acknowledgement and this window field goes out."""
        self.edge = max(self.edge, self.nxt + (field << self.scale))
        self.last_ack = self.nxt
        self.ack_now = False
        self.ack_at = None
        self._unacked = 0
        self._duplicate = None

    def update_due(self) -> bool:
        """Whether the window has grown enough since it was last offered to say so unasked."""
        remaining = self.edge - self.nxt
        offer = min(self._limit - self.readable, 0xFFFF << self.scale)
        step = min(2 * self._full, self._capacity // 2)
        return offer - remaining >= step and offer >= 2 * remaining

    def ack_due(self, now: float) -> bool:
        """Whether an acknowledgement should go out even without data."""
        return self.ack_now or (self.ack_at is not None and self.ack_at <= now)

    @property
    def has_blocks(self) -> bool:
        """Whether an acknowledgement has more to tell than a number."""
        return bool(self._assembler) or self._duplicate is not None

    def blocks(self, limit: int = MAX_BLOCKS) -> Blocks:
        """The SACK blocks to send; a duplicate that just came goes first (RFC 2883)."""
        if self._duplicate is None:
            return self._assembler.blocks(limit)
        return (self._duplicate, *self._assembler.blocks(limit - 1))

    def _take_assembled(self, now: float) -> None:
        pieces = self._assembler.take(self.nxt)
        self.extend(pieces, sum(map(len, pieces)), now)

    def _finish(self) -> None:
        if self.fin_at == self.nxt and not self.finished:
            self.finished = True
            self.nxt += 1
            self.ack_now = True

    def _end_round(self, now: float) -> None:
        """A whole window has come: let it hold twice what comes in a round trip, never less."""
        rtt = max(self.rtt or now - self._round_at, LEAST_RTT)
        wanted = 2 * (self.nxt - self._round_from) * rtt / max(now - self._round_at, rtt)
        if wanted > self._limit and self._round_at:
            self._limit = min(self._capacity, int(wanted))
        self._round_at = now
        self._round_from = self.nxt
        self._round_ends = self.edge

    def _join(self) -> None:
        head = self._pieces[0][self._at_head :]
        self._pieces.popleft()
        self._pieces = deque([head + b"".join(self._pieces)])
        self._at_head = 0

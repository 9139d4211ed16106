"""The sending half: what was written, what may go, and the windows (RFC 9293 §3.8).

Read `Scoreboard` (what is in flight), `Outbox` (what is written) and `Repair` (what is lost) first.
"""

from builder_orch.tunnel.ipv6.congestion import Congestion
from builder_orch.tunnel.ipv6.outbox import Outbox
from builder_orch.tunnel.ipv6.pacer import GRAIN
from builder_orch.tunnel.ipv6.repair import FLOOR_MTU, Repair
from builder_orch.tunnel.ipv6.rtt import MAX_RTO
from builder_orch.tunnel.ipv6.search import FOLLOWERS
from builder_orch.tunnel.ipv6.segment import Blocks, Template
from builder_orch.tunnel.ipv6.train import train_limit
from builder_orch.tunnel.machine import Train

CAPACITY = 4 << 20
USER_TIMEOUT = 600.0
"""R2 of RFC 9293 §3.8.3: how long data may go without progress; at least 100 s, Linux takes 924."""
DEFER_SEGMENTS = 16
DEFER_SHARE = 8
"""Less than both 16 segments and an eighth of cwnd waits until acknowledgements make it more."""


class Sender(Repair):
    """Octets to one peer, at unbounded sequence numbers.

    While data waits for a closed window `persist_at` is set. This holds after every call.
    """

    __slots__ = ("_capacity", "_max_window", "_overhead", "_touched_at", "outbox")

    def __init__(
        self,
        start: int,
        *,
        mss: int,
        template: Template,
        congestion: Congestion,
        capacity: int = CAPACITY,
    ) -> None:
        super().__init__(
            start, mss=mss, floor_mss=FLOOR_MTU - template.overhead, congestion=congestion
        )
        self.outbox = Outbox(start, template)
        self._capacity = capacity
        self._overhead = template.overhead
        self._max_window = 0
        self._touched_at = 0.0

    # -- the application's side

    def room(self) -> int:
        """How many octets `write` would take."""
        outbox = self.outbox
        return 0 if outbox.fin else max(0, self._capacity - (outbox.end - self.una))

    def write(self, data: bytes) -> int:
        """Take what fits."""
        taken = min(len(data), self.room())
        if taken:
            self.outbox.put(data if taken == len(data) else data[:taken])
        return taken

    @property
    def holds_data(self) -> bool:
        """Something written has not been acknowledged."""
        return self.una < self.outbox.end

    @property
    def is_roomy(self) -> bool:
        """At least half of the capacity is free: time to ask for more."""
        return self.room() * 2 >= self._capacity

    @property
    def is_waiting(self) -> bool:
        """Something written has not been sent."""
        return self.nxt < self.outbox.end

    @property
    def is_done(self) -> bool:
        """Everything written and the FIN have been acknowledged."""
        return self.outbox.fin and self.una > self.outbox.end

    @property
    def tries(self) -> int:
        """How often the peer was asked in vain since it was last heard."""
        return max(self.rtt.backoff, self._persists)

    @property
    def max_window(self) -> int:
        """The largest window the peer ever offered (RFC 5961 §5)."""
        return self._max_window

    # -- what arrives

    def peer_takes(self, mss: int, overhead: int) -> None:
        """The largest payload the peer wants behind headers of `overhead`, by its SYN."""
        self.mss = self._full_mss = mss
        self._overhead = overhead
        self._floor_mss = FLOOR_MTU - overhead

    def opened(self, window: int) -> None:
        """The handshake is over; `window` is the one it offered."""
        self.edge = self.una + window
        self._max_window = window

    def window_is(self, edge: int, window: int) -> None:
        """The peer takes octets up to `edge`; it may be less than before (RFC 9293 §3.8.6)."""
        self.edge = edge
        self._max_window = max(self._max_window, window)
        if edge > self.nxt:
            self._persists = 0
            self.persist_at = None

    def acknowledge(self, ack: int, blocks: Blocks, now: float, *, duplicate: bool = False) -> None:
        """Take an acknowledgement in [una, nxt]; `blocks` are unwrapped.

        `duplicate` says that it carried nothing else (RFC 5681 §2), which counts without SACK only.
        """
        board = self.board
        min_rtt = self.rtt.min_rtt or 0.0
        advanced = ack - self.una
        board.begin()
        if advanced > 0:
            self.una = ack
            self._proven = self._proven or advanced > self._floor_mss
            self._dupacks = 0
            self.outbox.free(ack)
            board.acknowledge(ack, now, min_rtt)
        for left, right in sorted(blocks):
            if self.una <= left < right <= self.nxt:
                board.select(left, right, now, min_rtt)
        if board.rtt is not None:
            self.rtt.sample(board.rtt, now)
            # Not without a measurement, or a path that got slower than the timeout would time out
            # for ever (RFC 6298 §5, the end).
            self.rtt.backoff = 0
        self._reduction.delivered(board.newly)
        if advanced > 0:
            self.waiting_since = now
        elif self.edge <= self.una:
            self.waiting_since = now  # a closed window that is answered is alive (§3.8.6.1)
        self._judge_probe(ack, blocks, now)
        if board.needless and self._doubtful:
            self._forgive()
        if advanced > 0:
            self._end_recovery()
        elif duplicate and not self.selective:
            self._count_duplicates(now)
        if self._search.in_flight:
            self._judge_trial(now)
        self._detect_losses(now)
        if board.newly:
            self._report(now)
        self._restart_timers(now, advanced)

    # -- what goes out

    def deadline(self) -> float | None:
        """The earliest of the timers."""
        at = self.rto_at
        for other in (self._probe_at, self._reorder_at, self.persist_at, self._pace_at):
            if other is not None and (at is None or other < at):
                at = other
        return at

    def only_waits_for_rate(self, now: float) -> bool:
        """Whether `transmit` would do nothing because the rate does not allow it yet."""
        at = self._pace_at
        if at is None or at <= now or self._recovery_point is not None or at != self.deadline():
            return False
        return self.congestion.cwnd - self.board.in_flight >= self.mss

    def transmit(self, now: float, ack: int, window: int, grain: float = GRAIN) -> list[Train]:
        """Run the timers that are due and send what may go, with these acknowledgement fields.

        `grain` is of `Pacer`.
        """
        trains: list[Train] = []
        self._pacer.grain = grain
        self._pacer.called(waited=self._pace_at is not None)
        self._pace_at = None
        if self.una == self.nxt == self.outbox.last:
            return trains
        if self._reorder_at is not None and self._reorder_at <= now:
            self._detect_losses(now)
        if self._probe_at is not None and self._probe_at <= now:
            self._send_tail_probe(trains, now, ack, window)
        if self.rto_at is not None and self.rto_at <= now:
            self._time_out(now)
        if self.board.lost:
            self._resend(trains, now, ack, window)
        if self.nxt < self.outbox.last and not self.board.lost:
            self._send_new(trains, now, ack, window)
        self._arm(now)
        if self.persist_at is not None and self.persist_at <= now:
            self._persist(trains, now, ack, window)
        if trains:
            self._touched_at = now
        return trains

    def _room(self, cwnd: int) -> int:
        """How much more may be in flight."""
        board = self.board
        if self._frozen and self.selective:
            return self._reduction.room(cwnd, board.in_flight, self.mss)
        return cwnd - board.in_flight + (0 if self.selective else self._dupacks * self.mss)

    def _send_new(self, trains: list[Train], now: float, ack: int, window: int) -> None:
        board, mss, outbox = self.board, self.mss, self.outbox
        if self.una == self.nxt and now - self._touched_at > self.rtt.rto:
            self.congestion.on_idle()
        cwnd = self.congestion.cwnd
        room = self._room(cwnd)
        offered = min(self.edge, outbox.end) - self.nxt
        self._limited = room < max(mss, offered)
        if room < mss:
            return
        octets = min(offered, room)
        if octets < outbox.end - self.nxt:
            whole = self._whole(octets)
            if octets == offered and not whole and not board.in_flight:
                # Silly windows: half of what the peer ever offered will do (RFC 9293 §3.8.6.2.1).
                whole = octets if octets * 2 >= self._max_window else 0
            octets = whole
            least = min(DEFER_SEGMENTS * mss, cwnd // DEFER_SHARE)
            if octets < least and self._limited and not self._frozen:
                return
        if octets > 0:
            octets = self._paced(octets, now)
        if self._search.at is not None:
            octets = self._try_larger(trains, octets, now, ack, window)
        if octets > 0:
            outbox.emit(trains, self.nxt, self.nxt + octets, mss, ack, window)
            self._note_sent(octets, now)
        if outbox.fin and self.nxt == outbox.end:
            outbox.emit(trains, self.nxt, outbox.last, mss, ack, window)
            self._note_sent(1, now)
        if self.nxt == outbox.last and board.in_flight < cwnd:
            board.limited_by_application()

    def _try_larger(
        self, trains: list[Train], octets: int, now: float, ack: int, window: int
    ) -> int:
        """Perhaps the first of `octets` as one larger segment; how many are left to send."""
        search, mss = self._search, self.mss
        size = search.size(mss)
        offered = min(self.edge, self.outbox.end) - self.nxt
        if search.in_flight or search.at is None or search.at > now or not self.selective:
            return octets
        if self._recovery_point is not None or octets < size or offered < size + FOLLOWERS * mss:
            return octets
        search.sent(self.nxt, self.nxt + size)
        self.outbox.emit(trains, self.nxt, self.nxt + size, size, ack, window)
        self._note_sent(size, now)
        return (octets - size) // mss * mss

    def _resend(self, trains: list[Train], now: float, ack: int, window: int) -> None:
        """Send lost runs again, lowest first, while the pipe has room (RFC 6675 §5 NextSeg 1)."""
        board, mss = self.board, self.mss
        # Beyond a window that was taken back only the first segment is tried.
        reach = max(self.edge, self.una + mss)
        if self.outbox.end < reach:
            reach = self.outbox.last
        allowed = self._room(self.congestion.cwnd)
        if allowed >= mss:
            allowed = self._paced(min(allowed, board.lost), now, fresh=False)
        if self._urgent or not board.in_flight:
            allowed = max(allowed, mss)
            self._urgent = False
        index = 0
        while index < len(board.runs):
            run = board.runs[index]
            if run.lost:
                upto = min(run.end, reach)
                if upto <= run.start or allowed < min(mss, upto - run.start):
                    break
                if upto - run.start > allowed:
                    upto = run.start + allowed - allowed % mss
                allowed -= upto - run.start
                self.outbox.emit(trains, run.start, upto, mss, ack, window)
                self._doubtful += upto - run.start
                board.resent(index, upto, now)
                if not index:
                    self.rto_at = now + self.rtt.rto  # its answer needs a round trip from now on
                self._spent(upto - run.start, now)
            index += 1
        if not board.lost:
            self._arm_probe(now)

    def _note_sent(self, octets: int, now: float) -> None:
        self.board.sent(self.nxt, self.nxt + octets, now)
        self.nxt += octets
        self.persist_at = None
        if self.rto_at is None:
            self.rto_at = now + self.rtt.rto
        if self.waiting_since is None:
            self.waiting_since = now
        self._spent(octets, now)
        self._arm_probe(now)

    def _whole(self, octets: int) -> int:
        """As much of `octets` as makes whole packets, and whole trains where it is more than one.

        What is left of a train waits for the rest of it: whole ones cost least, at both ends.
        """
        mss = self.mss
        train = mss * train_limit(mss + self._overhead)
        if octets > train:
            whole = self.outbox.whole(self.nxt, octets, train)
            # Where the only end is near, little would go now, and for that nobody would call again.
            octets = whole if whole >= DEFER_SEGMENTS * mss else octets
        return octets - octets % mss

    def _paced(self, octets: int, now: float, *, fresh: bool = True) -> int:
        """As much of `octets` as may go now; if that is not all, asks to be called again."""
        rate = self.congestion.pacing_rate
        if rate is None:
            return octets
        mss, pacer = self.mss, self._pacer
        train = mss * train_limit(mss + self._overhead)
        allowed = pacer.allowance(now, rate, mss, train)
        if allowed >= octets:
            return octets
        allowed = self._whole(allowed) if fresh else allowed - allowed % mss
        self._pace_at = max(pacer.after(allowed, now, rate, train), now + 1e-5)
        return allowed

    def _spent(self, octets: int, now: float) -> None:
        rate = self.congestion.pacing_rate
        if rate is not None:
            self._pacer.sent(octets, now, rate, self.mss * train_limit(self.mss + self._overhead))
        self._reduction.sent(octets)

    # -- the tail, and closed windows

    def _send_tail_probe(self, trains: list[Train], now: float, ack: int, window: int) -> None:
        """§7.3: one new segment if there is one, else the last one again; in recovery the first."""
        self._probe_at = None
        board = self.board
        if not board.runs or board.lost:
            return
        if self._recovery_point is not None:
            self._probe_first(trains, now, ack, window)
            return
        waiting = self.outbox.end - self.nxt
        fresh = min(self.edge - self.nxt, waiting, self.mss)
        if waiting > 0 and fresh == min(waiting, self.mss):
            self.outbox.emit(trains, self.nxt, self.nxt + fresh, self.mss, ack, window)
            self._note_sent(fresh, now)
            self._probe_resent = False
        else:
            index = board.lose_last(self.mss)
            run = board.runs[index]
            self.outbox.emit(trains, run.start, run.end, self.mss, ack, window)
            board.resent(index, run.end, now)
            self._probe_resent = True
        self._probe_at = None
        self._probe_end = self.nxt
        self.rto_at = now + self.rtt.rto

    def _probe_first(self, trains: list[Train], now: float, ack: int, window: int) -> None:
        """The end of what was resent may be lost: the first segment once more."""
        board = self.board
        board.lose_first(self.mss)
        if board.lost:
            run = board.runs[0]
            self.outbox.emit(trains, run.start, run.end, self.mss, ack, window)
            self._doubtful += run.end - run.start
            board.resent(0, run.end, now)
            self._probe_end = run.end
            self._probe_resent = False  # congestion control knows of this window's losses
            self.rto_at = now + self.rtt.rto
            self._spent(run.end - run.start, now)

    def _arm(self, now: float) -> None:
        """Keep the promise of the class: outstanding data or a closed window have a timer."""
        if self.una < self.nxt:
            self.persist_at = None
            if self.rto_at is None:
                self.rto_at = now + self.rtt.rto
        elif self.nxt < self.outbox.last and self._pace_at is None:
            self.rto_at = None
            if self.persist_at is None:
                wait = min(self.rtt.rto * 2.0 ** min(self._persists, 16), MAX_RTO)
                self.persist_at = now + wait
            if self.waiting_since is None:
                self.waiting_since = now
        else:
            self.persist_at = None

    def _persist(self, trains: list[Train], now: float, ack: int, window: int) -> None:
        """The window has been too small for long: use what there is, or ask (RFC 9293 §3.8.6.1)."""
        self.persist_at = None
        octets = min(self.edge - self.nxt, self.outbox.end - self.nxt, self.mss)
        if octets > 0:
            self.outbox.emit(trains, self.nxt, self.nxt + octets, self.mss, ack, window)
            self._note_sent(octets, now)
        else:
            self.outbox.emit_probe(trains, self.una, ack, window)
            self._persists += 1
        self._arm(now)

    def _restart_timers(self, now: float, advanced: int) -> None:
        if advanced <= 0:
            if self.board.newly and self._recovery_point is not None:
                self._arm_probe(now)
        elif self.una == self.nxt:
            self.rto_at = self._probe_at = self._reorder_at = None
            if self.nxt == self.outbox.last:
                self.waiting_since = self._pace_at = None
        else:
            self.rto_at = now + self.rtt.rto
            self._arm_probe(now)

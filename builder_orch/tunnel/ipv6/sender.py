"""The sending half: what is unacknowledged, what may go, when to send again.

Read `Scoreboard` (what is in flight) and `Outbox` (what is written) first. RFC 9293 §3.8, RFC 6298
(RTO), RFC 6675 (pipe), RFC 8985 (RACK-TLP), RFC 6582 where the peer knows no SACK.
"""

from builder_orch.tunnel.ipv6.congestion import Congestion, Delivered
from builder_orch.tunnel.ipv6.outbox import Outbox
from builder_orch.tunnel.ipv6.rtt import MAX_RTO, RoundTrip
from builder_orch.tunnel.ipv6.scoreboard import DUP_THRESH, Scoreboard
from builder_orch.tunnel.ipv6.segment import PACKET_OVERHEAD, Blocks, Template
from builder_orch.tunnel.ipv6.train import train_limit
from builder_orch.tunnel.machine import Train

CAPACITY = 4 << 20
USER_TIMEOUT = 600.0
"""R2 of RFC 9293 §3.8.3: how long data may go without progress; at least 100 s, Linux takes 924."""
BLACK_HOLE_TIMEOUTS = 2
"""Timeouts in a row after which full packets are suspected to be too big for the path."""
PROVEN_TIMEOUTS = 5
"""The same when full packets have passed before."""
FLOOR_MSS = 1220
"""What fits the 1280 octets that every IPv6 link carries."""
MIN_PROBE_WAIT = 0.01
PEER_ACK_DELAY = 0.2
"""WCDelAckT of RFC 8985 §7.2."""
DEFER_SEGMENTS = 16
DEFER_SHARE = 8
"""Less than both 16 segments and an eighth of cwnd waits until acknowledgements make it more."""


class Sender:
    """Octets to one peer, at unbounded sequence numbers.

    While something is unacknowledged `rto_at` is set; while data waits for a closed window
    `persist_at` is. Both hold after every call.
    """

    __slots__ = (
        "_capacity",
        "_doubtful",
        "_dupacks",
        "_frozen",
        "_full_mss",
        "_limited",
        "_max_window",
        "_pace_at",
        "_persists",
        "_probe_at",
        "_probe_end",
        "_probe_resent",
        "_proven",
        "_recovery_point",
        "_reorder_at",
        "_touched_at",
        "_urgent",
        "board",
        "congestion",
        "edge",
        "mss",
        "nxt",
        "outbox",
        "persist_at",
        "rto_at",
        "rtt",
        "selective",
        "una",
        "waiting_since",
    )

    def __init__(
        self,
        start: int,
        *,
        mss: int,
        template: Template,
        congestion: Congestion,
        capacity: int = CAPACITY,
    ) -> None:
        self.una = self.nxt = self.edge = start
        self.mss = self._full_mss = mss
        self._proven = False
        self.outbox = Outbox(start, template)
        self.congestion = congestion
        self.board = Scoreboard()
        self.rtt = RoundTrip()
        self.selective = False
        self.rto_at: float | None = None
        self.persist_at: float | None = None
        self.waiting_since: float | None = None
        self._capacity = capacity
        self._max_window = 0
        self._dupacks = 0
        self._doubtful = 0
        self._recovery_point: int | None = None
        self._frozen = False
        self._limited = False
        self._probe_at: float | None = None
        self._probe_end: int | None = None
        self._probe_resent = False
        self._reorder_at: float | None = None
        self._pace_at: float | None = None
        self._persists = 0
        self._touched_at = 0.0
        self._urgent = False

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
    def is_done(self) -> bool:
        """Everything written and the FIN have been acknowledged."""
        return self.outbox.fin and self.una > self.outbox.end

    @property
    def max_window(self) -> int:
        """The largest window the peer ever offered (RFC 5961 §5)."""
        return self._max_window

    # -- what arrives

    def peer_takes(self, mss: int) -> None:
        """The largest segment the peer wants, from its SYN."""
        self.mss = self._full_mss = mss

    def opened(self, window: int) -> None:
        """The handshake is over; `window` is the one it offered."""
        self.edge = self.una + window
        self._max_window = window

    def window_is(self, edge: int) -> None:
        """The peer takes octets up to `edge`; it may be less than before (RFC 9293 §3.8.6)."""
        self.edge = edge
        self._max_window = max(self._max_window, edge - self.una)
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
            self._proven = self._proven or advanced > FLOOR_MSS
            self._dupacks = 0
            self.outbox.free(ack)
            board.acknowledge(ack, now, min_rtt)
        for left, right in sorted(blocks):
            if self.una <= left < right <= self.nxt:
                board.select(left, right, now, min_rtt)
        if board.rtt is not None:
            self.rtt.sample(board.rtt, now)
        if advanced > 0:
            self.rtt.backoff = 0
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
        self._detect_losses(now)
        if board.newly:
            self._report(now)
        if advanced > 0:
            self._restart_timers(now)

    def too_big(self, position: int, mss: int) -> None:
        """A packet with `position` did not fit the path; forged ones name nothing in flight."""
        if self.una <= position < self.nxt:
            self._full_mss = min(self._full_mss, mss)
            self._lower_mss(mss)

    def restart(self, now: float) -> None:
        """The path came back: whatever is outstanding goes out again at once, without back-off."""
        self.rtt.backoff = 0
        if self.mss < self._full_mss:
            self.mss = self._full_mss
            self.congestion.on_mss(self.mss)
        if self.una < self.nxt:
            self.board.lose_all()
            self._recovery_point = self.nxt
            self._frozen = False
            self.congestion.on_restart()
            self.waiting_since = now
            self.rto_at = now + self.rtt.rto
        self._probe_at = self._reorder_at = self._pace_at = None
        self._persists = 0
        if self.persist_at is not None:
            self.persist_at = now

    def nudge(self, now: float) -> None:
        """A new session began below: one that stalled starts again, one that flows asks once."""
        if self.una == self.nxt:
            if self.persist_at is not None:
                self.persist_at = now
        elif self.rtt.backoff or now - (self.waiting_since or 0.0) > self.rtt.rto / 2:
            self.restart(now)
        elif not self.board.lost:
            self.board.lose_first(self.mss)
            self._urgent = True

    # -- what goes out

    def deadline(self) -> float | None:
        """The earliest of the timers."""
        at = self.rto_at
        for other in (self._probe_at, self._reorder_at, self.persist_at, self._pace_at):
            if other is not None and (at is None or other < at):
                at = other
        return at

    def transmit(self, now: float, ack: int, window: int) -> list[Train]:
        """Run the timers that are due and send what may go, with these acknowledgement fields."""
        trains: list[Train] = []
        if self._pace_at is not None and self._pace_at <= now:
            self._pace_at = None
        if self.una == self.nxt == self.outbox.last:
            return trains
        if self._reorder_at is not None and self._reorder_at <= now:
            self._detect_losses(now)
        if self.rto_at is not None and self.rto_at <= now:
            self._time_out(now)
        if self._probe_at is not None and self._probe_at <= now:
            self._send_tail_probe(trains, now, ack, window)
        if self.board.lost and self._pace_at is None:
            self._resend(trains, now, ack, window)
        if self.nxt < self.outbox.last and not self.board.lost and self._pace_at is None:
            self._send_new(trains, now, ack, window)
        self._arm(now)
        if self.persist_at is not None and self.persist_at <= now:
            self._persist(trains, now, ack, window)
        if trains:
            self._touched_at = now
        return trains

    def _send_new(self, trains: list[Train], now: float, ack: int, window: int) -> None:
        board, mss, outbox = self.board, self.mss, self.outbox
        if self.una == self.nxt and now - self._touched_at > self.rtt.rto:
            self.congestion.on_idle()
        cwnd = self.congestion.cwnd
        in_flight = board.in_flight - (0 if self.selective else self._dupacks * mss)
        allowed = cwnd - in_flight
        offered = min(self.edge, outbox.end) - self.nxt
        self._limited = allowed < max(mss, offered)
        if allowed < mss:
            return
        octets = min(offered, self._paced(allowed))
        if octets < outbox.end - self.nxt:
            whole = octets - octets % mss
            if octets == offered and not whole and not board.in_flight:
                # Silly windows: half of what the peer ever offered will do (RFC 9293 §3.8.6.2.1).
                whole = octets if octets * 2 >= self._max_window else 0
            octets = whole
            if self._limited and octets < min(DEFER_SEGMENTS * mss, cwnd // DEFER_SHARE):
                return
        if octets > 0:
            outbox.emit(trains, self.nxt, self.nxt + octets, mss, ack, window)
            self._note_sent(octets, now)
        if outbox.fin and self.nxt == outbox.end:
            outbox.emit(trains, self.nxt, outbox.last, mss, ack, window)
            self._note_sent(1, now)
        if self.nxt == outbox.last and board.in_flight < cwnd:
            board.limited_by_application()

    def _resend(self, trains: list[Train], now: float, ack: int, window: int) -> None:
        """Send lost runs again, lowest first, while the pipe has room (RFC 6675 §5 NextSeg 1)."""
        board, mss = self.board, self.mss
        # Beyond a window that was taken back only the first segment is tried.
        reach = max(self.edge, self.una + mss)
        if self.outbox.end < reach:
            reach = self.outbox.last
        allowed = self._paced(self.congestion.cwnd - board.in_flight)
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
                self._pace(upto - run.start, now)
                self._doubtful += upto - run.start
                board.resent(index, upto, now)
            index += 1

    def _note_sent(self, octets: int, now: float) -> None:
        self.board.sent(self.nxt, self.nxt + octets, now)
        self.nxt += octets
        self.persist_at = None
        if self.rto_at is None:
            self.rto_at = now + self.rtt.rto
        if self.waiting_since is None:
            self.waiting_since = now
        self._pace(octets, now)
        self._arm_probe(now)

    def _paced(self, allowed: int) -> int:
        """At most a train at a time when there is a rate to keep."""
        if self.congestion.pacing_rate is None:
            return allowed
        return min(allowed, self.mss * train_limit(self.mss + PACKET_OVERHEAD))

    def _pace(self, octets: int, now: float) -> None:
        rate = self.congestion.pacing_rate
        if rate is not None:
            self._pace_at = now + max(octets / rate, 1e-5)

    # -- losses

    def _detect_losses(self, now: float) -> None:
        """RACK: losses by time; enter recovery when there are new ones (RFC 8985 §6.2)."""
        board = self.board
        before = board.lost
        recovering = self._recovery_point is not None
        min_rtt, srtt = self.rtt.min_rtt or 0.0, self.rtt.srtt or 0.0
        wait = board.detect_losses(now, board.tolerance(min_rtt, srtt, self.mss, recovering))
        self._reorder_at = None if wait is None else now + wait
        if board.lost > before:
            self._enter_recovery(now)

    def _enter_recovery(self, now: float) -> None:
        self._probe_at = None
        if self._recovery_point is None:
            self._recovery_point = self.nxt
            self._frozen = True
            self._urgent = True
            self._doubtful = 0
            self.congestion.on_loss(self.board.in_flight, now)

    def _forgive(self) -> None:
        """Nothing of what was repaired had been lost: it was reordered (RFC 9438 §4.9)."""
        self._doubtful = max(0, self._doubtful - self.board.needless)
        if not self._doubtful and not self.board.lost:
            self._recovery_point = None
            self._frozen = False
            self.congestion.on_spurious()

    def _end_recovery(self) -> None:
        if self._recovery_point is None:
            return
        if self.una >= self._recovery_point:
            self._recovery_point = None
            self._frozen = False
            self.board.recovered()
        elif not self.selective:
            self.board.lose_first(self.mss)  # a partial acknowledgement (RFC 6582 §3.2)
            self._urgent = True

    def _count_duplicates(self, now: float) -> None:
        """RFC 6582 and 3042: without SACK each duplicate says that one segment has left."""
        if self.una == self.nxt:
            return
        self._dupacks += 1
        if self._dupacks == DUP_THRESH and self._recovery_point is None:
            self.board.lose_first(self.mss)
            self._enter_recovery(now)

    def _time_out(self, now: float) -> None:
        """The retransmission timer expired (RFC 6298 §5, RFC 6675 §5.1)."""
        board = self.board
        if self.rtt.backoff == 0:
            self.congestion.on_rto(board.in_flight, now)
        self.rtt.backoff += 1
        patience = PROVEN_TIMEOUTS if self._proven else BLACK_HOLE_TIMEOUTS
        if self.rtt.backoff == patience and self.edge > self.una:
            self._lower_mss(FLOOR_MSS)
        board.lose_all()
        self._recovery_point = self.nxt
        self._frozen = False
        self._dupacks = self._doubtful = 0
        self._probe_at = self._probe_end = self._reorder_at = self._pace_at = None
        self.rto_at = now + self.rtt.rto

    def _lower_mss(self, mss: int) -> None:
        if mss < self.mss:
            self.mss = mss
            self.congestion.on_mss(mss)
            self.board.lose_all()
            self._recovery_point = self.nxt
            self._frozen = False

    # -- the tail, and closed windows

    def _arm_probe(self, now: float) -> None:
        """RFC 8985 §7.2: a probe when nothing else would find a lost tail before the RTO."""
        self._probe_at = None
        board, srtt = self.board, self.rtt.srtt
        if not self.selective or srtt is None or self._recovery_point is not None:
            return
        if self._probe_end is not None or board.sacked or self.rtt.backoff or self.rto_at is None:
            return
        wait = max(2 * srtt, MIN_PROBE_WAIT)
        if board.in_flight <= self.mss:
            wait += PEER_ACK_DELAY
        if now + wait < self.rto_at:
            self._probe_at = now + wait

    def _send_tail_probe(self, trains: list[Train], now: float, ack: int, window: int) -> None:
        """§7.3: one new segment if there is one, else the last one again."""
        self._probe_at = None
        board = self.board
        if not board.runs or board.lost:
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

    def _judge_probe(self, ack: int, blocks: Blocks, now: float) -> None:
        """§7.4: a probe that was acknowledged without a DSACK has repaired a loss."""
        repeated = _is_repeated(ack, blocks)
        if repeated:
            self.board.repeated(self.una, self.nxt)
        if self._probe_end is None or ack < self._probe_end:
            return
        if self._probe_resent and not repeated and self._recovery_point is None:
            self.congestion.on_loss(self.board.in_flight, now)
        self._probe_end = None

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

    def _restart_timers(self, now: float) -> None:
        if self.una == self.nxt:
            self.rto_at = self._probe_at = self._reorder_at = None
            if self.nxt == self.outbox.last:
                self.waiting_since = self._pace_at = None
        else:
            self.rto_at = now + self.rtt.rto
            self._arm_probe(now)

    def _report(self, now: float) -> None:
        board = self.board
        rate, app_limited = board.rate(now)
        self.congestion.on_ack(
            Delivered(
                now=now,
                octets=board.newly,
                in_flight=board.in_flight,
                rtt=board.rtt,
                min_rtt=self.rtt.min_rtt,
                rate=rate,
                app_limited=app_limited,
                limited=self._limited,
                delivered=board.delivered,
            ),
            self._frozen,
        )


def _is_repeated(ack: int, blocks: Blocks) -> bool:
    """Whether the first block reports octets that came twice (RFC 2883 §4)."""
    if not blocks:
        return False
    left, right = blocks[0]
    return right <= ack or (len(blocks) > 1 and blocks[1][0] <= left and right <= blocks[1][1])

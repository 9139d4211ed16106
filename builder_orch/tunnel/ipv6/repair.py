"""Finding out what was lost, and the timers for it: RACK-TLP, the retransmission timeout, PRR.

RFC 6298, RFC 6675, RFC 8985, RFC 6937bis, and RFC 6582 where the peer knows no SACK. `Repair` says
what has to go again and when; `Sender`, which builds on it, sends.
"""

from builder_orch.tunnel.ipv6.congestion import Congestion, Delivered
from builder_orch.tunnel.ipv6.pacer import Pacer
from builder_orch.tunnel.ipv6.prr import Reduction
from builder_orch.tunnel.ipv6.rtt import RoundTrip
from builder_orch.tunnel.ipv6.scoreboard import DUP_THRESH, Scoreboard
from builder_orch.tunnel.ipv6.search import Search
from builder_orch.tunnel.ipv6.segment import Blocks

BLACK_HOLE_TIMEOUTS = 2
"""Timeouts in a row after which full packets are suspected to be too big for the path."""
PROVEN_TIMEOUTS = 5
"""The same when full packets have passed before."""
FLOOR_MTU = 1280
"""What every IPv6 link carries."""
MIN_PROBE_WAIT = 0.01
PEER_ACK_DELAY = 0.2
"""WCDelAckT of RFC 8985 §7.2."""


class Repair:
    """What is in flight on one connection, and its fate.

    While something is unacknowledged `rto_at` is set. This holds after every call.
    """

    __slots__ = (
        "_doubtful",
        "_dupacks",
        "_floor_mss",
        "_frozen",
        "_full_mss",
        "_limited",
        "_pace_at",
        "_pacer",
        "_persists",
        "_probe_at",
        "_probe_end",
        "_probe_resent",
        "_proven",
        "_recovery_point",
        "_reduction",
        "_reorder_at",
        "_search",
        "_urgent",
        "board",
        "congestion",
        "edge",
        "mss",
        "nxt",
        "persist_at",
        "rto_at",
        "rtt",
        "selective",
        "una",
        "waiting_since",
    )

    def __init__(self, start: int, *, mss: int, floor_mss: int, congestion: Congestion) -> None:
        self.una = self.nxt = self.edge = start
        self.mss = self._full_mss = mss
        self._floor_mss = floor_mss
        self._proven = False
        self._search = Search()
        self.congestion = congestion
        self.board = Scoreboard()
        self.rtt = RoundTrip()
        self.selective = False
        self.rto_at: float | None = None
        self.persist_at: float | None = None
        self.waiting_since: float | None = None
        self._dupacks = 0
        self._doubtful = 0
        self._recovery_point: int | None = None
        self._reduction = Reduction()
        self._frozen = False
        self._limited = False
        self._probe_at: float | None = None
        self._probe_end: int | None = None
        self._probe_resent = False
        self._reorder_at: float | None = None
        self._pacer = Pacer()
        self._pace_at: float | None = None
        self._persists = 0
        self._urgent = False

    def too_big(self, position: int, mss: int) -> None:
        """A packet with `position` did not fit the path; forged ones name nothing in flight."""
        if self.una <= position < self.nxt:
            self._full_mss = min(self._full_mss, mss)
            self._search.bound(mss)
            self._lower_mss(mss)
            if self.mss >= self._full_mss:
                self._search.stop()

    def restart(self, now: float) -> None:
        """The path came back: whatever is outstanding goes out again at once, without back-off."""
        self.rtt.backoff = 0
        self._search.stop()
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

    # -- losses

    def _detect_losses(self, now: float) -> None:
        """RACK: losses by time; enter recovery when there are new ones (RFC 8985 §6.2).

        It needs SACK (§3): without, duplicates are counted.
        """
        if not self.selective:
            return
        board = self.board
        before = board.lost
        recovering = self._recovery_point is not None
        min_rtt, srtt = self.rtt.min_rtt or 0.0, self.rtt.srtt or 0.0
        wait = board.detect_losses(now, board.tolerance(min_rtt, srtt, self.mss, recovering))
        self._reorder_at = None if wait is None else now + wait
        if self._reorder_at is not None and self.rto_at is not None:
            self.rto_at = max(self.rto_at, self._reorder_at)  # first what is surely lost (§8)
        if board.lost > before and not (self._search.in_flight and self._loses_trial(before, now)):
            self._enter_recovery(now)

    def _loses_trial(self, before: int, now: float) -> bool:
        """Whether a trial of a larger segment is all that was lost: no sign of congestion."""
        search, board = self._search, self.board
        runs = (run for run in board.runs if run.end > search.start and run.start < search.end)
        if not any(run.lost for run in runs):
            return False
        octets = search.end - search.start
        if self._recovery_point is not None or board.lost - before != octets:
            search.postpone(now)
            return False
        search.failed(self.mss, now)
        board.losses -= octets
        self._urgent = True
        return True

    def _judge_trial(self, now: float) -> None:
        """A larger segment was acknowledged before it was given up."""
        if self.una >= self._search.end:
            self.mss = self._search.arrived(now)
            self.congestion.on_mss(self.mss)

    def _enter_recovery(self, now: float) -> None:
        self._probe_at = None
        if self._recovery_point is None:
            self._recovery_point = self.nxt
            self._frozen = True
            self._urgent = True
            self._doubtful = 0
            self._reduction.begin(self.nxt - self.una - self.board.sacked + self.board.newly)
            self._reduction.delivered(self.board.newly)
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
        if self.rtt.backoff == patience and self.edge > self.una and self.mss > self._floor_mss:
            self._lower_mss(self._floor_mss)
            self._search.begin(self._full_mss, now)
        if self._search.in_flight:
            self._search.postpone(now)
        board.lose_all()
        self._recovery_point = self.nxt
        self._frozen = False
        self._dupacks = self._doubtful = 0
        self._probe_at = self._reorder_at = self._pace_at = None
        self._probe_end = self.una + 1  # only progress earns a probe again
        self._probe_resent = False
        self.rto_at = now + self.rtt.rto

    def _lower_mss(self, mss: int) -> None:
        if mss < self.mss:
            self.mss = mss
            self.congestion.on_mss(mss)
            self._search.forget()
            self.board.lose_all()
            self._recovery_point = self.nxt
            self._frozen = False

    # -- the tail

    def _arm_probe(self, now: float) -> None:
        """RFC 8985 §7.2: a probe where nothing else would find a lost tail before the RTO.

        Where it would come later it goes in the RTO's place, without its back-off: of a lone
        segment three copies can get lost and the fourth still goes within a second.

        §7.2 arms none in recovery, where what was resent last can be lost as well. There the first
        segment is the probe, and only progress earns another; a peer with holes answers at once.
        """
        self._probe_at = None
        board, srtt = self.board, self.rtt.srtt
        if not self.selective or srtt is None or self._probe_end is not None:
            return
        if self.rto_at is None or not board.runs:
            return
        if self._recovery_point is None:
            if board.sacked or self.rtt.backoff:
                return
        elif board.lost:
            return
        wait = max(2 * srtt, MIN_PROBE_WAIT)
        if board.in_flight <= self.mss and not board.sacked:
            wait += PEER_ACK_DELAY
        self._probe_at = min(now + wait, self.rto_at)

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

    # -- what the congestion control learns

    def _report(self, now: float) -> None:
        board = self.board
        newest, min_rtt = board.newest, self.rtt.min_rtt
        if newest is None:
            return  # only second copies of what had arrived
        self.congestion.on_ack(
            Delivered(
                now,
                board.newly,
                board.in_flight,
                board.rtt,
                min_rtt,
                board.rate(now, min_rtt or 0.0),
                newest.app_limited,
                self._limited,
                board.delivered,
                board.losses,
                newest.delivered,
                newest.losses,
                newest.flight,
                self._pacer.grain,
            ),
            self._frozen,
        )


def _is_repeated(ack: int, blocks: Blocks) -> bool:
    """Whether the first block reports octets that came twice (RFC 2883 §4)."""
    if not blocks:
        return False
    left, right = blocks[0]
    return right <= ack or (len(blocks) > 1 and blocks[1][0] <= left and right <= blocks[1][1])

"""BBR, version 3 (draft-ietf-ccwg-bbr): a model of the path instead of a reaction to each loss.

The model is the bandwidth (the fastest delivery of late), the round trip without queues, and how
much may be in flight before losses set in. States follow the draft's §5.3; names follow its text.
"""

from collections import deque
from enum import Enum, auto
from math import inf

from builder_orch.tunnel.ipv6.congestion import INITIAL_SEGMENTS, Delivered
from builder_orch.tunnel.ipv6.pacer import quantum
from builder_orch.tunnel.machine import TRAIN_PACKETS

STARTUP_PACING = 2.77
"""4 ln 2 (§5.3.1)."""
WINDOW_GAIN = 2.0
CRUISE_GAIN = 1.5
"""The draft says 2; with that CUBIC on the same link kept 32 and 48 %, not 40 and 54."""
MARGIN = 0.99
"""Sending 1 % slower than the model says drains what was misjudged (§5.6.2)."""
MINIMUM = 4
"""Segments in flight that keep acknowledgements coming."""
LOSS_THRESHOLD = 0.02
BETA = 0.7
HEADROOM = 0.85
PROBE_RTT_EVERY = 5.0
PROBE_RTT_FOR = 0.2
MIN_RTT_AGE = 10.0
MAX_ROUNDS = 63
"""After so many rounds a Reno flow would have grown by as much as we probe for (§5.3.3.6)."""
EXTRA_ROUNDS = 5
GROWTH = 1.25
FULL_ROUNDS = 3
STARTUP_LOSSES = 6
TRAINS = 3
"""Offload at both ends needs this many quanta in flight (§5.6.3)."""


class Phase(Enum):
    """What it is doing: (pacing gain, cwnd gain)."""

    STARTUP = auto()
    DRAIN = auto()
    DOWN = auto()
    CRUISE = auto()
    REFILL = auto()
    UP = auto()
    PROBE_RTT = auto()


GAINS: dict[Phase, tuple[float, float]] = {
    Phase.STARTUP: (STARTUP_PACING, WINDOW_GAIN),
    Phase.DRAIN: (0.5, WINDOW_GAIN),
    Phase.DOWN: (0.9, CRUISE_GAIN),
    Phase.CRUISE: (1.0, CRUISE_GAIN),
    Phase.REFILL: (1.0, WINDOW_GAIN),
    Phase.UP: (1.25, 2.25),
    Phase.PROBE_RTT: (1.0, 0.5),
}
_PROBING = frozenset({Phase.STARTUP, Phase.REFILL, Phase.UP})
_CYCLE = frozenset({Phase.DOWN, Phase.CRUISE, Phase.REFILL, Phase.UP})


class Bbr:
    """One connection's model and what follows from it. Octets, seconds, octets per second."""

    def __init__(self, mss: int) -> None:
        self.cwnd = INITIAL_SEGMENTS * mss
        self.phase = Phase.STARTUP
        self.min_rtt = 0.0
        self._mss = mss
        self._rate = 0.0
        # Rounds.
        self._round = 0
        self._round_ends = 0
        self._round_began = False
        # Bandwidth: the maximum of this probing cycle and the one before, and the short-term bound.
        self.bandwidth = 0.0
        self._bandwidths = [0.0, 0.0]
        self._most = 0.0
        self._bw_latest = 0.0
        self._bw_short = inf
        self._inflight_latest = 0
        self._inflight_short = inf
        self._inflight_long = inf
        self._loss_in_round = False
        self._loss_round_ends = 0
        self._loss_round_began = False
        self._losses = 0
        self._round_losses = 0
        self._round_delivered = 0
        self._loss_events = 0
        # Whether more bandwidth can be had.
        self._full = False
        self._full_now = False
        self._full_bandwidth = 0.0
        self._full_count = 0
        # Probing for bandwidth.
        self._cycle_at = 0.0
        self._probe_wait = 0.0
        self._rounds_since_probe = 0
        self._up_rounds = 0
        self._up_step = inf
        self._up_acked = 0
        self._may_be_too_high = False
        self._ends_probe = False
        # The round trip.
        self._min_rtt_at = 0.0
        self._probe_rtt_min = inf
        self._probe_rtt_at = 0.0
        self._probe_rtt_ends: float | None = None
        self._probe_rtt_round = 0
        self._idle_restart = False
        self._window_before = 0
        # Aggregation: how much more came at once than the bandwidth explains.
        self._extra: deque[tuple[int, float]] = deque()
        self._extra_since = 0.0
        self._extra_delivered = 0
        self._before_loss: tuple[float, float, float] | None = None

    @property
    def pacing_rate(self) -> float | None:
        """Octets per second; None before the first round trip is known."""
        return self._rate or None

    # -- what the sender tells

    def on_ack(self, delivered: Delivered, recovering: bool) -> None:
        """§5.2.3: the model first, then the state, then what may be sent.

        Once per acknowledgement of a train; what changes seldom is in methods of its own.
        """
        if not self._rate:
            self._begin(delivered)
        self._count_rounds(delivered)
        self._learn_bandwidth(delivered)
        self._adapt_bounds(delivered)
        self._learn_extra(delivered)
        if self._round_began:
            self._check_full(delivered)
        self._change_phase(delivered, recovering)
        self._learn_round_trip(delivered)
        self._set_rate_and_window(delivered)
        if self._loss_round_began:
            self._loss_in_round = False
            self._bw_latest = delivered.rate or 0.0
            self._inflight_latest = delivered.delivered - delivered.sent_delivered

    def on_loss(self, in_flight: int, now: float) -> None:  # noqa: ARG002
        """Losses change the model when they are reported; it is kept for `on_spurious`."""
        self._before_loss = self._bw_short, self._inflight_short, self._inflight_long

    def on_spurious(self) -> None:
        """§5.5.10.3: as if nothing had been."""
        self._loss_in_round = False
        if self._before_loss is not None:
            bandwidth, short, long = self._before_loss
            self._bw_short = max(self._bw_short, bandwidth)
            self._bound_bandwidth()
            self._inflight_short = max(self._inflight_short, short)
            self._inflight_long = max(self._inflight_long, long)
            self._before_loss = None

    def on_rto(self, in_flight: int, now: float) -> None:  # noqa: ARG002
        """Everything in flight may be gone: one segment, then as delivery shows (§5.6.4.4)."""
        self._keep_window()
        self._loss_in_round = True
        self.cwnd = self._mss

    def on_idle(self) -> None:
        """What the model says holds; it is paced from the start (§5.4.1)."""
        self._idle_restart = True

    def on_restart(self) -> None:
        """The path was away: the window as before, the model as before."""
        self._loss_in_round = False
        self.cwnd = max(self.cwnd, INITIAL_SEGMENTS * self._mss)
        self._restore_window()

    def on_mss(self, mss: int) -> None:
        """Keep the octets; never less than a segment."""
        self._mss = mss
        self.cwnd = max(self.cwnd, mss)

    # -- the model

    def _begin(self, delivered: Delivered) -> None:
        """§5.6.2: until more is known, the first window in a round trip of the handshake."""
        self.min_rtt = self._probe_rtt_min = delivered.min_rtt or 1e-3
        self._min_rtt_at = self._probe_rtt_at = delivered.now
        self._rate = STARTUP_PACING * self.cwnd / self.min_rtt

    def _count_rounds(self, delivered: Delivered) -> None:
        """Rounds, and what was delivered and lost in the one under way (§5.5.10.3)."""
        sent = delivered.sent_delivered
        self._round_began = sent >= self._round_ends
        if self._round_began:
            self._round += 1
            self._rounds_since_probe += 1
            self._round_ends = delivered.delivered
        if delivered.losses != self._losses:
            if delivered.losses > self._losses:
                self._loss_in_round = True
                self._loss_events += 1
            self._losses = delivered.losses
        self._loss_round_began = sent >= self._loss_round_ends
        if self._loss_round_began:
            self._loss_round_ends = delivered.delivered
        got = delivered.delivered - sent
        if got > self._inflight_latest:
            self._inflight_latest = got

    def _learn_bandwidth(self, delivered: Delivered) -> None:
        rate = delivered.rate
        if rate is not None:
            if rate > self._bw_latest:
                self._bw_latest = rate
            if rate > self._bandwidths[1] and (rate >= self._most or not delivered.app_limited):
                self._bandwidths[1] = rate
                self._bound_bandwidth()
        if self._loss_round_began and self._loss_in_round and self.phase not in _PROBING:
            if self._bw_short == inf:
                self._bw_short = self._most
            if self._inflight_short == inf:
                self._inflight_short = self.cwnd
            self._bw_short = max(self._bw_latest, BETA * self._bw_short)
            self._inflight_short = max(self._inflight_latest, BETA * self._inflight_short)
            self._bound_bandwidth()

    def _bound_bandwidth(self) -> None:
        """What the path is thought to carry now."""
        self._most = max(self._bandwidths)
        self.bandwidth = min(self._most, self._bw_short)

    def _adapt_bounds(self, delivered: Delivered) -> None:
        """§5.5.10.2: how much may be in flight at most, from what probing brings back."""
        if self._ends_probe and self._round_began:
            self._ends_probe = False
            if self.phase in _CYCLE and not delivered.app_limited:
                self._bandwidths = [self._bandwidths[1], 0.0]
                self._bound_bandwidth()
        flight = delivered.sent_flight
        if delivered.losses - delivered.sent_losses > LOSS_THRESHOLD * flight:
            if self._may_be_too_high:
                self._inflight_is_too_high(delivered)
        elif self._inflight_long != inf:
            if flight > self._inflight_long:
                self._inflight_long = flight
            if self.phase is Phase.UP:
                self._raise_inflight(delivered)

    def _inflight_is_too_high(self, delivered: Delivered) -> None:
        self._may_be_too_high = False
        if not delivered.app_limited:
            target = min(self._bdp(1.0), self.cwnd)
            self._inflight_long = max(delivered.sent_flight, BETA * target)
        if self.phase is Phase.UP:
            self._begin_down(delivered)

    def _raise_inflight(self, delivered: Delivered) -> None:
        """Faster from round to round, while the window is used."""
        if not delivered.limited or self.cwnd < self._inflight_long:
            return
        self._up_acked += delivered.octets
        if self._up_acked >= self._up_step:
            steps = int(self._up_acked / self._up_step)
            self._up_acked -= int(steps * self._up_step)
            self._inflight_long += steps * self._mss
        if self._round_began:
            self._grow_faster()

    def _grow_faster(self) -> None:
        growth = self._mss << min(self._up_rounds, 30)
        self._up_rounds += 1
        self._up_step = max(self.cwnd * self._mss / growth, self._mss)

    def _learn_extra(self, delivered: Delivered) -> None:
        """§5.5.9: acknowledgements that come in lumps need more in flight than the model says."""
        expected = self.bandwidth * (delivered.now - self._extra_since)
        if self._extra_delivered <= expected:
            self._extra_delivered = 0
            self._extra_since = delivered.now
            expected = 0.0
        self._extra_delivered += delivered.octets
        extra = self._extra_delivered - expected
        if extra > self.cwnd:
            extra = self.cwnd
        falling = self._extra
        while falling and falling[-1][1] <= extra:
            falling.pop()
        falling.append((self._round, extra))
        if falling[0][0] < self._round - (2 * EXTRA_ROUNDS if self._full else 1):
            falling.popleft()

    def _check_full(self, delivered: Delivered) -> None:
        """§5.3.1.2: three rounds without a quarter more have found the bandwidth."""
        if self._full_now or delivered.app_limited:
            return
        rate = delivered.rate or 0.0
        if rate >= self._full_bandwidth * GROWTH:
            self._reset_full()
            self._full_bandwidth = rate
            return
        self._full_count += 1
        if self._full_count >= FULL_ROUNDS:
            self._full = self._full_now = True

    def _reset_full(self) -> None:
        self._full_bandwidth = 0.0
        self._full_count = 0
        self._full_now = False

    # -- states

    def _change_phase(self, delivered: Delivered, recovering: bool) -> None:
        phase = self.phase
        if phase is Phase.STARTUP:
            self._check_startup_losses(delivered, recovering)
            if self._full:
                self.phase = Phase.DRAIN
        elif phase is Phase.DRAIN:
            if delivered.in_flight <= self._bdp(1.0):
                self._begin_down(delivered)
        elif phase is not Phase.PROBE_RTT:
            self._cycle(delivered)

    def _check_startup_losses(self, delivered: Delivered, recovering: bool) -> None:
        """§5.3.1.3: a round with many losses has found how much may be in flight."""
        if not self._loss_round_began:
            return
        lost = delivered.losses - self._round_losses
        got = delivered.delivered - self._round_delivered
        many = recovering and self._loss_events >= STARTUP_LOSSES
        if many and lost > LOSS_THRESHOLD * (lost + got):
            self._full = True
            self._inflight_long = max(self._bdp(1.0), self._inflight_latest)
        self._round_losses = delivered.losses
        self._round_delivered = delivered.delivered
        self._loss_events = 0

    def _cycle(self, delivered: Delivered) -> None:
        """§5.3.3.6."""
        phase = self.phase
        if phase is Phase.UP:
            if self._has_probed_enough(delivered):
                self._begin_down(delivered)
        elif phase is Phase.REFILL:
            if self._round_began:
                self._begin_up(delivered)
        elif self._is_time_to_probe(delivered):
            self._begin_refill(delivered)
        elif phase is Phase.DOWN and delivered.in_flight <= min(
            self._bdp(1.0), self._with_headroom()
        ):
            self.phase = Phase.CRUISE

    def _is_time_to_probe(self, delivered: Delivered) -> bool:
        rounds = min(MAX_ROUNDS, self._bdp(1.0) / self._mss)
        return (
            delivered.now - self._cycle_at > self._probe_wait or self._rounds_since_probe >= rounds
        )

    def _has_probed_enough(self, delivered: Delivered) -> bool:
        if delivered.limited and self.cwnd >= self._inflight_long:
            self._reset_full()
            self._full_bandwidth = delivered.rate or 0.0
            return False
        return self._full_now

    def _begin_down(self, delivered: Delivered) -> None:
        """Leave room, and wait as long as Reno would need to grow (§5.3.3.1)."""
        self._reset_signals()
        self._up_step = inf
        # Two to three seconds; the fraction of the clock keeps flows out of step.
        self._probe_wait = 2.0 + delivered.now * 997 % 1.0
        self._rounds_since_probe = 0
        self._cycle_at = delivered.now
        self._ends_probe = True
        self._round_ends = delivered.delivered
        self.phase = Phase.DOWN

    def _begin_refill(self, delivered: Delivered) -> None:
        self._reset_short()
        self._up_rounds = 0
        self._up_acked = 0
        self._may_be_too_high = False
        self._ends_probe = False
        self._round_ends = delivered.delivered
        self.phase = Phase.REFILL

    def _begin_up(self, delivered: Delivered) -> None:
        self._may_be_too_high = True
        self._reset_full()
        self._full_bandwidth = delivered.rate or 0.0
        self._cycle_at = delivered.now
        self._round_ends = delivered.delivered
        self._grow_faster()
        self.phase = Phase.UP

    # -- the round trip

    def _learn_round_trip(self, delivered: Delivered) -> None:
        """§5.3.4: every five seconds a short pause shows the round trip without our queue."""
        now, rtt = delivered.now, delivered.rtt
        expired = now > self._probe_rtt_at + PROBE_RTT_EVERY
        if rtt is not None and (rtt < self._probe_rtt_min or expired):
            self._probe_rtt_min = rtt
            self._probe_rtt_at = now
        if self._probe_rtt_min < self.min_rtt or now > self._min_rtt_at + MIN_RTT_AGE:
            self.min_rtt = self._probe_rtt_min
            self._min_rtt_at = self._probe_rtt_at
        if self.phase is Phase.PROBE_RTT:
            self._stay_small(delivered)
        elif expired and not self._idle_restart:
            self._keep_window()
            self._probe_rtt_ends = None
            self._ends_probe = False
            self.phase = Phase.PROBE_RTT
        self._idle_restart = False

    def _stay_small(self, delivered: Delivered) -> None:
        if self._probe_rtt_ends is None:
            if delivered.in_flight <= self._probe_rtt_window():
                self._probe_rtt_ends = delivered.now + PROBE_RTT_FOR
                self._probe_rtt_round = self._round
                self._round_ends = delivered.delivered
        elif self._round > self._probe_rtt_round and delivered.now > self._probe_rtt_ends:
            self._probe_rtt_at = delivered.now
            self._restore_window()
            self._reset_short()
            if self._full:
                self._begin_down(delivered)
                self.phase = Phase.CRUISE
            else:
                self.phase = Phase.STARTUP

    # -- what may be sent

    def _set_rate_and_window(self, delivered: Delivered) -> None:
        """§5.6.2, 5.6.4: what the model allows, approached by what is delivered."""
        pacing, gain = GAINS[self.phase]
        bandwidth, mss = self.bandwidth, self._mss
        rate = pacing * bandwidth * MARGIN
        if self._full or rate > self._rate:
            self._rate = rate
        allowed = max(
            gain * bandwidth * self.min_rtt + self._extra[0][1],
            TRAINS * quantum(self._rate, delivered.grain, mss, TRAIN_PACKETS * mss),
            MINIMUM * mss,
        )
        if self.phase is Phase.UP:
            allowed += 2 * mss
        if self._full:
            window = min(self.cwnd + delivered.octets, allowed)
        elif self.cwnd < allowed or delivered.delivered < INITIAL_SEGMENTS * mss:
            window = self.cwnd + delivered.octets
        else:
            window = self.cwnd
        if self.phase is Phase.PROBE_RTT:
            window = min(window, self._probe_rtt_window())
        if self._inflight_long != inf or self._inflight_short != inf:
            window = min(window, self._bound())
        self.cwnd = int(max(window, MINIMUM * mss))

    def _bound(self) -> float:
        """What losses showed (§5.6.4.7)."""
        bound = inf
        if self.phase in (Phase.PROBE_RTT, Phase.CRUISE):
            bound = self._with_headroom()
        elif self.phase in _CYCLE:
            bound = self._inflight_long
        return min(bound, self._inflight_short)

    def _with_headroom(self) -> float:
        if self._inflight_long == inf:
            return inf
        return max(self._inflight_long * HEADROOM, MINIMUM * self._mss)

    def _probe_rtt_window(self) -> float:
        return max(self._bdp(GAINS[Phase.PROBE_RTT][1]), MINIMUM * self._mss)

    def _bdp(self, gain: float) -> float:
        return gain * self.bandwidth * self.min_rtt

    def _keep_window(self) -> None:
        self._window_before = max(self.cwnd, self._window_before)

    def _restore_window(self) -> None:
        self.cwnd = max(self.cwnd, self._window_before)
        self._window_before = 0

    # -- signals of the latest round

    def _reset_signals(self) -> None:
        self._loss_in_round = False
        self._bw_latest = 0.0
        self._inflight_latest = 0

    def _reset_short(self) -> None:
        self._bw_short = self._inflight_short = inf
        self._bound_bandwidth()

"""CUBIC as a neighbour on the same link: what our own algorithm has to leave room for."""

from math import inf

from builder_orch.tunnel.ipv6.congestion import INITIAL_SEGMENTS, Delivered

MINIMUM_SEGMENTS = 2
SAMPLES = 8
LEAST_RISE, MOST_RISE = 0.004, 0.016
CAUTION = 4
CAUTIOUS_ROUNDS = 5


class HyStart:
    """HyStart++ (RFC 9406): a round trip that grows ends slow start before losses do."""

    def __init__(self) -> None:
        self.cautious_rounds = 0
        self._round_ends = 0
        self._samples = 0
        self._last = self._current = self._baseline = inf

    def step(self, delivered: Delivered) -> float:
        """The share of what was delivered by which the window grows; 0 when slow start is over."""
        if delivered.sent_delivered >= self._round_ends:
            self._round_ends = delivered.delivered
            self._last, self._current = self._current, inf
            self._samples = 0
            if self.cautious_rounds:
                self.cautious_rounds += 1
        if delivered.rtt is not None:
            self._current = min(self._current, delivered.rtt)
            self._samples += 1
        if self._samples >= SAMPLES:
            self._judge()
        if self.cautious_rounds > CAUTIOUS_ROUNDS:
            return 0.0
        return 1 / CAUTION if self.cautious_rounds else 1.0

    def _judge(self) -> None:
        if self.cautious_rounds:
            if self._current < self._baseline:
                self.cautious_rounds = 0
        elif inf not in (self._current, self._last):
            rise = min(max(self._last / 8, LEAST_RISE), MOST_RISE)
            if self._current >= self._last + rise:
                self._baseline = self._current
                self.cautious_rounds = 1


class Cubic:
    """CUBIC (RFC 9438): the window grows with the time since a loss, no slower than Reno's."""

    C = 0.4
    BETA = 0.7

    def __init__(self, mss: int) -> None:
        self.cwnd = INITIAL_SEGMENTS * mss
        self.ssthresh: float = inf
        self._mss = mss
        self._start = HyStart()
        self._w_max = 0.0
        self._epoch: float | None = None
        self._k = 0.0
        self._origin = 0.0
        self._reno = 0.0
        self._growth = 0.0
        self._before_loss: tuple[int, float, float] | None = None
        self._before_rto: tuple[float, float] | None = None

    @property
    def pacing_rate(self) -> float | None:
        """CUBIC is clocked by acknowledgements."""
        return None

    def on_ack(self, delivered: Delivered, recovering: bool) -> None:
        """§4.1 to 4.4; no growth while repairing, or when cwnd was not what limited us (§4.2)."""
        self._before_rto = None
        if recovering or not delivered.limited or not delivered.octets:
            return
        if self.cwnd < self.ssthresh:
            growth = self._start.step(delivered) if self.ssthresh == inf else 1.0
            self.cwnd += int(delivered.octets * growth)
            if not growth:
                self.ssthresh = self.cwnd
            return
        self._avoid(delivered)

    def on_loss(self, in_flight: int, now: float) -> None:
        """§4.6, with fast convergence (§4.7)."""
        self._before_loss = self.cwnd, self.ssthresh, self._w_max
        window = self.cwnd / self._mss
        if window < self._w_max:
            self._w_max = window * (1 + self.BETA) / 2
        else:
            self._w_max = window
        self.ssthresh = max(self.cwnd * self.BETA, MINIMUM_SEGMENTS * self._mss)
        self.cwnd = int(self.ssthresh)
        self._epoch = None

    def on_spurious(self) -> None:
        """§4.9.2: as if nothing had been."""
        if self._before_loss is not None:
            cwnd, self.ssthresh, self._w_max = self._before_loss
            self.cwnd = max(self.cwnd, cwnd)
            self._before_loss = self._epoch = None

    def on_rto(self, in_flight: int, now: float) -> None:
        """§4.8: start again from one segment."""
        before = self.ssthresh, self._w_max
        self.on_loss(in_flight, now)
        self._before_rto = before
        self.cwnd = self._mss

    def on_idle(self) -> None:
        """The restart window of RFC 5681 §4.1."""
        self.cwnd = min(self.cwnd, INITIAL_SEGMENTS * self._mss)
        self._epoch = None

    def on_restart(self) -> None:
        """A new start, with what was known before the first timeout."""
        if self._before_rto is not None:
            self.ssthresh, self._w_max = self._before_rto
        self.cwnd = INITIAL_SEGMENTS * self._mss
        self._epoch = self._before_rto = None

    def on_mss(self, mss: int) -> None:
        """Keep the octets; never less than a segment."""
        self._mss = mss
        self.cwnd = max(self.cwnd, mss)

    def _avoid(self, delivered: Delivered) -> None:
        """Congestion avoidance in segments, as the RFC counts."""
        window = self.cwnd / self._mss
        acked = delivered.octets / self._mss
        if self._epoch is None:
            self._epoch = delivered.now
            self._reno = window
            self._origin = max(window, self._w_max)
            self._k = ((self._origin - window) / self.C) ** (1 / 3)
        alpha = 3 * (1 - self.BETA) / (1 + self.BETA) if self._reno < self._w_max else 1.0
        self._reno += alpha * acked / window
        elapsed = delivered.now - self._epoch + (delivered.min_rtt or 0.0)
        target = self._origin + self.C * (elapsed - self._k) ** 3
        target = min(max(target, window), 1.5 * window)
        grown = max((target - window) / window * acked, self._reno - window)
        self._growth += grown * self._mss
        if self._growth >= 1:
            whole = int(self._growth)
            self.cwnd += whole
            self._growth -= whole

"""Congestion control: how much may be in flight (RFC 5681, RFC 9438).

The sender tells an algorithm what was delivered and lost; it answers with `cwnd` in octets and,
if it paces, `pacing_rate` in octets per second. Nothing else of the sender depends on which it is.
"""

from typing import NamedTuple, Protocol

INITIAL_SEGMENTS = 10
"""RFC 6928."""
MINIMUM_SEGMENTS = 2


class Delivered(NamedTuple):
    """What one acknowledgement, or one train of them, told.

    `octets` were newly delivered, cumulatively or selectively; `in_flight` remain. `rate` is the
    delivery rate in octets per second, None without a valid sample; `app_limited` marks one
    that the application bounded. `limited` says that cwnd was what held the sender back.
    """

    now: float
    octets: int
    in_flight: int
    rtt: float | None
    min_rtt: float | None
    rate: float | None
    app_limited: bool
    limited: bool
    delivered: int


class Congestion(Protocol):
    """One algorithm for one connection."""

    @property
    def cwnd(self) -> int:
        """How many octets may be in flight."""
        ...

    @property
    def pacing_rate(self) -> float | None:
        """Octets per second at which to send, None for as soon as possible."""
        ...

    def on_ack(self, delivered: Delivered, recovering: bool) -> None:
        """Something was delivered; `recovering` until the losses of one window are repaired."""
        ...

    def on_loss(self, in_flight: int, now: float) -> None:
        """A new window with losses; called once for each."""
        ...

    def on_spurious(self) -> None:
        """The losses told last were none."""
        ...

    def on_rto(self, in_flight: int, now: float) -> None:
        """The retransmission timer fired for the first time since the last progress."""
        ...

    def on_idle(self) -> None:
        """What was known about the path is stale: nothing was sent for an RTO."""
        ...

    def on_restart(self) -> None:
        """The path was away and is back: timeouts meanwhile were not about congestion."""
        ...

    def on_mss(self, mss: int) -> None:
        """Packets are of another size from now on."""
        ...


class Cubic:
    """CUBIC (RFC 9438): the window grows with the time since a loss, no slower than Reno's."""

    C = 0.4
    BETA = 0.7

    def __init__(self, mss: int) -> None:
        self.cwnd = INITIAL_SEGMENTS * mss
        self.ssthresh: float = float("inf")
        self._mss = mss
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
            self.cwnd += delivered.octets
            return
        self._avoid(delivered)

    def on_loss(self, in_flight: int, now: float) -> None:  # noqa: ARG002
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

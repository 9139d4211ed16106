"""Round-trip time and the retransmission timeout (RFC 6298)."""

INITIAL_RTO = 1.0
MIN_RTO = 0.2
"""RFC 6298 asks for 1 s; every deployed stack takes 200 ms, above the longest delayed ACK."""
MAX_RTO = 60.0
AFTER_LOST_SYN = 3.0
GRANULARITY = 0.001
ALPHA = 1 / 8
BETA = 1 / 4
K = 4
MAX_REMOTES = 1024
"""How many are remembered; the oldest are forgotten."""
MIN_RTT_AGE = 60.0
"""How long a minimum counts before a longer one may replace it."""


class RoundTrip:
    """The estimator of one connection. All times in seconds; `min_rtt` is None before a sample."""

    __slots__ = (
        "_base",
        "_is_expected",
        "_min_at",
        "backoff",
        "latest",
        "min_rtt",
        "srtt",
        "variation",
    )

    def __init__(self) -> None:
        self.srtt: float | None = None
        self.variation = 0.0
        self.latest: float | None = None
        self.min_rtt: float | None = None
        self.backoff = 0
        self._base = INITIAL_RTO
        self._is_expected = False
        self._min_at = 0.0

    @property
    def rto(self) -> float:
        """The timeout now, doubled for each one that has passed in vain (§5.5)."""
        return min(self._base * 2.0 ** min(self.backoff, 16), MAX_RTO)

    @property
    def measured(self) -> float | None:
        """The timeout without back-off, None before a sample."""
        return None if self.srtt is None else self._base

    def expect(self, rto: float) -> None:
        """Begin with a timeout that another connection between these hosts arrived at.

        The initial second is for hosts that have not measured yet (§2.1); RFC 9040 §6.2 shares.
        """
        self._base = min(INITIAL_RTO, max(rto, MIN_RTO))
        self._is_expected = True

    def sample(self, rtt: float, now: float) -> None:
        """Take a measurement; never one of a segment that was sent twice (Karn, §3)."""
        self.latest = rtt
        if self.min_rtt is None or rtt <= self.min_rtt or now - self._min_at > MIN_RTT_AGE:
            self.min_rtt = rtt
            self._min_at = now
        if self.srtt is None:
            self.srtt = rtt
            self.variation = rtt / 2
        else:
            self.variation += BETA * (abs(self.srtt - rtt) - self.variation)
            self.srtt += ALPHA * (rtt - self.srtt)
        self._base = max(MIN_RTO, self.srtt + max(GRANULARITY, K * self.variation))

    def syn_was_lost(self) -> None:
        """Be patient with the first data after a SYN that had to be repeated (§5.7).

        Less so where other connections know the path: then the SYN was most likely lost.
        """
        if self.srtt is None:
            self._base = INITIAL_RTO if self._is_expected else AFTER_LOST_SYN


class Remotes:
    """How long answers of each remote take, for the next connection there (RFC 9040 §6.1)."""

    def __init__(self) -> None:
        self._timeouts: dict[bytes, float] = {}

    def remember(self, remote: bytes, measured: RoundTrip) -> None:
        """A handshake is over."""
        rto = measured.measured
        if rto is not None:
            self._timeouts.pop(remote, None)
            if len(self._timeouts) >= MAX_REMOTES:
                del self._timeouts[next(iter(self._timeouts))]
            self._timeouts[remote] = rto

    def prepare(self, remote: bytes, fresh: RoundTrip) -> None:
        """A handshake begins."""
        rto = self._timeouts.get(remote)
        if rto is not None:
            fresh.expect(rto)

"""Back to larger segments after a retreat from a black hole (RFC 4821 §7, RFC 8899 §5.3).

A retreat may have been about an outage and not about size, so now and then one segment of new data
is sent larger than the others. More data follow it, so that its loss is found by what arrives
behind it and costs a round trip, no timeout and no congestion response.
"""

FIRST_WAIT = 10.0
"""Before the first trial; doubled with each retreat, because one taken back in vain is dear."""
LAST_WAIT = 600.0
"""PMTU_RAISE_TIMER of RFC 8899 §5.1.1: how long a result lasts."""
BETWEEN = 1.0
FOLLOWERS = 3
"""Segments that have to follow a trial."""
CLOSE = 16
"""Octets that are not worth one more trial."""


class Search:
    """One connection's trials. `at` says when the next may go, None when there is nothing to find.

    Sizes are of payloads. `start` and `end` are the positions of the trial in flight, if any.
    """

    __slots__ = ("_full", "_high", "_wait", "at", "end", "start")

    def __init__(self) -> None:
        self.at: float | None = None
        self.start = self.end = 0
        self._full = self._high = 0
        self._wait = FIRST_WAIT

    @property
    def in_flight(self) -> bool:
        """A trial is under way."""
        return self.end > 0

    def begin(self, full: int, now: float) -> None:
        """Segments have just become smaller than `full`, which was not said by the path."""
        self._full, self._high = full, full + 1
        self.at = now + self._wait
        self.end = 0
        self._wait = min(2 * self._wait, LAST_WAIT)

    def stop(self) -> None:
        """Nothing is to be found."""
        self.at = None
        self.end = 0

    def bound(self, most: int) -> None:
        """The path has said what it takes."""
        self._full = min(self._full, most)
        self._high = min(self._high, most + 1)

    def size(self, mss: int) -> int:
        """What to try next: everything first, then the middle of what is left."""
        return self._full if self._high > self._full else (mss + self._high) // 2

    def sent(self, start: int, end: int) -> None:
        """The trial went out."""
        self.start, self.end = start, end

    def arrived(self, now: float) -> int:
        """It was delivered: the size of segments from now on."""
        size = self.end - self.start
        self._conclude(size, now)
        return size

    def failed(self, mss: int, now: float) -> None:
        """It alone was lost: too large, as it seems."""
        self._high = self.end - self.start
        self._conclude(mss, now)

    def postpone(self, now: float) -> None:
        """It was lost with others, which tells nothing."""
        self.end = 0
        self.at = now + self._wait

    def forget(self) -> None:
        """Everything in flight was given up."""
        self.end = 0

    def _conclude(self, mss: int, now: float) -> None:
        self.end = 0
        if mss >= self._full:
            self.at = None
        elif self._high - mss > CLOSE:
            self.at = now + BETWEEN
        else:
            self.at = now + LAST_WAIT
            self._high = self._full + 1

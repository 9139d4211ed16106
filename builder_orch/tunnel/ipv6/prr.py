"""Proportional rate reduction (RFC 6937bis): how a window with losses is shared out in recovery."""


class Reduction:
    """One recovery. `begin` with what was outstanding, then tell what is delivered and sent.

    Whatever the congestion control makes of the losses, there is neither a silence until the pipe
    has drained to its new window nor a burst when it had drained below it.
    """

    __slots__ = ("_delivered", "_flight", "_fresh", "_sent")

    def __init__(self) -> None:
        self.begin(1)

    def begin(self, flight: int) -> None:
        """Losses were found with `flight` octets outstanding (RecoverFS)."""
        self._flight = max(flight, 1)
        self._delivered = 0
        self._sent = 0
        self._fresh = 0

    def delivered(self, octets: int) -> None:
        """Octets have arrived."""
        self._delivered += octets
        self._fresh += octets

    def sent(self, octets: int) -> None:
        """Octets went out, new ones or again."""
        self._sent += octets
        self._fresh = 0

    def room(self, window: int, in_flight: int, mss: int) -> int:
        """How much may go now, towards `window` in flight (§5)."""
        if in_flight > window:
            return -(-self._delivered * window // self._flight) - self._sent
        # Slow start back to the window: what was delivered and as much again.
        fresh = max(self._delivered - self._sent, self._fresh)
        return min(window - in_flight, fresh + max(mss, self._fresh))

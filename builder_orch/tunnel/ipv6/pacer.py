"""When the next train may go and how long it may be, so that packets leave at a rate."""

GRAIN = 1e-3
"""Timers above us are about this exact, so a train holds what the rate moves in this time."""
LATE = 2e-3
"""How much lateness is made up for; more would be a burst."""
LATE_TRAINS = 4


class Pacer:
    """Keeps `next_at`, the moment up to which the rate has been used.

    Sending is free from then on. What the rate would have moved since is made up for within limits,
    so neither a late timer nor an acknowledgement that comes in between makes it slower.
    """

    __slots__ = ("next_at",)

    def __init__(self) -> None:
        self.next_at = 0.0

    def allowance(self, now: float, rate: float, mss: int, train: int) -> int:
        """How many octets may go now, 0 before `next_at`; `train` octets make a full train."""
        late = now - self.next_at
        if late < 0:
            return 0
        quantum = rate * GRAIN
        quantum = train if quantum > train else max(quantum, 2 * mss)
        return int(quantum + min((min(LATE, late)) * rate, LATE_TRAINS * train))

    def after(self, octets: int, now: float, rate: float, train: int) -> float:
        """What `next_at` will be when so much has gone out now."""
        late = min(LATE, LATE_TRAINS * train / rate)
        return max(self.next_at, now - late) + octets / rate

    def sent(self, octets: int, now: float, rate: float, train: int) -> None:
        """So much went out."""
        self.next_at = self.after(octets, now, rate, train)

"""When the next train may go and how long it may be, so that packets leave at a rate."""

GRAIN = 1e-3
"""Timers above us are about this exact, so a train holds what the rate moves in this time."""
SHARES = 16
"""Of so many streams at once each sends as much more at a time, and as much less often: together
they burst no more than one that had all of it, and their trains are as long."""
SHARED_TRAINS = 2
PAUSE = 2e-3
"""How much of a time in which the rate was not what held us is made up for; more is a burst."""
LATE = 5e-2
"""The same when only the rate held us, and whoever should have called us then was late."""
LATE_TRAINS = 4


def grain(streams: int) -> float:
    """The time whose worth a train holds when so many streams have something to send."""
    return GRAIN * min(max(streams, 1), SHARES)


def quantum(rate: float, grain: float, mss: int, train: int) -> float:
    """How many octets go at a time: a train at most, two of one among many streams, so that one
    acknowledgement tells of both."""
    most = train if grain == GRAIN else SHARED_TRAINS * train
    octets = rate * grain
    return most if octets > most else max(octets, 2 * mss)


class Pacer:
    """Keeps `next_at`, the moment up to which the rate has been used.

    Sending is free from then on. What the rate would have moved since is made up for within limits,
    so neither a late timer nor an acknowledgement that comes in between makes it slower. A host
    that is busy calls late again and again: were that not made up for, each measurement of the
    bandwidth would lie below the one before, until next to nothing is sent.
    """

    __slots__ = ("_credit", "grain", "next_at")

    def __init__(self) -> None:
        self.next_at = 0.0
        self.grain = GRAIN
        self._credit = PAUSE

    def called(self, *, waited: bool) -> None:
        """The next allowances are for a sender that waited for `next_at`, or for something else."""
        self._credit = LATE if waited else PAUSE

    def allowance(self, now: float, rate: float, mss: int, train: int) -> int:
        """How many octets may go now, 0 before `next_at`; `train` octets make a full train."""
        late = now - self.next_at
        if late < 0:
            return 0
        made_up = min(min(self._credit, late) * rate, LATE_TRAINS * train)
        return int(quantum(rate, self.grain, mss, train) + made_up)

    def after(self, octets: int, now: float, rate: float, train: int) -> float:
        """What `next_at` will be when so much has gone out now."""
        late = min(self._credit, LATE_TRAINS * train / rate)
        return max(self.next_at, now - late) + octets / rate

    def sent(self, octets: int, now: float, rate: float, train: int) -> None:
        """So much went out."""
        self.next_at = self.after(octets, now, rate, train)

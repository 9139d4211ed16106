"""Which transport counters have been seen (WireGuard paper, 5.4.6; RFC 6479 in spirit)."""

from builder_orch.tunnel.wireguard.timers import REJECT_AFTER_MESSAGES

WINDOW = 8128
"""How far behind the newest counter one may come and still be taken."""

_MASK = (1 << (WINDOW + 1)) - 1


class Window:
    """Bit n of one integer says whether the counter n behind the newest was seen.

    It must be asked only after the packet proved authentic: a forged counter would move it.
    """

    __slots__ = ("_newest", "_seen")

    def __init__(self) -> None:
        self._newest = -1
        self._seen = 0

    def admit(self, counter: int) -> bool:
        """Take one counter; False when it was seen before, is too old or beyond the limit."""
        behind = self._newest - counter
        if behind < 0:
            return self.advance(counter, 1)
        if behind > WINDOW or self._seen >> behind & 1:
            return False
        self._seen |= 1 << behind
        return True

    def advance(self, first: int, count: int) -> bool:
        """Take `count` consecutive counters, all newer than any before, in one step.

        False, with nothing taken, when some are not newer or lie beyond the limit.
        """
        ahead = first + count - 1 - self._newest
        if ahead < count or first + count > REJECT_AFTER_MESSAGES:
            return False
        # A leap empties the window; shifting by 2**60 would ask for the memory.
        seen = 0 if ahead > WINDOW else self._seen << ahead
        self._seen = (seen | (1 << count) - 1) & _MASK
        self._newest += ahead
        return True

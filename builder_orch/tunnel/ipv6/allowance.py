"""So many a second and no more, for what strangers can make us send."""


class Allowance:
    """Counts within whole seconds of the clock that is passed in."""

    __slots__ = ("_left", "_per_second", "_second")

    def __init__(self, per_second: int) -> None:
        self._per_second = per_second
        self._left = per_second
        self._second: int | None = None

    def take(self, now: float) -> bool:
        """Whether one more is allowed now; if so it is taken."""
        if int(now) != self._second:
            self._second, self._left = int(now), self._per_second
        self._left -= 1
        return self._left >= 0

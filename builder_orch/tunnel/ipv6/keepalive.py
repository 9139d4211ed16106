"""Asking a quiet peer whether it is still there (RFC 9293 §3.8.4); off unless wanted."""

PROBES = 4
"""Questions without an answer after which the peer counts as gone."""


class Keepalive:
    """When to ask. The connection says when it heard something and when it asked."""

    __slots__ = ("_asked", "_heard_at", "_since", "interval_s")

    def __init__(self) -> None:
        self.interval_s: float | None = None
        self._heard_at = 0.0
        self._since = 0.0
        self._asked = 0

    def heard(self, now: float) -> None:
        """A segment came."""
        self._heard_at = self._since = now
        self._asked = 0

    def asked(self, now: float) -> None:
        """A probe went out."""
        self._since = now
        self._asked += 1

    def deadline(self) -> float | None:
        """When to ask next, or to give up."""
        return None if self.interval_s is None else self._since + self.interval_s

    def limit(self) -> float | None:
        """When a peer that was asked by other means, by data, counts as gone."""
        return None if self.interval_s is None else self._heard_at + self.interval_s * (PROBES + 1)

    @property
    def is_hopeless(self) -> bool:
        """At the next deadline it is over."""
        return self._asked >= PROBES

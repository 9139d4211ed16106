"""Timestamps on one connection and protection against wrapped numbers (RFC 7323 §3 to 5).

Taken up when the peer offers them. We do not offer them by default: round trips are measured per
train without them, and 12 octets in each packet would buy nothing.
"""

from struct import Struct

from builder_orch.tunnel.ipv6.seq import MASK

OPTION_LEN = 12
TICKS = 1000
"""Our clock ticks once a millisecond (§5.4 asks for 1 ms to 1 s)."""
OUTDATED = 24 * 86400.0
"""A stamp that is older than half the range of a millisecond clock says nothing (§5.5)."""

PREFIX = b"\x01\x01\x08\x0a"
"""Two NOPs, kind 8, length 10."""
_OPTION = Struct(">4sII")
_HALF = 1 << 31


class Stamps:
    """TS.Recent and our clock. `offset` keeps the time since boot from strangers."""

    __slots__ = ("_offset", "_recent", "_recent_at")

    def __init__(self, offset: int) -> None:
        self._offset = offset
        self._recent = 0
        self._recent_at: float | None = None

    def option(self, now: float) -> bytes:
        """The option to send, aligned as everybody sends it."""
        return _OPTION.pack(PREFIX, (int(now * TICKS) + self._offset) & MASK, self._recent)

    def is_old(self, value: int, now: float) -> bool:
        """PAWS: a segment with this TSval was sent before one that came in order (§5.2)."""
        if self._recent_at is None or now - self._recent_at > OUTDATED:
            return False
        return (value - self._recent) & MASK >= _HALF

    def came(self, value: int, now: float) -> None:
        """A segment that covers the last acknowledgement sent carried this TSval (§4.3)."""
        if not self.is_old(value, now):
            self._recent = value
            self._recent_at = now

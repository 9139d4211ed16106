"""The clock in an initiation: strictly increasing, and coarse so that it tells little (TAI64N)."""

from struct import Struct

BASE = 2**62 + 10
"""Label of the Unix epoch: TAI was 10 s ahead. Leap seconds are not counted, as in Linux."""
TICK_NS = 2**24
"""Nanoseconds are cut to multiples of this, 16.8 ms."""
TICK_S = TICK_NS / 1e9
STAMP_LEN = 12

_STAMP = Struct(">QI")
_SECOND_NS = 10**9


def stamp(wall: float) -> bytes:
    """Seconds since the Unix epoch as 12 octets that sort like the time."""
    seconds = int(wall)
    nanoseconds = int((wall - seconds) * _SECOND_NS)
    return _STAMP.pack(BASE + seconds, nanoseconds // TICK_NS * TICK_NS)


def after(previous: bytes) -> bytes:
    """The stamp one tick later."""
    label, nanoseconds = _STAMP.unpack(previous)
    nanoseconds += TICK_NS
    if nanoseconds >= _SECOND_NS:
        return _STAMP.pack(label + 1, 0)
    return _STAMP.pack(label, nanoseconds)

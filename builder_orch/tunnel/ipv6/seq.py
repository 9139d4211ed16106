"""Sequence numbers: 32 bits on the wire, unbounded integers inside (RFC 9293 §3.4).

Inside, a number only grows and plain `<` compares it, so nothing but the border has to know of the
circle. `unwrap` is exact while both numbers lie within 2^31 of each other, which windows of at most
2^30 octets guarantee.
"""

MODULUS = 1 << 32
MASK = MODULUS - 1
HALF = 1 << 31


def wire(number: int) -> int:
    """The 32 bits that travel."""
    return number & MASK


def unwrap(value: int, near: int) -> int:
    """The number whose 32 bits are `value` and that lies nearest to `near`."""
    return near + ((value - near + HALF) & MASK) - HALF

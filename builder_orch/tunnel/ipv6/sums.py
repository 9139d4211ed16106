"""The checksum fields (RFC 1071) of a whole train of packets at once.

With integers alone they are the largest cost of an upload (1.6 us a packet of 1360 octets); as dot
products of octets with ones they cost 0.15 us.
"""

from typing import cast

import simsimd

from builder_orch.tunnel.ipv6.header import (
    FOLD_LARGE,
    FOLD_MIDDLE,
    FOLD_SMALL,
    FOLD_TINY,
    MASK_LARGE,
    MASK_MIDDLE,
    MASK_SMALL,
    MASK_TINY,
)

MAX_SIZE = 65_535
"""The products of longer runs would not fit the 32 bits that they are added in."""


def by_integers(chunk: bytes, at: int, size: int, count: int, rest: int) -> list[int]:
    """The fields of `count` packets with `size` octets each of `chunk` from `at`.

    `rest` is the sum of all other words of the first; it grows by `size` from one to the next, as
    sequence numbers do.
    """
    number = int.from_bytes
    fields: list[int] = []
    append = fields.append
    for begin in range(at, at + size * count, size):
        x = number(chunk[begin : begin + size], "little")
        x = (x >> FOLD_LARGE) + (x & MASK_LARGE)
        x = (x >> FOLD_MIDDLE) + (x & MASK_MIDDLE)
        x = (x >> FOLD_SMALL) + (x & MASK_SMALL)
        # Little-endian words summed are the sum of the network's, turned by one octet.
        x = (x >> FOLD_TINY) + (x & MASK_TINY) << 8
        append(65535 - (x + rest + begin - at) % 65535)
    return fields


def by_products(chunk: bytes, at: int, size: int, count: int, rest: int) -> list[int]:
    """The same; ValueError for payloads longer than MAX_SIZE."""
    if size > MAX_SIZE:
        raise ValueError("a run longer than its sum may be")
    ones = _ONES.get(size)
    if ones is None:
        if len(_ONES) >= MAX_SIZES:
            _ONES.clear()
        octets = b"\1\0" * size
        ones = _ONES[size] = memoryview(octets[:size] + octets[1 : size + 1]).cast("B", (2, size))
    runs = memoryview(chunk)[at : at + size * count].cast("B", (count, size))
    products = simsimd.cdist(runs, ones, metric="dot", dtype="uint8")
    pairs = cast("list[tuple[float, float]]", memoryview(cast("bytes", products)).tolist())
    rests = range(rest, rest + size * count, size)
    # The octets at even places are the high ones.
    return [
        65535 - (int(256.0 * even + odd) + other) % 65535
        for other, (even, odd) in zip(rests, pairs, strict=True)
    ]


MAX_SIZES = 16
_ONES: dict[int, memoryview] = {}
"""By length of the runs: ones for the octets at even places, then for those at odd ones."""


def _is_exact() -> bool:
    """Whether the products come out right on this processor, whose instructions they depend on."""
    worst = bytes(range(256)) * 11 + b"\xff" * 2816
    for size in (1360, 1348, 1220, 1219, 17):
        count = len(worst) // size
        if by_products(worst, 0, size, count, 0) != by_integers(worst, 0, size, count, 0):
            return False
    return True


fields = by_products if _is_exact() else by_integers

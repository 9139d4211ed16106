"""The contract of the two cores; read this before either.

A machine is told everything: octets, commands and the time. It does no I/O, reads no clock and
rolls no dice. The driver calls in, then always asks `transmit`, then sets one timer for `deadline`:

- After `transmit(now)`, `deadline()` is `None` or later than `now`.
- A call after the deadline, or before it, is harmless.

`now` is seconds from any origin on a clock that never goes back and counts suspended time.

Inside, packets travel in **trains**: lists of IPv6 packets for one destination, all of one size but
for a shorter last one, at most 64 packets and 64 KiB together; one that came may be `Laid`.
Outside, the same train is `Datagrams`: octets laid end to end and the size to cut them by, which is
what UDP_SEGMENT takes and UDP_GRO gives.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, overload

Entropy = Callable[[int], bytes]
Endpoint = tuple[str, int]
"""An outside address: numeric host and UDP port."""
Address = tuple[bytes, int]
"""An inside address: 16 octets of IPv6 and a port."""
Train = list[bytes]

TRAIN_PACKETS = 44
"""Packets in a full train: 44 datagrams of 1452 octets fit one UDP send of 64 KiB."""


class Laid(Sequence[bytes]):
    """Packets of `size` octets each, at least one of them, laid end to end in `octets`.

    To most it is the list of its packets; who looks at all of them at once need not take it apart.
    """

    __slots__ = ("octets", "size")

    def __init__(self, octets: bytes, size: int) -> None:
        self.octets = octets
        self.size = size

    def __len__(self) -> int:
        return len(self.octets) // self.size

    @overload
    def __getitem__(self, index: int) -> bytes: ...

    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...

    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        if isinstance(index, slice):
            return list(self)[index]
        start = range(0, len(self.octets), self.size)[index]
        return self.octets[start : start + self.size]

    def __iter__(self) -> Iterator[bytes]:
        octets, size = self.octets, self.size
        return (octets[start : start + size] for start in range(0, len(octets), size))


class Datagrams(NamedTuple):
    """UDP payloads laid end to end; each is `segment` octets long, the last perhaps shorter."""

    octets: bytes | memoryview
    segment: int
    endpoint: Endpoint


class Malformed(ValueError):
    """Octets that are not what they claim to be; counted and dropped by the core that met them."""


class Rejected(Exception):
    """Well-formed octets that a rule forbids (replay, unknown key, wrong source address)."""

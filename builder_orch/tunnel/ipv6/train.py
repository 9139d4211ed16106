"""Cutting packets into trains as `machine.py` wants them, and trains into what is one stream's."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from struct import Struct

from builder_orch.tunnel.machine import TRAIN_PACKETS, Laid, Train

TRAIN_OCTETS = 65_535 - 8 - 40
"""What one UDP send may carry: 65 535 less the UDP header and an IPv6 header outside."""
SEALED_EXTRA = 32
"""What WireGuard adds to each packet."""


def train_limit(packet_len: int) -> int:
    """How many packets of this size make a full train."""
    return max(1, min(TRAIN_PACKETS, TRAIN_OCTETS // (packet_len + SEALED_EXTRA)))


def couple(trains: list[Train], packets: list[bytes]) -> None:
    """Append `packets`, all of one size and one destination, to the last train as far as they fit.

    `trains` may hold packets for that destination only.
    """
    if not packets:
        return
    size = len(packets[0])
    at = 0
    if trains:
        last = trains[-1]
        first_size = len(last[0])
        room = train_limit(first_size) - len(last)
        if room > 0 and len(last[-1]) == first_size:
            if size == first_size:
                last += packets[:room]
                at = room
            elif size < first_size:
                last.append(packets[0])
                at = 1
    limit = train_limit(size)
    while at < len(packets):
        trains.append(packets[at : at + limit])
        at += limit


def streams(packets: Sequence[bytes]) -> Iterator[tuple[bytes, int, int]]:
    """Where one stream's packets begin and end among those that came together.

    For each run: octets 6 to 44 of its packets (protocol, hop limit, addresses and ports, or as
    much of it as there is), the index of its first, and the index behind its last.
    """
    if isinstance(packets, Laid) and packets.size >= _NAMED:
        names: Sequence[bytes] = _names(packets.size, len(packets))(packets.octets)
    else:
        names = [packet[6:_NAMED] for packet in packets]
    start = 0
    for name, run in groupby(names):
        stop = start + len(list(run))
        yield name, start, stop
        start = stop


_NAMED = 44


@lru_cache(maxsize=256)
def _names(size: int, count: int) -> Callable[[bytes], tuple[bytes, ...]]:
    return Struct(f"6x{_NAMED - 6}s{size - _NAMED}x" * count).unpack

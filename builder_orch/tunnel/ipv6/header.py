"""The IPv6 header and the Internet checksum (RFC 8200, RFC 1071).

Sums are taken over little-endian integers, because `int.from_bytes(.., "little")` pads an odd tail
the right way by itself, and folded while they are long: 2^16 is 1 modulo 65535, so a shift by any
multiple of 16 keeps the sum. The folds halve 1360 octets, the payload of a full packet, at
multiples of 240 bits, where 16-bit words meet CPython's 30-bit digits. Changing the byte order of a
sum is a multiplication by 256.
"""

from struct import Struct
from typing import NamedTuple

from builder_orch.tunnel.machine import Malformed, Rejected

ADDRESS_LEN = 16
HEADER_LEN = 40
HOP_LIMIT = 64
MINIMUM_MTU = 1280

HOP_BY_HOP = 0
TCP = 6
UDP = 17
ROUTING = 43
FRAGMENT = 44
ICMPV6 = 58
NO_NEXT_HEADER = 59
DESTINATION_OPTIONS = 60

FOLD_LARGE, FOLD_MIDDLE, FOLD_SMALL, FOLD_TINY = 5520, 2880, 1440, 720
MASK_LARGE = (1 << FOLD_LARGE) - 1
MASK_MIDDLE = (1 << FOLD_MIDDLE) - 1
MASK_SMALL = (1 << FOLD_SMALL) - 1
MASK_TINY = (1 << FOLD_TINY) - 1

VERSION = 6 << 28
MAX_EXTENSIONS = 8
_FIXED = Struct(">IHBB")
_PAD1 = 0


class Header(NamedTuple):
    """An IPv6 header; `next_header` and `offset` name what follows its extension headers."""

    source: bytes
    destination: bytes
    next_header: int
    offset: int
    hop_limit: int


def total(octets: bytes) -> int:
    """A number congruent modulo 65535 to the sum of little-endian 16-bit words."""
    number = int.from_bytes(octets, "little")
    number = (number >> FOLD_LARGE) + (number & MASK_LARGE)
    number = (number >> FOLD_MIDDLE) + (number & MASK_MIDDLE)
    number = (number >> FOLD_SMALL) + (number & MASK_SMALL)
    return (number >> FOLD_TINY) + (number & MASK_TINY)


def checksum(source: bytes, destination: bytes, next_header: int, octets: bytes) -> int:
    """The checksum field of `octets`, whose own field holds zero, under the pseudo-header.

    Never 0, which UDP forbids and which is the same number as 65535 elsewhere (RFC 8200 §8.1).
    """
    pseudo = (total(source) + total(destination) + total(octets)) << 8
    return 65535 - (pseudo + len(octets) + next_header) % 65535


def is_intact(source: bytes, destination: bytes, next_header: int, octets: bytes) -> bool:
    """Whether `octets`, checksum included, add up."""
    pseudo = (total(source) + total(destination) + total(octets)) << 8
    return (pseudo + len(octets) + next_header) % 65535 == 0


def emit(source: bytes, destination: bytes, next_header: int, payload: bytes) -> bytes:
    """One packet around `payload`."""
    fixed = _FIXED.pack(VERSION, len(payload), next_header, HOP_LIMIT)
    return b"".join((fixed, source, destination, payload))


def parse(packet: bytes) -> Header:
    """Read the header and walk past extension headers that ask nothing of a host.

    Malformed when lengths disagree; Rejected for fragments (our peers have no reason to send any),
    routing headers with hops left and options that demand to be understood.
    """
    if len(packet) < HEADER_LEN:
        raise Malformed("shorter than an IPv6 header")
    first, length, next_header, hop_limit = _FIXED.unpack_from(packet)
    if first >> 28 != 6:
        raise Malformed("not IPv6")
    if length != len(packet) - HEADER_LEN:
        raise Malformed("IPv6 length")
    offset = HEADER_LEN
    if next_header not in (TCP, UDP, ICMPV6):
        next_header, offset = _skip_extensions(packet, next_header)
    return Header(packet[8:24], packet[24:40], next_header, offset, hop_limit)


def _skip_extensions(packet: bytes, next_header: int) -> tuple[int, int]:
    """RFC 8200 §4: the first header that is none of those, and where it begins."""
    offset = HEADER_LEN
    for _ in range(MAX_EXTENSIONS):
        if next_header == FRAGMENT:
            raise Rejected("fragment")
        if next_header == NO_NEXT_HEADER:
            raise Rejected("no next header")
        if next_header not in (HOP_BY_HOP, ROUTING, DESTINATION_OPTIONS):
            return next_header, offset
        if next_header == HOP_BY_HOP and offset != HEADER_LEN:
            raise Malformed("hop-by-hop options must come first")
        if offset + 8 > len(packet):
            raise Malformed("extension header is cut off")
        after = offset + 8 * (packet[offset + 1] + 1)
        if after > len(packet):
            raise Malformed("extension header is cut off")
        if next_header == ROUTING:
            if packet[offset + 3]:
                raise Rejected("routing header")
        else:
            _check_options(packet[offset + 2 : after])
        next_header, offset = packet[offset], after
    raise Rejected("too many extension headers")


def _check_options(options: bytes) -> None:
    """RFC 8200 §4.2: an unknown option may be skipped when its two highest bits are zero."""
    at = 0
    while at < len(options):
        kind = options[at]
        if kind == _PAD1:
            at += 1
            continue
        if kind >> 6:
            raise Rejected("option must be understood")
        if at + 2 > len(options):
            raise Malformed("option is cut off")
        at += 2 + options[at + 1]
    if at != len(options):
        raise Malformed("option is cut off")

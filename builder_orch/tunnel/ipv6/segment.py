"""TCP segments to octets and back (RFC 9293 §3.1, RFC 2018, RFC 7323).

`Segment` is the plain form, for handshakes, options and everything rare. `Template` is the fast
one: what never changes in one direction of one connection is laid out and summed once.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import repeat
from struct import Struct
from typing import Any, NamedTuple

from builder_orch.tunnel.ipv6 import header
from builder_orch.tunnel.ipv6.seq import MASK, MODULUS
from builder_orch.tunnel.ipv6.sums import fields
from builder_orch.tunnel.machine import Address, Laid, Malformed

FIN, SYN, RST, PSH, ACK, URG = 1, 2, 4, 8, 16, 32

TCP_HEADER_LEN = 20
PACKET_OVERHEAD = header.HEADER_LEN + TCP_HEADER_LEN
PLAIN_ACK = TCP_HEADER_LEN // 4 << 12 | ACK
"""Data offset and flags of a segment without options that carries ACK and nothing else."""
DEFAULT_MSS = 1220
"""What a peer that sends no MSS option takes over IPv6 (RFC 9293 §3.7.1)."""

Blocks = tuple[tuple[int, int], ...]
"""SACK blocks: left edge, right edge (exclusive)."""

_END, _NOP, _MSS, _SCALE, _SACK_PERMITTED, _SACK, _STAMPS = 0, 1, 2, 3, 4, 5, 8
_TCP = Struct(">HHIIHHHH")
_IP_START = Struct(">IHBB")
_HEADERS = Struct(">44sI8sHH")
_ACK_PART = Struct(">IHH")
_BLOCK = Struct(">II")
_FIELDS = Struct(">IIHH").unpack_from
_SACK_STARTS = {4 + 8 * n: bytes((_NOP, _NOP, _SACK, 2 + 8 * n)) for n in range(1, 5)}
"""How SACK options begin, by their length with the padding before."""
FULL_RUN = 4
"""How many packets make it worth to read them all at once."""


@lru_cache(maxsize=64)
def _apart(length: int) -> Callable[[bytes], tuple[Any, ...]]:
    """Takes a packet with `length` octets and no options apart, as `_read_full` wants it."""
    return Struct(f">4x40sIIHH4x{length}s").unpack


@lru_cache(maxsize=256)
def _all_apart(length: int, count: int) -> Callable[[bytes, int], tuple[Any, ...]]:
    """The same for `count` packets laid end to end."""
    return Struct(">" + f"4x40sIIHH4x{length}s" * count).unpack_from


@lru_cache(maxsize=64)
def _slices(size: int, count: int) -> Callable[[bytes, int], tuple[bytes, ...]]:
    """Cuts `count` payloads of `size` octets out of a chunk."""
    return Struct(f"{size}s" * count).unpack_from


@lru_cache(maxsize=64)
def _packet(options_len: int, size: int) -> Callable[..., bytes]:
    """Joins the parts of a packet: what never changes, its number, the rest of its header without
    urgent pointer, options if there are any, and payload."""
    return Struct(">44sI8sH2x" + f"{options_len}s" * bool(options_len) + f"{size}s").pack


class Segment(NamedTuple):
    """One TCP segment; numbers are those of the wire."""

    source_port: int
    destination_port: int
    seq: int
    ack: int
    flags: int
    window: int
    payload: bytes = b""
    mss: int | None = None
    scale: int | None = None
    sack_permitted: bool = False
    blocks: Blocks = ()
    stamp: int | None = None
    """TSval; what it echoes is not used."""

    @property
    def length(self) -> int:
        """How much of the sequence space it takes."""
        return len(self.payload) + bool(self.flags & SYN) + bool(self.flags & FIN)


def parse(packet: bytes, offset: int = header.HEADER_LEN) -> Segment:
    """Read the segment at `offset`; Malformed when its header does not fit.

    The checksum is not verified: packets out of a tunnel have been authenticated as a whole. Use
    `header.is_intact` where they have not. Options that make no sense are passed over.
    """
    if len(packet) < offset + TCP_HEADER_LEN:
        raise Malformed("shorter than a TCP header")
    source, destination, seq, ack, bits, window, _, _ = _TCP.unpack_from(packet, offset)
    header_len = bits >> 12 << 2
    data = offset + header_len
    if header_len < TCP_HEADER_LEN or data > len(packet):
        raise Malformed("TCP data offset")
    plain = Segment(source, destination, seq, ack, bits & 0x3F, window, packet[data:])
    if header_len == TCP_HEADER_LEN:
        return plain
    return _with_options(plain, packet[offset + TCP_HEADER_LEN : data])


def _with_options(segment: Segment, options: bytes) -> Segment:
    at = 0
    while at < len(options) and options[at] != _END:
        kind = options[at]
        if kind == _NOP:
            at += 1
            continue
        if at + 2 > len(options):
            break
        length = options[at + 1]
        value = options[at + 2 : at + length]
        if length < 2 or len(value) != length - 2:
            break
        at += length
        if kind == _SACK and length >= 10 and length % 8 == 2:
            segment = segment._replace(blocks=tuple(_BLOCK.iter_unpack(value)))
        elif kind == _MSS and length == 4:
            segment = segment._replace(mss=int.from_bytes(value, "big"))
        elif kind == _SCALE and length == 3:
            segment = segment._replace(scale=min(value[0], 14))
        elif kind == _SACK_PERMITTED and length == 2:
            segment = segment._replace(sack_permitted=True)
        elif kind == _STAMPS and length == 10:
            segment = segment._replace(stamp=int.from_bytes(value[:4], "big"))
    return segment


def syn_options(mss: int, scale: int | None, sack_permitted: bool) -> bytes:
    """The options of a SYN."""
    options = bytes((_MSS, 4)) + mss.to_bytes(2, "big")
    if sack_permitted:
        options += bytes((_SACK_PERMITTED, 2, _NOP, _NOP))
    if scale is not None:
        options += bytes((_NOP, _SCALE, 3, scale))
    return options


def sack_option(blocks: Blocks) -> bytes:
    """Up to four SACK blocks."""
    if not blocks:
        return b""
    octets = b"".join(_BLOCK.pack(left & MASK, right & MASK) for left, right in blocks[:4])
    return bytes((_NOP, _NOP, _SACK, 2 + len(octets))) + octets


class Run(NamedTuple):
    """What a run of plain segments in order brought; `after` is the index of the packet behind it.

    `acked` counts from the first unacknowledged octet; `window` is the last field as it travelled.
    """

    after: int
    payloads: list[bytes]
    octets: int
    acked: int
    window: int


def read_run(
    packets: Sequence[bytes],
    index: int,
    stop: int,
    nxt: int,
    una: int,
    outstanding: int,
    room: int,
    overhead: int = PACKET_OVERHEAD,
) -> Run | None:
    """Read `packets[index:stop]` as far as they continue one connection's stream without surprises.

    They share one IPv6 header and their ports, carry ACK or ACK and PSH, have the same options in
    the `overhead` of their headers, continue at `nxt` within `room` octets and acknowledge ever
    more of the `outstanding` octets from `una`, pure acknowledgements at least one octet more.
    None if not even the first does.
    """
    packet = packets[index]
    if not _is_whole(packet, overhead):
        return None
    head, size = packet[4:44], len(packet)
    length = size - overhead
    nxt &= MASK
    una &= MASK
    if length and overhead == PACKET_OVERHEAD and stop - index >= FULL_RUN:
        full = _read_full(packets, index, stop, nxt, una, outstanding, room)
        if full is not None:
            return full
    payloads: list[bytes] = []
    acked = octets = window = 0
    begun = index
    plain = overhead - header.HEADER_LEN << 10 | ACK
    options = packet[PACKET_OVERHEAD:overhead]
    while True:
        seq, ack, bits, offered = _FIELDS(packet, 44)
        advance = (ack - una) & MASK
        if seq != nxt or bits & ~PSH != plain or not acked <= advance <= outstanding:
            break
        if length:
            if octets + length > room:
                break
            octets += length
            payloads.append(packet[overhead:])
            nxt = (nxt + length) & MASK
        elif advance == acked:
            break  # a duplicate or a window update
        acked, window = advance, offered
        index += 1
        if index == stop:
            break
        packet = packets[index]
        if packet[4:44] != head or len(packet) != size:
            break
        if options and packet[PACKET_OVERHEAD:overhead] != options:
            break
    return Run(index, payloads, octets, acked, window) if index > begun else None


def _is_whole(packet: bytes, overhead: int) -> bool:
    """Whether it is an IPv6 packet of the length it says, with headers of `overhead` octets."""
    size = len(packet)
    said = int.from_bytes(packet[4:6], "big") + header.HEADER_LEN
    return size >= overhead and packet[0] >> 4 == 6 and size == said


def _read_full(
    packets: Sequence[bytes],
    index: int,
    stop: int,
    nxt: int,
    una: int,
    outstanding: int,
    room: int,
) -> Run | None:
    """The case that nearly all of a download is, in C: full packets up to `stop`, one number
    acknowledged by all; None where it is another.

    The first has been looked at. Two thirds of what the loop costs: 0.3 us a packet, and less where
    they are laid end to end.
    """
    count = stop - index
    if isinstance(packets, Laid):
        length = packets.size - PACKET_OVERHEAD
        parts = _all_apart(length, count)(packets.octets, index * packets.size)
        heads, seqs, acks, bits, windows, payloads = (parts[column::6] for column in range(6))
    else:
        packets = packets[index:stop]
        size = len(packets[0])
        length = size - PACKET_OVERHEAD
        if packets[-1][4:44] != packets[0][4:44] or list(map(len, packets)).count(size) != count:
            return None
        rows = map(_apart(length), packets)
        heads, seqs, acks, bits, windows, payloads = zip(*rows, strict=True)
    octets = count * length
    advance = (acks[0] - una) & MASK
    if (
        octets > room
        or advance > outstanding
        or heads.count(heads[0]) != count
        or seqs != tuple(range(nxt, nxt + octets, length))
        or acks.count(acks[0]) != count
        or bits.count(PLAIN_ACK) + bits.count(PLAIN_ACK | PSH) != count
    ):
        return None
    return Run(index + count, list(payloads), octets, advance, windows[-1])


class Answers(NamedTuple):
    """What a run of pure acknowledgements said; `after` is the index of the packet behind it.

    `acked` and the edges of `blocks`, which lie apart and in order, count from the first
    unacknowledged octet; `window` is the last field as it travelled.
    """

    after: int
    acked: int
    window: int
    blocks: Blocks


def read_answers(
    packets: Sequence[bytes],
    index: int,
    stop: int,
    nxt: int,
    una: int,
    outstanding: int,
    overhead: int,
) -> Answers | None:
    """Read `packets[index:stop]` as far as they are acknowledgements of one connection with SACK
    blocks.

    Several that were there at once are as good as the last of them with all that they selected: a
    peer might have sent that alone. They carry ACK and nothing else at `nxt`, acknowledge no less
    than the one before and select nothing outside the `outstanding` octets from `una`. None if not
    even the first does, or if it says that something came twice (RFC 2883).
    """
    head, options = packets[index][6:44], packets[index][PACKET_OVERHEAD:overhead]
    nxt &= MASK
    una &= MASK
    selected: dict[int, int] = {}
    acked = window = 0
    begun = index
    while index < stop:
        packet = packets[index]
        size = len(packet)
        if packet[6:44] != head:
            break
        if packet[overhead : overhead + 4] != _SACK_STARTS.get(size - overhead):
            break
        if options and packet[PACKET_OVERHEAD:overhead] != options:
            break
        seq, ack, bits, offered = _FIELDS(packet, 44)
        advance = (ack - una) & MASK
        if (
            seq != nxt
            or bits != (size - header.HEADER_LEN << 10 | ACK)
            or int.from_bytes(packet[4:6], "big") != size - header.HEADER_LEN
            or not acked <= advance <= outstanding
        ):
            break
        edges = [
            ((left - una) & MASK, (right - una) & MASK)
            for left, right in _BLOCK.iter_unpack(packet[overhead + 4 :])
        ]
        if not all(advance < left < right <= outstanding for left, right in edges):
            break
        if len(edges) > 1 and edges[1][0] <= edges[0][0] and edges[0][1] <= edges[1][1]:
            break
        for left, right in edges:
            if right > selected.get(left, 0):
                selected[left] = right
        acked, window = advance, offered
        index += 1
    if index == begun:
        return None
    return Answers(index, acked, window, _apart_from(acked, selected))


def _apart_from(acked: int, selected: dict[int, int]) -> Blocks:
    """What is selected beyond `acked`, each octet once."""
    blocks: list[tuple[int, int]] = []
    reach = acked
    for left, right in sorted(selected.items()):
        if right <= reach:
            continue
        if blocks and left <= reach:
            blocks[-1] = blocks[-1][0], right
        else:
            blocks.append((max(left, reach), right))
        reach = right
    return tuple(blocks)


class Template:
    """Builds the packets of one direction of one connection.

    `overhead` is how long the headers of its plain packets are, with the option of `stamp`.
    """

    __slots__ = ("_constant", "_options", "_options_sum", "_tail", "overhead")

    def __init__(self, local: Address, remote: Address) -> None:
        ports = local[1].to_bytes(2, "big") + remote[1].to_bytes(2, "big")
        self._tail = local[0] + remote[0] + ports
        self._constant = (header.total(self._tail) % 65535 << 8) + header.TCP
        self._options = b""
        self._options_sum = 0
        self.overhead = PACKET_OVERHEAD

    def stamp(self, option: bytes) -> None:
        """Every packet from now on carries this option; b"" for none."""
        self._options = option
        self._options_sum = header.total(option) % 65535 << 8
        self.overhead = PACKET_OVERHEAD + len(option)

    def segment(
        self,
        seq: int,
        ack: int,
        flags: int,
        window: int,
        payload: bytes = b"",
        options: bytes = b"",
    ) -> bytes:
        """Any one packet; `options` are whole 32-bit words, `window` is the field as it travels."""
        options = self._options + options
        header_len = TCP_HEADER_LEN + len(options)
        length = header_len + len(payload)
        bits = header_len << 10 | flags
        seq &= MASK
        ack &= MASK
        plain = self._constant + length + seq + ack + bits + window
        sums = header.total(options) + header.total(payload)
        return b"".join(
            (
                _HEADERS.pack(
                    _IP_START.pack(header.VERSION, length, header.TCP, header.HOP_LIMIT)
                    + self._tail,
                    seq,
                    _ACK_PART.pack(ack, bits, window),
                    65535 - (plain + (sums << 8)) % 65535,
                    0,
                ),
                options,
                payload,
            )
        )

    def train(
        self, chunk: bytes, at: int, size: int, count: int, seq: int, ack: int, window: int
    ) -> list[bytes]:
        """`count` packets with `size` octets each out of `chunk` from `at`: ACK and nothing else.

        What every upload goes through: 0.5 us for a full packet.
        """
        seq &= MASK
        ack &= MASK
        if seq + size * count > MODULUS:
            ends = range(at, at + size * count, size)
            return [
                self.segment(seq + end - at, ack, ACK, window, chunk[end : end + size])
                for end in ends
            ]
        options = self._options
        length = self.overhead - header.HEADER_LEN + size
        bits = self.overhead - header.HEADER_LEN << 10 | ACK
        start = _IP_START.pack(header.VERSION, length, header.TCP, header.HOP_LIMIT) + self._tail
        middle = _ACK_PART.pack(ack, bits, window)
        rest = self._constant + length + ack + bits + window + self._options_sum + seq
        columns: list[Iterable[object]] = [
            repeat(start),
            range(seq, seq + size * count, size),
            repeat(middle),
            fields(chunk, at, size, count, rest),
            _slices(size, count)(chunk, at),
        ]
        if options:
            columns.insert(4, repeat(options))
        return list(map(_packet(len(options), size), *columns))

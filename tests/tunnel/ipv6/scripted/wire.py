"""Packets laid out by hand: the second opinion on every octet that the stack reads and writes.

Nothing of the code under test is used here, and sums are taken as RFC 1071 writes them down.
"""

from struct import Struct
from typing import NamedTuple

TCP, UDP, FRAGMENT, ICMPV6, NO_NEXT_HEADER = 6, 17, 44, 58, 59
HOP_BY_HOP, ROUTING, DESTINATION_OPTIONS = 0, 43, 60
FLAGS = "FSRPAUEW"
"""Names of the TCP flags, lowest bit first."""

Address = tuple[bytes, int]

_IP = Struct(">IHBB16s16s")
_TCP = Struct(">HHIIBBHHH")
_UDP = Struct(">HHHH")
_ICMP = Struct(">BBHI")


class Packet(NamedTuple):
    """An IPv6 packet without extension headers."""

    source: bytes
    destination: bytes
    next_header: int
    hop_limit: int
    body: bytes


class Segment(NamedTuple):
    """A TCP segment as it travelled; options by kind."""

    source_port: int
    destination_port: int
    seq: int
    ack: int
    flags: str
    window: int
    urgent: int
    options: dict[int, bytes]
    payload: bytes


def checksum(source: bytes, destination: bytes, protocol: int, octets: bytes) -> int:
    """The Internet checksum under the pseudo-header of RFC 8200 §8.1, word by word."""
    pseudo = source + destination + len(octets).to_bytes(4, "big") + protocol.to_bytes(4, "big")
    whole = pseudo + octets + bytes(len(octets) % 2)
    words: tuple[int, ...] = Struct(f">{len(whole) // 2}H").unpack(whole)
    total = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def ipv6(
    source: bytes, destination: bytes, next_header: int, body: bytes, *, hop_limit: int = 64
) -> bytes:
    """One packet."""
    return _IP.pack(6 << 28, len(body), next_header, hop_limit, source, destination) + body


def read_ipv6(packet: bytes) -> Packet:
    """Take a packet apart; its length must be right."""
    first, length, next_header, hop_limit, source, destination = _IP.unpack_from(packet)
    assert first >> 28 == 6
    assert length == len(packet) - 40
    return Packet(source, destination, next_header, hop_limit, packet[40:])


def tcp(
    local: Address,
    remote: Address,
    flags: str,
    seq: int,
    ack: int,
    window: int,
    *,
    options: bytes = b"",
    payload: bytes = b"",
    urgent: int = 0,
    reserved: int = 0,
) -> bytes:
    """One TCP packet; options are padded with zeros to whole words."""
    options += bytes(-len(options) % 4)
    bits = sum(1 << FLAGS.index(flag) for flag in flags)
    offset = (20 + len(options)) // 4 << 4 | reserved

    def fields(check: int) -> bytes:
        start = (local[1], remote[1], seq & 0xFFFFFFFF, ack & 0xFFFFFFFF)
        return _TCP.pack(*start, offset, bits, window, check, urgent) + options + payload

    check = checksum(local[0], remote[0], TCP, fields(0))
    return ipv6(local[0], remote[0], TCP, fields(check))


def read_tcp(packet: bytes) -> Segment:
    """Take a TCP packet apart; checksum, lengths and reserved bits must be right."""
    ip = read_ipv6(packet)
    assert ip.next_header == TCP
    assert checksum(ip.source, ip.destination, TCP, ip.body) == 0, "TCP checksum"
    source, destination, seq, ack, offset, bits, window, _, urgent = _TCP.unpack_from(ip.body)
    data = offset >> 4 << 2
    assert 20 <= data <= len(ip.body)
    assert not offset & 0x0F, "reserved bits"
    flags = "".join(flag for bit, flag in enumerate(FLAGS) if bits >> bit & 1)
    options = read_options(ip.body[20:data])
    payload = ip.body[data:]
    return Segment(source, destination, seq, ack, flags, window, urgent, options, payload)


def read_options(octets: bytes) -> dict[int, bytes]:
    """TCP options by kind; each may come once and none may be cut off."""
    options: dict[int, bytes] = {}
    at = 0
    while at < len(octets) and octets[at]:
        kind = octets[at]
        if kind == 1:
            at += 1
            continue
        length = octets[at + 1]
        assert 2 <= length <= len(octets) - at
        assert kind not in options
        options[kind] = octets[at + 2 : at + length]
        at += length
    return options


def udp(local: Address, remote: Address, payload: bytes, *, check: int | None = None) -> bytes:
    """One UDP packet; `check` in place of the right checksum."""
    length = 8 + len(payload)
    if check is None:
        blank = _UDP.pack(local[1], remote[1], length, 0) + payload
        check = checksum(local[0], remote[0], UDP, blank) or 0xFFFF
    body = _UDP.pack(local[1], remote[1], length, check) + payload
    return ipv6(local[0], remote[0], UDP, body)


def icmp(source: bytes, destination: bytes, kind: int, code: int, value: int, body: bytes) -> bytes:
    """One ICMPv6 packet; `value` is the second word."""
    blank = _ICMP.pack(kind, code, 0, value) + body
    check = checksum(source, destination, ICMPV6, blank)
    return ipv6(source, destination, ICMPV6, _ICMP.pack(kind, code, check, value) + body)


class Message(NamedTuple):
    """An ICMPv6 message."""

    kind: int
    code: int
    value: int
    body: bytes


def read_icmp(packet: bytes) -> Message:
    """Take an ICMPv6 packet apart; its checksum must be right."""
    ip = read_ipv6(packet)
    assert ip.next_header == ICMPV6
    assert checksum(ip.source, ip.destination, ICMPV6, ip.body) == 0, "ICMPv6 checksum"
    kind, code, _, value = _ICMP.unpack_from(ip.body)
    return Message(kind, code, value, ip.body[8:])

"""UDP datagrams to packets and back (RFC 768, RFC 8200 §8.1)."""

from struct import Struct
from typing import NamedTuple

from builder_orch.tunnel.ipv6 import header
from builder_orch.tunnel.machine import Address, Malformed

UDP_HEADER_LEN = 8
_UDP = Struct(">HHHH")


class Datagram(NamedTuple):
    """What one UDP packet carries."""

    source_port: int
    destination_port: int
    payload: bytes


def emit(local: Address, remote: Address, payload: bytes) -> bytes:
    """One packet."""
    length = UDP_HEADER_LEN + len(payload)
    blank = _UDP.pack(local[1], remote[1], length, 0)
    value = header.checksum(local[0], remote[0], header.UDP, blank + payload)
    datagram = _UDP.pack(local[1], remote[1], length, value) + payload
    return header.emit(local[0], remote[0], header.UDP, datagram)


def parse(packet: bytes, ip: header.Header) -> Datagram:
    """Read a datagram; Malformed when its length or checksum is wrong or its checksum missing."""
    octets = packet[ip.offset :]
    if len(octets) < UDP_HEADER_LEN:
        raise Malformed("shorter than a UDP header")
    source, destination, length, value = _UDP.unpack_from(octets)
    if not UDP_HEADER_LEN <= length <= len(octets):
        raise Malformed("UDP length")
    octets = octets[:length]
    if not value or not header.is_intact(ip.source, ip.destination, header.UDP, octets):
        raise Malformed("UDP checksum")
    return Datagram(source, destination, octets[UDP_HEADER_LEN:])

"""ICMPv6 echo and the errors that end or shrink a connection (RFC 4443)."""

from struct import Struct
from typing import NamedTuple

from builder_orch.tunnel.ipv6 import header
from builder_orch.tunnel.machine import Malformed

DESTINATION_UNREACHABLE = 1
PACKET_TOO_BIG = 2
TIME_EXCEEDED = 3
PARAMETER_PROBLEM = 4
ECHO_REQUEST = 128
ECHO_REPLY = 129
FIRST_INFORMATIONAL = 128

PORT_UNREACHABLE = 4

ICMP_HEADER_LEN = 8
_ICMP = Struct(">BBHI")
_ECHO = Struct(">HH")


class Echo(NamedTuple):
    """A request or a reply."""

    is_request: bool
    identifier: int
    sequence: int
    payload: bytes


class Failure(NamedTuple):
    """An error about a packet of ours, of which `cause` holds the beginning.

    `value` is the MTU of a Packet Too Big, the pointer of a Parameter Problem.
    """

    kind: int
    code: int
    value: int
    cause: bytes


def echo(source: bytes, destination: bytes, message: Echo) -> bytes:
    """One packet with an echo request or reply."""
    kind = ECHO_REQUEST if message.is_request else ECHO_REPLY
    value = int.from_bytes(_ECHO.pack(message.identifier, message.sequence), "big")
    return _emit(source, destination, (kind, 0, value), message.payload)


def failure(source: bytes, destination: bytes, message: Failure) -> bytes:
    """One packet with an error, cut so that it passes everywhere (RFC 4443 §2.4 c)."""
    room = header.MINIMUM_MTU - header.HEADER_LEN - ICMP_HEADER_LEN
    fields = (message.kind, message.code, message.value)
    return _emit(source, destination, fields, message.cause[:room])


def parse(packet: bytes, ip: header.Header) -> Echo | Failure | None:
    """Read a message; None for a kind that is none of ours, Malformed for a wrong checksum."""
    octets = packet[ip.offset :]
    if len(octets) < ICMP_HEADER_LEN:
        raise Malformed("shorter than an ICMPv6 header")
    if not header.is_intact(ip.source, ip.destination, header.ICMPV6, octets):
        raise Malformed("ICMPv6 checksum")
    kind, code, _, value = _ICMP.unpack_from(octets)
    body = octets[ICMP_HEADER_LEN:]
    if kind in (ECHO_REQUEST, ECHO_REPLY) and code == 0:
        return Echo(kind == ECHO_REQUEST, value >> 16, value & 0xFFFF, body)
    if DESTINATION_UNREACHABLE <= kind <= PARAMETER_PROBLEM:
        return Failure(kind, code, value, body)
    return None


def _emit(source: bytes, destination: bytes, fields: tuple[int, int, int], body: bytes) -> bytes:
    kind, code, value = fields
    blank = _ICMP.pack(kind, code, 0, value) + body
    check = header.checksum(source, destination, header.ICMPV6, blank)
    message = _ICMP.pack(kind, code, check, value) + body
    return header.emit(source, destination, header.ICMPV6, message)

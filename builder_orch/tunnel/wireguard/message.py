"""The four WireGuard messages as octets (WireGuard paper, section 5.4).

A handshake message is built as everything before its two MACs; `cookie` appends and checks those,
because a MAC covers octets, not fields. Transport messages have no class: they are sealed and
opened by the train in `session`.
"""

from struct import Struct
from typing import NamedTuple, Self

from builder_orch.tunnel.machine import Malformed

INITIATION = 1
RESPONSE = 2
COOKIE_REPLY = 3
TRANSPORT = 4

MAC_LEN = 16
TAG_LEN = 16
INITIATION_LEN = 148
RESPONSE_LEN = 92
COOKIE_REPLY_LEN = 64
HEADER_LEN = 16
"""Octets before the ciphertext of a transport message."""
TRANSPORT_LEN = HEADER_LEN + TAG_LEN
"""The shortest transport message: a keepalive."""

_LENGTHS = {INITIATION: INITIATION_LEN, RESPONSE: RESPONSE_LEN, COOKIE_REPLY: COOKIE_REPLY_LEN}
_KIND = Struct("<I")
_INITIATION = Struct("<II108s")
_RESPONSE = Struct("<III48s")
_COOKIE_REPLY = Struct("<II24s32s")


def kind_of(octets: bytes | memoryview) -> int:
    """The type of a datagram; Malformed when type, reserved octets or length do not go together."""
    if len(octets) < _KIND.size:
        raise Malformed("short datagram")
    # The three reserved octets are zero, so the type may be read as one little-endian word.
    kind: int = _KIND.unpack_from(octets)[0]
    if kind == TRANSPORT:
        if len(octets) < TRANSPORT_LEN:
            raise Malformed("wrong length")
    elif kind not in _LENGTHS:
        raise Malformed("unknown type")
    elif len(octets) != _LENGTHS[kind]:
        raise Malformed("wrong length")
    return kind


class Initiation(NamedTuple):
    """First message. `noise` is the ephemeral key, the sealed static key and the sealed TAI64N."""

    sender: int
    noise: bytes

    def emit(self) -> bytes:
        """The 116 octets before the MACs."""
        return _INITIATION.pack(INITIATION, self.sender, self.noise)

    @classmethod
    def parse(cls, octets: bytes) -> Self:
        """Read 148 octets; Malformed for anything else."""
        if kind_of(octets) != INITIATION:
            raise Malformed("not an initiation")
        _, sender, noise = _INITIATION.unpack_from(octets)
        return cls(sender, noise)


class Response(NamedTuple):
    """Second message. `noise` is the ephemeral key and the tag of an empty payload."""

    sender: int
    receiver: int
    noise: bytes

    def emit(self) -> bytes:
        """The 60 octets before the MACs."""
        return _RESPONSE.pack(RESPONSE, self.sender, self.receiver, self.noise)

    @classmethod
    def parse(cls, octets: bytes) -> Self:
        """Read 92 octets; Malformed for anything else."""
        if kind_of(octets) != RESPONSE:
            raise Malformed("not a response")
        _, sender, receiver, noise = _RESPONSE.unpack_from(octets)
        return cls(sender, receiver, noise)


class CookieReply(NamedTuple):
    """What a busy responder answers instead: a sealed cookie for the next attempt."""

    receiver: int
    nonce: bytes
    sealed: bytes

    def emit(self) -> bytes:
        """All 64 octets."""
        return _COOKIE_REPLY.pack(COOKIE_REPLY, self.receiver, self.nonce, self.sealed)

    @classmethod
    def parse(cls, octets: bytes) -> Self:
        """Read 64 octets; Malformed for anything else."""
        if kind_of(octets) != COOKIE_REPLY:
            raise Malformed("not a cookie reply")
        _, receiver, nonce, sealed = _COOKIE_REPLY.unpack(octets)
        return cls(receiver, nonce, sealed)

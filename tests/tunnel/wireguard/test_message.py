"""Wire formats: fields come back, and nothing but Malformed comes out of garbage."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder_orch.tunnel.machine import Malformed
from builder_orch.tunnel.wireguard.message import (
    COOKIE_REPLY,
    INITIATION,
    RESPONSE,
    TRANSPORT,
    CookieReply,
    Initiation,
    Response,
    kind_of,
)

INDEX = st.integers(0, 2**32 - 1)
MACS = bytes(32)


@settings(deadline=None)
@given(INDEX, st.binary(min_size=108, max_size=108))
def test_initiation_comes_back(sender: int, noise: bytes) -> None:
    message = Initiation(sender, noise)
    octets = message.emit() + MACS
    assert len(octets) == 148
    assert kind_of(octets) == INITIATION
    assert Initiation.parse(octets) == message


@settings(deadline=None)
@given(INDEX, INDEX, st.binary(min_size=48, max_size=48))
def test_response_comes_back(sender: int, receiver: int, noise: bytes) -> None:
    message = Response(sender, receiver, noise)
    octets = message.emit() + MACS
    assert len(octets) == 92
    assert kind_of(octets) == RESPONSE
    assert Response.parse(octets) == message


@settings(deadline=None)
@given(INDEX, st.binary(min_size=24, max_size=24), st.binary(min_size=32, max_size=32))
def test_cookie_reply_comes_back(receiver: int, nonce: bytes, sealed: bytes) -> None:
    message = CookieReply(receiver, nonce, sealed)
    octets = message.emit()
    assert len(octets) == 64
    assert kind_of(octets) == COOKIE_REPLY
    assert CookieReply.parse(octets) == message


@pytest.mark.parametrize("kind", [INITIATION, RESPONSE, COOKIE_REPLY])
@pytest.mark.parametrize("step", [-1, 1])
def test_every_other_length_is_malformed(kind: int, step: int) -> None:
    length = {INITIATION: 148, RESPONSE: 92, COOKIE_REPLY: 64}[kind]
    octets = bytes([kind, 0, 0, 0]) + bytes(length - 4 + step)
    with pytest.raises(Malformed, match="wrong length"):
        kind_of(octets)


def test_transport_messages_are_at_least_a_header_and_a_tag() -> None:
    assert kind_of(bytes([TRANSPORT]) + bytes(31)) == TRANSPORT
    with pytest.raises(Malformed, match="wrong length"):
        kind_of(bytes([TRANSPORT]) + bytes(30))


@pytest.mark.parametrize("octets", [b"", b"\x01", b"\x04\x00\x00"])
def test_less_than_a_type_is_malformed(octets: bytes) -> None:
    with pytest.raises(Malformed, match="short"):
        kind_of(octets)


@pytest.mark.parametrize("place", [1, 2, 3])
def test_reserved_octets_must_be_zero(place: int) -> None:
    octets = bytearray(bytes([INITIATION]) + bytes(147))
    octets[place] = 1
    with pytest.raises(Malformed, match="unknown type"):
        kind_of(bytes(octets))


SHAPED = st.builds(
    lambda kind, size, rest: (bytes([kind, 0, 0, 0]) + rest).ljust(size, b"\x5a")[:size],
    st.integers(0, 6),
    st.sampled_from([4, 31, 32, 63, 64, 65, 91, 92, 93, 147, 148, 149]),
    st.binary(max_size=60),
)


@settings(max_examples=3500, deadline=None)
@given(st.binary(max_size=60) | SHAPED)
def test_garbage_is_malformed_or_one_of_the_messages(octets: bytes) -> None:
    taken = 0
    for parse in (Initiation.parse, Response.parse, CookieReply.parse):
        try:
            message = parse(octets)
        except Malformed:
            continue
        taken += 1
        emitted = message.emit()
        assert octets.startswith(emitted)
        assert len(octets) - len(emitted) in (0, 32)
    assert taken <= 1

"""UDP octets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder_orch.tunnel.ipv6 import header, udp
from builder_orch.tunnel.machine import Malformed

LOCAL, REMOTE = (bytes(15) + b"\x01", 5353), (bytes(15) + b"\x02", 53)


@given(st.binary(max_size=1500))
def test_a_datagram_comes_back_as_it_was(payload: bytes) -> None:
    packet = udp.emit(LOCAL, REMOTE, payload)
    assert udp.parse(packet, header.parse(packet)) == udp.Datagram(5353, 53, payload)


@pytest.mark.parametrize("at", [40, 46, 47, 48])
def test_a_changed_octet_is_malformed(at: int) -> None:
    packet = bytearray(udp.emit(LOCAL, REMOTE, b"question"))
    packet[at] ^= 1
    with pytest.raises(Malformed):
        udp.parse(bytes(packet), header.parse(bytes(packet)))


def test_a_missing_checksum_is_malformed() -> None:
    packet = udp.emit(LOCAL, REMOTE, b"question")
    bare = packet[:46] + b"\0\0" + packet[48:]
    with pytest.raises(Malformed):
        udp.parse(bare, header.parse(bare))


def test_what_follows_the_datagram_is_cut_off() -> None:
    packet = udp.emit(LOCAL, REMOTE, b"question")
    longer = header.emit(LOCAL[0], REMOTE[0], header.UDP, packet[40:] + b"tail")
    assert udp.parse(longer, header.parse(longer)).payload == b"question"


@pytest.mark.parametrize(
    "datagram", [b"", bytes(7), b"\0\x35\0\x35\0\x07\0\0", b"\0\x35\0\x35\0\x09\0\0"]
)
def test_lengths_that_do_not_fit_are_malformed(datagram: bytes) -> None:
    packet = header.emit(LOCAL[0], REMOTE[0], header.UDP, datagram)
    with pytest.raises(Malformed):
        udp.parse(packet, header.parse(packet))

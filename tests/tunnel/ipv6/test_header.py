"""IPv6 headers and sums."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder_orch.tunnel.ipv6 import header
from builder_orch.tunnel.machine import Malformed, Rejected

SOURCE, DESTINATION = bytes(range(16)), bytes(range(16, 32))


def slow_sum(octets: bytes) -> int:
    """RFC 1071 §4.1, word by word."""
    octets += b"\0" * (len(octets) % 2)
    total = sum(int.from_bytes(octets[i : i + 2], "big") for i in range(0, len(octets), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@given(st.binary(max_size=3000))
def test_folding_keeps_the_sum(octets: bytes) -> None:
    pseudo = SOURCE + DESTINATION + len(octets).to_bytes(4, "big") + bytes((0, 0, 0, 17))
    wanted = 0xFFFF - slow_sum(pseudo + octets)
    assert header.checksum(SOURCE, DESTINATION, 17, octets) == (wanted or 0xFFFF)


@given(st.binary(min_size=2, max_size=200), st.data())
def test_a_changed_octet_is_noticed(octets: bytes, data: st.DataObject) -> None:
    check = header.checksum(SOURCE, DESTINATION, 6, b"\0\0" + octets)
    whole = check.to_bytes(2, "big") + octets
    assert header.is_intact(SOURCE, DESTINATION, 6, whole)
    at = data.draw(st.integers(0, len(whole) - 1))
    flip = data.draw(st.integers(1, 254))  # 255 may turn 0000 into ffff, which is the same number
    changed = bytearray(whole)
    changed[at] ^= flip
    assert not header.is_intact(SOURCE, DESTINATION, 6, bytes(changed))


def test_parse_is_the_inverse_of_emit() -> None:
    packet = header.emit(SOURCE, DESTINATION, header.UDP, b"payload")
    assert header.parse(packet) == header.Header(SOURCE, DESTINATION, header.UDP, 40, 64)


def options(next_header: int, content: bytes = b"\x01\x04\0\0\0\0") -> bytes:
    return bytes((next_header, len(content) // 8)) + content


def test_harmless_extension_headers_are_walked_past() -> None:
    chain = options(header.ROUTING) + options(header.DESTINATION_OPTIONS, bytes((0, 0, 0, 0, 0, 0)))
    chain += options(header.TCP, b"\x1e\x0c" + bytes(12))
    packet = header.emit(SOURCE, DESTINATION, header.HOP_BY_HOP, chain + b"tcp")
    ip = header.parse(packet)
    assert (ip.next_header, packet[ip.offset :]) == (header.TCP, b"tcp")


@pytest.mark.parametrize(
    ("first", "chain"),
    [
        (header.FRAGMENT, bytes(8)),
        (header.NO_NEXT_HEADER, b""),
        (header.ROUTING, options(header.TCP, b"\0\x01\0\0\0\0")),
        (header.HOP_BY_HOP, options(header.TCP, b"\xc2\x04\0\0\0\0")),
        (header.DESTINATION_OPTIONS, options(header.DESTINATION_OPTIONS) * 20),
    ],
    ids=["fragment", "nothing follows", "segments left", "unknown option", "endless"],
)
def test_what_asks_too_much_is_rejected(first: int, chain: bytes) -> None:
    with pytest.raises(Rejected):
        header.parse(header.emit(SOURCE, DESTINATION, first, chain))


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        bytes(39),
        b"\x45" + bytes(39),
        header.emit(SOURCE, DESTINATION, header.TCP, b"x" * 20)[:-1],
        header.emit(SOURCE, DESTINATION, header.HOP_BY_HOP, b"\x06"),
        header.emit(SOURCE, DESTINATION, header.HOP_BY_HOP, b"\x06\xff" + bytes(6)),
        header.emit(SOURCE, DESTINATION, header.HOP_BY_HOP, options(6, b"\x01\x09\0\0\0\0")),
        header.emit(SOURCE, DESTINATION, header.HOP_BY_HOP, options(6, b"\x01\x03\0\0\0\x05")),
        header.emit(SOURCE, DESTINATION, header.ROUTING, options(0, bytes(6)) + options(6)),
    ],
)
def test_what_does_not_add_up_is_malformed(packet: bytes) -> None:
    with pytest.raises(Malformed):
        header.parse(packet)

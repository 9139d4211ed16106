"""ICMPv6 octets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder_orch.tunnel.ipv6 import header, icmp
from builder_orch.tunnel.machine import Malformed

SOURCE, DESTINATION = bytes(15) + b"\x01", bytes(15) + b"\x02"
SHORT = st.integers(0, 0xFFFF)


@given(st.booleans(), SHORT, SHORT, st.binary(max_size=1300))
def test_an_echo_comes_back_as_it_was(
    is_request: bool, identifier: int, sequence: int, payload: bytes
) -> None:
    message = icmp.Echo(is_request, identifier, sequence, payload)
    packet = icmp.echo(SOURCE, DESTINATION, message)
    assert icmp.parse(packet, header.parse(packet)) == message


@given(st.integers(1, 4), st.integers(0, 255), st.integers(0, (1 << 32) - 1), st.binary())
def test_a_failure_comes_back_as_it_was(kind: int, code: int, value: int, cause: bytes) -> None:
    message = icmp.Failure(kind, code, value, cause)
    packet = icmp.failure(SOURCE, DESTINATION, message)
    assert icmp.parse(packet, header.parse(packet)) == message


def test_a_failure_fits_every_link() -> None:
    packet = icmp.failure(SOURCE, DESTINATION, icmp.Failure(1, 4, 0, bytes(5000)))
    assert len(packet) == header.MINIMUM_MTU


def test_other_messages_are_nothing_to_us() -> None:
    body = b"\x87\0\0\0" + bytes(20)
    check = header.checksum(SOURCE, DESTINATION, header.ICMPV6, body)
    body = body[:2] + check.to_bytes(2, "big") + body[4:]
    packet = header.emit(SOURCE, DESTINATION, header.ICMPV6, body)
    assert icmp.parse(packet, header.parse(packet)) is None


@pytest.mark.parametrize("cut", [0, 7, 12])
def test_damage_is_malformed(cut: int) -> None:
    whole = icmp.echo(SOURCE, DESTINATION, icmp.Echo(True, 1, 2, b"ping!"))
    packet = header.emit(SOURCE, DESTINATION, header.ICMPV6, whole[40 : 40 + cut])
    with pytest.raises(Malformed):
        icmp.parse(packet, header.parse(packet))

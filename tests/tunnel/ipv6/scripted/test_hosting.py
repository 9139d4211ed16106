"""The host: UDP, ICMPv6, extension headers, ports and how many strangers may want of it."""

from ipaddress import IPv6Address
from itertools import pairwise
from random import Random

import pytest

from builder_orch.tunnel.ipv6.events import DatagramReceived, EchoReplied, Event, Unreachable
from builder_orch.tunnel.ipv6.stack import BACKLOG, Stack
from tests.tunnel.ipv6.scripted import wire
from tests.tunnel.ipv6.scripted.trace import MTU, PEER, PORT, ROUTER, US

NOW = 500.0
MULTICAST = IPv6Address("ff02::1").packed
UNSPECIFIED = bytes(16)
OURS, THEIRS = (US.packed, 53), (PEER.packed, 4000)


def host() -> Stack:
    """One with UDP port 53 bound and TCP port 80 listening."""
    stack = Stack([US], mtu=MTU, entropy=Random("host").randbytes, capacity=1 << 16)
    stack.bind(53)
    stack.listen(PORT)
    return stack


def tell(stack: Stack, *packets: bytes) -> list[bytes]:
    """What it answers."""
    stack.receive(list(packets), NOW)
    return [packet for train in stack.transmit(NOW) for packet in train]


def is_dropped(packet: bytes) -> bool:
    """No answer, no event, and counted once."""
    stack = host()
    return tell(stack, packet) == [] and stack.events() == [] and stack.drops.total() == 1


def happened(packet: bytes) -> list[Event]:
    """The events that a packet brings to a host that says nothing."""
    stack = host()
    assert tell(stack, packet) == []
    return stack.events()


# -- UDP


@pytest.mark.parametrize("size", [0, 1, 2, 511, 1372])
def test_a_datagram_of_any_size_is_told(size: int) -> None:
    payload = Random(size).randbytes(size)
    (event,) = happened(wire.udp(THEIRS, OURS, payload))
    assert event == DatagramReceived(53, US.packed, THEIRS, payload)


def test_a_datagram_without_checksum_is_dropped() -> None:
    """RFC 8200 §8.1."""
    assert is_dropped(wire.udp(THEIRS, OURS, b"x", check=0))


@pytest.mark.parametrize("check", [1, 0x1234, 0xFFFE])
def test_a_datagram_with_a_wrong_checksum_is_dropped(check: int) -> None:
    assert is_dropped(wire.udp(THEIRS, OURS, b"x", check=check))


def test_a_checksum_that_sums_to_zero_travels_as_ones() -> None:
    """RFC 768; the payload is chosen so that the sum is 0."""
    blank = wire.read_ipv6(wire.udp(THEIRS, OURS, bytes(2))).body
    payload = blank[6:8]
    packet = wire.udp(THEIRS, OURS, payload)
    assert wire.read_ipv6(packet).body[6:8] == b"\xff\xff"
    (event,) = happened(packet)
    assert isinstance(event, DatagramReceived)
    stack = host()
    back = wire.read_ipv6(wire.udp(OURS, THEIRS, bytes(2))).body[6:8]
    stack.send_datagram(53, THEIRS, back)
    (sent,) = tell(stack)
    assert wire.read_ipv6(sent).body[6:8] == b"\xff\xff"


@pytest.mark.parametrize("length", [0, 7, 200])
def test_a_datagram_whose_length_does_not_fit_is_dropped(length: int) -> None:
    packet = bytearray(wire.udp(THEIRS, OURS, b"payload"))
    packet[44:46] = length.to_bytes(2, "big")
    assert is_dropped(bytes(packet))


def test_a_closed_port_is_reported_with_the_packet_itself() -> None:
    """RFC 4443 §3.1: code 4, as much of the packet as fits 1280 octets."""
    packet = wire.udp(THEIRS, (US.packed, 9), b"anyone?")
    (answer,) = tell(host(), packet)
    ip, got = wire.read_ipv6(answer), wire.read_icmp(answer)
    assert (ip.source, ip.destination) == (US.packed, PEER.packed)
    assert got == wire.Message(1, 4, 0, packet)


def test_a_report_is_never_longer_than_the_smallest_link() -> None:
    packet = wire.udp(THEIRS, (US.packed, 9), bytes(1372))
    (answer,) = tell(host(), packet)
    assert len(answer) == 1280
    assert wire.read_icmp(answer).body == packet[: 1280 - 48]


def test_reports_are_limited() -> None:
    """RFC 4443 §2.4 (f)."""
    packet = wire.udp(THEIRS, (US.packed, 9), b"anyone?")
    answers = tell(host(), *[packet] * 5000)
    assert 1 <= len(answers) < 1000


@pytest.mark.parametrize("code", [0, 1, 3, 4])
def test_an_error_about_our_datagram_is_told(code: int) -> None:
    cause = wire.udp(OURS, THEIRS, b"sent")
    (event,) = happened(wire.icmp(ROUTER.packed, US.packed, 1, code, 0, cause))
    assert event == Unreachable(THEIRS, 53, 1, code)


@pytest.mark.parametrize(
    "cause",
    [
        wire.udp((US.packed, 54), THEIRS, b"a port that is not bound"),
        wire.udp((PEER.packed, 53), THEIRS, b"not our address"),
        wire.ipv6(US.packed, PEER.packed, 132, bytes(40)),
        b"",
    ],
)
def test_an_error_about_what_we_did_not_send_is_dropped(cause: bytes) -> None:
    assert is_dropped(wire.icmp(ROUTER.packed, US.packed, 1, 4, 0, cause))


# -- ICMPv6


@pytest.mark.parametrize("size", [0, 1, 56, 1372])
def test_an_echo_is_returned_as_it_came(size: int) -> None:
    """RFC 4443 §4.2."""
    body = Random(size).randbytes(size)
    (answer,) = tell(host(), wire.icmp(PEER.packed, US.packed, 128, 0, 0x00070009, body))
    ip = wire.read_ipv6(answer)
    assert (ip.source, ip.destination) == (US.packed, PEER.packed)
    assert wire.read_icmp(answer) == wire.Message(129, 0, 0x00070009, body)


def test_a_ping_of_ours_is_a_proper_request_and_its_answer_is_told() -> None:
    stack = host()
    stack.ping(PEER.packed, 7, 9, b"body")
    (sent,) = tell(stack)
    assert wire.read_icmp(sent) == wire.Message(128, 0, 0x00070009, b"body")
    tell(stack, wire.icmp(PEER.packed, US.packed, 129, 0, 0x00070009, b"body"))
    assert stack.events() == [EchoReplied(PEER.packed, 7, 9, b"body")]


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (128, 1),
        (130, 0),
        (133, 0),
        (134, 0),
        (135, 0),
        (137, 0),
        (200, 0),
        (255, 0),
        (0, 0),
        (99, 0),
    ],
)
def test_messages_that_are_none_of_ours_get_no_answer(kind: int, code: int) -> None:
    """RFC 4443 §2.4 (b): unknown informational ones are discarded silently."""
    assert is_dropped(wire.icmp(PEER.packed, US.packed, kind, code, 0, bytes(32)))


@pytest.mark.parametrize("kind", [1, 2, 3, 4, 100, 127])
def test_an_error_about_an_error_is_never_answered(kind: int) -> None:
    """RFC 4443 §2.4 (e.1)."""
    cause = wire.icmp(US.packed, PEER.packed, 1, 4, 0, bytes(48))
    assert is_dropped(wire.icmp(PEER.packed, US.packed, kind, 0, 1300, cause))


@pytest.mark.parametrize("cut", [1, 4, 7])
def test_a_message_that_is_cut_off_is_dropped(cut: int) -> None:
    assert is_dropped(wire.ipv6(PEER.packed, US.packed, wire.ICMPV6, bytes(cut)))


def test_an_echo_with_a_wrong_checksum_is_dropped() -> None:
    packet = bytearray(wire.icmp(PEER.packed, US.packed, 128, 0, 1, b"body"))
    packet[-1] ^= 1
    assert is_dropped(bytes(packet))


# -- addresses

KINDS = {
    "UDP": lambda source, to: wire.udp((source, 4000), (to, 9), b"x"),
    "TCP": lambda source, to: wire.tcp((source, 4000), (to, 9), "S", 0, 0, 1000),
    "echo": lambda source, to: wire.icmp(source, to, 128, 0, 1, b"x"),
}
of_every_kind = pytest.mark.parametrize("kind", KINDS)


@of_every_kind
def test_nothing_is_said_to_what_was_sent_to_many(kind: str) -> None:
    """RFC 4443 §2.4 (e.3)."""
    assert is_dropped(KINDS[kind](PEER.packed, MULTICAST))


@of_every_kind
def test_nothing_is_said_to_a_group(kind: str) -> None:
    """RFC 4443 §2.4 (e.6); RFC 9293 §3.9.2.3: a SYN from one is discarded (MUST-63)."""
    assert is_dropped(KINDS[kind](MULTICAST, US.packed))


@of_every_kind
def test_nothing_is_said_to_nobody(kind: str) -> None:
    assert is_dropped(KINDS[kind](UNSPECIFIED, US.packed))


@of_every_kind
def test_what_claims_to_come_from_us_is_dropped(kind: str) -> None:
    """Land."""
    assert is_dropped(KINDS[kind](US.packed, US.packed))


@of_every_kind
def test_what_is_for_somebody_else_is_dropped(kind: str) -> None:
    assert is_dropped(KINDS[kind](PEER.packed, ROUTER.packed))


# -- headers


def behind(*headers: tuple[int, bytes]) -> bytes:
    """A good datagram behind extension headers, each a kind and what follows its kind octet."""
    datagram = wire.read_ipv6(wire.udp(THEIRS, OURS, b"inside")).body
    kinds = [kind for kind, _ in headers] + [wire.UDP]
    octets = b"".join(bytes((kinds[at + 1],)) + rest for at, (_, rest) in enumerate(headers))
    return wire.ipv6(PEER.packed, US.packed, kinds[0], octets + datagram)


PADDING = b"\x00\x01\x04\x00\x00\x00\x00"
"""Length 0, then PadN with four zeros."""
SKIPPED = b"\x00\x1e\x04\x00\x00\x00\x00"
"""An unknown option that asks to be skipped."""


@pytest.mark.parametrize(
    "headers",
    [
        [(wire.HOP_BY_HOP, PADDING)],
        [(wire.DESTINATION_OPTIONS, PADDING)],
        [(wire.HOP_BY_HOP, PADDING), (wire.DESTINATION_OPTIONS, PADDING)],
        [(wire.DESTINATION_OPTIONS, PADDING), (wire.DESTINATION_OPTIONS, PADDING)],
        [(wire.DESTINATION_OPTIONS, SKIPPED)],
        [(wire.HOP_BY_HOP, b"\x01\x01\x0c" + bytes(12))],
        [(wire.HOP_BY_HOP, bytes(7))],
        [(wire.ROUTING, b"\x00\x00\x00\x00\x00\x00\x00")],
        [(wire.ROUTING, b"\x00\xfd\x00\x00\x00\x00\x00")],
    ],
)
def test_what_lies_behind_harmless_headers_is_taken(headers: list[tuple[int, bytes]]) -> None:
    """RFC 8200 §4."""
    (event,) = happened(behind(*headers))
    assert isinstance(event, DatagramReceived)
    assert event.payload == b"inside"


@pytest.mark.parametrize(
    "packet",
    [
        behind((wire.DESTINATION_OPTIONS, b"\x00\x5e\x04\x00\x00\x00\x00")),
        behind((wire.DESTINATION_OPTIONS, PADDING), (wire.HOP_BY_HOP, PADDING)),
        behind((wire.ROUTING, b"\x00\x00\x01\x00\x00\x00\x00")),
        behind((wire.DESTINATION_OPTIONS, b"\xff" + PADDING[1:])),
        behind((wire.DESTINATION_OPTIONS, b"\x00\x01\x09\x00\x00\x00\x00")),
        behind(*[(wire.DESTINATION_OPTIONS, PADDING)] * 40),
        wire.ipv6(PEER.packed, US.packed, wire.NO_NEXT_HEADER, b"whatever"),
        wire.ipv6(PEER.packed, US.packed, wire.HOP_BY_HOP, b"\x11\x00"),
        wire.ipv6(PEER.packed, US.packed, wire.DESTINATION_OPTIONS, b""),
    ],
    ids=[
        "option to discard",
        "hop-by-hop not first",
        "route to follow",
        "longer than the packet",
        "option longer than its header",
        "too many",
        "no next header",
        "cut off",
        "empty",
    ],
)
def test_headers_that_ask_too_much_are_dropped(packet: bytes) -> None:
    assert is_dropped(packet)


@pytest.mark.parametrize("bits", [0x0000, 0x0001, 0x0008, 0x0009, 0xFFF8, 0xFFF9])
def test_fragments_are_dropped_and_counted(bits: int) -> None:
    """None are reassembled here, be they first, later, last or all of it (bits 0)."""
    rest = b"\x00" + bits.to_bytes(2, "big") + b"\x00\x00\x00\x07"
    stack = host()
    assert tell(stack, behind((wire.FRAGMENT, rest))) == []
    assert stack.events() == []
    (reason,) = stack.drops
    assert "fragment" in reason


@pytest.mark.parametrize(
    "packet",
    [
        behind((wire.DESTINATION_OPTIONS, b"\x00\x9e\x04\x00\x00\x00\x00")),
        behind((wire.DESTINATION_OPTIONS, b"\x00\xde\x04\x00\x00\x00\x00")),
        behind((wire.ROUTING, b"\x00\xfd\x01\x00\x00\x00\x00")),
        wire.ipv6(PEER.packed, US.packed, 132, bytes(16)),
    ],
    ids=["option 10", "option 11", "unknown route", "unknown protocol"],
)
def test_what_was_not_understood_is_counted_and_not_reported(packet: bytes) -> None:
    """RFC 8200 §4.2 asks for a Parameter Problem; inside a tunnel it would only help a prober."""
    stack = host()
    assert tell(stack, packet) == []
    assert sum(stack.drops.values()) == 1


@pytest.mark.parametrize("hop_limit", [0, 1, 255])
def test_any_hop_limit_will_do_for_who_has_arrived(hop_limit: int) -> None:
    """RFC 8200 §3: a destination does not discard for it."""
    body = wire.read_ipv6(wire.udp(THEIRS, OURS, b"far")).body
    packet = wire.ipv6(PEER.packed, US.packed, wire.UDP, body, hop_limit=hop_limit)
    assert len(happened(packet)) == 1


@of_every_kind
def test_everything_we_send_can_go_far(kind: str) -> None:
    (answer,) = tell(host(), KINDS[kind](PEER.packed, US.packed))
    assert wire.read_ipv6(answer).hop_limit >= 64


@pytest.mark.parametrize(
    "packet",
    [b"", b"\x60", bytes(39), bytes(40), b"\x45" + bytes(60), b"\x70" + bytes(60)],
    ids=["nothing", "an octet", "39", "version 0", "version 4", "version 7"],
)
def test_what_is_no_ipv6_is_dropped(packet: bytes) -> None:
    assert is_dropped(packet)


@pytest.mark.parametrize("change", [-1, 1, 100])
def test_a_length_that_does_not_fit_is_dropped(change: int) -> None:
    packet = bytearray(wire.udp(THEIRS, OURS, b"payload"))
    packet[4:6] = (len(packet) - 40 + change).to_bytes(2, "big")
    assert is_dropped(bytes(packet))


@pytest.mark.parametrize("cut", [0, 10, 19])
def test_a_segment_that_is_cut_off_is_dropped(cut: int) -> None:
    body = wire.read_ipv6(wire.tcp(THEIRS, (US.packed, PORT), "S", 0, 0, 1000)).body
    assert is_dropped(wire.ipv6(PEER.packed, US.packed, wire.TCP, body[:cut]))


# -- ports and crowds


def syn(port: int) -> bytes:
    """From the peer's `port` to where somebody listens."""
    return wire.tcp((PEER.packed, port), (US.packed, PORT), "S", 77, 0, 1000)


def test_a_flood_of_syns_is_bounded_and_answered_in_part() -> None:
    """What is beyond the backlog is dropped in silence, not reset: the peer tries again."""
    answers = tell(host(), *[syn(1 + n) for n in range(BACKLOG + 500)])
    assert 1 <= len(answers) <= BACKLOG
    assert {wire.read_tcp(answer).flags for answer in answers} == {"SA"}


def test_a_flood_leaves_room_again_when_it_is_over() -> None:
    stack = host()
    tell(stack, *[syn(1 + n) for n in range(BACKLOG)])
    assert tell(stack, syn(60_000)) == []
    reset = wire.tcp((PEER.packed, 1), (US.packed, PORT), "R", 78, 0, 0)
    tell(stack, reset)
    (answer,) = tell(stack, syn(60_000))
    assert wire.read_tcp(answer).flags == "SA"


def test_the_same_name_is_one_connection() -> None:
    answers = tell(host(), *[syn(4000)] * 5)
    assert len({wire.read_tcp(answer).seq for answer in answers}) == 1


def test_connections_are_told_apart_by_all_four_names() -> None:
    stack = host()
    other = wire.tcp((ROUTER.packed, 4000), (US.packed, PORT), "S", 77, 0, 1000)
    answers = [wire.read_tcp(packet) for packet in tell(stack, syn(4000), syn(4001), other)]
    assert len({answer.seq for answer in answers}) == 3


def test_ports_of_attempts_are_ephemeral_and_never_the_same() -> None:
    """RFC 6335 §6 allows 49152 up; RFC 6056 §3.2 asks for as many as possible above 1023."""
    stack = host()
    ports = [stack.connect((PEER.packed, 443), NOW).local[1] for _ in range(1000)]
    assert len(set(ports)) == 1000
    assert min(ports) > 1023
    assert sum(abs(b - a) == 1 for a, b in pairwise(ports)) < 50


def test_initial_numbers_of_two_names_are_unrelated_and_of_one_name_grow() -> None:
    """RFC 6528 §3; a tick is 4 us."""

    def first(at: float, port: int) -> int:
        stack = host()
        stack.receive([syn(port)], at)
        ((answer,),) = stack.transmit(at)
        return wire.read_tcp(answer).seq

    assert len({first(NOW, port) >> 16 for port in range(1, 40)}) > 30
    assert (first(NOW + 1, 9) - first(NOW, 9)) % (1 << 32) == 250_000


def test_a_refused_syn_costs_nothing() -> None:
    stack = host()
    packet = wire.tcp(THEIRS, (US.packed, 81), "S", 5, 0, 1000)
    (answer,) = tell(stack, packet)
    got = wire.read_tcp(answer)
    assert (got.flags, got.seq, got.ack) == ("RA", 0, 6)
    assert stack.deadline() is None


def test_refusals_are_limited() -> None:
    packet = wire.tcp(THEIRS, (US.packed, 81), "S", 5, 0, 1000)
    assert 1 <= len(tell(host(), *[packet] * 5000)) < 1000

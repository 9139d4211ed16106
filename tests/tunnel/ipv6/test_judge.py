"""scapy as an outside judge of our octets, both ways."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from builder_orch.tunnel.ipv6 import header, icmp, segment, udp
from builder_orch.tunnel.ipv6.segment import ACK, FIN, PSH, SYN, Template

LOCAL, REMOTE = (
    (bytes.fromhex("fd00" + "00" * 13 + "01"), 50_000),
    (
        bytes.fromhex("fd00" + "00" * 13 + "02"),
        443,
    ),
)
NAMES = {"src": "fd00::1", "dst": "fd00::2"}


@pytest.fixture(scope="module")
def scapy() -> Any:
    """Imported late, and with its warnings put aside: they are not about us."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from scapy.layers import inet, inet6
        from scapy.packet import Raw
    return SimpleNamespace(
        IPv6=inet6.IPv6,
        TCP=inet.TCP,
        UDP=inet.UDP,
        Raw=Raw,
        EchoRequest=inet6.ICMPv6EchoRequest,
        EchoReply=inet6.ICMPv6EchoReply,
        Unreachable=inet6.ICMPv6DestUnreach,
        TooBig=inet6.ICMPv6PacketTooBig,
        HopByHop=inet6.IPv6ExtHdrHopByHop,
        Destination=inet6.IPv6ExtHdrDestOpt,
    )


def rebuilt(scapy: Any, packet: bytes, layer: Any, field: str) -> bytes:
    """What scapy makes of a packet when it has to work out lengths and checksum by itself."""
    read = scapy.IPv6(packet)
    assert (read.src, read.dst, read.version, read.hlim) == ("fd00::1", "fd00::2", 6, 64)
    del read.plen
    delattr(read[layer], field)
    if layer is scapy.UDP:
        del read[layer].len
    if layer is scapy.TCP:
        del read[layer].dataofs
    return bytes(read)


SYN_OPTIONS = segment.syn_options(1360, 7, True)
SACK = segment.sack_option(((100, 200), (300, 400), (500, 600)))


@pytest.mark.parametrize(
    ("flags", "options", "payload"),
    [
        (SYN, SYN_OPTIONS, b""),
        (SYN | ACK, SYN_OPTIONS, b""),
        (ACK, b"", b""),
        (ACK, SACK, b""),
        (ACK | PSH, b"", b"odd"),
        (ACK | FIN, SACK, bytes(range(256)) * 5),
    ],
)
def test_scapy_reads_our_segments(scapy: Any, flags: int, options: bytes, payload: bytes) -> None:
    packet = Template(LOCAL, REMOTE).segment(0xFFFFFFF0, 0x80000001, flags, 4321, payload, options)
    tcp = scapy.IPv6(packet)[scapy.TCP]
    assert (tcp.sport, tcp.dport, tcp.seq, tcp.ack) == (50_000, 443, 0xFFFFFFF0, 0x80000001)
    assert (int(tcp.flags), tcp.window, bytes(tcp.payload)) == (flags, 4321, payload)
    said = dict(tcp.options)
    if options == SYN_OPTIONS:
        assert (said["MSS"], said["WScale"], said["SAckOK"]) == (1360, 7, b"")
    if options == SACK:
        assert said["SAck"] == (100, 200, 300, 400, 500, 600)
    assert rebuilt(scapy, packet, scapy.TCP, "chksum") == packet


def test_scapy_agrees_with_every_checksum_of_a_train(scapy: Any) -> None:
    chunk = bytes(i * i % 251 for i in range(20_000))
    for packet in Template(LOCAL, REMOTE).train(chunk, 3, 1360, 14, 0xFFFF0000, 77, 5000):
        assert rebuilt(scapy, packet, scapy.TCP, "chksum") == packet


def test_we_read_scapys_segments(scapy: Any) -> None:
    options = [
        ("MSS", 1234),
        ("SAckOK", b""),
        ("Timestamp", (123, 456)),
        ("NOP", None),
        ("WScale", 9),
        ("SAck", (10, 20, 30, 40)),
    ]
    made = scapy.TCP(sport=50_000, dport=443, seq=5, ack=6, flags="SA", window=7, options=options)
    packet = bytes(scapy.IPv6(**NAMES) / made / scapy.Raw(b"data"))
    ip = header.parse(packet)
    assert header.is_intact(ip.source, ip.destination, header.TCP, packet[ip.offset :])
    got = segment.parse(packet, ip.offset)
    assert got == segment.Segment(
        50_000, 443, 5, 6, SYN | ACK, 7, b"data", 1234, 9, True, ((10, 20), (30, 40)), 123
    )


@pytest.mark.parametrize("payload", [b"", b"x", b"question", bytes(1300)])
def test_datagrams_are_read_both_ways(scapy: Any, payload: bytes) -> None:
    packet = udp.emit(LOCAL, REMOTE, payload)
    assert bytes(scapy.IPv6(packet)[scapy.UDP].payload) == payload
    assert rebuilt(scapy, packet, scapy.UDP, "chksum") == packet
    theirs = bytes(scapy.IPv6(**NAMES) / scapy.UDP(sport=50_000, dport=443) / payload)
    assert theirs == packet
    assert udp.parse(theirs, header.parse(theirs)) == udp.Datagram(50_000, 443, payload)


def test_echoes_are_read_both_ways(scapy: Any) -> None:
    for kind, is_request in ((scapy.EchoRequest, True), (scapy.EchoReply, False)):
        theirs = bytes(scapy.IPv6(**NAMES) / kind(id=7, seq=9, data=b"ping pong"))
        message = icmp.Echo(is_request, 7, 9, b"ping pong")
        assert icmp.parse(theirs, header.parse(theirs)) == message
        assert icmp.echo(LOCAL[0], REMOTE[0], message) == theirs


def test_errors_are_read_both_ways(scapy: Any) -> None:
    cause = Template(REMOTE, LOCAL).segment(1, 2, ACK, 3, b"data")
    for made, message in (
        (scapy.Unreachable(code=4), icmp.Failure(1, 4, 0, cause)),
        (scapy.TooBig(mtu=1300), icmp.Failure(2, 0, 1300, cause)),
    ):
        theirs = bytes(scapy.IPv6(**NAMES) / made / scapy.Raw(cause))
        assert icmp.parse(theirs, header.parse(theirs)) == message
        assert icmp.failure(LOCAL[0], REMOTE[0], message) == theirs


def test_extension_headers_by_scapy_are_walked_past(scapy: Any) -> None:
    packet = bytes(
        scapy.IPv6(**NAMES)
        / scapy.HopByHop()
        / scapy.Destination()
        / scapy.UDP(sport=50_000, dport=443)
        / b"inside"
    )
    ip = header.parse(packet)
    assert ip.next_header == header.UDP
    assert udp.parse(packet, ip).payload == b"inside"

"""The host: ports, TIME-WAIT, UDP, ICMPv6, and many connections."""

from collections import Counter
from ipaddress import IPv6Address

import pytest

from builder_orch.tunnel.ipv6 import header, icmp, segment, udp
from builder_orch.tunnel.ipv6.events import (
    DatagramReceived,
    EchoReplied,
    Opened,
    Unreachable,
)
from builder_orch.tunnel.ipv6.segment import ACK, FIN, RST, SYN, Template
from builder_orch.tunnel.ipv6.stack import ANSWERS_PER_SECOND, BACKLOG, FIRST_EPHEMERAL, Stack
from builder_orch.tunnel.ipv6.state import End, State
from tests.sim import Weather
from tests.tunnel.ipv6.script import Script, is_in
from tests.tunnel.ipv6.world import LEFT, PORT, RIGHT, ROUTER, World, stack

CLEAR = Weather(delay_s=0.01)


def test_the_most_of_a_listener_can_be_left_open() -> None:
    ours = stack(LEFT)
    other = IPv6Address("fd00::99")
    ours.add_address(other)
    theirs = RIGHT.packed

    def answer(to: IPv6Address, port: int, source_port: int) -> int:
        packet = Template((theirs, source_port), (to.packed, port)).segment(0, 0, SYN, 1000)
        ours.receive([packet], 0.0)
        ((reply,),) = ours.transmit(0.0)
        return segment.parse(reply).flags

    assert answer(LEFT, 80, 1) == RST | ACK
    ours.listen(80, other)
    assert answer(LEFT, 80, 2) == RST | ACK
    assert answer(other, 80, 3) == SYN | ACK
    ours.listen(None, LEFT)
    assert answer(LEFT, 12_345, 4) == SYN | ACK
    ours.unlisten(None, LEFT)
    ours.unlisten(80, other)
    ours.listen(443)
    assert answer(other, 80, 5) == RST | ACK
    assert answer(other, 443, 6) == SYN | ACK


def test_a_segment_for_nobody_is_reset_by_the_rules() -> None:
    script = Script()
    script.ports = (PORT, 40_000)
    (reset,) = script.send(ACK, 5, 77)
    assert (reset.flags, reset.seq) == (RST, 77)
    (reset,) = script.send(SYN | FIN, 5, payload=b"abc")
    assert (reset.flags, reset.seq, reset.ack) == (RST | ACK, 0, 10)
    assert script.send(RST, 5) == []


def test_strangers_get_only_so_many_answers_a_second() -> None:
    script = Script()
    script.ports = (PORT, 40_000)
    answers = sum(len(script.send(ACK, 5, 77)) for _ in range(ANSWERS_PER_SECOND * 2))
    assert answers == ANSWERS_PER_SECOND


def test_half_open_connections_are_bounded_and_come_back() -> None:
    ours = stack(LEFT)
    ours.listen(PORT)
    for port in range(1, BACKLOG + 100):
        template = Template((RIGHT.packed, port), (LEFT.packed, PORT))
        ours.receive([template.segment(0, 0, SYN, 1000)], 0.0)
    assert ours.drops["rejected: too many connections"] == 99
    assert sum(map(len, ours.transmit(0.0))) == BACKLOG
    now = 0.0
    while (at := ours.deadline()) is not None:
        now = at
        ours.transmit(now)
    template = Template((RIGHT.packed, 1), (LEFT.packed, PORT))
    ours.receive([template.segment(0, 0, SYN, 1000)], now)
    assert len(ours.transmit(now)) == 1


def test_ports_and_initial_numbers_cannot_be_guessed() -> None:
    ours = stack(LEFT)
    made = [ours.connect((RIGHT.packed, 80), 1.0) for _ in range(300)]
    ports = [connection.local[1] for connection in made]
    assert len(set(ports)) == 300
    assert min(ports) >= FIRST_EPHEMERAL
    assert len({port >> 9 for port in ports}) > 50  # spread over all of 64 parts
    numbers = [connection.sender.una for connection in made]
    assert len({number >> 24 for number in numbers}) > 150


def test_the_same_name_gets_a_higher_initial_number_later() -> None:
    early = stack(LEFT).connect((RIGHT.packed, 80), 10.0).sender.una
    for seconds in (0.001, 1.0, 100.0):
        second = stack(LEFT)  # the same secret, and the same port
        late = second.connect((RIGHT.packed, 80), 10.0 + seconds).sender.una
        assert (late - early) % (1 << 32) == int(seconds * 250_000)
    other = stack(LEFT, seed=1).connect((RIGHT.packed, 80), 10.0).sender.una
    assert other != early


def test_when_all_ports_are_taken_connecting_fails() -> None:
    ours = stack(LEFT)
    for port in range(FIRST_EPHEMERAL, 65_536):
        ours.bind(port)
    with pytest.raises(OSError, match="UDP"):
        ours.bind(None)
    with pytest.raises(OSError, match="UDP"):
        ours.bind(FIRST_EPHEMERAL)
    ours.unbind(40_000)
    assert ours.bind(None) == 40_000


# -- TIME-WAIT


def waiting() -> Script:
    """Both ways closed, ours first; 1 octet came, 1 went."""
    script = Script()
    connection = script.connect()
    connection.write(b"x")
    connection.close()
    script.out()
    script.send(ACK, 1, 3)
    script.send(FIN | ACK, 1, 3, b"y")
    assert is_in(connection, State.TIME_WAIT)
    return script


def test_a_repeated_fin_is_acknowledged_and_starts_the_wait_anew() -> None:
    script = waiting()
    script.now += 50
    (ack,) = script.send(FIN | ACK, 2, 3)
    assert (ack.flags, ack.seq, ack.ack) == (ACK, 3, 3)
    script.now += 50
    (ack,) = script.send(FIN | ACK, 2, 3)
    script.now += 61
    script.out()
    assert script.stack.deadline() is None
    assert script.send(FIN | ACK, 2, 3)[0].flags == RST


def test_a_reset_does_not_end_the_wait() -> None:
    script = waiting()
    assert script.send(RST, 3) == []
    assert script.send(FIN | ACK, 2, 3)[0].flags == ACK


def test_a_new_syn_ends_the_wait_and_an_old_one_does_not() -> None:
    script = waiting()
    script.stack.listen(None)
    (ack,) = script.send(SYN, 1)
    assert ack.flags == ACK
    (answer,) = script.send(SYN, 1000)
    assert answer.flags == SYN | ACK


def test_a_plain_acknowledgement_in_the_wait_needs_no_answer() -> None:
    script = waiting()
    assert script.send(ACK, 3, 3) == []
    assert script.send(ACK, 9, 3, b"data")[0].flags == ACK


def test_ports_in_the_wait_are_not_used_again() -> None:
    script = waiting()
    port = script.ports[0]
    used = [script.stack.connect((RIGHT.packed, PORT), script.now).local[1] for _ in range(2000)]
    assert port not in used


def test_a_port_that_the_peer_may_wait_for_is_not_used_again_until_that_is_over() -> None:
    """It closed first, so the wait is there; what we sent has outrun the clock of our numbers."""
    client = Stack([LEFT], mtu=1420, entropy=bytes)  # always the first port that is free
    world = World(CLEAR, client=client)
    ours, theirs = world.established()
    ours.write(bytes(100_000))
    world.run(lambda: not ours.sender.holds_data, limit_s=5)
    theirs.read(1 << 20)
    theirs.close()
    world.run(lambda: ours.at_eof, limit_s=5)
    ours.close()
    world.run(lambda: bool(ours.end), limit_s=5)
    next_one, _ = world.established()
    assert (ours.local[1], next_one.local[1]) == (FIRST_EPHEMERAL, FIRST_EPHEMERAL + 1)
    world.run_for(61)
    later, _ = world.established()
    assert later.local[1] == FIRST_EPHEMERAL


# -- UDP and ICMPv6


def test_datagrams_go_both_ways() -> None:
    world = World(CLEAR)
    port = world.client.bind(None)
    world.server.bind(53)
    world.client.send_datagram(port, (RIGHT.packed, 53), b"question")
    world.run_for(0.1)
    (got,) = world.seen(DatagramReceived)
    assert got == DatagramReceived(53, RIGHT.packed, (LEFT.packed, port), b"question")
    world.server.send_datagram(53, (LEFT.packed, port), b"answer")
    world.run_for(0.1)
    assert world.events[-1] == DatagramReceived(port, LEFT.packed, (RIGHT.packed, 53), b"answer")


def test_a_datagram_to_a_closed_port_comes_back_as_an_error() -> None:
    world = World(CLEAR)
    port = world.client.bind(None)
    world.client.send_datagram(port, (RIGHT.packed, 9), b"anyone?")
    world.run_for(0.1)
    assert world.events == [Unreachable((RIGHT.packed, 9), port, 1, 4)]


def test_a_datagram_must_fit() -> None:
    with pytest.raises(ValueError, match="fit"):
        stack(LEFT).send_datagram(1, (RIGHT.packed, 9), bytes(1373))
    stack(LEFT).send_datagram(1, (RIGHT.packed, 9), bytes(1372))


def test_a_ping_is_answered_with_what_it_said() -> None:
    world = World(CLEAR)
    world.client.ping(RIGHT.packed, 7, 9, b"round trip")
    world.run_for(0.1)
    assert world.events == [EchoReplied(RIGHT.packed, 7, 9, b"round trip")]


def test_events_of_strangers_are_bounded() -> None:
    ours = stack(LEFT)
    ours.bind(53)
    packet = udp.emit((RIGHT.packed, 9), (LEFT.packed, 53), b"x")
    ours.receive([packet] * 5000, 0.0)
    kinds = Counter(type(event) for event in ours.events())
    assert kinds[DatagramReceived] < 5000
    assert ours.drops["rejected: datagram queue is full"] == 5000 - kinds[DatagramReceived]


@pytest.mark.parametrize(
    ("code", "end"), [(0, End.UNREACHABLE), (3, End.UNREACHABLE), (4, End.REFUSED)]
)
def test_an_unreachable_destination_ends_an_attempt(code: int, end: End) -> None:
    script = Script()
    connection = script.stack.connect((RIGHT.packed, PORT), script.now)
    ((syn,),) = script.stack.transmit(script.now)
    forged = syn[:44] + b"\0\0\0\0" + syn[48:]
    for cause in (forged, syn):
        assert connection.end is None
        failure = icmp.Failure(icmp.DESTINATION_UNREACHABLE, code, 0, cause)
        script.stack.receive([icmp.failure(RIGHT.packed, LEFT.packed, failure)], script.now)
    assert connection.end is end


def test_an_established_connection_outlives_unreachable_messages() -> None:
    script = Script()
    connection = script.connect()
    connection.write(b"data")
    ((packet,),) = script.stack.transmit(script.now)
    failure = icmp.Failure(icmp.DESTINATION_UNREACHABLE, 0, 0, packet)
    script.stack.receive([icmp.failure(RIGHT.packed, LEFT.packed, failure)], script.now)
    assert connection.end is None


@pytest.mark.parametrize(("mtu", "size"), [(1380, 1320), (1280, 1220), (576, 1360), (9000, 1360)])
def test_packet_too_big_lowers_the_size_and_repeats(mtu: int, size: int) -> None:
    script = Script()
    connection = script.connect()
    connection.write(bytes(3 * 1360))
    ((*_, packet),) = script.stack.transmit(script.now)
    failure = icmp.Failure(icmp.PACKET_TOO_BIG, 0, mtu, packet)
    script.stack.receive([icmp.failure(bytes(15) + b"\x77", LEFT.packed, failure)], script.now)
    sent = script.out()
    assert {len(one.payload) for one in sent[:-1]} == ({size} if size < 1360 else set())


def test_packet_too_big_about_nothing_in_flight_changes_nothing() -> None:
    script = Script()
    connection = script.connect()
    connection.write(bytes(3 * 1360))
    ((*_, packet),) = script.stack.transmit(script.now)
    forged = packet[:44] + b"\x01\x02\x03\x04" + packet[48:]
    failure = icmp.Failure(icmp.PACKET_TOO_BIG, 0, 1280, forged)
    script.stack.receive([icmp.failure(RIGHT.packed, LEFT.packed, failure)], script.now)
    assert script.out() == []
    assert connection.sender.mss == 1360


def test_every_drop_has_a_reason() -> None:
    ours = stack(LEFT)
    ours.bind(53)
    theirs, other = (RIGHT.packed, 1), (bytes(15) + b"\x05", 53)
    bad_sum = bytearray(udp.emit(theirs, (LEFT.packed, 53), b"x"))
    bad_sum[-1] ^= 1
    fragment = header.emit(RIGHT.packed, LEFT.packed, header.FRAGMENT, bytes(16))
    packets = {
        "malformed: shorter than an IPv6 header": b"\x60",
        "malformed: UDP checksum": bytes(bad_sum),
        "rejected: fragment": fragment,
        "rejected: not our address": udp.emit(theirs, other, b"x"),
        "rejected: impossible source": udp.emit((LEFT.packed, 1), (LEFT.packed, 53), b"x"),
        "rejected: unknown protocol": header.emit(RIGHT.packed, LEFT.packed, 132, bytes(16)),
    }
    ours.receive(list(packets.values()), 0.0)
    assert ours.drops == dict.fromkeys(packets, 1)
    assert ours.transmit(0.0) == []


def test_taking_an_address_away_resets_its_connections() -> None:
    script = Script()
    connection = script.connect()
    script.stack.remove_address(LEFT)
    assert [one.flags for one in script.out()] == [RST | ACK]
    assert connection.end is End.ABORTED
    with pytest.raises(OSError, match="no such address"):
        script.stack.connect((RIGHT.packed, PORT), script.now)


# -- many


def test_thousands_of_idle_connections_cost_nothing() -> None:
    ours = stack(LEFT)
    ours.listen(PORT)
    for port in range(1, 3001):
        template = Template((RIGHT.packed, port), (LEFT.packed, PORT))
        ours.receive([template.segment(0, 0, SYN, 1000)], 0.0)
        ((answer,),) = ours.transmit(0.0)
        ack = segment.parse(answer).seq + 1
        ours.receive([template.segment(1, ack, ACK, 1000)], 0.0)
    assert ours.transmit(0.0) == []
    assert ours.deadline() is None
    assert len(ours.events()) == 3000


def test_many_short_connections_leave_nothing_behind() -> None:
    world = World(CLEAR)
    for _ in range(30):
        world.connections.clear()
        ours = [world.connect() for _ in range(10)]
        world.run_for(0.1)
        for connection in world.connections:
            assert connection.write(b"hello") == 5
            connection.close()
        world.run_for(0.2)
        assert [connection.read(100) for connection in world.connections] == [b"hello"] * 20
        assert all(connection.end is End.FINISHED for connection in world.connections)
        assert len(world.seen(Opened)) % len(ours) == 0
    world.run_for(130)
    assert world.client.deadline() is None
    assert world.server.deadline() is None
    assert not world.client.drops
    assert not world.server.drops


# -- what one connection teaches the next


def test_a_lost_syn_to_a_known_host_is_repeated_sooner() -> None:
    """RFC 6298 §2.1: the initial second is for hosts that have not been measured."""
    script = Script()
    script.connect()
    script.send(ACK, 1, 1)
    began = script.now
    script.stack.connect((RIGHT.packed, PORT), script.now)
    assert [sent.flags for sent in script.out()] == [SYN]
    (again,) = script.jump()
    assert again.flags == SYN
    assert script.now - began == pytest.approx(0.2)


def test_a_lost_syn_to_another_host_waits_for_a_second() -> None:
    script = Script()
    script.connect()
    script.send(ACK, 1, 1)
    script.stack.connect((IPv6Address("fd00::7").packed, PORT), script.now)
    began = script.now
    script.out()
    script.jump()
    assert script.now - began == pytest.approx(1.0)


def test_streams_to_one_remote_share_their_trains() -> None:
    """Many short ones make one long: what a train costs, it costs once."""
    ours = stack(LEFT)
    for _ in range(30):
        ours.connect((RIGHT.packed, PORT), 0.0)
    ours.connect((ROUTER.packed, PORT), 0.0)
    trains = ours.transmit(0.0)
    assert sorted(map(len, trains)) == [1, 30]
    assert all(len({packet[24:40] for packet in train}) == 1 for train in trains)

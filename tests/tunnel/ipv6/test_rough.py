"""What paths and strangers may do to a connection: translators, routers, sleep, forgers."""

from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from builder_orch.tunnel.ipv6 import icmp
from builder_orch.tunnel.ipv6.connection import CHALLENGES_PER_SECOND
from builder_orch.tunnel.ipv6.segment import ACK, FIN, PSH, RST, SYN, Template
from builder_orch.tunnel.ipv6.stack import Stack
from builder_orch.tunnel.ipv6.state import End
from builder_orch.tunnel.machine import Train
from tests.sim import Stream, Weather
from tests.tunnel.ipv6.world import LEFT, PORT, RIGHT, Flow, World, stack, transfer

BAD = Weather(delay_s=0.005, loss=0.02, reorder=0.05, reorder_s=0.003, duplicate=0.01, corrupt=0.01)


def flowing(world: World, length: int = 4 << 20) -> tuple[Flow, Flow]:
    """An upload under way."""
    stream, nothing = Stream("flow", length), Stream("", 0)
    ours, theirs = Flow(stream, nothing), Flow(nothing, stream)
    world.flows = [ours, theirs]
    ours.connection = world.connect()
    world.run(lambda: theirs.got > 50_000, limit_s=60)
    return ours, theirs


# -- paths


def test_wrong_bits_are_noticed_below_and_repaired_here() -> None:
    world = transfer(BAD, world=World(BAD, seed=1, sealed=True), seed=1, up=1 << 20, down=1 << 19)
    assert world.now < 20


def test_losses_in_bursts_are_repaired() -> None:
    bursts = Weather(delay_s=0.01, rate=5e6, turns_bad=0.002, turns_good=0.05, bad_loss=0.8)
    world = transfer(bursts, seed=2, up=4 << 20)
    assert world.there.lost > 50
    assert world.now < 20


@pytest.mark.parametrize("seed", range(6))
def test_a_busy_host_hears_many_answers_at_once(seed: int) -> None:
    """Acknowledgements that waited are read together, with all they selected and in any order."""
    world = World(BAD, seed=seed, sealed=True, turn_s=0.003)
    transfer(BAD, world=world, seed=seed, up=2 << 20, down=1 << 18)
    assert world.now < 20


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("mtu", [1280, 1320, 1400])
def test_a_narrow_path_is_found_with_or_without_being_told(mtu: int, told: bool) -> None:
    world = World(Weather(mtu=mtu), seed=3)
    if told:
        world.tell_too_big()
    transfer(Weather(), world=world, seed=3, up=200_000)
    assert world.now < (1 if told else 5)


def test_a_translator_that_forgets_is_reminded_by_keepalives() -> None:
    world = World(Weather(nat_s=30.0), seed=4, back=Weather())
    ours, theirs = world.established()
    world.run_for(100)
    theirs.write(b"lost on its way back")
    world.run_for(5)
    assert not ours.readable
    ours.keep_alive(20.0)
    world.run_for(200)
    theirs.write(b"!")
    world.run(lambda: ours.readable == 21, limit_s=60)


def test_after_hours_of_sleep_it_goes_on() -> None:
    world = World(seed=5)
    _, theirs = flowing(world)
    world.set_wall(1e9)
    world.suspend(8 * 3600)
    assert world.wall == pytest.approx(1e9 + 8 * 3600, abs=1)
    took = world.run(lambda: theirs.is_done, limit_s=120)
    assert took < 10


def test_a_reader_that_pauses_for_two_hours_is_asked_at_least_each_minute() -> None:
    world = World(seed=6)
    _, theirs = flowing(world, 12 << 20)
    theirs.reading = False
    world.run_for(600)
    before = world.there.carried
    world.run_for(6600)
    assert 100 <= world.there.carried - before <= 130
    world.back.is_cut = True
    theirs.reading = True
    world.run_for(1)  # the window update is lost
    world.back.is_cut = False
    before = theirs.got
    world.run(lambda: theirs.got > before + (1 << 20), limit_s=61)


class Shrinking:
    """A stack whose window fields sometimes say less than before, as RFC 9293 begs nobody to do."""

    def __init__(self, inner: Stack, seed: int) -> None:
        self._random = Random(seed)
        self._inner = inner
        self.receive = inner.receive
        self.deadline = inner.deadline

    def transmit(self, now: float) -> list[Train]:
        """What it sends, with smaller windows here and there."""
        return [[self._shrunk(packet) for packet in train] for train in self._inner.transmit(now)]

    def _shrunk(self, packet: bytes) -> bytes:
        if packet[53] & SYN or self._random.random() < 0.7:
            return packet
        field = int.from_bytes(packet[58:60], "big")
        less = max(0, field - self._random.randrange(1, 512))  # 128 octets each
        return packet[:58] + less.to_bytes(2, "big") + packet[60:]


@settings(
    deadline=None,
    max_examples=15,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(st.integers(0, 1 << 20), st.sampled_from([60_000, 200_000]))
def test_a_peer_that_takes_its_window_back_gets_everything(seed: int, capacity: int) -> None:
    server = stack(RIGHT, seed=seed, capacity=capacity)
    world = World(Weather(delay_s=0.005, loss=0.005), seed=seed, server=server)
    world.right = Shrinking(server, seed)
    transfer(Weather(), world=world, seed=seed, up=300_000, limit_s=120)


@pytest.mark.parametrize(("seed", "minutes"), [(0, 10), (1, 1), (2, 1)])
def test_a_tiny_round_trip_with_losses_never_stalls(seed: int, minutes: int) -> None:
    """20 us, bursts of single octets (gvisor #6113)."""
    world = World(Weather(delay_s=10e-6, loss=0.01), seed=seed)
    ours, theirs = world.established()
    dice = Random(seed)
    for _ in range(60 * minutes):
        for _ in range(dice.randrange(1, 30)):
            ours.write(b"x")
            world.run_for(dice.choice([0.0, 5e-6, 50e-6]))
        world.run_for(1.0)
        theirs.read(1000)
        assert ours.sender.una == ours.sender.nxt, "a stall of more than a second"


def before_the_wrap(seed: int) -> tuple[float, int]:
    """When to begin so that the stamps are 0.2 s before their wrap, and how many octets
    the sequence numbers are then before theirs.
    """
    first = stack(LEFT, seed=seed).connect((RIGHT.packed, PORT), 0.0).sender.una - 1
    # Numbers go by 250 000 a second, stamps by 1000, and both begin at the same number.
    start = (-200 - first) % (1 << 32) / 251_000
    return start, int(1000 * start) + 200


def test_numbers_and_stamps_wrap_under_losses() -> None:
    seed = next(seed for seed in range(100) if before_the_wrap(seed)[1] < 8 << 20)
    start, octets = before_the_wrap(seed)
    client = stack(LEFT, seed=seed, timestamps=True)
    world = World(Weather(delay_s=0.005, loss=0.01), seed=seed, client=client)
    world.now = start
    stamps: list[int] = []
    push = world.there.push

    def note(packet: bytes, now: float) -> None:
        stamps.append(int.from_bytes(packet[64:68], "big"))
        push(packet, now)

    world.there.push = note  # type: ignore[method-assign]
    transfer(Weather(), world=world, seed=seed, up=16 << 20)
    sender = world.connections[0].sender
    assert sender.outbox.end - (1 << 32) == pytest.approx((16 << 20) - octets, abs=1000)
    # The SYN has its stamp behind other options.
    assert 1 << 31 < stamps[1] < 1 << 32
    assert stamps[-1] < 1 << 20
    assert sender.mss == 1348
    assert not world.client.drops
    assert not world.server.drops


# -- strangers


def test_a_hundred_thousand_guesses_do_not_break_a_connection() -> None:
    world = World(Weather(delay_s=0.01, rate=1e6), seed=8)
    ours, theirs = flowing(world, 24 << 20)
    connection = ours.connection
    assert connection is not None
    receiver = connection.receiver
    forger = Template(connection.remote, connection.local)
    dice = Random(8)
    began, answered = world.now, 0
    for _ in range(1000):
        packets = []
        for _ in range(100):
            # Some fall into the window.
            span = dice.choice([1 << 20, 1 << 31, 1 << 31, 1 << 31, 1 << 31, 1 << 31, 1 << 31])
            seq = (receiver.nxt + dice.choice([1, -1]) * dice.randrange(1, span)) % (1 << 32)
            flags = dice.choice([RST, RST | ACK, SYN, SYN | ACK, ACK | PSH, FIN | ACK, ACK])
            ack = dice.randrange(1 << 32)
            packets.append(forger.segment(seq, ack, flags, 0, b"evil" if flags & PSH else b""))
        cause = Template(connection.local, connection.remote).segment(
            dice.randrange(1 << 32), 0, ACK, 0
        )
        for kind in (icmp.PACKET_TOO_BIG, icmp.DESTINATION_UNREACHABLE):
            failure = icmp.Failure(kind, 0, 1280, cause)
            packets.append(icmp.failure(RIGHT.packed, LEFT.packed, failure))
        world.client.receive(packets, world.now)
        before = world.there.carried
        for train in world.client.transmit(world.now):
            answered += sum(len(packet) == 60 for packet in train)
            for packet in train:
                world.there.push(packet, world.now)
        world.run_for(0.01)
        assert world.there.carried >= before
    elapsed = world.now - began
    assert connection.end is None
    assert answered <= CHALLENGES_PER_SECOND * (elapsed + 1)
    assert connection.sender.mss == 1360
    world.run(lambda: theirs.is_done, limit_s=60)


class Mutating:
    """A stack whose packets sometimes leave with a wrong header."""

    def __init__(self, inner: Stack, seed: int) -> None:
        self._random = Random(seed)
        self._inner = inner
        self.receive = inner.receive
        self.deadline = inner.deadline

    def transmit(self, now: float) -> list[Train]:
        """What it sends, some of it changed in the first 72 octets."""
        return [[self._changed(packet) for packet in train] for train in self._inner.transmit(now)]

    def _changed(self, packet: bytes) -> bytes:
        if self._random.random() > 0.05:
            return packet
        wrong = bytearray(packet)
        for _ in range(self._random.randrange(1, 4)):
            at = self._random.randrange(min(72, len(wrong)))
            wrong[at] = self._random.randrange(256)
        return bytes(wrong)


@pytest.mark.parametrize("sealed", [True, False])
def test_changed_headers_raise_nothing_and_end_in_time(sealed: bool) -> None:
    """Where the layer below vouches for packets, what arrives is right as well."""
    for seed in range(1000):
        world = World(Weather(delay_s=0.002), seed=seed, sealed=sealed)
        world.left, world.right = Mutating(world.client, seed), Mutating(world.server, ~seed)
        if sealed:
            world = World(Weather(delay_s=0.002, corrupt=0.05), seed=seed, sealed=True)
        stream, nothing = Stream("x", 20_000), Stream("", 0)
        into = stream if sealed else Unchecked(20_000)
        ours, theirs = Flow(stream, nothing), Flow(nothing, into)
        world.flows = [ours, theirs]
        ours.connection = world.connect(timeout_s=60)
        world.run_for(20 if sealed else 5)
        assert theirs.got == 20_000 or not sealed
        for connection in world.connections:
            connection.abort()
        world.run_for(240)
        assert all(connection.end is not None for connection in world.connections)


class Unchecked(Stream):
    """Whatever comes."""

    def __init__(self, length: int) -> None:
        super().__init__("", length)

    def check(self, start: int, data: bytes) -> None:
        """Anything will do."""


def test_a_forged_reset_needs_the_very_next_number() -> None:
    world = World(seed=9)
    ours, _ = world.established()
    forger = Template(ours.remote, ours.local)
    world.client.receive([forger.segment(ours.receiver.nxt + 1, 0, RST, 0)], world.now)
    assert ours.end is None
    world.client.receive([forger.segment(ours.receiver.nxt, 0, RST, 0)], world.now)
    assert ours.end is End.RESET

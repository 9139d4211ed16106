"""Whatever the wire does, the same octets come out; and not too late."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from builder_orch.tunnel.ipv6.congestion import Delivered
from builder_orch.tunnel.ipv6.connection import Connection
from builder_orch.tunnel.ipv6.events import Closed
from builder_orch.tunnel.ipv6.state import End, State
from tests.sim import Pair, Stream, Weather
from tests.tunnel.ipv6.world import LEFT, RIGHT, Flow, World, stack, transfer

SLOW = settings(
    deadline=None,
    max_examples=40,
    derandomize=True,  # a connection may die of 30 % loss, if seldom; it should not do so by chance
    suppress_health_check=[HealthCheck.too_slow],
)


def weather(loss: float) -> st.SearchStrategy[Weather]:
    """Anything that leaves a path."""
    return st.builds(
        Weather,
        delay_s=st.sampled_from([0.0, 0.0001, 0.01, 0.15]),
        jitter_s=st.sampled_from([0.0, 0.001, 0.02]),
        loss=st.floats(0, loss),
        burst=st.sampled_from([0.0, 0.01]),
        reorder=st.floats(0, 0.3),
        reorder_s=st.sampled_from([0.0, 0.001, 0.03]),
        duplicate=st.floats(0, 0.2),
        rate=st.sampled_from([None, 2e6]),
        queue=st.sampled_from([20_000, 300_000]),
    )


@SLOW
@given(weather(0.3), weather(0.3), st.integers(0, 1 << 30), st.data())
def test_the_same_octets_come_out(
    there: Weather, back: Weather, seed: int, data: st.DataObject
) -> None:
    world = World(there, back=back, seed=seed)
    transfer(
        there,
        world=world,
        seed=seed,
        up=data.draw(st.integers(0, 60_000)),
        down=data.draw(st.integers(0, 60_000)),
        read_limit=data.draw(st.sampled_from([100, 5000, 1 << 20])),
        write_size=data.draw(st.sampled_from([700, 1360, 50_000])),
        limit_s=3600,
    )


@SLOW
@given(weather(0.1), st.integers(0, 1 << 30), st.integers(1000, 20_000))
def test_small_buffers_do_not_stall(weather: Weather, seed: int, capacity: int) -> None:
    world = World(
        weather,
        seed=seed,
        client=stack(LEFT, seed=seed, capacity=capacity),
        server=stack(RIGHT, seed=seed, capacity=capacity),
    )
    transfer(weather, world=world, seed=seed, up=40_000, down=40_000, read_limit=3000)


def test_a_run_repeats_exactly() -> None:
    rough = Weather(loss=0.05, reorder=0.1, duplicate=0.05, jitter_s=0.002)
    runs = [transfer(rough, seed=5, up=200_000, down=100_000) for _ in range(2)]
    assert (runs[0].now, runs[0].steps) == (runs[1].now, runs[1].steps)


@pytest.mark.parametrize("wrap", [0, 1, 100_000, 1 << 31])
def test_numbers_go_over_the_top(wrap: int) -> None:
    """The initial numbers are chosen so that `wrap` octets later the circle closes."""
    client = stack(LEFT, seed=3)
    probe = stack(LEFT, seed=3).connect((RIGHT.packed, 80), 0.0).sender.una
    # The clock of initial numbers runs at 250 000 a second, so the start time chooses the number.
    start = (-wrap - probe) % (1 << 32) / 250_000
    world = World(Weather(loss=0.01, reorder=0.02), seed=3, client=client)
    world.now = start
    transfer(Weather(), world=world, seed=3, up=400_000, down=400_000)
    first = world.connections[0].sender
    if wrap < 1 << 31:
        assert first.una >= 1 << 32


# -- speed, in virtual time


def test_a_clean_path_is_filled() -> None:
    world = transfer(Weather(delay_s=0.01, rate=12.5e6), up=3 << 20)
    assert world.now < 1.1 * (3 << 20) / 12.5e6 + 0.15  # slow start takes some round trips


def test_sixteen_megabytes_at_20_ms_with_loss_and_reordering() -> None:
    """The Mathis bound at 1 % is 0.83 MB/s, so 20 s."""
    world = transfer(Weather(delay_s=0.01, loss=0.01, reorder=0.05), seed=1, up=16 << 20)
    assert world.now < 25


def test_mere_reordering_costs_little() -> None:
    mixed = Weather(delay_s=0.01, reorder=0.1, reorder_s=0.004)
    world = transfer(mixed, seed=2, up=4 << 20)
    needed = (4 << 20) // 1360
    assert world.there.carried < needed * 1.02
    straight = transfer(Weather(delay_s=0.01), seed=2, up=4 << 20)
    assert world.now < straight.now * 2.5


def test_two_flows_share_a_bottleneck() -> None:
    weather = Weather(delay_s=0.01, rate=2.5e6, queue=100_000)
    world = World(weather, seed=4)
    flows = []
    for number in range(2):
        stream = Stream(f"{number}", 2 << 20)
        ours, theirs = Flow(stream, Stream("", 0)), Flow(Stream("", 0), stream)
        world.flows = [ours, theirs]
        ours.connection = world.connect()
        world.run_for(0.05)
        flows += [ours, theirs]
    world.flows = flows
    got = (flows[1], flows[3])
    world.run(lambda: any(flow.is_done for flow in got), limit_s=60)
    shares = sorted(flow.got for flow in got)
    assert shares[0] > 0.4 * shares[1]


class Paced:
    """A constant window sent at a constant rate."""

    cwnd = 200_000
    pacing_rate: float | None = 1_000_000.0

    def on_ack(self, delivered: Delivered, recovering: bool) -> None: ...
    def on_loss(self, in_flight: int, now: float) -> None: ...
    def on_spurious(self) -> None: ...
    def on_rto(self, in_flight: int, now: float) -> None: ...
    def on_idle(self) -> None: ...
    def on_restart(self) -> None: ...
    def on_mss(self, mss: int) -> None: ...


def test_another_congestion_control_can_pace() -> None:
    # The queue holds two trains; without pacing a window of 200 kB would overflow it at once.
    world = World(Weather(delay_s=0.02, rate=1_100_000.0, queue=130_000), seed=12)
    ours, theirs = world.established()
    ours.sender.congestion = Paced()
    stream = Stream("paced", 2_000_000)
    world.flows = [Flow(stream, Stream("", 0)), Flow(Stream("", 0), stream)]
    world.flows[0].connection, world.flows[1].connection = ours, theirs
    took = world.run(lambda: world.flows[1].is_done, limit_s=10)
    assert world.there.lost == 0
    assert 2.0 <= took < 2.3


# -- trouble


def test_a_reader_that_pauses_for_an_hour_gets_everything() -> None:
    world = World(Weather(loss=0.02), seed=6)
    stream = Stream("slow", 12 << 20)
    ours, theirs = Flow(stream, Stream("", 0)), Flow(Stream("", 0), stream)
    world.flows = [ours, theirs]
    ours.connection = world.connect()
    world.run(lambda: theirs.got > 100_000, limit_s=60)
    theirs.reading = False
    world.run_for(3600)
    assert ours.sent < stream.length
    world.there.is_cut = world.back.is_cut = True
    theirs.reading = True
    world.run_for(1)  # the window update is lost
    world.there.is_cut = world.back.is_cut = False
    world.run(lambda: theirs.got > 3 << 20, limit_s=61)
    world.run(lambda: ours.is_done and theirs.is_done, limit_s=60)


def test_after_an_outage_it_goes_on_within_the_backed_off_timeout() -> None:
    world = World(seed=7)
    stream = Stream("cut", 4 << 20)
    ours, theirs = Flow(stream, Stream("", 0)), Flow(Stream("", 0), stream)
    world.flows = [ours, theirs]
    ours.connection = world.connect()
    world.run(lambda: theirs.got > 1 << 20, limit_s=60)
    world.there.is_cut = world.back.is_cut = True
    world.run_for(15)
    world.there.is_cut = world.back.is_cut = False
    world.client.kick(world.now)
    world.server.kick(world.now)
    assert world.run(lambda: ours.is_done and theirs.is_done, limit_s=60) < 2


def test_after_a_held_handshake_a_loss_costs_little() -> None:
    """The 5 s that the layer below needed are not taken for a round trip."""
    is_open = False
    client = stack(LEFT, path=lambda _: is_open)
    world = World(seed=13, client=client)
    ours = world.connect()
    world.run_for(5)
    assert client.summons() == [RIGHT.packed]
    is_open = True
    client.kick(world.now)
    world.run(lambda: len(world.connections) == 2, limit_s=0.1)
    theirs = world.connections[-1]
    assert ours.sender.rtt.rto <= 1.0
    world.there.is_cut = True
    ours.write(b"lost at first")
    world.run_for(0.001)
    world.there.is_cut = False
    assert world.run(lambda: theirs.readable == 13, limit_s=1.2) < 0.5


@SLOW
@given(st.integers(0, 1 << 30), st.lists(st.floats(0.001, 40), min_size=1, max_size=8))
def test_a_path_that_comes_and_goes_delays_and_nothing_else(seed: int, phases: list[float]) -> None:
    is_open = True
    client = stack(LEFT, seed=seed, path=lambda _: is_open)
    world = World(Weather(loss=0.02, rate=2e6), seed=seed, client=client)
    up, down = Stream("up", 300_000), Stream("down", 300_000)
    ours, theirs = Flow(up, down), Flow(down, up)
    world.flows = [ours, theirs]
    ours.connection = world.connect()
    for number, phase in enumerate(phases):
        is_open = number % 2 == 1
        sent = world.there.carried
        world.run_for(phase)
        if not is_open:
            assert world.there.carried == sent
    is_open = True
    world.run(lambda: ours.is_done and theirs.is_done, limit_s=200)


def test_a_path_that_swallows_big_packets_is_crossed() -> None:
    world = transfer(Weather(mtu=1300), seed=8, up=300_000, down=300_000)
    assert world.now < 10


def ends(world: World) -> list[End | None]:
    return [connection.end for connection in world.connections]


def test_a_connection_ends_at_both_ends_alike() -> None:
    world = World(seed=9)
    ours, _ = world.established()
    ours.abort()
    world.run_for(1)
    assert ends(world) == [End.ABORTED, End.RESET]
    assert len(world.seen(Closed)) == 2
    refused = world.client.connect((RIGHT.packed, 81), world.now)
    world.run_for(1)
    assert refused.end is End.REFUSED


@pytest.mark.parametrize("seed", range(20))
def test_connections_end_even_when_the_last_packets_get_lost(seed: int) -> None:
    world = World(seed=seed)
    ours, theirs = world.established()
    world.there.weather = world.back.weather = Weather(loss=0.3)
    ours.close()
    theirs.close()
    world.run(lambda: None not in ends(world), limit_s=700)
    assert set(ends(world)) <= {End.FINISHED, End.TIMED_OUT, End.RESET}
    world.run_for(200)
    assert world.client.deadline() is None
    assert world.server.deadline() is None


def test_the_law_holds_for_a_pair_of_anything() -> None:
    """`Pair` notices a machine that asks for now again."""

    class Hasty:
        def receive(self, packets: list[bytes], now: float) -> None: ...

        def transmit(self, now: float) -> list[list[bytes]]:
            return []

        def deadline(self) -> float | None:
            return 0.0

    with pytest.raises(AssertionError, match="now again"):
        Pair(Hasty(), stack(RIGHT)).pump()


def test_the_stream_names_the_first_wrong_octet() -> None:
    stream = Stream("x", 200_000)
    data = bytearray(stream.octets(60_000, 20_000))
    stream.check(60_000, bytes(data))
    data[7000] ^= 1
    with pytest.raises(AssertionError, match="67000 of 200000"):
        stream.check(60_000, bytes(data))


def test_a_connection_knows_its_state_in_words() -> None:
    world = World(seed=10)
    ours, _ = world.established()
    assert isinstance(ours, Connection)
    assert State.ESTABLISHED.value in repr(ours)

"""How fast, under what: the committed table, and what the shipped algorithm was chosen for."""

import pytest

from builder_orch.tunnel.ipv6.bbr import Bbr
from builder_orch.tunnel.ipv6.congestion import Congestion
from tests.sim import Stream, Weather
from tests.tunnel.ipv6.cubic import Cubic
from tests.tunnel.ipv6.goodput import RATE, TABLE, cells, goodput, mathis, read
from tests.tunnel.ipv6.world import LEFT, Flow, World, stack, transfer

DRIFT = 0.05


def test_goodput_is_what_the_committed_table_says() -> None:
    """`python -m tests.tunnel.ipv6.goodput` writes it anew when a change is meant."""
    table = read()
    assert list(table) == cells()
    drifted = {
        cell: (wanted, got)
        for cell, wanted in table.items()
        if abs((got := goodput(*cell)) - wanted) > DRIFT * wanted
    }
    assert not drifted, f"more than 5 % off {TABLE.name}"


def test_the_table_keeps_up_with_what_a_loss_based_sender_could_do() -> None:
    for (loss, rtt, window), got in read().items():
        if 0 < loss <= 0.05 and window > 1 << 16:
            share = 0.6 if loss <= 0.02 else 0.4
            assert got >= share * min(mathis(loss, rtt), 0.2 * RATE), (loss, rtt, window)


def upload(weather: Weather, seconds: float, seed: int = 1) -> float:
    """Octets a second of an endless upload, timers only a millisecond exact."""
    world = World(weather, seed=seed, back=Weather(delay_s=weather.delay_s), grain_s=1e-3)
    stream, nothing = Stream("endless", 1 << 40), Stream("", 0)
    world.flows = [Flow(stream, nothing), Flow(nothing, stream)]
    world.flows[0].connection = world.connect()
    world.run_for(seconds)
    return world.flows[1].got / seconds


@pytest.mark.parametrize("share", [0.05, 0.1])
@pytest.mark.parametrize("delay_s", [0.0025, 0.01])
def test_reordering_costs_next_to_nothing(share: float, delay_s: float) -> None:
    straight = Weather(delay_s=delay_s, rate=5e6, queue=1 << 18)
    mixed = Weather(
        delay_s=delay_s,
        rate=5e6,
        queue=1 << 18,
        reorder=share,
        reorder_s=0.03,
        reorder_from_s=0.001,
    )
    assert upload(mixed, 1) >= 0.85 * upload(straight, 1)


@pytest.mark.parametrize(("delay_s", "megabytes"), [(0.0025, 8), (0.01, 2), (0.03, 2)])
def test_reordered_packets_are_not_sent_twice(delay_s: float, megabytes: int) -> None:
    """Less than one in a hundred: the first that came late tells how late they can come."""
    mixed = Weather(delay_s=delay_s, rate=12.5e6, reorder=0.1, reorder_s=0.03, reorder_from_s=1e-3)
    world = transfer(mixed, seed=3, up=megabytes << 20)
    needed = -(-(megabytes << 20) // 1360)
    assert world.there.carried - world.there.lost - needed < 0.01 * needed


@pytest.mark.parametrize(
    ("loss", "delay_s", "least"), [(0.001, 0.02, 7e6), (0.01, 0.01, 8e6), (0.05, 0.0005, 5e6)]
)
def test_random_losses_are_not_taken_for_congestion(
    loss: float, delay_s: float, least: float
) -> None:
    """Reno gets 1.5 to 2 MB/s of the first two."""
    weather = Weather(delay_s=delay_s, loss=loss, rate=12.5e6, queue=250_000)
    assert upload(weather, 1) >= least


@pytest.mark.parametrize("order", [(Bbr, Cubic), (Cubic, Bbr)])
def test_a_cubic_flow_on_the_same_link_keeps_a_third(
    order: tuple[type[Bbr] | type[Cubic], ...],
) -> None:
    kinds = iter(order)

    def next_kind(mss: int) -> Congestion:
        return next(kinds)(mss)

    client = stack(LEFT, seed=1, congestion=next_kind)
    link = Weather(delay_s=0.01, rate=2.5e6, queue=50_000)
    world = World(link, seed=1, back=Weather(delay_s=0.01), client=client, grain_s=1e-3)
    stream, nothing = Stream("shared", 1 << 40), Stream("", 0)
    flows: list[Flow] = []
    for _ in order:
        world.flows = [Flow(stream, nothing), Flow(nothing, stream)]
        world.flows[0].connection = world.connect()
        world.run_for(0.5)
        flows += world.flows
    world.flows = flows
    before = [flow.got for flow in flows]
    world.run_for(8)
    got = {
        kind: flows[2 * number + 1].got - before[2 * number + 1]
        for number, kind in enumerate(order)
    }
    assert got[Cubic] >= sum(got.values()) / 3
    assert sum(got.values()) > 0.85 * 2.5e6 * 8


def test_bursts_do_not_overrun_a_small_buffer_again_and_again() -> None:
    weather = Weather(delay_s=0.0002, rate=100e6, queue=60_000)
    world = World(weather, seed=1, back=Weather(delay_s=0.0002), grain_s=1e-3)
    stream, nothing = Stream("lan", 1 << 40), Stream("", 0)
    world.flows = [Flow(stream, nothing), Flow(nothing, stream)]
    world.flows[0].connection = world.connect()
    world.run_for(0.2)
    assert world.flows[1].got > 0.85 * 100e6 * 0.2
    assert world.there.lost < 0.02 * world.there.carried

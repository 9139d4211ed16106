"""Many connections at once share what there is; many one after the other leave nothing behind."""

import gc
from weakref import WeakSet

import pytest

from builder_orch.tunnel.ipv6.connection import Connection
from tests.sim import Stream, Weather
from tests.tunnel.ipv6.world import PORT, RIGHT, Flow, World

STREAMS = 100
LOSSY = Weather(delay_s=0.01, loss=0.01, rate=12.5e6, queue=500_000)
ECHO = bytes(range(256)) * 4


def jain(shares: list[int]) -> float:
    """1 when all are equal, 1/n when one has everything."""
    return float(sum(shares) ** 2 / (len(shares) * sum(share * share for share in shares)))


@pytest.mark.parametrize("octets", [80_000, pytest.param(1_000_000, marks=pytest.mark.long)])
def test_a_hundred_streams_in_both_directions_get_equal_shares(octets: int) -> None:
    """Jain's index of each direction when the first stream is done, and nobody waits for 3 s."""
    world = World(LOSSY, seed=1)
    nothing = Stream("", 0)
    pairs: list[tuple[Flow, Flow]] = []
    for number in range(STREAMS):
        up = Stream(f"{number}", octets)
        there, back = (up, nothing) if number % 2 else (nothing, up)
        ours, theirs = Flow(there, back), Flow(back, there)
        world.flows = [ours, theirs]
        ours.connection = world.connect()
        world.run(lambda theirs=theirs: theirs.connection is not None, limit_s=10)  # type: ignore[misc]
        pairs.append((ours, theirs))
    world.flows = [flow for pair in pairs for flow in pair]
    takers = [pair[number % 2] for number, pair in enumerate(pairs)]
    heard = [(0, world.now)] * STREAMS

    def waits() -> float:
        for number, taker in enumerate(takers):
            if taker.got != heard[number][0] or taker.got == octets:
                heard[number] = (taker.got, world.now)
        return world.now - min(at for _, at in heard)

    world.run(lambda: any(taker.got >= octets for taker in takers), limit_s=60)
    for side in (0, 1):
        assert jain([taker.got for taker in takers[side::2]]) >= 0.9
    while not all(taker.got == octets for taker in takers):
        world.run_for(0.5)
        assert waits() < 3.0


def converse(world: World) -> tuple[Connection, Connection]:
    """Connect, 1 KB there and back, close."""
    ours = world.client.connect((RIGHT.packed, PORT), world.now)
    ours.write(ECHO)
    world.connections.clear()
    world.run(lambda: bool(world.connections), limit_s=60)
    theirs = world.connections[-1]
    world.run(lambda: theirs.readable == len(ECHO), limit_s=60)
    theirs.write(theirs.read(len(ECHO)))
    world.run(lambda: ours.readable == len(ECHO), limit_s=60)
    assert ours.read(len(ECHO)) == ECHO
    ours.close()
    theirs.close()
    world.events.clear()
    return ours, theirs


@pytest.mark.parametrize("number", [300, pytest.param(10_000, marks=pytest.mark.long)])
def test_short_connections_leave_nothing_behind(number: int) -> None:
    world = World(Weather(delay_s=0.001, loss=0.01), seed=2)
    alive: WeakSet[Connection] = WeakSet()
    for _ in range(number):
        alive |= set(converse(world))
    world.run_for(200)
    stacks = world.client, world.server
    for side in stacks:
        assert side.deadline() is None
        assert not side.transmit(world.now)
    assert alive
    del world  # it remembers all connections for its invariants
    gc.collect()
    assert not alive

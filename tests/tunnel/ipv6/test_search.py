"""Larger segments are found again after a retreat, and looking for them costs next to nothing."""

from builder_orch.tunnel.ipv6.search import FIRST_WAIT, LAST_WAIT, Search
from tests.sim import Stream, Weather
from tests.tunnel.ipv6.world import Flow, World

SLOW = Weather(delay_s=0.01, rate=200_000.0, queue=50_000)
FLOOR, FULL = 1220, 1360


def uploading(world: World) -> tuple[Flow, Flow]:
    """An upload that never ends."""
    stream, nothing = Stream("endless", 1 << 40), Stream("", 0)
    ours, theirs = Flow(stream, nothing), Flow(nothing, stream)
    world.flows = [ours, theirs]
    ours.connection = world.connect()
    world.run(lambda: theirs.got > 200_000, limit_s=60)
    return ours, theirs


def longest_silence(world: World, theirs: Flow, seconds: float) -> float:
    """How long nothing arrived at most, in so much time."""
    end, heard, longest = world.now + seconds, world.now, 0.0
    got = theirs.got
    while world.now < end:
        world.run_for(0.01)
        if theirs.got > got:
            got, heard = theirs.got, world.now
        longest = max(longest, world.now - heard)
    return longest


def outage(world: World, theirs: Flow, seconds: float) -> None:
    """Nothing passes for a while; afterwards data flow again."""
    world.there.is_cut = world.back.is_cut = True
    world.run_for(seconds)
    world.there.is_cut = world.back.is_cut = False
    got = theirs.got
    world.run(lambda: theirs.got > got + 20_000, limit_s=60)


def test_after_an_outage_segments_become_full_again() -> None:
    world = World(SLOW, seed=1, back=Weather(delay_s=0.01))
    ours, theirs = uploading(world)
    assert ours.connection is not None
    sender = ours.connection.sender
    outage(world, theirs, 10)
    assert sender.mss == FLOOR
    assert longest_silence(world, theirs, FIRST_WAIT + 5) < 0.3
    assert sender.mss == FULL
    lost = world.there.lost
    world.run_for(5)
    assert world.there.lost == lost


def test_the_size_of_a_narrow_path_that_says_nothing_is_found_without_a_stall() -> None:
    """The path takes 1300 octets; each trial that is too large is one packet lost, no timeout."""
    world = World(SLOW, seed=2, back=Weather(delay_s=0.01))
    ours, theirs = uploading(world)
    assert ours.connection is not None
    sender = ours.connection.sender
    world.there.weather = Weather(delay_s=0.01, rate=200_000.0, queue=50_000, mtu=1300)
    got = theirs.got
    world.run(lambda: theirs.got > got + 100_000, limit_s=60)
    assert sender.mss == FLOOR
    lost, got = world.there.lost, theirs.got
    assert longest_silence(world, theirs, 2 * FIRST_WAIT) < 0.3
    assert 1240 - 16 <= sender.mss <= 1240
    assert 1 <= world.there.lost - lost <= 5
    assert theirs.got - got > 0.85 * 200_000 * 2 * FIRST_WAIT


def test_a_path_that_loses_a_lot_has_no_stalls_from_trials() -> None:
    world = World(SLOW, seed=3, back=Weather(delay_s=0.01))
    ours, theirs = uploading(world)
    assert ours.connection is not None
    outage(world, theirs, 10)
    world.there.weather = Weather(delay_s=0.01, rate=200_000.0, queue=50_000, loss=0.03)
    assert longest_silence(world, theirs, 60) < 1.0
    assert ours.connection.sender.mss > FLOOR


def test_each_retreat_waits_longer_than_the_one_before() -> None:
    search = Search()
    waits = []
    for _ in range(8):
        search.begin(FULL, 0.0)
        assert search.at is not None
        waits.append(search.at)
    assert waits[:3] == [FIRST_WAIT, 2 * FIRST_WAIT, 4 * FIRST_WAIT]
    assert max(waits) == LAST_WAIT


def test_a_search_narrows_down_and_rests() -> None:
    for limit in range(FLOOR, FULL + 1, 7):
        search, mss, now, trials = Search(), FLOOR, 0.0, 0
        search.begin(FULL, now)
        while search.at is not None and search.at < LAST_WAIT:
            now, size = search.at, search.size(mss)
            assert mss < size <= FULL
            search.sent(5000, 5000 + size)
            if size <= limit:
                mss = search.arrived(now)
            else:
                search.failed(mss, now)
            trials += 1
        assert limit - 17 < mss <= limit
        assert trials <= 6


def test_what_the_path_says_is_tried_next() -> None:
    search = Search()
    search.begin(FULL, 0.0)
    search.bound(1300)
    assert search.size(FLOOR) == 1300

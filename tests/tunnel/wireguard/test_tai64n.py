"""Timestamps sort like the time and tell no more than 16.8 ms."""

from hypothesis import given, settings
from hypothesis import strategies as st

from builder_orch.tunnel.wireguard.tai64n import TICK_S, after, stamp

TIMES = st.floats(0, 4e9)


def test_the_epoch_and_a_known_time() -> None:
    assert stamp(0.0) == bytes.fromhex("400000000000000a00000000")
    assert stamp(1.5).hex() == "400000000000000b" + (29 << 24).to_bytes(4).hex()


@settings(deadline=None)
@given(TIMES, TIMES)
def test_stamps_sort_like_times(one: float, other: float) -> None:
    first, second = sorted((one, other))
    assert stamp(first) <= stamp(second)
    if second - first >= 2 * TICK_S:
        assert stamp(first) < stamp(second)


@settings(deadline=None)
@given(TIMES)
def test_nanoseconds_are_whitened(wall: float) -> None:
    nanoseconds = int.from_bytes(stamp(wall)[8:])
    assert nanoseconds % 2**24 == 0
    assert nanoseconds < 10**9


@settings(deadline=None)
@given(TIMES)
def test_after_is_the_next_tick(wall: float) -> None:
    earlier = stamp(wall)
    later = after(earlier)
    assert later > earlier
    assert int.from_bytes(later[8:]) < 10**9
    # No stamp of the clock lies between the two.
    assert stamp(wall + 2 * TICK_S) >= later

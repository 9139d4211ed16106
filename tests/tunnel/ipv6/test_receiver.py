"""The receiving half by itself."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder_orch.tunnel.ipv6.receiver import DELAYED_ACK, MAX_PIECES, Receiver, scale_for

MSS = 100


def receiver(capacity: int = 10_000) -> Receiver:
    """One whose peer has been told the whole window."""
    made = Receiver(0, MSS, capacity)
    made.scale = scale_for(capacity)
    made.announced(made.window())
    return made


def test_a_scale_is_the_smallest_that_does() -> None:
    assert [scale_for(n) for n in (1000, 65_535, 65_536, 4 << 20)] == [0, 0, 1, 7]


def test_two_full_segments_are_acknowledged_at_once_one_within_40_ms() -> None:
    half = receiver()
    half.accept(0, bytes(MSS), False, 5.0)
    assert not half.ack_due(5.0)
    assert half.ack_at == 5.0 + DELAYED_ACK
    assert half.ack_due(5.0 + DELAYED_ACK)
    half.accept(MSS, bytes(MSS), False, 5.01)
    assert half.ack_due(5.01)


def test_what_is_out_of_order_is_acknowledged_at_once_with_its_block() -> None:
    half = receiver()
    assert not half.accept(200, bytes(100), False, 0.0)
    assert half.ack_due(0.0)
    assert half.blocks() == ((200, 300),)
    half.announced(half.window())
    assert half.accept(0, bytes(200), False, 0.0)
    assert half.ack_due(0.0)
    assert (half.nxt, half.readable, half.blocks()) == (300, 300, ())


def test_a_duplicate_is_reported_once_and_first() -> None:
    half = receiver()
    half.accept(0, bytes(100), False, 0.0)
    half.accept(200, bytes(100), False, 0.0)
    half.accept(0, bytes(100), False, 0.0)
    assert half.blocks() == ((0, 100), (200, 300))
    half.accept(210, bytes(50), False, 0.0)
    assert half.blocks() == ((210, 260), (200, 300))
    half.announced(half.window())
    assert half.blocks() == ((200, 300),)


def test_a_fin_waits_for_what_lies_before_it() -> None:
    half = receiver()
    half.accept(100, b"end", True, 0.0)
    assert half.nxt == 0
    half.accept(0, bytes(100), False, 0.0)
    assert half.finished
    assert half.nxt == 104
    half.accept(103, b"", True, 0.0)
    assert half.nxt == 104
    assert half.blocks() == ()


def test_nothing_counts_behind_a_fin() -> None:
    half = receiver()
    half.accept(0, b"end", True, 0.0)
    assert not half.accept(2, b"dmore", False, 0.0)
    assert half.read(100) == b"end"


def test_who_asks_from_behind_a_fin_that_waits_is_told_of_the_hole() -> None:
    """A keep-alive of smoltcp is one octet at SND.NXT - 1, which is where its FIN stands."""
    half = receiver()
    half.accept(100, b"end", True, 0.0)
    half.announced(half.window())
    assert not half.accept(103, b"\0", False, 0.0)
    assert half.ack_due(0.0)
    assert (half.nxt, half.blocks()) == (0, ((100, 103),))
    half.accept(0, bytes(100), False, 0.0)
    assert half.finished
    assert half.read(200) == bytes(100) + b"end"


def test_a_full_window_takes_nothing_and_says_so() -> None:
    half = receiver(1000)
    half.accept(0, bytes(1000), False, 0.0)
    half.announced(half.window())
    assert half.window() == 0
    assert not half.accept(1000, b"probe", False, 0.0)
    assert half.ack_due(0.0)
    assert half.nxt == 1000


def test_the_window_opens_by_whole_segments_and_asks_to_be_told() -> None:
    half = receiver(1000)
    half.accept(0, bytes(1000), False, 0.0)
    half.announced(half.window())
    half.read(99)
    assert half.window() == 0
    assert not half.update_due()
    half.read(101)
    assert half.window() == 200
    assert half.update_due()


@given(
    st.integers(1, 1 << 20),
    st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 5000), st.integers(0, 3000))),
)
def test_the_window_never_retreats_and_never_offers_what_is_not_there(
    capacity: int, moves: list[tuple[int, int, int]]
) -> None:
    half = receiver(capacity)
    position = 0
    for ahead, length, read in moves:
        edge = half.edge
        half.accept(half.nxt + ahead, bytes(length), False, 0.0)
        assert half.nxt <= edge
        field = half.window()
        assert 0 <= field <= 0xFFFF
        assert half.nxt + (field << half.scale) >= edge
        half.announced(field)
        assert half.edge >= edge
        assert half.edge <= position + capacity + (1 << half.scale)
        position += len(half.read(read))
        assert half.readable == half.nxt - position


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=30), st.lists(st.integers(0, 90)))
def test_reads_of_any_size_give_the_stream(pieces: list[bytes], limits: list[int]) -> None:
    half = receiver()
    for piece in pieces:
        half.accept(half.nxt, piece, False, 0.0)
    got = b"".join(half.read(limit) for limit in limits) + half.read(1 << 20)
    assert got == b"".join(pieces)
    assert half.readable == 0


def test_octets_one_by_one_do_not_make_a_queue_of_thousands() -> None:
    half = receiver(1 << 20)
    half.accept(0, b"\0\0", False, 0.0)
    half.read(1)
    for at in range(2, MAX_PIECES * 2):
        half.accept(at, bytes((at % 256,)), False, 0.0)
    assert half.read(1 << 20) == b"\0" + bytes(at % 256 for at in range(2, MAX_PIECES * 2))


# -- how the window grows


def fed(rate: float, rtt: float, seconds: float) -> int:
    """The window after a sender that fills it, but no faster than `rate`, was read at once."""
    receiver = Receiver(0, 1360, 8 << 20)
    receiver.scale = scale_for(8 << 20)
    receiver.rtt = rtt
    now = 1.0
    while now < 1.0 + seconds:
        receiver.announced(receiver.window())
        octets = min(receiver.edge - receiver.nxt, int(rate * rtt))
        now += max(rtt, octets / rate)
        receiver.extend([bytes(octets)], octets, now)
        receiver.read(octets)
    return receiver.window() << receiver.scale


def test_the_window_grows_to_twice_what_a_round_trip_brings() -> None:
    assert fed(1e6, 0.1, 10) == pytest.approx(1 << 20, rel=0.01)  # enough as it began
    assert 3e6 < fed(20e6, 0.1, 10) < 4.5e6
    assert fed(100e6, 0.1, 10) == 8 << 20


def test_the_window_never_shrinks_again() -> None:
    receiver = Receiver(0, 1360, 8 << 20)
    receiver.scale = scale_for(8 << 20)
    receiver.rtt = 0.1
    now, before = 1.0, 0
    for rate in (50e6, 50e6, 50e6, 50e6, 1e6, 1e5, 1e6):
        receiver.announced(receiver.window())
        octets = min(receiver.edge - receiver.nxt, int(rate * 0.1))
        now += 0.1
        receiver.extend([bytes(octets)], octets, now)
        receiver.read(octets)
        window = receiver.window() << receiver.scale
        assert window >= before
        before = window

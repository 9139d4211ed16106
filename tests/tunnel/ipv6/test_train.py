"""Trains keep the promise of machine.py."""

from hypothesis import given
from hypothesis import strategies as st

from builder_orch.tunnel.ipv6.train import couple, train_limit
from builder_orch.tunnel.machine import TRAIN_PACKETS, Train


@given(st.lists(st.tuples(st.integers(40, 2000), st.integers(0, 100)), max_size=20))
def test_packets_of_a_train_are_equal_but_for_a_shorter_last(groups: list[tuple[int, int]]) -> None:
    trains: list[Train] = []
    for size, number in groups:
        couple(trains, [bytes(size)] * number)
    sizes = [len(packet) for train in trains for packet in train]
    assert sizes == [size for size, number in groups for _ in range(number)]
    for train in trains:
        assert len({len(packet) for packet in train[:-1]}) <= 1
        assert len(train[-1]) <= len(train[0])
        assert len(train) <= TRAIN_PACKETS
        assert sum(len(packet) + 32 for packet in train) <= 65_535


def test_full_packets_make_full_trains() -> None:
    assert train_limit(1420) == TRAIN_PACKETS
    assert train_limit(9000) == 7
    assert train_limit(65_535) == 1

"""A train's checksums by dot products are those by integers, whatever the payloads."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder_orch.tunnel.ipv6 import header
from builder_orch.tunnel.ipv6.sums import MAX_SIZE, by_integers, by_products, fields


@given(st.binary(min_size=1, max_size=4000), st.integers(0, 1 << 33), st.data())
def test_both_ways_agree_with_the_sum_of_each_payload(
    chunk: bytes, rest: int, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(chunk) - 1))
    size = data.draw(st.integers(1, len(chunk) - at))
    count = (len(chunk) - at) // size
    payloads = [chunk[at + n * size : at + (n + 1) * size] for n in range(count)]
    expected = [
        65535 - ((header.total(payload) << 8) + rest + n * size) % 65535
        for n, payload in enumerate(payloads)
    ]
    for way in (by_products, by_integers, fields):
        assert way(chunk, at, size, count, rest) == expected


@pytest.mark.parametrize("size", [1360, 1348, 1220, MAX_SIZE])
def test_the_largest_octets_do_not_overflow(size: int) -> None:
    chunk = b"\xff" * (size * 3)
    total = header.total(chunk[:size]) << 8
    expected = [65535 - (total + n * size) % 65535 for n in range(3)]
    assert by_products(chunk, 0, size, 3, 0) == expected


def test_longer_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="longer"):
        by_products(bytes(MAX_SIZE + 1), 0, MAX_SIZE + 1, 1, 0)


def test_this_processor_multiplies_exactly() -> None:
    assert fields is by_products

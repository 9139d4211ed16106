"""Arithmetic on the circle."""

from hypothesis import given
from hypothesis import strategies as st

from builder_orch.tunnel.ipv6.seq import HALF, MASK, MODULUS, unwrap, wire


@given(st.integers(0, 1 << 40), st.integers(-HALF, HALF - 1))
def test_what_travelled_is_found_again_near_where_it_was(near: int, distance: int) -> None:
    assert unwrap(wire(near + distance), near) == near + distance


@given(st.integers(0, MASK), st.integers(0, 1 << 40))
def test_unwrapped_numbers_keep_their_bits_and_stay_near(value: int, near: int) -> None:
    number = unwrap(value, near)
    assert wire(number) == value
    assert abs(number - near) <= HALF


def test_the_number_after_the_last_is_the_first() -> None:
    assert wire(MODULUS) == 0
    assert unwrap(0, MASK) == MODULUS
    assert unwrap(MASK, MODULUS) == MASK

"""What both cores share."""

from hypothesis import given
from hypothesis import strategies as st

from builder_orch.tunnel.machine import Laid


@given(st.integers(1, 9), st.integers(1, 60), st.slices(9), st.data())
def test_packets_laid_end_to_end_are_the_list_of_them(
    size: int, count: int, part: slice, data: st.DataObject
) -> None:
    octets = bytes(number % 256 for number in range(size * count))
    packets = [octets[at : at + size] for at in range(0, len(octets), size)]
    laid = Laid(octets, size)
    assert len(laid) == count
    assert list(laid) == packets
    assert laid[part] == packets[part]
    index = data.draw(st.integers(-count, count - 1))
    assert laid[index] == packets[index]
    assert packets[index] in laid

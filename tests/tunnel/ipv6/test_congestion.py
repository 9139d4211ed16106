"""CUBIC by its formulas."""

import pytest

from builder_orch.tunnel.ipv6.congestion import Delivered
from tests.tunnel.ipv6.cubic import Cubic

MSS = 1000


def acked(octets: int, now: float = 0.0, *, limited: bool = True) -> Delivered:
    return Delivered(now, octets, 0, 0.1, 0.1, None, False, limited, 0, 0, 0, 0, 0)


def avoiding(segments: int) -> Cubic:
    """In congestion avoidance after a loss at this window."""
    cubic = Cubic(MSS)
    cubic.cwnd = segments * MSS
    cubic.on_loss(0, 0.0)
    return cubic


def test_it_begins_with_ten_segments_and_doubles() -> None:
    cubic = Cubic(MSS)
    assert cubic.cwnd == 10 * MSS
    cubic.on_ack(acked(10 * MSS), False)
    assert cubic.cwnd == 20 * MSS


def test_a_window_that_did_not_limit_does_not_grow() -> None:
    cubic = Cubic(MSS)
    cubic.on_ack(acked(10 * MSS, limited=False), False)
    cubic.on_ack(acked(10 * MSS), True)
    assert cubic.cwnd == 10 * MSS


def test_a_loss_takes_three_tenths() -> None:
    assert avoiding(100).cwnd == 70 * MSS


def test_it_is_back_where_it_was_after_k_seconds() -> None:
    cubic = avoiding(1000)
    k = (300 / 0.4) ** (1 / 3)
    now = 0.0
    while now < k:
        cubic.on_ack(acked(cubic.cwnd // 10, now), False)
        now += 0.01
    assert cubic.cwnd == pytest.approx(1000 * MSS, rel=0.02)
    while now < k + 3:
        cubic.on_ack(acked(cubic.cwnd // 10, now), False)
        now += 0.01
    assert cubic.cwnd == pytest.approx((1000 + 0.4 * 3**3) * MSS, rel=0.02)


def test_small_windows_grow_as_reno_would() -> None:
    cubic = avoiding(10)
    for number in range(100):
        cubic.on_ack(acked(cubic.cwnd, number * 0.001), False)
    # Half a segment for each window until it is back at 10, then a whole one.
    assert cubic.cwnd > 90 * MSS


def test_fast_convergence_remembers_less() -> None:
    cubic = avoiding(100)
    cubic.on_loss(0, 0.0)
    assert cubic.cwnd == 49 * MSS
    k = ((70 * 0.85 - 49) / 0.4) ** (1 / 3)
    now = 0.0
    while now < k:
        cubic.on_ack(acked(cubic.cwnd // 20, now), False)
        now += 0.005
    assert 55 * MSS < cubic.cwnd < 70 * MSS


def test_after_a_timeout_it_starts_from_one_segment() -> None:
    cubic = Cubic(MSS)
    cubic.cwnd = 100 * MSS
    cubic.on_rto(0, 0.0)
    assert cubic.cwnd == MSS
    for _ in range(20):
        cubic.on_ack(acked(cubic.cwnd), False)
    assert cubic.cwnd > 70 * MSS


def test_idleness_takes_it_back_to_ten_segments() -> None:
    cubic = Cubic(MSS)
    cubic.cwnd = 100 * MSS
    cubic.on_idle()
    assert cubic.cwnd == 10 * MSS


def test_losses_one_after_another_leave_two_segments() -> None:
    cubic = Cubic(MSS)
    for _ in range(50):
        cubic.on_loss(0, 0.0)
    assert cubic.cwnd == 2 * MSS

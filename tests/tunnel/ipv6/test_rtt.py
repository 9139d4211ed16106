"""RFC 6298 by its numbers."""

import pytest

from builder_orch.tunnel.ipv6.rtt import (
    INITIAL_RTO,
    MAX_REMOTES,
    MIN_RTO,
    Remotes,
    RoundTrip,
)


def test_the_first_timeout_is_one_second() -> None:
    assert RoundTrip().rto == 1.0


def test_the_first_sample_sets_everything() -> None:
    rtt = RoundTrip()
    rtt.sample(0.4, 1.0)
    assert (rtt.srtt, rtt.variation, rtt.min_rtt) == (0.4, 0.2, 0.4)
    assert rtt.rto == pytest.approx(0.4 + 4 * 0.2)


def test_later_samples_weigh_an_eighth_and_a_quarter() -> None:
    rtt = RoundTrip()
    rtt.sample(0.4, 1.0)
    rtt.sample(0.8, 2.0)
    assert rtt.variation == pytest.approx(0.75 * 0.2 + 0.25 * 0.4)
    assert rtt.srtt == pytest.approx(0.875 * 0.4 + 0.125 * 0.8)


def test_timeouts_double_up_to_a_minute_and_never_fall_below_200_ms() -> None:
    rtt = RoundTrip()
    for _ in range(50):
        rtt.sample(0.001, 1.0)
    assert rtt.rto == 0.2
    rtt.backoff = 3
    assert rtt.rto == pytest.approx(1.6)
    rtt.backoff = 1000
    assert rtt.rto == 60.0


def test_a_minimum_is_forgotten_after_a_while() -> None:
    rtt = RoundTrip()
    rtt.sample(0.01, 0.0)
    rtt.sample(0.05, 30.0)
    assert rtt.min_rtt == 0.01
    rtt.sample(0.05, 61.0)
    assert rtt.min_rtt == 0.05


def test_after_a_lost_syn_the_first_data_gets_three_seconds() -> None:
    rtt = RoundTrip()
    rtt.syn_was_lost()
    assert rtt.rto == 3.0
    rtt.sample(0.1, 0.0)
    rtt.syn_was_lost()
    assert rtt.rto < 1


def test_a_second_connection_begins_with_what_the_first_one_measured() -> None:
    remotes, fresh = Remotes(), RoundTrip()
    remotes.prepare(b"there", fresh)
    assert fresh.rto == INITIAL_RTO
    first = RoundTrip()
    remotes.remember(b"there", first)
    first.sample(0.2, 1.0)
    remotes.remember(b"there", first)
    remotes.prepare(b"there", fresh)
    assert fresh.rto == pytest.approx(0.6)
    elsewhere = RoundTrip()
    remotes.prepare(b"elsewhere", elsewhere)
    assert elsewhere.rto == INITIAL_RTO


@pytest.mark.parametrize(("measured", "expected"), [(0.001, MIN_RTO), (5.0, INITIAL_RTO)])
def test_a_handshake_is_neither_hasty_nor_slower_than_without(
    measured: float, expected: float
) -> None:
    fresh = RoundTrip()
    fresh.expect(measured)
    assert fresh.rto == expected
    assert fresh.measured is None


def test_a_lost_syn_asks_for_most_patience_on_an_unknown_path() -> None:
    stranger, known = RoundTrip(), RoundTrip()
    known.expect(0.25)
    for fresh in (stranger, known):
        fresh.syn_was_lost()
    assert (stranger.rto, known.rto) == (3.0, 1.0)


def test_only_so_many_remotes_are_remembered() -> None:
    remotes, known = Remotes(), RoundTrip()
    known.sample(0.1, 0.0)
    for number in range(MAX_REMOTES + 1):
        remotes.remember(b"%d" % number, known)
    first, last = RoundTrip(), RoundTrip()
    remotes.prepare(b"0", first)
    remotes.prepare(b"%d" % MAX_REMOTES, last)
    assert first.rto == INITIAL_RTO
    assert last.rto < INITIAL_RTO

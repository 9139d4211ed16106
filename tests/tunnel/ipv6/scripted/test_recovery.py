"""The end of a recovery, and what its acknowledgements say about the path (RFC 6298, RFC 8985)."""

from itertools import pairwise

from tests.tunnel.ipv6.scripted.test_retransmission import MSS, flight, nth
from tests.tunnel.ipv6.scripted.trace import play

# -- the tail of what was resent


def test_a_lost_repetition_with_nothing_behind_it_is_probed_before_the_timer() -> None:
    """RFC 8985 §7.2 probes no tail in recovery; waiting 200 ms for 20 would be the alternative."""
    trace = flight(4)
    trace.play(f"""
        +0.02 < A 1 ack 1 sack {1 + MSS}:{1 + 4 * MSS}
        ..0.02 > A {nth(0)} ack 1
        +0.02..0.1 > A {nth(0)} ack 1
        +0.02 < A 1 ack {1 + 4 * MSS}
        idle
    """)


def test_a_tail_that_says_nothing_is_probed_once_and_then_left_to_the_timer() -> None:
    trace = flight(4)
    trace.play(f"""
        +0.02 < A 1 ack 1 sack {1 + MSS}:{1 + 4 * MSS}
        ..0.02 > A {nth(0)} ack 1
        ..0.1 > A {nth(0)} ack 1
        +0.1 silence
        ..1 > A {nth(0)} ack 1
        +0.2 silence
        drain
    """)


def test_after_a_timeout_only_progress_earns_a_probe() -> None:
    """RFC 6298 §5.5: an unanswered timeout doubles the next, and nothing goes in between."""
    trace = flight(4)
    trace.play("+8 drain")
    times = [sent.at for sent in trace.sent if sent.seq == 1 and sent.end > 1]
    waits = [after - before for before, after in pairwise(times)][1:]
    assert len(waits) >= 4
    for before, after in pairwise(waits):
        assert 1.9 * before <= after <= 2.1 * before


def test_a_probe_of_a_repetition_that_had_arrived_changes_nothing() -> None:
    trace = flight(4)
    trace.play(f"""
        +0.02 < A 1 ack 1 sack {1 + MSS}:{1 + 4 * MSS}
        ..0.02 > A {nth(0)} ack 1
        ..0.1 > A {nth(0)} ack 1
        < A 1 ack {1 + 4 * MSS}
        +0.02 < A 1 ack {1 + 4 * MSS} sack {nth(0)}
        +1 silence
        idle
    """)


def test_without_sack_a_repetition_is_not_probed() -> None:
    trace = flight(4, "nosack")
    trace.play(f"""
        +0.02 < A 1 ack 1
        < A 1 ack 1
        < A 1 ack 1
        > A {nth(0)} ack 1
        +0.15 silence
        ..1 > A {nth(0)} ack 1
        drain
    """)


# -- round trips during repairs


def test_a_selection_of_something_sent_once_ends_the_back_off() -> None:
    """RFC 6298 §5: a new measurement, of a segment that was sent once, collapses the timeout."""
    trace = flight(1)
    trace.play(f"""
        +0.5 drain
        < A 1 ack {1 + MSS}
        write {4 * MSS}
        ..0.5 ~> A {nth(4)} ack 1
        +0.02 < A 1 ack {1 + MSS} sack {1 + 2 * MSS}:{1 + 5 * MSS}
        ..0.05 > A {nth(1)} ack 1
        ..0.1 > A {nth(1)} ack 1
        +0.15..0.26 > A {nth(1)} ack 1
        drain
    """)


def test_an_outage_is_not_taken_for_a_round_trip_when_old_selections_come_late() -> None:
    """They were given up, so when they arrived nobody knows; RTO stays what the path asks for."""
    trace = flight(4)
    trace.play(f"""
        +9 drain
        < A 1 ack 1 sack {1 + MSS}:{1 + 4 * MSS}
        +0.02 drain
        < A 1 ack {1 + 4 * MSS}
        write 100
        > A {1 + 4 * MSS}:{101 + 4 * MSS} ack 1
        +0.02 < A 1 ack {101 + 4 * MSS}
        write 100
        > A {101 + 4 * MSS}:{201 + 4 * MSS} ack 1
        ..1 > A {101 + 4 * MSS}:{201 + 4 * MSS} ack 1
        drain
    """)


def test_larger_segments_are_tried_again_after_a_black_hole() -> None:
    """RFC 4821 §7, RFC 8899 §5.3: one segment, other data behind it, and its loss is no timeout."""
    trace = play(f"""
        open
        write {2 * MSS}
        +7 drain
        take {1 + 2 * MSS}
        drain
    """)
    assert trace.sent[-1].end - trace.sent[-1].seq <= 1220
    trace.play("+10 silence")
    trace.play("write 20000\ntake 22721\ndrain")
    sizes = [sent.end - sent.seq for sent in trace.sent]
    assert sizes.count(MSS) > sizes[: sizes.index(1220)].count(MSS)
    trace.play("write 20000\n+0.001 drain")
    assert trace.sent[-1].end - trace.sent[-1].seq == MSS

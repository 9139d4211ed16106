"""Sending again: by timer, by duplicates, by time, by a probe (RFC 6298, 5681, 6582, 8985)."""

from itertools import pairwise

import pytest

from tests.tunnel.ipv6.scripted.trace import Trace, play

MSS = 1360


def flight(segments: int, how: str = "") -> Trace:
    """So many full segments on their way, all sent together."""
    end = 1 + segments * MSS
    return play(f"""
        open {how}
        write {segments * MSS}
        >> A 1:{end} ack 1
    """)


def nth(number: int) -> str:
    """The numbers of the full segment `number`, counted from 0."""
    return f"{1 + number * MSS}:{1 + (number + 1) * MSS}"


# -- the timer (RFC 6298)


def test_the_timer_doubles_each_time_up_to_a_minute() -> None:
    """§5.5; §2.5 lets the ceiling be 60 s."""
    trace = play("""
        open nosack
        write 100
        +300 drain
    """)
    waits = [b.at - a.at for a, b in pairwise(sent for sent in trace.sent if sent.end > sent.seq)]
    assert 0.06 <= waits[0] <= 1
    assert max(waits) <= 60.001
    for before, after in pairwise(waits):
        assert after == pytest.approx(min(2 * before, 60))


def test_data_without_any_answer_ends_it_not_before_100_s() -> None:
    """RFC 9293 §3.8.3: R2."""
    trace = flight(1)
    trace.play("""
        +100 drain
        end none
        +1000 drain
        end timed out
        events readable closed
        idle
    """)


def test_before_any_measurement_the_timer_waits_a_second() -> None:
    """§2.1: the handshake of an accepted connection took two SYNs, so nothing was measured."""
    play("""
        listen
        < S 0 mss 1360
        > SA 0 ack 1
        +0.1 < S 0 mss 1360
        > SA 0 ack 1
        +0.1 < A 1 ack 1
        write 100
        > A 1:101 ack 1
        +0.99 silence
        ..2.02 > A 1:101 ack 1
    """)


def test_progress_starts_the_timer_anew() -> None:
    """§5.3."""
    trace = flight(2, "nosack")
    trace.play(f"""
        +0.15 < A 1 ack {1 + MSS}
        +0.1 silence
        ..2 > A {nth(1)} ack 1
    """)


def test_when_all_is_acknowledged_the_timer_stops() -> None:
    """§5.2."""
    trace = flight(2)
    trace.play(f"""
        +0.02 < A 1 ack {1 + 2 * MSS}
        +100 silence
        idle
    """)


def test_after_a_timeout_the_first_hole_goes_first() -> None:
    """§5.4: the earliest that is not acknowledged."""
    trace = flight(4, "nosack")
    trace.play(f"""
        +0.02 < A 1 ack {1 + MSS}
        +0.06..1 > A {nth(1)} ack 1
        take {1 + 4 * MSS}
        idle
    """)


def test_a_round_trip_of_something_sent_twice_is_not_measured() -> None:
    """§3: Karn. 5 ms after the copy is no round trip of 5 ms, nor one of 405 ms."""
    trace = flight(1, "nosack")
    trace.play(f"""
        ..1 > A 1:{1 + MSS} ack 1
        +0.005 < A 1 ack {1 + MSS}
        write 100
        > A {1 + MSS}:{101 + MSS} ack 1
        +0.06..1 > A {1 + MSS}:{101 + MSS} ack 1
        drain
    """)


def test_an_outage_does_not_count_as_a_round_trip() -> None:
    """§3, §5: once something sent once is acknowledged, the timer is what it was before."""
    play("""
        open nosack
        write 100
        +10 drain
        < A 1 ack 101
        write 100
        > A 101:201 ack 1
        +0.02 < A 1 ack 201
        write 100
        > A 201:301 ack 1
        +0.06..1 > A 201:301 ack 1
    """)


def test_a_path_that_got_slower_than_the_timeout_is_learned() -> None:
    """Karn's second half: the longer timeout stays until something sent once is acknowledged."""
    trace = play("open nosack")
    spurious = 0
    for number in range(8):
        before = len(trace.sent)
        trace.play("write 100\n+0.5 drain")
        spurious = len(trace.sent) - before - 1
        trace.play(f"< A 1 ack {101 + 100 * number}\ndrain")
    assert spurious == 0


def test_a_steady_round_trip_below_the_timeout_is_never_cut_short() -> None:
    trace = play("open nosack")
    for number in range(20):
        trace.play(f"""
            write 100
            ..1 > A {1 + 100 * number}:{101 + 100 * number} ack 1
            +0.1 < A 1 ack {101 + 100 * number}
            silence
        """)


def test_a_slow_path_is_given_its_time() -> None:
    """A round trip of 2 s from the start: the timer must not fire within it once it is known."""
    play("""
        connect
        > S 0
        +0.9 < SA 0 ack 1 mss 1360
        > A 1 ack 1
        write 100
        > A 1:101 ack 1
        +1.5 silence
        +0.4 < A 1 ack 101
        write 100
        > A 101:201 ack 1
        +1.9 < A 1 ack 201
        silence
    """)


def test_a_wildly_varying_round_trip_widens_the_timer() -> None:
    """§2.3: RTTVAR."""
    trace = play("open nosack")
    at = 1
    for number in range(10):
        wait = 0.01 if number % 2 else 0.19
        trace.play(f"""
            write 100
            > A {at}:{at + 100} ack 1
            +{wait} < A 1 ack {at + 100}
        """)
        at += 100
    trace.play(f"""
        write 100
        > A {at}:{at + 100} ack 1
        +0.3 silence
    """)


def test_the_peer_getting_it_at_last_ends_the_repetition() -> None:
    trace = flight(3, "nosack")
    trace.play(f"""
        +2 drain
        < A 1 ack {1 + 3 * MSS}
        silence
        idle
    """)


# -- duplicates, without SACK (RFC 5681 §3.2, RFC 6582, RFC 3042)

DUPLICATE = "< A 1 ack 1\n"


def test_three_duplicates_bring_the_first_segment_again() -> None:
    trace = flight(5, "nosack")
    trace.play(f"""
        +0.02 < A 1 ack 1
        < A 1 ack 1
        silence
        < A 1 ack 1
        > A {nth(0)} ack 1
    """)


def test_more_duplicates_do_not_bring_it_a_second_time() -> None:
    trace = flight(6, "nosack")
    trace.play(f"""
        +0.02 silence
        {DUPLICATE} {DUPLICATE} < A 1 ack 1
        > A {nth(0)} ack 1
        {DUPLICATE} < A 1 ack 1
        silence
    """)


PARTIAL = f"""
    open nosack
    write {6 * MSS}
    >> A 1:{1 + 6 * MSS} ack 1
    +0.02 < A 1 ack 1
    < A 1 ack 1
    < A 1 ack 1
    > A {nth(0)} ack 1
    +0.02 < A 1 ack {1 + 2 * MSS}
    ..0.02 > A {nth(2)} ack 1
"""


def test_each_partial_acknowledgement_brings_the_next_hole() -> None:
    """RFC 6582 §3.2 step 3."""
    play(f"""{PARTIAL}
        +0.02 drain
        < A 1 ack {1 + 4 * MSS}
        ..0.02 ~> A {nth(4)} ack 1
        +0.02 drain
        < A 1 ack {1 + 6 * MSS}
        idle
    """)


def test_a_partial_acknowledgement_brings_one_segment_only() -> None:
    play(f"""{PARTIAL}
        +0.01 silence
    """)


@pytest.mark.parametrize(
    "segment",
    [
        "A 1:2 ack 1",
        "A 1 ack 1 win 60000",
        "A 1 ack 0",
    ],
    ids=["with data", "with another window", "older"],
)
def test_what_says_something_else_is_no_duplicate(segment: str) -> None:
    """RFC 5681 §2."""
    trace = flight(5, "nosack")
    trace.play("+0.02 silence\n")
    for number in range(3):
        said = segment
        if "win" in segment:
            said = f"A 1 ack 1 win {60000 + number}"
        elif ":" in segment:
            said = f"A {1 + number}:{2 + number} ack 1"
        trace.play(f"< {said}\ndrain")
    again = [sent for sent in trace.sent if sent.seq == 1 and sent.end > 1]
    assert len(again) == 1


def test_duplicates_with_nothing_outstanding_mean_nothing() -> None:
    play("open nosack\n" + 5 * DUPLICATE + "write 100\n> A 1:101 ack 1")


def test_the_first_two_duplicates_let_new_segments_out() -> None:
    """RFC 3042: one for each when cwnd holds the sender, both at the second at the latest."""
    trace = play("""
        open nosack
        write 60000
        +0.02 drain
    """)
    end = max(sent.end for sent in trace.sent)
    trace.play(DUPLICATE + "drain\n" + DUPLICATE + "drain\n")
    assert max(sent.end for sent in trace.sent) == end + 2 * MSS
    assert trace.sent[-1].seq > 1


# -- with SACK (RFC 6675, RFC 8985 §6)


def test_a_hole_that_three_segments_have_passed_is_filled() -> None:
    trace = flight(6)
    trace.play(f"""
        +0.02 < A 1 ack 1 sack {1 + MSS}:{1 + 4 * MSS}
        ..0.004 > A {nth(0)} ack 1
        +0.02 < A 1 ack {1 + 6 * MSS}
        silence
        idle
    """)


def test_only_the_holes_are_filled() -> None:
    trace = flight(8)
    trace.play(f"""
        +0.02 < A 1 ack 1 sack {1 + 5 * MSS}:{1 + 8 * MSS} {1 + MSS}:{1 + 3 * MSS}
        ..0.02 > A {nth(0)} ack 1
        ..0.02 >> A {1 + 3 * MSS}:{1 + 5 * MSS} ack 1
        +0.02 < A 1 ack {1 + 8 * MSS}
        idle
    """)


def test_one_segment_passed_waits_a_quarter_of_a_round_trip() -> None:
    """RFC 8985 §6.2: less than DUP_THRESH, so it may be mere reordering."""
    trace = flight(4)
    trace.play(f"""
        +0.02 < A 1 ack 1 sack {1 + MSS}:{1 + 2 * MSS}
        +0.004 silence
        ..0.04 > A {nth(0)} ack 1
    """)


def test_a_little_reordering_repeats_nothing() -> None:
    """tailscale #20893."""
    trace = flight(4)
    trace.play(f"""
        +0.02 < A 1 ack 1 sack {1 + MSS}:{1 + 2 * MSS}
        +0.002 < A 1 ack {1 + 2 * MSS}
        +0.002 < A 1 ack {1 + 2 * MSS} sack {1 + 3 * MSS}:{1 + 4 * MSS}
        +0.002 < A 1 ack {1 + 4 * MSS}
        +1 silence
        idle
    """)


def test_a_lost_repetition_is_noticed_and_repeated() -> None:
    """RFC 8985 §6.2: RACK knows when the copy went out; no timeout is needed."""
    trace = flight(6)
    trace.play(f"""
        +0.02 < A 1 ack 1 sack {1 + MSS}:{1 + 6 * MSS}
        ..0.02 > A {nth(0)} ack 1
        write {2 * MSS}
        >> A {1 + 6 * MSS}:{1 + 8 * MSS} ack 1
        +0.02 < A 1 ack 1 sack {1 + MSS}:{1 + 8 * MSS}
        ..0.05 > A {nth(0)} ack 1
    """)


def spurious_rounds(rounds: int, late: float) -> list[int]:
    """How often a segment that comes `late` behind three others is sent again, each round."""
    trace = play("open")
    counts = []
    at = 1
    for _ in range(rounds):
        end = at + 4 * MSS
        trace.play(f"""
            write {4 * MSS}
            ..0.05 >> A {at}:{end} ack 1
        """)
        paced = trace.sent[-1].at - trace.sent[-4].at
        trace.play("+0.02 silence")
        before = len(trace.sent)
        if paced < late:  # else pacing kept them so far apart that they stay in order
            trace.play(f"""
                < A 1 ack {at} sack {at + MSS}:{end}
                +{late - paced:.6f} drain
            """)
        counts.append(len(trace.sent) - before)
        trace.play(f"< A 1 ack {end}\n")
        if counts[-1]:
            trace.play(f"+0.02 < A 1 ack {end} sack {at}:{at + MSS}")
        trace.play("+0.1 drain")
        at = end
    return counts


def test_reordering_once_seen_is_tolerated_for_a_quarter_of_a_round_trip() -> None:
    """RFC 8985 §6.2 step 4: with reordering seen, three segments passed are no loss at once."""
    assert sum(spurious_rounds(8, 0.004)[1:]) == 0


def test_more_reordering_is_tolerated_once_dsacks_report_it() -> None:
    """RACK.reo_wnd grows with each round that reported one, up to a whole round trip."""
    assert sum(spurious_rounds(12, 0.012)[5:]) == 0


# -- the tail (RFC 8985 §7)


def test_a_lost_tail_is_probed_with_its_last_segment() -> None:
    """Within two round trips, far below the timeout."""
    trace = flight(4)
    trace.play(f"""
        +0.02 < A 1 ack {1 + 2 * MSS}
        +0.02..0.1 > A {nth(3)} ack 1
        +0.02 < A 1 ack {1 + 2 * MSS} sack {1 + 3 * MSS}:{1 + 4 * MSS}
        ..0.1 > A {nth(2)} ack 1
        +0.02 < A 1 ack {1 + 4 * MSS}
        idle
    """)


def test_a_probe_prefers_what_was_never_sent() -> None:
    """§7.3: new data is the better question, if the window takes it."""
    trace = play(f"""
        open win {4 * MSS}
        write {6 * MSS}
        >> A 1:{1 + 4 * MSS} ack 1
        +0.005 < A 1 ack 1 win {6 * MSS}
        drain
    """)
    trace.play("+0.3 drain")
    assert max(sent.end for sent in trace.sent) == 1 + 6 * MSS


def test_a_tail_is_probed_once_and_then_left_to_the_timer() -> None:
    trace = flight(4)
    trace.play(f"""
        +0.02 silence
        ..0.1 > A {nth(3)} ack 1
        +0.1 silence
        ..1 > A {nth(0)} ack 1
        drain
    """)


def test_a_lone_segment_is_left_the_time_of_a_delayed_acknowledgement() -> None:
    """§7.2: a peer may wait up to 200 ms before it acknowledges one segment."""
    trace = flight(1)
    trace.play(f"""
        +0.19 silence
        ..1 > A {nth(0)} ack 1
    """)


def test_a_probe_in_the_place_of_a_timeout_backs_nothing_off() -> None:
    """§7.2: none comes after the RTO; where it would, it goes instead of the first repetition."""
    trace = play("open\nwrite 100\n+1 drain")
    times = [sent.at for sent in trace.sent if sent.end > sent.seq]
    assert [round(at - times[0], 1) for at in times] == [0, 0.2, 0.4, 0.8]
    trace.play("< A 1 ack 101\nidle")


def test_without_sack_nothing_is_probed() -> None:
    trace = flight(4, "nosack")
    trace.play(f"""
        +0.15 silence
        ..1 > A {nth(0)} ack 1
        drain
    """)


def test_after_a_probe_that_was_needless_nothing_more_is_repeated() -> None:
    """§7.4: the DSACK tells that the tail had arrived."""
    trace = flight(4)
    trace.play(f"""
        ..0.1 > A {nth(3)} ack 1
        < A 1 ack {1 + 4 * MSS}
        +0.02 < A 1 ack {1 + 4 * MSS} sack {1 + 3 * MSS}:{1 + 4 * MSS}
        +1 silence
        idle
    """)


# -- black holes (RFC 4821, RFC 8899 §4.3)


def test_full_segments_that_never_arrive_are_cut_to_1280_octets() -> None:
    trace = flight(2, "nosack")
    trace.play("+6 drain")
    firsts = [sent.end - 1 for sent in trace.sent if sent.seq == 1 and sent.end > 1]
    assert firsts[0] == MSS
    assert firsts[-1] == 1220
    trace.play(f"take {1 + 2 * MSS}\ndrain\nidle")

"""Windows: closed, silly, shrinking, opened again; ours and the peer's (RFC 9293 §3.8.6)."""

from itertools import pairwise

import pytest

from tests.tunnel.ipv6.scripted.trace import Trace, play

# -- the peer's window is closed

CLOSED = """
    open nosack win 1000
    write 3000
    > A 1:1001 ack 1
    +0.02 < A 1 ack 1001 win 0
"""


def test_nothing_goes_into_a_closed_window_before_the_first_question() -> None:
    """§3.8.6.1: the first after a retransmission timeout."""
    trace = play(f"""{CLOSED}
        +0.06 silence
        +1 drain
    """)
    assert len(trace.sent) > 3


def test_questions_about_a_closed_window_come_ever_more_slowly() -> None:
    """§3.8.6.1 (SHLD-30); each is something that the peer must answer."""
    trace = play(CLOSED)
    before = len(trace.sent)
    for _ in range(6):
        trace.play("..120 ~> A 1000 ack 1\n< A 1 ack 1001 win 0")
    times = [sent.at for sent in trace.sent[before:]]
    waits = [later - earlier for earlier, later in pairwise(times)]
    assert all(b >= 1.5 * a for a, b in pairwise(waits))
    trace.play("end none")


def test_a_closed_window_is_asked_about_for_ever_while_it_is_answered() -> None:
    """§3.8.6.1 (MUST-37): never give up on a peer that answers."""
    trace = play(CLOSED)
    before = len(trace.sent)
    while trace.now < 1000 + 7200:
        trace.play("+0.001..120 ~> A 1000 ack 1\n< A 1 ack 1001 win 0")
    assert len(trace.sent) - before > 7200 / 61
    trace.play("""
        end none
        < A 1 ack 1001 win 4000
        >> A 1001:3001 ack 1
    """)


def test_a_closed_window_that_is_not_answered_ends_it_not_before_100_s() -> None:
    """§3.8.3: R2."""
    play(f"""{CLOSED}
        +99 drain
        end none
        +1000 drain
        end timed out
        idle
    """)


def test_an_opened_window_is_used_at_once() -> None:
    play(f"""{CLOSED}
        +0.1 < A 1 ack 1001 win 2000
        >> A 1001:3001 ack 1
    """)


def test_a_lost_window_update_is_found_out() -> None:
    """The answer to our question tells what the update said."""
    play(f"""{CLOSED}
        ..1 > A 1000 ack 1
        < A 1 ack 1001 win 0
        ..2 > A 1000 ack 1
        < A 1 ack 1001 win 2000
        >> A 1001:3001 ack 1
    """)


def test_a_window_closed_from_the_start_is_asked_about() -> None:
    play("""
        open win 0
        write 100
        +0.05 silence
        ..0.1 > A 1 ack 1
        ..1.5 > A 0 ack 1
        < A 1 ack 1 win 500
        > A 1:101 ack 1
    """)


def test_without_anything_to_say_nobody_asks_about_a_closed_window() -> None:
    play("""
        open win 0
        ..0.2 > A 1 ack 1
        +1000 silence
        idle
    """)


def test_data_that_no_longer_fits_is_repeated_when_nobody_answers() -> None:
    """A window of zero, the acknowledgement of what is in flight lost: it is still sent again."""
    play("""
        open nosack win 2000
        write 1000
        > A 1:1001 ack 1
        +0.02 < A 1 ack 1 win 0
        ..1 ~> A 1:1001 ack 1
        < A 1 ack 1001 win 5000
        silence
        idle
    """)


def test_the_question_does_not_count_as_data() -> None:
    """A peer that takes an octet of it after all keeps the stream whole."""
    play(f"""{CLOSED}
        ..1 > A 1000 ack 1
        < A 1 ack 1001 win 1
        drain
        ..2 ~> A 1001:1002 ack 1
        < A 1 ack 1002 win 5000
        >> A 1002:3001 ack 1
    """)


# -- silly windows


def test_a_window_of_one_octet_is_not_filled_at_once_but_in_the_end() -> None:
    """§3.8.6.2.1: an override between 0.1 and 1 s."""
    play("""
        open win 1000
        write 1000
        > A 1:1001 ack 1
        +0.02 < A 1 ack 1001 win 1
        write 500
        +0.09 silence
        ..1 > A 1001:1002 ack 1
    """)


def test_half_of_the_largest_window_is_worth_a_segment() -> None:
    play("""
        open win 1000
        write 2000
        > A 1:1001 ack 1
        +0.02 < A 1 ack 1001 win 500
        > A 1001:1501 ack 1
    """)


def test_a_silly_window_behind_data_in_flight_is_left() -> None:
    """Neither a full segment nor the last: wait for the acknowledgement."""
    play("""
        open win 2000
        write 5000
        > A 1:1361 ack 1
        +0.01 silence
        +0.01 < A 1 ack 1361 win 2720
        >> A 1361:4081 ack 1
    """)


def test_the_last_octets_are_not_held_back() -> None:
    """Our applications talk in requests: there is no Nagle."""
    play("""
        open
        write 10
        > PA 1:11 ack 1
        write 10
        > PA 11:21 ack 1
    """)


def test_a_window_is_filled_to_its_last_full_segment() -> None:
    trace = play("""
        open win 5440
        write 20000
        >> A 1:5441 ack 1
        +0.01 silence
    """)
    assert max(sent.end for sent in trace.sent) == 5441


def test_the_first_flight_is_at_most_what_rfc_6928_allows() -> None:
    trace = play("""
        open
        write 60000
        +0.019 drain
    """)
    octets = max(sent.end for sent in trace.sent) - 1
    assert 2 * 1360 <= octets <= 14_600


# -- the peer takes its window back

SHRUNK = """
    open nosack win 4080
    write 8000
    >> A 1:4081 ack 1
    +0.02 < A 1 ack 1361 win 500
"""


def test_data_beyond_a_window_that_shrank_is_kept() -> None:
    """§3.8.6 (MUST-34): a sender must be robust against it."""
    play(f"""{SHRUNK}
        +0.02 < A 1 ack 4081 win 4080
        >> A 4081:8001 ack 1
    """)


def test_a_shrunk_window_lets_nothing_new_out() -> None:
    play(f"""{SHRUNK}
        +0.05 silence
    """)


def test_a_window_that_shrank_before_it_was_used_holds_back() -> None:
    trace = play("""
        open win 8000
        write 1360
        > A 1:1361 ack 1
        +0.02 < A 1 ack 1361 win 1400
        write 6640
        +0.03 drain
    """)
    assert trace.sent[-1].end == 2721


def test_what_a_shrunk_window_refused_is_sent_again_in_the_end() -> None:
    play(f"""{SHRUNK}
        ..1 ~> A 1361:2721 ack 1
        < A 1 ack 1861 win 8000
        take 8001
    """)


def test_a_window_that_shrank_to_nothing_is_survived() -> None:
    """gvisor #10312: in flight when it closed, taken when it opens."""
    play("""
        open nosack win 4080
        write 8000
        >> A 1:4081 ack 1
        +0.02 < A 1 ack 1 win 0
        +5 drain
        end none
        < A 1 ack 1 win 8000
        take 8001
        idle
    """)


def test_an_older_segment_does_not_change_the_window() -> None:
    """§3.10.7.4: only one that is newer by SEG.SEQ and SEG.ACK does (SND.WL1, SND.WL2)."""
    play("""
        open win 4080
        write 8160
        >> A 1:4081 ack 1
        +0.02 < A 101:201 ack 4081 win 1360
        ..0.02 ~> A 4081:5441
        drain
        < A 1:101 ack 4081 win 65535
        > A 5441 ack 201
        +0.005 silence
    """)


def test_an_older_acknowledgement_does_not_change_the_window() -> None:
    play("""
        open win 4080
        write 8160
        >> A 1:4081 ack 1
        +0.02 < A 1 ack 4081 win 1360
        ..0.02 > A 4081:5441
        < A 1 ack 1361 win 65535
        +0.005 silence
    """)


# -- our window


def filled(capacity: int) -> Trace:
    """A connection that nobody reads, filled to the brim in full segments."""
    trace = play("open", capacity=capacity)
    for start in range(1, capacity + 1, 1360):
        end = min(start + 1360, capacity + 1)
        trace.play(f"< A {start}:{end} ack 1\ndrain")
    trace.play("+0.6 drain")
    assert (trace.sent[-1].ack, trace.sent[-1].window) == (capacity + 1, 0)
    return trace


def test_what_a_full_window_cannot_hold_is_refused_and_answered() -> None:
    filled(13_600).play("""
        < A 13601:13602 ack 1
        > A 1 ack 13601 win 0
        readable 13600
    """)


def test_a_question_about_our_closed_window_is_answered() -> None:
    filled(13_600).play("""
        < A 13600 ack 1
        > A 1 ack 13601 win 0
        +60 < A 13600 ack 1
        > A 1 ack 13601 win 0
    """)


def test_reading_a_little_opens_nothing() -> None:
    """§3.8.6.2.2: not by less than a segment."""
    filled(13_600).play("""
        read 500
        +1 silence
        < A 13600 ack 1
        > A 1 ack 13601 win 0
    """)


def test_reading_enough_opens_the_window_unasked() -> None:
    """gVisor IncreaseWindowOnRead."""
    filled(13_600).play("""
        read 13600
        > A 1 ack 13601 win 13600
    """)


def test_a_small_buffer_opens_by_half() -> None:
    filled(1000).play("""
        read 400
        +1 silence
        read 100
        > A 1 ack 1001 win 500
    """)


def test_reading_with_the_window_wide_open_says_nothing() -> None:
    play("""
        open
        < A 1:101 ack 1
        ..0.5 > A 1 ack 101
        read 100
        +1 silence
    """)


def test_reading_says_nothing_when_the_window_cannot_be_told_any_wider() -> None:
    play("""
        open noscale
        < A 1:101 ack 1
        ..0.5 > A 1 ack 101 win 65535
        read 100
        +1 silence
    """)


@pytest.mark.parametrize("step", [1, 100, 1360, 5000])
def test_the_right_edge_never_retreats(step: int) -> None:
    """§3.8.6 (SHLD-14); gVisor NoWindowShrinking."""
    trace = play("open", capacity=20_000)
    for start in range(1, 20_001 - step, max(step, 500)):
        end = start + min(step, 1360)
        trace.play(f"< A {start}:{end} ack 1\ndrain\n+0.1 drain")
        if start % 3 == 0 and trace.connection.readable > 700:
            trace.play("read 700\ndrain")
    edges = [sent.ack + sent.window for sent in trace.sent if sent.flags == "A"]
    assert all(before <= after for before, after in pairwise(edges))


def test_data_across_the_right_edge_is_taken_up_to_it() -> None:
    """§3.10.7.4: cut to the window."""
    play(
        """
        open
        < A 1:3001 ack 1
        drain
        < A 3001:5001 ack 1
        > A 1 ack 4001 win 0
        read 4000
        ~> A 1 ack 4001
        < A 4001:5001 ack 1
        ..0.5 > A 1 ack 5001
        read 1000
        """,
        capacity=4000,
    )


def test_a_full_window_still_takes_acknowledgements() -> None:
    trace = filled(13_600)
    trace.play("""
        write 1000
        > A 1:1001 ack 13601 win 0
        < A 13601 ack 1001
        silence
        idle
    """)

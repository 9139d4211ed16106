"""The end: TIME-WAIT, resets of ours and resets of theirs."""

import pytest

from tests.tunnel.ipv6.scripted.test_states import CLOSE_WAIT, FIN_WAIT_1, FIN_WAIT_2, TIME_WAIT
from tests.tunnel.ipv6.scripted.trace import play

# -- TIME-WAIT


def test_the_wait_takes_two_lifetimes_of_a_segment_and_starts_anew_with_each_fin() -> None:
    """RFC 9293 §3.10.7.4, eighth; MSL is 30 s here."""
    play(f"""{TIME_WAIT}
        +50 < FA 1 ack 2
        > A 2 ack 2
        +59 < FA 1 ack 2
        > A 2 ack 2
        +61 idle
        < FA 1 ack 2
        > R 2
    """)


@pytest.mark.parametrize("segment", ["R 2", "RA 2 ack 2", "R 1", "R 100"])
def test_a_reset_does_not_cut_the_wait_short(segment: str) -> None:
    """RFC 1337."""
    play(f"""{TIME_WAIT}
        < {segment}
        silence
        < FA 1 ack 2
        > A 2 ack 2
    """)


def test_data_in_the_wait_is_acknowledged_only() -> None:
    play(f"""{TIME_WAIT}
        < A 50:150 ack 2
        > A 2 ack 2
        readable 0
    """)


def test_a_last_acknowledgement_in_the_wait_needs_no_answer() -> None:
    play(f"""{TIME_WAIT}
        < A 2 ack 2
        silence
    """)


def test_an_old_syn_in_the_wait_is_acknowledged() -> None:
    play(f"""{WE_CLOSED_WHAT_THEY_OPENED}
        < S 1 mss 1360
        > A 2 ack 2
    """)


WE_CLOSED_WHAT_THEY_OPENED = """
    accept
    close
    > FA 1 ack 1
    < FA 1 ack 2
    > A 2 ack 2
    events readable closed
"""


def test_a_new_syn_in_the_wait_opens_anew() -> None:
    """RFC 9293 §3.6.1 (MAY-2)."""
    trace = play(f"""{WE_CLOSED_WHAT_THEY_OPENED}
        +1 < S 3 mss 1360
        > SA 0 ack 4
        < A 4 ack 1
        events accepted
        state ESTABLISHED
    """)
    first, second = trace.initials
    assert 2 < second - first < 1 << 31


def test_a_new_connection_after_the_wait_begins_beyond_the_old_one() -> None:
    trace = play("""
        accept
        write 13000; close
        >> A 1:13001 ack 1
        > FA 13001 ack 1
        < FA 1 ack 13002
        > A 13002 ack 2
        +0.001 < S 3 mss 1360
        > SA 0 ack 4
    """)
    first, second = trace.initials
    assert 13_001 < second - first < 1 << 31


def test_a_syn_that_turns_out_to_be_old_leads_back_to_the_wait() -> None:
    """RFC 9293 §3.6.1 (MAY-2), its second condition."""
    trace = play(f"""{WE_CLOSED_WHAT_THEY_OPENED}
        +1 < S 3 mss 1360
        > SA 0 ack 4
        < R 4
        silence
    """)
    trace.initial = trace.initials[0]
    trace.play("""
        < FA 1 ack 2
        > A 2 ack 2
    """)


def test_strangers_get_only_so_many_answers_from_the_wait() -> None:
    trace = play(TIME_WAIT)
    before = len(trace.sent)
    trace.play(100 * "< A 900 ack 2\ndrain\n")
    assert 1 <= len(trace.sent) - before <= 10


# -- resets of ours


def test_abort_resets_at_the_next_number() -> None:
    play("""
        open
        write 100
        > A 1:101 ack 1
        abort
        > RA 101 ack 1
        end aborted
        events closed
        idle
        < A 1 ack 101
        > R 101
    """)


@pytest.mark.parametrize(
    ("way", "nxt", "rcv"),
    [
        (FIN_WAIT_1, 2, 1),
        (FIN_WAIT_2, 2, 1),
        (CLOSE_WAIT, 1, 2),
    ],
    ids=["FIN-WAIT-1", "FIN-WAIT-2", "CLOSE-WAIT"],
)
def test_abort_resets_a_half_closed_connection(way: str, nxt: int, rcv: int) -> None:
    """RFC 9293 §3.10.5."""
    play(f"""{way}
        abort
        > RA {nxt} ack {rcv}
        idle
    """)


def test_abort_in_syn_sent_says_nothing() -> None:
    play("""
        connect
        > S 0
        abort
        silence
        idle
        < SA 0 ack 1
        > R 1
    """)


def test_abort_of_a_simultaneous_open_resets() -> None:
    play("""
        connect
        > S 0
        < S 0 mss 1360
        > SA 0 ack 1
        abort
        > RA 1 ack 1
        idle
    """)


def test_release_with_something_unread_resets() -> None:
    """RFC 2525 §2.17; RFC 9293 §3.6.1."""
    play("""
        open
        < A 1:101 ack 1
        release
        > RA 1 ack 101
        end aborted
    """)


def test_release_with_everything_read_closes() -> None:
    play("""
        open
        < A 1:101 ack 1
        read 100
        release
        ~> FA 1 ack 101
        < FA 101 ack 2
        > A 2 ack 102
        end finished
    """)


def test_release_delivers_what_was_written() -> None:
    play("""
        open
        write 100; release
        > A 1:101 ack 1
        > FA 101 ack 1
        +0.02 < A 1 ack 102
        state FIN-WAIT-2
    """)


def test_data_for_nobody_is_reset() -> None:
    """RFC 9293 §3.6.1: its sender must learn that it is lost."""
    play("""
        open
        release
        > FA 1 ack 1
        < A 1 ack 2
        < A 1:101 ack 2
        > RA 2 ack 1
        idle
    """)


def test_a_released_connection_does_not_wait_for_a_fin_for_ever() -> None:
    play("""
        open
        release
        > FA 1 ack 1
        < A 1 ack 2
        +300 silence
        idle
    """)


# -- resets of theirs


def test_what_came_before_a_reset_can_be_read() -> None:
    play("""
        open
        < A 1:101 ack 1
        < R 101
        events readable readable closed
        end reset
        read 100
    """)


def test_a_reset_is_taken_while_the_window_is_closed() -> None:
    """RFC 9293 §3.10.7.4 (MUST-66): with a window of zero RST is still looked at."""
    play(
        """
        open
        < A 1:4097 ack 1
        > A 1 ack 4097 win 0
        < R 4098
        drain
        end none
        < R 4097
        end reset
        """,
        capacity=4096,
    )


def test_a_reset_with_any_acknowledgement_counts_by_its_number() -> None:
    play("""
        open
        < RA 1 ack 77777
        end reset
    """)


def test_a_reset_may_carry_words() -> None:
    """RFC 9293 §3.5.2: a reset may carry text that explains it; it is not data."""
    play("""
        open
        < R 1:50
        end reset
        readable 0
    """)


def test_challenges_are_few_a_second_and_come_again_later() -> None:
    """RFC 5961 §7."""
    trace = play("open\n..0.2 > A 1 ack 1")
    before = len(trace.sent)
    trace.play("+0.5 silence\n" + 200 * "< R 9\ndrain\n")
    assert 1 <= len(trace.sent) - before <= 10
    before = len(trace.sent)
    trace.play("+2 silence\n" + 200 * "< S 9\ndrain\n")
    assert 1 <= len(trace.sent) - before <= 10
    trace.play("""
        +2 < R 9
        > A 1 ack 1
    """)

"""Opening: SYN and its answers; strangers at listeners and at closed ports."""

import pytest

from tests.tunnel.ipv6.scripted.trace import play

# -- actively


def test_a_syn_offers_everything_and_its_window_unscaled() -> None:
    trace = play("""
        connect
        > S 0 mss 1360 sackok win 65535
    """)
    assert trace.sent[0].options[3][0] <= 14


def test_a_syn_is_repeated_with_doubled_patience_and_the_same_number() -> None:
    """RFC 6298 §2.1: one second first. R2 of a SYN is three minutes at least (RFC 9293 §3.8.3)."""
    trace = play("""
        connect
        > S 0
        +1..1.1 > S 0
        +2..2.2 > S 0
        +4..4.4 > S 0
        +8..8.8 > S 0
        +16..17 > S 0
        +140 drain
        end none
    """)
    assert len(set(trace.initials)) == 1


def test_without_any_answer_it_times_out() -> None:
    play("""
        connect 10
        +9.9 drain
        end none
        +0.2 silence
        state CLOSED
        end timed out
        events closed
        idle
    """)


def test_a_port_that_nobody_listens_on_refuses() -> None:
    play("""
        connect
        > S 0
        < RA 0 ack 1
        state CLOSED
        end refused
        events closed
        idle
    """)


@pytest.mark.parametrize(
    ("segment", "wanted"),
    [
        ("R 0", "silence"),
        ("RA 0 ack 0", "silence"),
        ("RA 0 ack 2", "silence"),
        ("A 0 ack 1", "silence"),
        ("A 0 ack 2", "> R 2"),
        ("A 0 ack 0", "> R 0"),
        ("SA 0 ack 2", "> R 2"),
        ("SA 0 ack 0", "> R 0"),
        ("FA 0 ack 1", "silence"),
        ("P 1:50", "silence"),
        ("F 0", "silence"),
        ("U 0", "silence"),
    ],
)
def test_what_does_not_answer_our_syn_does_not_open_or_end_it(segment: str, wanted: str) -> None:
    """RFC 9293 §3.10.7.3; the half-open case is figure 11."""
    play(f"""
        connect
        > S 0
        < {segment}
        {wanted}
        state SYN-SENT
        < SA 0 ack 1 mss 1360
        > A 1 ack 1
        state ESTABLISHED
    """)


def test_the_answer_may_carry_data_and_fin() -> None:
    play("""
        connect
        > S 0
        < SFA 0 ack 1 mss 1360
        > A 1 ack 2
        state CLOSE-WAIT
        events opened readable
        eof
    """)


def test_what_is_written_early_goes_out_when_it_is_open() -> None:
    play("""
        connect; write 700
        > S 0
        +0.02 < SA 0 ack 1 mss 1360
        ~> PA 1:701 ack 1
        state ESTABLISHED
    """)


def test_what_was_written_early_dies_with_a_refusal() -> None:
    play("""
        connect; write 700
        > S 0
        < RA 0 ack 1
        silence
        end refused
        write 100 0
    """)


def test_a_lost_answer_to_the_answer_is_repeated() -> None:
    play("""
        open
        ..0.2 > A 1 ack 1
        +1 < SA 0 ack 1 mss 1360
        > A 1 ack 1
        state ESTABLISHED
        events
    """)


def test_to_a_peer_that_stays_silent_the_answer_goes_out_twice() -> None:
    """It may wait for nothing else, and would repeat its SYN only after a second."""
    play("""
        open
        +0.05 silence
        ..0.1 > A 1 ack 1
        +1000 silence
        idle
    """)


@pytest.mark.parametrize("heard", ["< A 1:101 ack 1\n..0.1 > A 1 ack 101", "< A 1 ack 1 win 9999"])
def test_who_was_heard_or_told_something_needs_no_second_answer(heard: str) -> None:
    play(f"""
        open
        +0.05 {heard}
        +1000 silence
        idle
    """)
    play("""
        open
        write 100
        > A 1:101 ack 1
        +0.02 < A 1 ack 101
        +1000 silence
        idle
    """)


def test_after_a_lost_syn_data_waits_three_seconds() -> None:
    """RFC 6298 §5.7."""
    play("""
        connect
        > S 0
        +1..1.1 > S 0
        +0.02 < SA 0 ack 1 mss 1360
        > A 1 ack 1
        write 100
        > A 1:101 ack 1
        +2.9 silence
        ..0.2 > A 1:101 ack 1
    """)


def test_the_round_trip_of_the_syn_is_measured() -> None:
    """RFC 6298 §2.2: after 20 ms the timer is well below its initial second."""
    play("""
        open nosack
        write 100
        > A 1:101 ack 1
        +0.06..0.99 > A 1:101 ack 1
    """)


def test_a_syn_sent_twice_measures_nothing() -> None:
    """Karn: which of the two was answered is not known."""
    play("""
        connect
        > S 0
        +1..1.1 > S 0
        +0.0001 < SA 0 ack 1
        > A 1 ack 1
        write 100
        > A 1:101 ack 1
        +0.99 silence
    """)


# -- both at once (RFC 9293 §3.5, figure 7)


def test_both_may_open_at_once() -> None:
    play("""
        connect
        > S 0
        < S 0 mss 1360 sackok scale 0
        > SA 0 ack 1
        state SYN-RECEIVED
        < SA 0 ack 1 mss 1360 sackok scale 0
        > A 1 ack 1
        state ESTABLISHED
        events opened
        write 100
        > A 1:101 ack 1
    """)


def test_a_plain_acknowledgement_ends_a_simultaneous_open_too() -> None:
    play("""
        connect
        > S 0
        < S 0 mss 1360
        > SA 0 ack 1
        < A 1 ack 1
        silence
        state ESTABLISHED
    """)


def test_a_simultaneous_open_repeats_its_answer() -> None:
    play("""
        connect
        > S 0
        < S 0 mss 1360
        > SA 0 ack 1
        +1..2.1 > SA 0 ack 1
    """)


def test_a_reset_ends_a_simultaneous_open() -> None:
    play("""
        connect
        > S 0
        < S 0 mss 1360
        > SA 0 ack 1
        < RA 1 ack 1
        silence
        end refused
    """)


def test_the_last_of_a_simultaneous_open_may_get_lost() -> None:
    play("""
        connect
        > S 0
        < S 0 mss 1360
        > SA 0 ack 1
        < SA 0 ack 1 mss 1360
        > A 1 ack 1
        +1 < SA 0 ack 1 mss 1360
        > A 1 ack 1
    """)


# -- passively


def test_a_listener_answers_and_says_accepted_when_it_is_open() -> None:
    play("""
        listen
        < S 0 mss 1360 sackok scale 3
        > SA 0 ack 1 mss 1360 sackok win 65535
        events
        < A 1 ack 1
        events accepted
        state ESTABLISHED
    """)


@pytest.mark.parametrize("segment", ["R 0", "RA 0 ack 1"])
def test_a_listener_hears_no_reset(segment: str) -> None:
    play(f"""
        listen
        < {segment}
        silence
    """)


@pytest.mark.parametrize(
    ("segment", "wanted"),
    [("A 5 ack 77", "> R 77"), ("SA 0 ack 77", "> R 77"), ("FA 5 ack 77", "> R 77")],
)
def test_a_listener_resets_what_acknowledges(segment: str, wanted: str) -> None:
    play(f"""
        listen
        < {segment}
        {wanted}
        events
    """)


@pytest.mark.parametrize(
    ("segment", "wanted"),
    [
        ("S 0", "> RA 0 ack 1"),
        ("S 5:15", "> RA 0 ack 16"),
        ("F 5:15", "> RA 0 ack 16"),
        ("P 5:15", "> RA 0 ack 15"),
        ("A 5:15 ack 77", "> R 77"),
        ("SA 5 ack 77", "> R 77"),
        ("R 5", "silence"),
        ("RA 5 ack 77", "silence"),
    ],
)
def test_nobody_answers_as_the_rules_say(segment: str, wanted: str) -> None:
    """RFC 9293 §3.10.7.1; resets count from 0 or from what was acknowledged."""
    trace = play(f"""
        < {segment}
        {wanted}
        idle
    """)
    assert trace.initial == 0


def test_data_with_the_last_of_the_handshake_is_taken() -> None:
    play("""
        listen
        < S 0 mss 1360
        > SA 0 ack 1
        < A 1:101 ack 1
        events accepted readable
        read 100
        ..0.5 > A 1 ack 101
    """)


def test_the_last_of_the_handshake_may_be_lost_when_data_follows() -> None:
    play("""
        listen
        < S 0 mss 1360
        > SA 0 ack 1
        < A 101:201 ack 1
        > A 1 ack 1
        < A 1:101 ack 1
        > A 1 ack 201
        readable 200
    """)


def test_data_in_a_syn_is_taken_or_left_to_be_repeated() -> None:
    """RFC 9293 §3.10.7.2: it may be kept, but must not be lost or told before the handshake."""
    play("""
        listen
        < S 0 mss 1360
        ~> SA 0
        events
        < A 1:51 ack 1
        read 50
        ..0.5 > A 1 ack 51
    """)


def test_an_old_syn_is_sorted_out_by_the_peer() -> None:
    """Figure 9: the peer resets our answer to the old one; its new SYN opens."""
    play("""
        listen
        < S 100 mss 1360
        > SA 0 ack 101
        < R 101
        silence
        < S 2000 mss 1360
        > SA 0 ack 2001
        < A 2001 ack 1
        events accepted
    """)


def test_a_peer_that_forgot_us_finds_out_and_comes_back() -> None:
    """RFC 9293 §3.5.1, figure 10: a half-open connection."""
    play("""
        accept
        < S 90000 mss 1360
        > A 1 ack 1
        < R 1
        end reset
        events readable closed
        +1 < S 90000 mss 1360
        > SA 0 ack 90001
    """)


def test_a_peer_that_forgot_us_resets_our_data() -> None:
    """Figure 11."""
    play("""
        open
        write 100
        > A 1:101 ack 1
        < R 1
        silence
        end reset
        write 100 0
        idle
    """)

"""Every state against every kind of segment that should not move it (RFC 9293, RFC 5961)."""

import pytest

from tests.tunnel.ipv6.scripted.trace import play

ESTABLISHED = "open"
FIN_WAIT_1 = """
    open
    close
    > FA 1 ack 1
"""
FIN_WAIT_2 = f"""{FIN_WAIT_1}
    < A 1 ack 2
"""
CLOSE_WAIT = """
    open
    < FA 1 ack 1
    > A 1 ack 2
"""
CLOSING = f"""{FIN_WAIT_1}
    < FA 1 ack 1
    > A 2 ack 2
"""
LAST_ACK = f"""{CLOSE_WAIT}
    close
    > FA 1 ack 2
"""
TIME_WAIT = f"""{FIN_WAIT_2}
    < FA 1 ack 2
    > A 2 ack 2
"""
STATES = {
    "ESTABLISHED": (ESTABLISHED, 1, 1),
    "FIN-WAIT-1": (FIN_WAIT_1, 2, 1),
    "FIN-WAIT-2": (FIN_WAIT_2, 2, 1),
    "CLOSE-WAIT": (CLOSE_WAIT, 1, 2),
    "CLOSING": (CLOSING, 2, 2),
    "LAST-ACK": (LAST_ACK, 2, 2),
    "TIME-WAIT": (TIME_WAIT, 2, 2),
}
"""How to get there, SND.NXT and RCV.NXT then."""

in_every_state = pytest.mark.parametrize("state", STATES)
in_every_living_state = pytest.mark.parametrize("state", [s for s in STATES if s != "TIME-WAIT"])


def answer(state: str, segment: str, wanted: str) -> None:
    """In `state` the peer sends `segment`; `wanted` follows and the state stays."""
    way, nxt, rcv = STATES[state]
    text = f"""{way}
        < {segment}
        {wanted}
        state {state}
    """
    play(text.format(nxt=nxt, rcv=rcv, over=500_000, end=500_100))


@in_every_state
def test_data_beyond_the_window_is_answered_and_nothing_else(state: str) -> None:
    answer(state, "A {over}:{end} ack {nxt}", "> A {nxt} ack {rcv}")


@in_every_state
def test_an_old_number_is_answered(state: str) -> None:
    answer(state, "A 0 ack {nxt}", "> A {nxt} ack {rcv}")


@in_every_state
def test_a_reset_outside_the_window_is_nothing(state: str) -> None:
    answer(state, "R {over}", "silence")
    answer(state, "R 0", "silence")


@in_every_living_state
def test_a_reset_inside_the_window_but_not_exact_is_challenged(state: str) -> None:
    """RFC 5961 §3.2."""
    answer(state, "R 7", "> A {nxt} ack {rcv}")


@in_every_living_state
def test_the_exact_reset_ends_it(state: str) -> None:
    way, _, rcv = STATES[state]
    play(f"""{way}
        < R {rcv}
        silence
        state CLOSED
        end reset
        idle
    """)


@in_every_state
def test_a_syn_inside_the_window_is_challenged(state: str) -> None:
    """RFC 5961 §4.2; in TIME-WAIT a SYN from here on would be a new connection."""
    seq = 1 if state == "TIME-WAIT" else 9
    answer(state, f"S {seq}", "> A {nxt} ack {rcv}")


@in_every_living_state
def test_a_syn_outside_the_window_is_challenged(state: str) -> None:
    answer(state, "S {over}", "> A {nxt} ack {rcv}")


@in_every_state
def test_the_answer_to_our_syn_once_more_is_acknowledged(state: str) -> None:
    """Our last ACK of the handshake was lost (gVisor and Linux answer it alike)."""
    answer(state, "SA 0 ack 1", "> A {nxt} ack {rcv}")


@in_every_living_state
def test_an_acknowledgement_of_what_was_not_sent_is_answered(state: str) -> None:
    answer(state, "A {rcv} ack 5000", "> A {nxt} ack {rcv}")


@in_every_living_state
def test_an_acknowledgement_from_long_ago_is_challenged(state: str) -> None:
    """RFC 5961 §5.2: older than SND.UNA - MAX.SND.WND."""
    answer(state, "A {rcv} ack -2000000", "> A {nxt} ack {rcv}")


@in_every_living_state
def test_a_segment_without_ack_is_nothing(state: str) -> None:
    answer(state, "P {rcv}", "silence")
    answer(state, "F {rcv}", "silence")


# -- SYN-RECEIVED

SYN_RECEIVED = """
    listen
    < S 0 mss 1360
    > SA 0 ack 1
"""


@pytest.mark.parametrize(
    ("segment", "wanted"),
    [
        ("A 1 ack 0", "> R 0"),
        ("A 1 ack 2", "> R 2"),
        ("A 1 ack 5000", "> R 5000"),
        ("SA 1 ack 9", "drain"),
    ],
)
def test_a_wrong_acknowledgement_of_our_syn_is_reset_and_it_waits_on(
    segment: str, wanted: str
) -> None:
    play(f"""{SYN_RECEIVED}
        < {segment}
        {wanted}
        < A 1 ack 1
        state ESTABLISHED
    """)


def test_in_syn_received_the_window_of_the_syn_counts_unscaled() -> None:
    play("""
        listen
        < S 0 win 3000 mss 1000 scale 7
        > SA 0 ack 1
        < A 1 ack 1 win 2048
        write 4000
        >> A 1:2001 ack 1
        +0.01 silence
    """)


def test_in_syn_received_the_syn_again_brings_our_answer_again() -> None:
    play(f"""{SYN_RECEIVED}
        +0.1 < S 0 mss 1360
        > SA 0 ack 1
        < A 1 ack 1
        events accepted
    """)


def test_in_syn_received_our_answer_is_repeated_and_backs_off() -> None:
    play(f"""{SYN_RECEIVED}
        +1..1.1 > SA 0 ack 1
        +2..2.1 > SA 0 ack 1
        +4..4.1 > SA 0 ack 1
    """)


@pytest.mark.parametrize("segment", ["A 500000 ack 1", "A -500 ack 1"])
def test_in_syn_received_an_unacceptable_segment_is_answered(segment: str) -> None:
    play(f"""{SYN_RECEIVED}
        < {segment}
        > A 1 ack 1
    """)


def test_in_syn_received_the_exact_reset_ends_it_without_a_word_to_the_listener() -> None:
    """Figure 9 of RFC 9293: an old SYN is sorted out by its own sender."""
    play(f"""{SYN_RECEIVED}
        < R 1
        silence
        events
        idle
        < S 3000 mss 1360
        > SA 0 ack 3001
    """)


def test_in_syn_received_other_resets_do_not() -> None:
    play(f"""{SYN_RECEIVED}
        < R 500000
        < R 0
        silence
        < A 1 ack 1
        events accepted
    """)


def test_in_syn_received_a_fin_opens_and_half_closes() -> None:
    play(f"""{SYN_RECEIVED}
        < FA 1:6 ack 1
        > A 1 ack 7
        events accepted readable
        state CLOSE-WAIT
        read 5
        eof
    """)


def test_an_attempt_that_never_ends_is_forgotten_silently() -> None:
    play(f"""{SYN_RECEIVED}
        +200 drain
        events
        idle
        < A 1 ack 1
        > R 1
    """)

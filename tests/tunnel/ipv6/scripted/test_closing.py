"""Closing: FINs in every order, late, twice, early and with data."""

import pytest

from tests.tunnel.ipv6.scripted.test_states import (
    CLOSE_WAIT,
    CLOSING,
    FIN_WAIT_1,
    FIN_WAIT_2,
    LAST_ACK,
    TIME_WAIT,
)
from tests.tunnel.ipv6.scripted.trace import play

# -- one way after the other


def test_we_close_first() -> None:
    play("""
        open
        close
        > FA 1 ack 1
        state FIN-WAIT-1
        < A 1 ack 2
        state FIN-WAIT-2
        < FA 1 ack 2
        > A 2 ack 2
        state TIME-WAIT
        end finished
    """)


def test_the_peer_closes_first() -> None:
    play("""
        open
        < FA 1 ack 1
        > A 1 ack 2
        state CLOSE-WAIT
        eof
        close
        > FA 1 ack 2
        state LAST-ACK
        < A 2 ack 2
        state CLOSED
        end finished
        idle
        < A 2 ack 2
        > R 2
    """)


def test_both_close_at_once() -> None:
    play(f"""{FIN_WAIT_1}
        < FA 1 ack 1
        > A 2 ack 2
        state CLOSING
        < A 2 ack 2
        drain
        state TIME-WAIT
    """)


def test_the_last_acknowledgement_of_a_simultaneous_close_is_not_answered() -> None:
    play(f"""{CLOSING}
        < A 2 ack 2
        silence
    """)


def test_both_close_at_once_and_say_so_together() -> None:
    """Our FIN is acknowledged by the peer's: straight to TIME-WAIT."""
    play(f"""{FIN_WAIT_1}
        < FA 1 ack 2
        > A 2 ack 2
        state TIME-WAIT
    """)


def test_both_close_at_once_with_data_under_way() -> None:
    play("""
        open
        write 300; close
        >> A 1:301 ack 1
        > FA 301 ack 1
        < FA 1:201 ack 1
        > A 302 ack 202
        state CLOSING
        read 200
        eof
        < A 202 ack 302
        drain
        state TIME-WAIT
    """)


def test_a_half_closed_connection_is_read_without_limit() -> None:
    play(f"""{FIN_WAIT_2}
        +3000 silence
        state FIN-WAIT-2
        < A 1:1001 ack 2
        ..0.5 > A 2 ack 1001
        read 1000
        < FA 1001:1501 ack 2
        > A 2 ack 1502
        read 500
        eof
    """)


def test_a_half_closed_connection_is_written_without_limit() -> None:
    play(f"""{CLOSE_WAIT}
        +3000 silence
        write 5000
        >> A 1:5001 ack 2
        +0.02 < A 2 ack 5001
        state CLOSE-WAIT
        close
        > FA 5001 ack 2
        < A 2 ack 5002
        end finished
    """)


def test_a_fin_follows_everything_that_was_written() -> None:
    play("""
        open win 2720
        write 5000; close
        >> A 1:2721 ack 1
        state FIN-WAIT-1
        +0.02 < A 1 ack 2721 win 2720
        >> A 2721:5001 ack 1
        > FA 5001 ack 1
        +0.02 < A 1 ack 5002
        state FIN-WAIT-2
    """)


def test_a_fin_that_a_closed_window_holds_back_goes_out_in_the_end() -> None:
    play("""
        open win 0
        write 100; close
        +5 drain
        < A 1 ack 1 win 1000
        ~> A 1:101 ack 1
        ..0.5 ~> FA 101 ack 1
    """)


def test_nothing_can_be_written_after_close() -> None:
    play(f"""{FIN_WAIT_1}
        write 100 0
        close
        silence
    """)


# -- FINs that come late, twice, early


def test_a_lost_fin_of_ours_is_repeated_until_it_is_acknowledged() -> None:
    play("""
        open nosack
        close
        > FA 1 ack 1
        +0.06..1 > FA 1 ack 1
        +0.1..2 > FA 1 ack 1
        < A 1 ack 2
        +10 silence
        state FIN-WAIT-2
    """)


@pytest.mark.parametrize(
    ("way", "nxt"),
    [(CLOSE_WAIT, 1), (LAST_ACK, 2), (CLOSING, 2), (TIME_WAIT, 2)],
    ids=["CLOSE-WAIT", "LAST-ACK", "CLOSING", "TIME-WAIT"],
)
def test_a_fin_that_comes_again_is_acknowledged_again(way: str, nxt: int) -> None:
    play(f"""{way}
        < FA 1 ack 1
        > A {nxt} ack 2
    """)


def test_a_fin_with_data_counts_after_it() -> None:
    play("""
        open
        < FA 1:101 ack 1
        > A 1 ack 102
        events readable
        read 50
        state CLOSE-WAIT
        read 50
        eof
    """)


def test_a_fin_with_a_hole_before_it_waits() -> None:
    play("""
        open
        < FA 101:201 ack 1
        > A 1 ack 1
        state ESTABLISHED
        < A 1:101 ack 1
        > A 1 ack 202
        state CLOSE-WAIT
        read 200
        eof
    """)


def test_a_bare_fin_with_a_hole_before_it_waits() -> None:
    play("""
        open
        < FA 101 ack 1
        drain
        state ESTABLISHED
        < A 1:51 ack 1
        drain
        < A 51:101 ack 1
        > A 1 ack 102
        state CLOSE-WAIT
    """)


def test_a_bare_fin_behind_a_hole_is_answered_at_once() -> None:
    play("""
        open
        < FA 101 ack 1
        > A 1 ack 1
    """)


def test_a_fin_whose_data_partly_came_before_counts() -> None:
    play("""
        open
        < A 1:101 ack 1
        < FA 51:151 ack 1
        > A 1 ack 152
        read 150
        eof
    """)


def test_a_fin_inside_what_has_come_is_no_end() -> None:
    play("""
        open
        < A 1:101 ack 1
        ..0.5 > A 1 ack 101
        < FA 50:100 ack 1
        drain
        < A 101:201 ack 1
        ..0.5 > A 1 ack 201
        read 200
    """)


def test_nothing_counts_behind_a_fin() -> None:
    play(f"""{CLOSE_WAIT}
        < A 2:102 ack 1
        drain
        readable 0
        eof
        state CLOSE-WAIT
    """)


def test_a_fin_beyond_the_window_does_not_count() -> None:
    play(
        """
        open
        < A 1:4097 ack 1
        > A 1 ack 4097 win 0
        < FA 4097:4197 ack 1
        > A 1 ack 4097 win 0
        state ESTABLISHED
        """,
        capacity=4096,
    )


@pytest.mark.parametrize(
    "capacity",
    [
        pytest.param(
            4096,
            id="unscaled",
        ),
        pytest.param(1 << 17, id="scaled"),
    ],
)
def test_a_fin_is_taken_when_the_window_is_full(capacity: int) -> None:
    """It needs no room."""
    quarter = capacity // 4
    trace = play("open", capacity=capacity)
    for start in range(1, capacity, quarter):
        trace.play(f"""
            < A {start}:{start + quarter} ack 1
            ..0.5 > A 1 ack {start + quarter}
        """)
    assert trace.sent[-1].window == 0
    trace.play(f"""
        < FA {capacity + 1} ack 1
        > A 1 ack {capacity + 2}
        state CLOSE-WAIT
        read {capacity}
        eof
    """)


def test_data_that_comes_late_is_taken_in_fin_wait() -> None:
    play(f"""{FIN_WAIT_2}
        < FA 101 ack 2
        drain
        < A 1:101 ack 2
        > A 2 ack 102
        state TIME-WAIT
        read 100
        eof
    """)


def test_an_old_acknowledgement_does_not_finish_our_fin() -> None:
    play(f"""{FIN_WAIT_1}
        < A 1 ack 1
        state FIN-WAIT-1
        < A 1 ack 2
        state FIN-WAIT-2
    """)

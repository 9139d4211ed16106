"""When we acknowledge, what the flags say, and keepalive (RFC 9293 §3.8, RFC 5681 §4)."""

from itertools import pairwise

import pytest

from tests.tunnel.ipv6.scripted.trace import Trace, Wanted, play

# -- delay


def test_a_lone_segment_is_acknowledged_within_half_a_second() -> None:
    """RFC 9293 §3.8.6.3 (MUST-40)."""
    play("""
        open
        < A 1:101 ack 1
        +0.001..0.5 > A 1 ack 101
        +1 silence
    """)


def test_every_second_full_segment_is_acknowledged_at_once() -> None:
    """(SHLD-19)."""
    play("""
        open
        < A 1:1361 ack 1
        < A 1361:2721 ack 1
        > A 1 ack 2721
        < A 2721:4081 ack 1
        < A 4081:5441 ack 1
        > A 1 ack 5441
    """)


@pytest.mark.parametrize("count", [2, 5, 44])
def test_a_train_is_acknowledged_once_and_whole(count: int) -> None:
    trace = play("open")
    packets = [
        trace.packet(Wanted.parse(f"A {1 + 1360 * n}:{1361 + 1360 * n} ack 1".split()))
        for n in range(count)
    ]
    trace.deliver(packets)
    trace.play(f"> A 1 ack {1 + 1360 * count}")
    trace.play(f"read {1360 * count}\n+1 drain")


@pytest.mark.parametrize(
    "segment",
    ["A 201:301 ack 1", "A 1:51 ack 1", "A 51:101 ack 1"],
    ids=["behind a hole", "again", "a part again"],
)
def test_what_is_not_next_is_answered_at_once(segment: str) -> None:
    """RFC 5681 §4.2."""
    play(f"""
        open
        < A 1:101 ack 1
        ..0.5 > A 1 ack 101
        < {segment}
        > A 1 ack 101
    """)


def test_a_filled_hole_is_answered_at_once() -> None:
    """RFC 5681 §4.2: whether all of it or a part."""
    play("""
        open
        < A 201:301 ack 1
        > A 1 ack 1 sack 201:301
        < A 1:101 ack 1
        > A 1 ack 101 sack 201:301
        < A 101:201 ack 1
        > A 1 ack 301
        read 300
    """)


def test_an_acknowledgement_rides_on_data() -> None:
    play("""
        open
        < A 1:101 ack 1
        write 50
        > A 1:51 ack 101
        +1 drain
    """).play("""
        < A 101 ack 51
        +1 silence
    """)


def test_an_acknowledgement_is_not_acknowledged() -> None:
    play("""
        open
        write 100
        > A 1:101 ack 1
        < A 1 ack 101
        < A 1 ack 101
        < A 1 ack 101 win 5000
        +1 silence
    """)


def test_many_small_segments_are_acknowledged_in_time() -> None:
    trace = play("open")
    for number in range(100):
        trace.play(f"+0.01 drain\n< A {1 + number}:{2 + number} ack 1\ndrain")
    acked = [sent for sent in trace.sent if sent.ack > 1]
    assert all(b.at - a.at <= 0.5 for a, b in pairwise(acked))
    trace.play("..0.5 ~> A 1 ack 101\nread 100")


# -- numbers across the border


def test_the_peers_numbers_may_go_over_the_top() -> None:
    """They begin 7296 below 2^32."""
    trace = play("open")
    for start in range(1, 20_000, 1000):
        trace.play(f"< A {start}:{start + 1000} ack 1\ndrain")
    trace.play("""
        ..0.5 drain
        < A 22001:23001 ack 1
        > A 1 ack 20001 sack 22001:23001
        read 20000
    """)


# -- flags


def test_the_last_of_what_was_written_is_pushed() -> None:
    """RFC 9293 §3.9.1.2 (MUST-61): PSH in the last buffered segment."""
    trace = play("""
        open
        write 3000
        > A 1:1361 ack 1
        > A 1361:2721 ack 1
        > PA 2721:3001 ack 1
    """)
    assert all("P" not in sent.flags for sent in trace.sent if sent.end in (1361, 2721))


def test_a_last_segment_that_is_full_is_pushed_too() -> None:
    play("""
        open
        write 2720
        > A 1:1361 ack 1
        > PA 1361:2721 ack 1
    """)


def test_what_is_not_pushed_is_given_to_the_application_too() -> None:
    play("""
        open
        < A 1:101 ack 1
        events readable
        read 100
        +0.5 drain
    """)


@pytest.mark.parametrize("urgent", [0, 1, 50, 65535])
def test_urgent_data_is_data(urgent: int) -> None:
    """RFC 9293 §3.8.5, RFC 6093 §4: taken in line."""
    play(f"""
        open
        < AU 1:101 ack 1 urgent {urgent}
        ..0.5 > A 1 ack 101
        read 100
    """)


def test_an_urgent_pointer_without_its_flag_means_nothing() -> None:
    play("""
        open
        < A 1:101 ack 1 urgent 7
        ..0.5 > A 1 ack 101
        read 100
    """)


def test_urgent_segments_are_acknowledgements_too() -> None:
    """RFC 9293 (MUST-66): also with a window of zero."""
    play("""
        open
        write 100
        > A 1:101 ack 1
        < AU 1 ack 101 urgent 1
        +1 silence
        idle
    """)


def test_we_never_say_urgent_nor_use_reserved_bits() -> None:
    trace = play("""
        open
        write 5000; close
        +30 drain
    """)
    assert all(set(sent.flags) <= set("SAFP") for sent in trace.sent)


# -- a stream out of order


@pytest.mark.parametrize(
    "order",
    [(3, 2, 1, 0), (1, 0, 3, 2), (0, 3, 1, 2), (2, 3, 0, 1), (3, 0, 2, 1)],
)
def test_whatever_the_order_the_stream_is_whole(order: tuple[int, ...]) -> None:
    text = "open\n"
    for number in order:
        text += f"< A {1 + 500 * number}:{501 + 500 * number} ack 1\ndrain\n"
    play(f"{text} +0.5 drain\nread 2000")


def test_overlaps_give_each_octet_once() -> None:
    play("""
        open
        < A 1:301 ack 1
        drain
        < A 201:501 ack 1
        drain
        < A 601:901 ack 1
        drain
        < A 401:1001 ack 1
        > A 1 ack 1001
        read 1000
    """)


def test_the_application_is_told_once() -> None:
    play("""
        open
        < A 1:101 ack 1
        < A 101:201 ack 1
        events readable
        ..0.5 > A 1 ack 201
        read 200
        < A 201:301 ack 1
        events readable
        +0.5 drain
    """)


def test_a_full_outbox_says_when_there_is_room() -> None:
    trace = play(
        """
        open
        write 10000 8000; write 100 0
        drain
        events
        """,
        capacity=8000,
    )
    trace.play("take 8001\nevents writable\nwrite 100\ndrain")


# -- keepalive (RFC 9293 §3.8.4)


def test_keepalive_is_off_unless_wanted() -> None:
    """(MUST-25)."""
    play("""
        open
        ..0.2 > A 1 ack 1
        +20000 silence
        idle
    """)


def quiet() -> Trace:
    """A connection that asks each 10 s."""
    return play("""
        open
        ..0.2 > A 1 ack 1
        keepalive 10
        +9.7 silence
        ..0.2 > A 0 ack 1
    """)


def test_a_quiet_peer_is_asked_with_an_old_number() -> None:
    """It has to answer (RFC 9293 §3.10.7.4, first)."""
    quiet().play("""
        < A 1 ack 1
        +9.9 silence
        ..0.2 > A 0 ack 1
    """)


def test_a_peer_that_answers_is_never_given_up() -> None:
    trace = quiet()
    for _ in range(100):
        trace.play("< A 1 ack 1\n..10.1 > A 0 ack 1\n")
    trace.play("end none")


def test_one_lost_question_is_no_end() -> None:
    """(MUST-29)."""
    quiet().play("""
        ..10.1 > A 0 ack 1
        < A 1 ack 1
        end none
    """)


def test_a_peer_that_never_answers_is_given_up() -> None:
    quiet().play("""
        +600 drain
        end timed out
        events readable closed
        idle
    """)


def test_anything_from_the_peer_puts_the_question_off() -> None:
    play("""
        open
        ..0.2 > A 1 ack 1
        keepalive 10
        +9 < A 1:101 ack 1
        ..0.5 > A 1 ack 101
        +9 silence
        ..1 > A 0 ack 101
    """)


def test_the_peers_questions_are_answered() -> None:
    """With the old number and no data, or one octet of garbage (SHLD-12, MAY-6)."""
    play("""
        open
        < A 1:101 ack 1
        ..0.5 > A 1 ack 101
        +100 < A 100 ack 1
        > A 1 ack 101
        +100 < A 100:101 ack 1
        > A 1 ack 101
        readable 100
        end none
    """)


def test_a_dead_peer_found_by_keepalive_answers_with_a_reset() -> None:
    quiet().play("""
        < R 1
        end reset
        idle
    """)

"""Selective acknowledgements, given and taken (RFC 2018, RFC 2883)."""

import pytest

from tests.tunnel.ipv6.scripted.trace import play

# -- given. RFC 2018 §4 sends eight segments of 500 octets from 5000 on; here they are 1:501 and so
# on, the first four make the left edge that stays, and the tables say which of them arrive.


def arrivals(*numbers: int) -> str:
    """These segments of 500 octets arrive, counted from 0."""
    return "\n".join(f"< A {1 + 500 * n}:{501 + 500 * n} ack 1\ndrain" for n in numbers[:-1])


def last(*numbers: int) -> str:
    """The last of them."""
    return f"< A {1 + 500 * numbers[-1]}:{501 + 500 * numbers[-1]} ack 1"


@pytest.mark.parametrize(
    ("numbers", "ack", "blocks"),
    [
        ((0, 1, 2, 3), 2001, ""),
        ((1,), 1, "501:1001"),
        ((1, 2), 1, "501:1501"),
        ((1, 2, 3, 4, 5, 6, 7), 1, "501:4001"),
        ((0, 2), 501, "1001:1501"),
        ((0, 2, 4), 501, "2001:2501 1001:1501"),
        ((0, 2, 4, 6), 501, "3001:3501 2001:2501 1001:1501"),
        ((0, 2, 4, 6, 3), 501, "1001:2501 3001:3501"),
        ((0, 2, 4, 6, 3, 1), 2501, "3001:3501"),
        ((0, 2, 4, 6, 3, 1, 5), 3501, ""),
        ((2, 4), 1, "2001:2501 1001:1501"),
        ((4, 2), 1, "1001:1501 2001:2501"),
        ((6, 4, 2), 1, "1001:1501 2001:2501 3001:3501"),
        ((2, 4, 6, 8, 10), 1, "5001:5501 4001:4501 3001:3501 2001:2501"),
        ((1, 3, 2), 1, "501:2001"),
    ],
)
def test_the_block_of_the_last_arrival_comes_first(
    numbers: tuple[int, ...], ack: int, blocks: str
) -> None:
    """RFC 2018 §4, rules 1 to 3, and its three cases."""
    said = f"sack {blocks}" if blocks else ""
    play(f"""
        open
        {arrivals(*numbers)}
        {last(*numbers)}
        ..0.5 > A 1 ack {ack} {said}
    """)


@pytest.mark.parametrize(
    ("numbers", "ack", "blocks"),
    [
        ((0, 1, 0), 1001, "1:501"),
        ((0, 1, 1), 1001, "501:1001"),
        ((0, 2, 2), 501, "1001:1501 1001:1501"),
        ((0, 2, 0), 501, "1:501 1001:1501"),
        ((0, 2, 4, 2), 501, "1001:1501 1001:1501 2001:2501"),
        ((2, 3, 4, 3), 1, "1501:2001 1001:2501"),
    ],
)
def test_what_came_twice_is_reported_first(numbers: tuple[int, ...], ack: int, blocks: str) -> None:
    """RFC 2883 §4; a repeated part of a block is followed by that block."""
    play(f"""
        open
        {arrivals(*numbers)}
        {last(*numbers)}
        > A 1 ack {ack} sack {blocks}
    """)


def test_a_repetition_is_reported_once() -> None:
    """RFC 2883 §4."""
    play("""
        open
        < A 1:501 ack 1
        drain
        < A 1:501 ack 1
        > A 1 ack 501 sack 1:501
        < A 501:1001 ack 1
        +0.5 drain
        < A 1501:2001 ack 1
        > A 1 ack 1001 sack 1501:2001
    """)


def test_a_part_that_came_twice_is_reported() -> None:
    """RFC 2883 §4.2: only the part."""
    play("""
        open
        < A 1:501 ack 1
        drain
        < A 301:801 ack 1
        > A 1 ack 801 sack 301:501
        readable 800
    """)


def test_without_permission_no_blocks_are_sent() -> None:
    trace = play("""
        open nosack
        < A 501:1001 ack 1
        > A 1 ack 1
        < A 1:501 ack 1
        > A 1 ack 1001
    """)
    assert all(5 not in sent.options for sent in trace.sent)


def test_blocks_are_repeated_in_further_acknowledgements() -> None:
    """RFC 2018 §4: the most recent three at least, so that a lost ACK costs nothing."""
    play("""
        open
        < A 501:1001 ack 1
        > A 1 ack 1 sack 501:1001
        < A 1501:2001 ack 1
        > A 1 ack 1 sack 1501:2001 501:1001
        < A 0 ack 1
        > A 1 ack 1 sack 1501:2001 501:1001
    """)


def test_what_was_selected_is_kept() -> None:
    """RFC 2018 §8 lets a receiver renege; ours does not."""
    play("""
        open
        < A 501:1001 ack 1
        drain
        +100 < A 1:501 ack 1
        > A 1 ack 1001
        read 1000
    """)


def test_overlapping_islands_become_one() -> None:
    play("""
        open
        < A 501:1001 ack 1
        drain
        < A 801:1501 ack 1
        > A 1 ack 1 sack 501:1501
        < A 1:601 ack 1
        > A 1 ack 1501
        read 1500
    """)


# -- taken

SENT = """
    open
    write 13600
    >> A 1:13601 ack 1
    +0.02 silence
"""


@pytest.mark.parametrize(
    "blocks",
    [
        "13601:14961",  # never sent
        "1361:14961",  # partly
        "4081:2721",  # the wrong way round
        "2721:2721",  # nothing
        "-5000:-3000",  # long ago
        "-5000:2721",  # across what is acknowledged
        "2000000000:2000001360",  # on the other side of the circle
    ],
)
def test_blocks_that_make_no_sense_are_passed_over(blocks: str) -> None:
    play(f"""{SENT}
        < A 1 ack 1 sack {blocks}
        drain
        +0.005 < A 1 ack 13601
        drain
        +1 silence
        idle
    """)


def test_what_was_selected_is_not_sent_again() -> None:
    trace = play(f"""{SENT}
        < A 1 ack 1 sack 1361:13601
        ..0.02 > A 1:1361 ack 1
        +0.02 < A 1 ack 13601
        idle
    """)
    assert sum(sent.end - sent.seq for sent in trace.sent) == 13_600 + 1360


def test_what_was_selected_and_then_dropped_is_sent_again_in_the_end() -> None:
    """RFC 2018 §8: reneging. Only the cumulative acknowledgement counts."""
    play(f"""{SENT}
        < A 1 ack 1 sack 1361:13601
        ..0.02 > A 1:1361 ack 1
        +0.02 < A 1 ack 1361
        take 13601
        idle
    """)


def test_a_duplicate_report_repeats_nothing() -> None:
    """RFC 2883 §3: a first block below the acknowledgement is no hole."""
    play(f"""{SENT}
        < A 1 ack 13601 sack 1:1361
        +1 silence
        idle
    """)


def test_blocks_may_come_in_any_order_and_overlap() -> None:
    play(f"""{SENT}
        < A 1 ack 1 sack 8161:13601 1361:5441 4081:6801
        ..0.02 > A 1:1361 ack 1
        ..0.02 > A 6801:8161 ack 1
        +0.02 < A 1 ack 13601
        idle
    """)


def test_the_last_octet_alone_may_be_selected() -> None:
    play(f"""{SENT}
        < A 1 ack 1 sack 13600:13601
        +0.5 drain
        < A 1 ack 13601
        drain
        idle
    """)


def test_an_old_acknowledgement_may_bring_new_blocks() -> None:
    """They come out of order as everything does."""
    play(f"""{SENT}
        < A 1 ack 2721
        drain
        < A 1 ack 1 sack 4081:13601
        ..0.02 > A 2721:4081 ack 1
        +0.02 < A 1 ack 13601
        idle
    """)

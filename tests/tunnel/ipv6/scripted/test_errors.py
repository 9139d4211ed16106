"""ICMPv6 errors about TCP, believed as far as they prove themselves (RFC 5927, RFC 8201)."""

import pytest

from tests.tunnel.ipv6.scripted import wire
from tests.tunnel.ipv6.scripted.trace import ROUTER, US, Trace, play

MSS = 1360

# -- while connecting


@pytest.mark.parametrize(
    ("code", "end"),
    [
        (0, "unreachable"),
        (1, "unreachable"),
        (2, "unreachable"),
        (3, "unreachable"),
        (4, "refused"),
        (5, "unreachable"),
        (6, "unreachable"),
    ],
)
def test_an_unreachable_peer_ends_an_attempt(code: int, end: str) -> None:
    """RFC 5461 §4.1: nothing is established yet, so the error may end it."""
    play(f"""
        connect
        > S 0
        unreachable {code} about 0
        silence
        end {end}
        events closed
        idle
    """)


@pytest.mark.parametrize(
    "error",
    [
        "unreachable 0 about 1",
        "unreachable 4 about -1",
        "unreachable 0 about 70000",
        "exceeded 0 about 0",
        "too-big 1280 about 0",
        "too-big 576 about 1",
    ],
)
def test_other_errors_do_not_end_an_attempt(error: str) -> None:
    """RFC 5927 §4.1: the number must be that of our SYN."""
    play(f"""
        connect
        > S 0
        {error}
        silence
        end none
        +0.02 < SA 0 ack 1
        > A 1 ack 1
    """)


# -- when established

SENT = f"""
    open
    write {3 * MSS}
    >> A 1:{1 + 3 * MSS} ack 1
"""


@pytest.mark.parametrize(
    "error",
    [
        "unreachable 0 about 1",
        "unreachable 1 about 1",
        "unreachable 3 about 1",
        "unreachable 4 about 1",
        "unreachable 4 about 1361",
        "exceeded 0 about 1",
        "exceeded 1 about 1",
        "problem 0 about 1",
        "problem 1 about 1",
    ],
)
def test_an_established_connection_outlives_errors(error: str) -> None:
    """RFC 5927 §5.2: soft, whatever they say."""
    play(f"""{SENT}
        {error}
        silence
        state ESTABLISHED
        +0.02 < A 1 ack {1 + 3 * MSS}
        idle
    """)


# -- packets that are too big


def largest(trace: Trace, since: int) -> int:
    """The longest payload sent since then."""
    return max((sent.end - sent.seq for sent in trace.sent[since:]), default=0)


@pytest.mark.parametrize("mtu", [1280, 1281, 1300, 1380, 1400, 1419])
def test_a_smaller_path_is_used_at_once(mtu: int) -> None:
    """RFC 8201 §4 and §5.4: what was too big is sent again, now smaller."""
    trace = play(SENT)
    before = len(trace.sent)
    trace.play(f"""
        too-big {mtu} about 1
        take {1 + 3 * MSS}
        drain
        write 4000
        drain
    """)
    assert largest(trace, before) == mtu - 60


@pytest.mark.parametrize(
    "error",
    [
        "too-big 1420 about 1",
        "too-big 1421 about 1",
        "too-big 1500 about 1",
        "too-big 9000 about 1",
        "too-big 4294967295 about 1",
        "too-big 1300 about 0",
        "too-big 1300 about -5000",
        "too-big 1300 about 4081",
        "too-big 1300 about 90000",
        "too-big 1300 about 2000000000",
        pytest.param("too-big 576 about 1"),
        pytest.param("too-big 0 about 1"),
    ],
)
def test_what_cannot_be_true_changes_nothing(error: str) -> None:
    """Not smaller, smaller than IPv6 allows, or about nothing in flight."""
    trace = play(f"""{SENT}
        {error}
        silence
        +0.02 < A 1 ack {1 + 3 * MSS}
    """)
    before = len(trace.sent)
    trace.play("write 5000\ndrain")
    assert largest(trace, before) == MSS


def test_a_path_never_grows_by_an_error() -> None:
    trace = play(f"""{SENT}
        too-big 1300 about 1
        take {1 + 3 * MSS}
        drain
        write 5000
        drain
        too-big 1400 about 4081
        drain
    """)
    before = len(trace.sent)
    trace.play("take 9081\ndrain\nwrite 3000\ndrain")
    assert largest(trace, before) == 1240


def test_an_error_about_what_is_acknowledged_changes_nothing() -> None:
    trace = play(
        f"""{SENT}
        +0.02 < A 1 ack {1 + 3 * MSS}
        too-big 1300 about 1
        write 2000
    """.replace("write 2000", "silence")
    )
    trace.play(f"write {MSS}\n> A 4081:{4081 + MSS} ack 1")


@pytest.mark.parametrize("length", [0, 20, 39, 40, 44, 47])
def test_an_error_that_quotes_too_little_is_dropped(length: int) -> None:
    trace = play(SENT)
    cause = trace.about(1)[:length]
    for kind, code, value in ((2, 0, 1300), (1, 4, 0)):
        trace.deliver([wire.icmp(ROUTER.packed, US.packed, kind, code, value, cause)])
    trace.play("silence\nend none")
    assert trace.stack.drops.total() == 2


@pytest.mark.parametrize("at", [8, 24, 40, 42], ids=["source", "destination", "port", "peer port"])
def test_an_error_about_a_packet_that_was_not_ours_is_dropped(at: int) -> None:
    trace = play(SENT)
    cause = bytearray(trace.about(1))
    cause[at + 1] ^= 0x40
    trace.deliver([wire.icmp(ROUTER.packed, US.packed, 2, 0, 1300, bytes(cause))])
    trace.play("silence")
    assert trace.stack.drops.total() == 1


def test_an_error_with_a_wrong_checksum_is_dropped() -> None:
    trace = play(SENT)
    packet = bytearray(wire.icmp(ROUTER.packed, US.packed, 2, 0, 1300, trace.about(1)))
    packet[42] ^= 1
    trace.deliver([bytes(packet)])
    trace.play("silence")
    assert trace.stack.drops.total() == 1


def test_too_big_in_recovery_does_not_stall() -> None:
    trace = play(f"""{SENT}
        +0.02 < A 1 ack 1 sack {1 + 2 * MSS}:{1 + 3 * MSS}
        too-big 1280 about 1
        take {1 + 3 * MSS}
        drain
        idle
    """)
    assert largest(trace, len(trace.sent) - 1) <= 1220


def test_too_big_about_a_segment_in_the_middle_repeats_it_smaller() -> None:
    trace = play(SENT)
    before = len(trace.sent)
    trace.play(f"""
        too-big 1300 about {1 + MSS}
        take {1 + 3 * MSS}
        drain
        idle
    """)
    assert largest(trace, before) == 1240

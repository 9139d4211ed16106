"""Timestamps and protection against wrapped sequence numbers (RFC 7323 §3 to §5)."""

from random import Random

import pytest

from builder_orch.tunnel.ipv6.stack import Stack
from tests.tunnel.ipv6.scripted.trace import CAPACITY, MTU, US, Sent, Trace, Wanted

_STAMPS = 8
FULL = 1348
"""A full segment of 1360 octets with 12 of them for the option."""


def ts(value: int, echo: int = 0) -> str:
    """The option, as a field of a segment of the peer's; it has to come last."""
    return f"raw 0101080a{value & 0xFFFFFFFF:08x}{echo & 0xFFFFFFFF:08x}"


def value_of(sent: Sent) -> int:
    """TSval of a segment of ours."""
    return int.from_bytes(sent.options[_STAMPS][:4], "big")


def echo_of(sent: Sent) -> int:
    """TSecr of a segment of ours."""
    return int.from_bytes(sent.options[_STAMPS][4:], "big")


def accepted(value: int = 1000, how: str = "mss 1360 sackok") -> Trace:
    """A connection of a peer that offered timestamps, TS.Recent is `value` + 1."""
    return Trace().play(f"""
        listen
        < S 0 {how} {ts(value)}
        > SA 0 ack 1
        +0.02 < A 1 ack 1 {ts(value + 1)}
        silence
        events accepted
    """)


def offering() -> Trace:
    """A stack of ours that offers them; the SYN is still to be answered."""
    trace = Trace()
    entropy = Random("offering").randbytes
    trace.stack = Stack([US], mtu=MTU, entropy=entropy, capacity=CAPACITY, timestamps=True)
    return trace.play("connect\n> S 0")


# -- negotiation (§3.2)


def test_an_answer_echoes_the_stamp_of_the_syn() -> None:
    trace = accepted(123_456)
    assert echo_of(trace.sent[0]) == 123_456


def test_our_own_syn_echoes_nothing() -> None:
    trace = offering()
    assert echo_of(trace.sent[0]) == 0
    assert value_of(trace.sent[0]) != 0


def test_after_an_answer_without_them_nothing_is_stamped() -> None:
    trace = offering()
    trace.play("""
        +0.02 < SA 0 ack 1 mss 1360 sackok
        > A 1 ack 1
        write 1360
        > A 1:1361 ack 1
        < A 1:101 ack 1361
        read 100
        +0.1 drain
    """)
    assert all(_STAMPS not in sent.options for sent in trace.sent[1:])


def test_after_an_answer_with_them_every_segment_is_stamped() -> None:
    """§3.2: once negotiated, in every segment that is no reset; full ones hold 12 octets less."""
    trace = offering()
    trace.play(f"""
        +0.02 < SA 0 ack 1 mss 1360 sackok {ts(7)}
        > A 1 ack 1
        write {2 * FULL}; close
        > A 1:{1 + FULL} ack 1
        > A {1 + FULL}:{1 + 2 * FULL} ack 1
        > FA {1 + 2 * FULL} ack 1
    """)
    assert [echo_of(sent) for sent in trace.sent] == [0, 7, 7, 7, 7]


def test_they_are_not_offered_where_the_peer_did_not() -> None:
    trace = Trace().play("accept")
    assert _STAMPS not in trace.sent[0].options


def test_both_opening_at_once_agree_on_them() -> None:
    trace = offering()
    trace.play(f"""
        < S 0 mss 1360 sackok {ts(50)}
        > SA 0 ack 1
        < SA 0 ack 1 mss 1360 sackok {ts(51)}
        ~> A 1 ack 1
        state ESTABLISHED
    """)
    assert echo_of(trace.sent[1]) == 50


# -- which stamp is echoed (§4.3)


def test_the_earliest_of_several_unacknowledged_segments_is_echoed() -> None:
    """§4.3 (A): a delayed acknowledgement has to count as part of the round trip."""
    trace = accepted()
    trace.play(f"""
        < A 1:101 ack 1 {ts(2000)}
        +0.01 < A 101:201 ack 1 {ts(2010)}
        +0.01..0.5 > A 1 ack 201
    """)
    assert echo_of(trace.sent[-1]) == 2000


def test_a_segment_behind_a_hole_is_not_echoed() -> None:
    """§4.3 (B): the last stamp that advanced the window is."""
    trace = accepted()
    trace.play(f"""
        < A 1:101 ack 1 {ts(2000)}
        +0.1 drain
        < A 201:301 ack 1 {ts(2200)}
        > A 1 ack 101 sack 201:301
    """)
    assert echo_of(trace.sent[-1]) == 2000


def test_what_fills_a_hole_is_echoed() -> None:
    """§4.3 (C): although its stamp is older than that of what came before it."""
    trace = accepted()
    trace.play(f"""
        < A 201:301 ack 1 {ts(2200)}
        > A 1 ack 1 sack 201:301
        < A 1:201 ack 1 {ts(2100)}
        > A 1 ack 301
    """)
    assert echo_of(trace.sent[-1]) == 2100


def test_our_own_clock_goes_by_milliseconds() -> None:
    """§5.4."""
    trace = accepted()
    for _ in range(2):
        number = 1 + 3000 * (len(trace.sent) - 1)
        trace.play(f"""
            +2.5 < A {number}:{number + 3000} ack 1 {ts(5000 + number)}
            > A 1 ack {number + 3000}
        """)
    first, second = trace.sent[-2:]
    assert (value_of(second) - value_of(first)) & 0xFFFFFFFF == 2500


def test_clocks_of_two_connections_do_not_betray_each_other() -> None:
    """RFC 7323 §7: an offset for each connection."""
    values = set()
    for seed in range(8):
        trace = Trace(seed=seed).play(f"listen\n< S 0 mss 1360 {ts(1)}\n> SA 0 ack 1")
        values.add(value_of(trace.sent[0]))
    assert len(values) == 8


def test_with_stamps_three_selective_blocks_fit() -> None:
    trace = accepted()
    for number in range(5):
        start = 201 + 200 * number
        trace.play(f"< A {start}:{start + 100} ack 1 {ts(2000)}\ndrain")
    assert len(trace.sent[-1].blocks) == 3
    assert trace.sent[-1].blocks[0] == "1001:1101"


# -- PAWS (§5)


@pytest.mark.parametrize("recent", [100_000, 0, (1 << 32) - 1])
def test_an_older_stamp_is_acknowledged_and_dropped(recent: int) -> None:
    """§5.3 R1, around the circle of stamps as well."""
    trace = accepted(recent - 1)
    trace.play(f"""
        < A 1:101 ack 1 {ts(recent - 1)}
        > A 1 ack 1
        readable 0
        < A 1:101 ack 1 {ts(recent + 1)}
        +0.1 drain
        readable 100
    """)


def test_half_a_circle_ahead_is_behind() -> None:
    trace = accepted(1000)
    trace.play(f"""
        < A 1:101 ack 1 {ts(1001 + (1 << 31))}
        > A 1 ack 1
        < A 1:101 ack 1 {ts(1000 + (1 << 31))}
        +0.1 drain
        readable 100
    """)


def test_the_same_stamp_is_not_old() -> None:
    trace = accepted()
    trace.play(f"""
        < A 1:101 ack 1 {ts(1001)}
        < A 101:201 ack 1 {ts(1001)}
        +0.1 drain
        readable 200
    """)


def test_an_old_acknowledgement_acknowledges_nothing() -> None:
    trace = accepted()
    trace.play(f"""
        < A 1:101 ack 1 {ts(3000)}
        +0.1 drain
        write 100
        > A 1:101 ack 101
        +0.01 < A 101 ack 101 {ts(2999)}
        > A 101 ack 101
        ..1 > A 1:101 ack 101
        < A 101 ack 101 {ts(3001)}
        idle
    """)


def test_an_old_window_opens_nothing() -> None:
    trace = Trace().play(f"""
        listen
        < S 0 mss 1360 sackok win 100 {ts(1000)}
        > SA 0 ack 1
        +0.02 < A 1 ack 1 win 100 {ts(2000)}
        write 200
        > A 1:101 ack 1
        +0.01 < A 1 ack 101 win 0 {ts(2001)}
        < A 1 ack 101 win 5000 {ts(1500)}
        > A 101 ack 1
        < A 1 ack 101 win 5000 {ts(2002)}
        > A 101:201 ack 1
    """)
    assert trace.written == 200


def test_a_reset_needs_no_stamp_and_no_fresh_one() -> None:
    """§3.2 and §5.2: PAWS is not for resets."""
    for option in ("", ts(1)):
        accepted().play(f"""
            < R 1 {option}
            end reset
        """)


def test_what_comes_without_a_stamp_is_dropped() -> None:
    """§3.2 SHOULD: silently, as TS.Recent cannot be asked about it."""
    accepted().play("""
        < A 1:101 ack 1
        silence
        readable 0
        < FA 1 ack 1
        silence
        state ESTABLISHED
    """)


def test_an_old_fin_ends_nothing() -> None:
    trace = accepted()
    trace.play(f"""
        < FA 1 ack 1 {ts(500)}
        > A 1 ack 1
        state ESTABLISHED
        < FA 1 ack 1 {ts(1002)}
        > A 1 ack 2
        state CLOSE-WAIT
    """)


def test_an_old_syn_is_answered_once() -> None:
    accepted().play(f"""
        < S 1 mss 1360 {ts(1)}
        > A 1 ack 1
        state ESTABLISHED
    """)


def test_data_of_a_previous_round_of_the_numbers_are_not_believed() -> None:
    """§5.1: the same sequence numbers, 2^32 octets later, in the window and yet old."""
    trace = accepted(1000)
    trace.play(f"""
        < A 1:1001 ack 1 {ts(900_000)}
        +0.1 drain
        < A 1001:1101 ack 1 {ts(1002)}
        > A 1 ack 1001
        readable 1000
        < A 1501:1601 ack 1 {ts(1002)}
        > A 1 ack 1001
        < A 1001:1501 ack 1 {ts(900_001)}
        +0.1 drain
        readable 1500
        read 1500
    """)
    assert not trace.sent[-1].blocks, "nothing old was kept for later"


def test_after_24_days_of_silence_any_stamp_will_do() -> None:
    """§5.5: TS.Recent has become invalid by then."""
    trace = accepted(1000)
    trace.play(f"""
        < A 1:101 ack 1 {ts(5000)}
        +0.1 drain
        +2160000 silence
        < A 101:201 ack 1 {ts(4000)}
        +0.1 drain
        readable 200
    """)


def test_before_24_days_an_old_stamp_stays_old() -> None:
    accepted(1000).play(f"""
        < A 1:101 ack 1 {ts(5000)}
        +0.1 drain
        +1900000 silence
        < A 101:201 ack 1 {ts(4000)}
        > A 1 ack 101
        readable 100
    """)


def test_a_train_of_plain_segments_is_read_up_to_the_first_old_stamp() -> None:
    """The fast path looks at each packet's option."""
    trace = accepted()
    packets = []
    for number, stamp in enumerate((2000, 2000, 1500, 2001)):
        start = 1 + 100 * number
        wanted = f"A {start}:{start + 100} ack 1 {ts(stamp)}".split()
        packets.append(trace.packet(Wanted.parse(wanted)))
    trace.deliver(packets)
    trace.play("+0.1 drain\nreadable 200")

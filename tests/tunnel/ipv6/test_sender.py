"""Stories of data on its way: repair, windows, acknowledgements."""

import pytest

from builder_orch.tunnel.ipv6.segment import ACK, PSH, RST, Template
from builder_orch.tunnel.ipv6.sender import Sender
from builder_orch.tunnel.ipv6.state import End
from tests.tunnel.ipv6.cubic import Cubic
from tests.tunnel.ipv6.script import Script, ended, opened
from tests.tunnel.ipv6.world import LEFT, RIGHT, stack

MSS = 1360


# -- data and its repair


@pytest.mark.parametrize("first", range(1, 44 * MSS, 5 * MSS // 3))
def test_a_window_just_above_a_train_is_used_wherever_chunks_begin(first: int) -> None:
    local, remote = (LEFT.packed, 1), (RIGHT.packed, 2)
    congestion = Cubic(MSS)
    congestion.cwnd = 44 * MSS + 700
    sender = Sender(1, mss=MSS, template=Template(local, remote), congestion=congestion)
    sender.opened(1 << 20)
    sender.write(bytes(first))
    sender.write(bytes(200 * MSS))
    assert sum(map(len, sender.transmit(1.0, 1, 1))) >= 16


def test_lost_data_is_sent_again_at_the_next_deadline() -> None:
    script, connection = opened()
    connection.write(b"lost")
    (first,) = script.out()
    began = script.now
    (again,) = script.jump()
    assert again == first
    assert script.now - began == pytest.approx(0.2, abs=0.01)
    for after_s in (0.4, 0.8, 1.6):  # the first was a probe, and only timeouts are doubled
        script.jump()
        assert script.now - began == pytest.approx(after_s, abs=0.03)
    script.send(ACK, 1, 5)
    assert script.stack.deadline() is None


def test_answers_that_come_at_once_do_what_they_do_one_by_one() -> None:
    """The second and fifth segment were late; what was lost in the end is the eighth."""
    said = [
        (1, ((MSS + 1, 3 * MSS + 1),)),
        (1, ((MSS + 1, 4 * MSS + 1),)),
        (4 * MSS + 1, ((5 * MSS + 1, 6 * MSS + 1),)),
        (4 * MSS + 1, ((5 * MSS + 1, 7 * MSS + 1),)),
        (7 * MSS + 1, ((8 * MSS + 1, 10 * MSS + 1),)),
    ]
    went = []
    for at_once in (False, True):
        script, connection = opened()
        connection.write(bytes(10 * MSS))
        assert len(script.out()) == 10
        script.now += 0.02
        packets = []
        for ack, blocks in said:
            packets += script.packet(ACK, 1, ack, blocks=blocks)
        for part in [packets] if at_once else [[packet] for packet in packets]:
            script.stack.receive(part, script.now)
        assert connection.sender.una == 7 * MSS + 1 + script.initial
        assert connection.sender.board.sacked == 2 * MSS
        connection.write(bytes(10 * MSS))
        went.append(sorted(one.seq for one in script.wait(0.03))[:10])
    assert went[0] == went[1] == [7 * MSS + 1, *range(10 * MSS + 1, 19 * MSS, MSS)]


def test_a_lost_tail_is_probed_after_two_round_trips() -> None:
    script, connection = opened()
    connection.write(bytes(4 * MSS))
    sent = script.out()
    began = script.now
    (probe,) = script.jump()
    assert script.now - began == pytest.approx(0.04)
    assert probe == sent[-1]
    # The peer has the last one now and tells: the others follow without a timeout.
    script.now += 0.02
    repaired = script.send(ACK, 1, 1, blocks=((3 * MSS + 1, 4 * MSS + 1),))
    repaired += script.wait(0.02)
    repaired += script.send(ACK, 1, MSS + 1, blocks=((3 * MSS + 1, 4 * MSS + 1),))
    assert [one.seq for one in repaired] == [1, MSS + 1, 2 * MSS + 1]


def test_a_hole_is_filled_when_three_segments_have_passed_it() -> None:
    script, connection = opened()
    connection.write(bytes(8 * MSS))
    script.out()
    script.now += 0.02
    assert script.send(ACK, 1, 1, blocks=((MSS + 1, 2 * MSS + 1),)) == []
    assert script.send(ACK, 1, 1, blocks=((MSS + 1, 3 * MSS + 1),)) == []
    (again,) = script.send(ACK, 1, 1, blocks=((MSS + 1, 4 * MSS + 1),))
    assert again.seq == 1


def test_a_hole_is_filled_after_a_quarter_round_trip_even_without_three() -> None:
    script, connection = opened()
    connection.write(bytes(3 * MSS))
    script.out()
    script.now += 0.02
    assert script.send(ACK, 1, 1, blocks=((MSS + 1, 3 * MSS + 1),)) == []
    began = script.now
    (again,) = script.jump()
    assert script.now - began == pytest.approx(0.005)
    assert again.seq == 1


def test_without_sack_three_duplicates_and_then_each_partial_acknowledgement_repair() -> None:
    script, connection = opened(sack=False, scale=None)
    connection.write(bytes(10 * MSS))
    script.out()
    script.now += 0.02
    assert script.send(ACK, 1, 1) == []
    assert script.send(ACK, 1, 1) == []
    (again,) = script.send(ACK, 1, 1)
    assert (again.seq, again.blocks) == (1, ())
    script.now += 0.02
    partial, *_ = script.send(ACK, 1, 2 * MSS + 1)
    assert partial.seq == 2 * MSS + 1
    assert script.send(ACK, 1, 10 * MSS + 1) == []


def test_duplicates_let_new_segments_out() -> None:
    script, connection = opened(sack=False, scale=None)
    connection.write(bytes(20 * MSS))
    assert len(script.out()) == 10
    script.now += 0.02
    first = script.send(ACK, 1, 1)
    second = script.send(ACK, 1, 1)
    assert [one.seq for one in first + second] == [10 * MSS + 1, 11 * MSS + 1]


def test_a_black_hole_is_left_with_smaller_packets() -> None:
    script, connection = opened()
    connection.write(bytes(20 * MSS))
    began = script.now
    sizes = {len(one.payload): script.now for one in script.out()}
    while 1220 not in sizes:
        sizes |= {len(one.payload): script.now for one in script.jump()}
    assert sizes[1220] - began < 5


def test_data_without_any_answer_ends_the_connection_not_before_100_s() -> None:
    script, connection = opened()
    connection.write(b"hello?")
    script.wait(100)
    assert ended(connection, None)
    sent = script.wait(600)
    assert ended(connection, End.TIMED_OUT)
    assert sent[-1].flags == RST | ACK
    assert script.kinds() == ["Readable", "Closed"]


def test_the_timer_starts_anew_with_each_progress() -> None:
    script, connection = opened()
    connection.write(bytes(2 * MSS))
    script.out()
    script.now += 0.15
    script.send(ACK, 1, MSS + 1)
    assert script.stack.deadline() is not None
    assert script.wait(0.19) == []


# -- windows


def test_a_closed_window_is_asked_about_for_ever_and_lost_updates_do_not_matter() -> None:
    script, connection = opened(window=0)
    connection.write(b"x" * 100)
    assert script.out() == []
    script.send(ACK, 1, 1, window=0)
    gaps, before = [], script.now
    for _ in range(12):
        (probe,) = script.jump()
        assert (probe.seq, probe.length) == (0, 0)
        gaps.append(script.now - before)
        before = script.now
        script.send(ACK, 1, 1, window=0)
    assert gaps == sorted(gaps)
    assert gaps[-1] == 60.0
    assert ended(connection, None)
    (data,) = script.send(ACK, 1, 1, window=1)
    assert len(data.payload) == 100


def test_a_closed_window_that_is_not_answered_ends_the_connection() -> None:
    script, connection = opened(window=0)
    connection.write(b"x")
    script.wait(700)
    assert ended(connection, End.TIMED_OUT)


def test_a_silly_window_is_not_filled_at_once() -> None:
    script, connection = opened(window=10 * MSS, scale=None)
    connection.write(bytes(20 * MSS))
    script.out()
    script.now += 0.02
    assert script.send(ACK, 1, 10 * MSS + 1, window=100) == []
    (after,) = script.jump()
    assert len(after.payload) == 100


def test_a_window_that_shrinks_holds_back_and_then_goes_on() -> None:
    script, connection = opened(window=10 * MSS, scale=None)
    connection.write(bytes(30 * MSS))
    assert len(script.out()) == 10
    script.now += 0.02
    assert script.send(ACK, 1, MSS + 1, window=2 * MSS) == []
    retried = script.wait(3)
    in_window = [one for one in retried if one.seq + len(one.payload) <= 3 * MSS + 1]
    assert in_window
    assert [one.seq for one in retried if one not in in_window] == [9 * MSS + 1]  # a tail probe
    sent = script.send(ACK, 1, 3 * MSS + 1, window=20 * MSS)
    assert sent[0].seq == 3 * MSS + 1


def test_reading_opens_the_window_and_says_so() -> None:
    script = Script(stack(LEFT, capacity=4 * MSS))
    connection = script.connect(scale=None)
    for number in range(4):
        script.send(ACK, 1 + number * MSS, 1, bytes(MSS))
    (full,) = script.send(ACK, 1 + 4 * MSS, 1, b"probe")
    assert (full.window, full.ack) == (0, 4 * MSS + 1)
    connection.read(100)
    assert script.out() == []
    connection.read(3 * MSS)
    (update,) = script.out()
    assert update.window == 3 * MSS + 100


def test_a_full_send_queue_says_when_there_is_room_again() -> None:
    script = Script(stack(LEFT, capacity=10 * MSS))
    connection = script.connect()
    assert connection.write(bytes(20 * MSS)) == 10 * MSS
    assert connection.room() == 0
    assert connection.write(b"more") == 0
    script.out()
    script.now += 0.02
    script.kinds()
    script.send(ACK, 1, 4 * MSS + 1)
    assert script.kinds() == []
    script.send(ACK, 1, 5 * MSS + 1)
    assert script.kinds() == ["Writable"]
    script.send(ACK, 1, 10 * MSS + 1)
    assert script.kinds() == []
    assert connection.room() == 10 * MSS


# -- acknowledging


def test_one_acknowledgement_answers_a_whole_train() -> None:
    script, connection = opened()
    for number in range(10):
        script.inject(ACK, 1 + number * MSS, 1, bytes(MSS))
    (ack,) = script.out()
    assert ack.ack == 10 * MSS + 1
    assert connection.readable == 10 * MSS


def test_a_lone_segment_is_acknowledged_within_40_ms_or_with_our_data() -> None:
    script, connection = opened()
    began = script.now
    assert script.send(ACK | PSH, 1, 1, b"question") == []
    (late,) = script.jump()
    assert script.now - began == pytest.approx(0.04)
    assert late.ack == 9
    script.send(ACK | PSH, 9, 1, b"again")
    connection.write(b"answer")
    (answer,) = script.out()
    assert (answer.payload, answer.ack) == (b"answer", 14)
    script.send(ACK, 14, 7)
    assert script.stack.deadline() is None


def test_overlaps_and_holes_give_each_octet_once() -> None:
    script, connection = opened()
    script.send(ACK, 5, 1, b"efgh")
    (ack,) = script.send(ACK, 9, 1, b"ijkl")
    assert (ack.ack, ack.blocks) == (1, ((5, 13),))
    (ack,) = script.send(ACK, 1, 1, b"abcdef")
    assert (ack.ack, ack.blocks) == (13, ())
    (ack,) = script.send(ACK, 3, 1, b"cdef")
    assert (ack.ack, ack.blocks) == (13, ((3, 7),))
    assert connection.read(100) == b"abcdefghijkl"

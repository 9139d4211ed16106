"""Stories of one connection and a peer played by hand: opening, closing, strangers."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder_orch.tunnel.ipv6 import segment
from builder_orch.tunnel.ipv6.connection import CHALLENGES_PER_SECOND
from builder_orch.tunnel.ipv6.segment import ACK, FIN, PSH, RST, SYN
from builder_orch.tunnel.ipv6.state import End, State
from builder_orch.tunnel.machine import Laid
from tests.tunnel.ipv6.script import Script, ended, is_in, opened
from tests.tunnel.ipv6.world import PORT, RIGHT

MSS = 1360


# -- handshake


def test_a_syn_says_what_we_can_and_waits_twice_as_long_each_time() -> None:
    script = Script()
    script.stack.connect((RIGHT.packed, PORT), script.now)
    (syn,) = script.out()
    assert (syn.flags, syn.mss, syn.scale, syn.sack_permitted) == (SYN, MSS, 7, True)
    assert syn.window == 0xFFFF
    began = script.now
    times = []
    for _ in range(4):
        assert [one.flags for one in script.jump()] == [SYN]
        times.append(script.now - began)
    assert times == [1, 3, 7, 15]


def test_a_connection_that_nobody_answers_times_out_when_it_was_told_to() -> None:
    script = Script()
    connection = script.stack.connect((RIGHT.packed, PORT), script.now, timeout_s=10)
    script.wait(9.9)
    assert ended(connection, None)
    script.wait(0.2)
    assert ended(connection, End.TIMED_OUT)
    assert script.kinds() == ["Closed"]
    assert script.stack.deadline() is None


def test_a_reset_refuses_a_syn_and_only_one_that_answers_it() -> None:
    script = Script()
    connection = script.stack.connect((RIGHT.packed, PORT), script.now)
    script.out()
    assert script.send(RST, 0) == []
    script.send(RST | ACK, 0, 2)
    assert ended(connection, None)
    script.send(RST | ACK, 0, 1)
    assert ended(connection, End.REFUSED)
    assert script.kinds() == ["Closed"]


def test_an_answer_to_something_else_is_reset_and_the_syn_goes_on() -> None:
    script = Script()
    connection = script.stack.connect((RIGHT.packed, PORT), script.now)
    script.out()
    (reset,) = script.send(SYN | ACK, 0, 77)
    assert (reset.flags, reset.seq) == (RST, 77)
    assert is_in(connection, State.SYN_SENT)


def test_both_ends_may_open_at_once() -> None:
    script = Script()
    connection = script.stack.connect((RIGHT.packed, PORT), script.now)
    script.out()
    (answer,) = script.send(SYN, 0, options=segment.syn_options(MSS, 7, True))
    assert (answer.flags, answer.seq, answer.ack) == (SYN | ACK, 0, 1)
    assert is_in(connection, State.SYN_RECEIVED)
    script.send(SYN | ACK, 0, 1, options=segment.syn_options(MSS, 7, True))
    assert is_in(connection, State.ESTABLISHED)
    assert script.kinds() == ["Opened"]


def test_a_peer_without_options_gets_1220_octets_and_an_unscaled_window() -> None:
    script = Script()
    connection = script.stack.connect((RIGHT.packed, PORT), script.now)
    script.out()
    script.send(SYN | ACK, 0, 1, window=5000)
    connection.write(bytes(4000))
    sent = script.out()
    assert [len(one.payload) for one in sent] == [1220, 1220, 1220, 340]
    assert sent[0].window == 0xFFFF


def test_a_tiny_segment_size_is_not_followed_below_64() -> None:
    script, connection = opened(mss=1)
    connection.write(bytes(200))
    assert [len(one.payload) for one in script.out()] == [64, 64, 64, 8]


def test_a_listener_answers_and_says_accepted_once() -> None:
    script = Script()
    connection = script.accept()
    assert is_in(connection, State.ESTABLISHED)
    assert script.kinds() == ["Accepted"]
    assert script.send(SYN, 0)[0].flags == ACK  # a challenge (RFC 5961 §4.2)
    assert script.kinds() == []


def test_a_lost_answer_of_the_listener_is_repeated() -> None:
    script = Script()
    script.stack.listen(PORT)
    script.ports = (PORT, 40_000)
    (first,) = script.send(SYN, 0, options=segment.syn_options(MSS, 7, True))
    script.now += 0.5
    (again,) = script.send(SYN, 0, options=segment.syn_options(MSS, 7, True))
    (by_timer,) = script.jump()
    assert first == again == by_timer
    script.wait(100)
    assert script.kinds() == []
    assert script.stack.deadline() is None


def test_data_may_come_with_the_end_of_the_handshake() -> None:
    script = Script()
    script.stack.listen(PORT)
    script.ports = (PORT, 40_000)
    script.send(SYN, 0)
    script.send(ACK | PSH, 1, 1, b"hello")
    assert script.kinds() == ["Accepted", "Readable"]


def test_what_is_written_early_goes_out_with_the_handshake() -> None:
    script = Script()
    connection = script.stack.connect((RIGHT.packed, PORT), script.now)
    script.out()
    assert connection.write(b"early") == 5
    connection.close()
    sent = script.send(SYN | ACK, 0, 1)
    assert [(one.payload, one.flags & FIN) for one in sent] == [(b"early", 0), (b"", FIN)]
    assert is_in(connection, State.FIN_WAIT_1)


# -- closing


def test_we_close_first_and_go_on_reading() -> None:
    script, connection = opened()
    connection.write(b"bye")
    connection.close()
    data, fin = script.out()
    assert (data.payload, fin.flags, fin.seq) == (b"bye", FIN | ACK, 4)
    script.send(ACK, 1, 5)
    assert is_in(connection, State.FIN_WAIT_2)
    script.wait(1000)  # a half-closed connection that is read has no limit
    script.send(ACK | PSH, 1, 5, b"late answer")
    assert connection.read(100) == b"late answer"
    (ack,) = script.send(FIN | ACK, 12, 5)
    assert ack.ack == 13
    assert (connection.at_eof, connection.end) == (True, End.FINISHED)
    assert script.kinds() == ["Readable", "Readable", "Closed"]


def test_the_peer_closes_first_and_goes_on_reading() -> None:
    script, connection = opened()
    (ack,) = script.send(FIN | ACK, 1, 1, b"bye")
    assert ack.ack == 5
    assert is_in(connection, State.CLOSE_WAIT)
    assert connection.read(10) == b"bye"
    assert connection.at_eof
    connection.write(b"late")
    (data,) = script.out()
    assert data.payload == b"late"
    connection.close()
    (fin,) = script.send(ACK, 5, 5)
    assert fin.flags == FIN | ACK
    script.send(ACK, 5, 6)
    assert (connection.state, connection.end) == (State.CLOSED, End.FINISHED)
    assert script.stack.deadline() is None


def test_both_close_at_once() -> None:
    script, connection = opened()
    connection.close()
    script.out()
    (ack,) = script.send(FIN | ACK, 1, 1)
    assert ack.ack == 2
    assert is_in(connection, State.CLOSING)
    script.send(ACK, 2, 2)
    assert is_in(connection, State.TIME_WAIT)
    assert script.kinds() == ["Readable", "Closed"]


def test_a_lost_fin_is_sent_again() -> None:
    script, connection = opened()
    connection.close()
    (fin,) = script.out()
    (again,) = script.jump()
    assert fin == again


def test_a_fin_with_a_hole_before_it_waits() -> None:
    script, connection = opened()
    script.send(FIN | ACK, 5, 1, b"end")
    assert is_in(connection, State.ESTABLISHED)
    script.send(ACK, 1, 1, b"the ")
    assert is_in(connection, State.CLOSE_WAIT)
    assert connection.read(100) == b"the end"


def test_nothing_can_be_written_after_close() -> None:
    script, connection = opened()
    connection.close()
    assert connection.write(b"more") == 0
    assert connection.room() == 0
    connection.close()
    assert len(script.out()) == 1


def test_abort_resets_and_forgets() -> None:
    script, connection = opened()
    connection.write(bytes(5000))
    connection.abort()
    (reset,) = script.out()
    assert (reset.flags, reset.seq) == (RST | ACK, 1)
    assert ended(connection, End.ABORTED)
    assert script.stack.deadline() is None
    assert script.kinds() == ["Closed"]


def test_releasing_with_unread_data_resets() -> None:
    script, connection = opened()
    script.send(ACK, 1, 1, b"unread")
    connection.release()
    assert [one.flags for one in script.out()] == [RST | ACK]


def test_releasing_an_attempt_forgets_it() -> None:
    script = Script()
    connection = script.stack.connect((RIGHT.packed, PORT), script.now)
    script.out()
    connection.release()
    assert script.out() == []
    assert ended(connection, End.ABORTED)
    assert script.send(SYN | ACK, 0, 1)[0].flags == RST


def test_a_released_connection_delivers_and_refuses_what_comes() -> None:
    script, connection = opened()
    connection.write(b"last words")
    connection.release()
    data, fin = script.out()
    assert (data.payload, fin.flags) == (b"last words", FIN | ACK)
    script.send(ACK, 1, 12)
    (reset,) = script.send(ACK, 1, 12, b"for nobody")
    assert reset.flags & RST
    assert ended(connection, End.ABORTED)


def test_a_released_connection_does_not_wait_for_ever_for_a_fin() -> None:
    script, connection = opened()
    connection.release()
    script.out()
    script.send(ACK, 1, 2)
    script.wait(59)
    assert ended(connection, None)
    script.wait(2)
    assert ended(connection, End.FINISHED)


# -- strangers (RFC 5961)


def test_only_the_exact_reset_ends_a_connection() -> None:
    script, connection = opened()
    script.now += 1
    assert script.send(RST, 0) == []
    assert script.send(RST, 5_000_000) == []
    (challenge,) = script.send(RST, 2)
    assert (challenge.flags, challenge.seq, challenge.ack) == (ACK, 1, 1)
    assert ended(connection, None)
    script.send(RST, 1)
    assert ended(connection, End.RESET)
    assert script.kinds() == ["Readable", "Closed"]


def test_what_came_before_a_reset_can_be_read() -> None:
    script, connection = opened()
    script.send(ACK, 1, 1, b"news")
    script.send(RST, 5)
    assert (connection.end, connection.at_eof) == (End.RESET, False)
    assert connection.read(10) == b"news"


@pytest.mark.parametrize(
    ("flags", "seq", "ack"),
    [(SYN, 1, 0), (ACK, 1, 2), (ACK, 1, 0x80000000), (ACK, 0, 1), (ACK, 9_000_000, 1)],
    ids=["syn", "ack too new", "ack too old", "old keepalive", "beyond the window"],
)
def test_guesses_are_challenged_but_not_often(flags: int, seq: int, ack: int) -> None:
    script, connection = opened()
    script.now = float(int(script.now) + 1)
    answers = []
    for _ in range(100):
        answers += script.send(flags, seq, ack)
    assert len(answers) == CHALLENGES_PER_SECOND
    assert {(one.flags, one.seq, one.ack) for one in answers} == {(ACK, 1, 1)}
    assert is_in(connection, State.ESTABLISHED)


def test_a_segment_without_ack_is_nothing() -> None:
    script, connection = opened()
    assert script.send(PSH, 1, 0, b"data") == []
    assert connection.readable == 0


def test_a_hundred_guesses_of_every_kind_a_millisecond_change_nothing() -> None:
    script, connection = opened()
    random = Random(11)
    began = script.now
    answers = 0
    for _ in range(200):
        script.now += 0.001
        for _ in range(100):
            flags = random.choice((RST, RST | ACK, SYN, ACK, ACK | FIN))
            # Somewhere in 2^32, and never just at our numbers.
            seq, ack = random.randrange(1 << 24, 1 << 32), random.randrange(2, 1 << 32)
            script.inject(flags, seq, ack, b"evil" if flags == ACK else b"")
        answers += len(script.out())
    assert answers <= CHALLENGES_PER_SECOND * (int(script.now) - int(began) + 1)
    assert is_in(connection, State.ESTABLISHED)
    script.send(ACK, 1, 1, b"good")
    assert connection.read(10) == b"good"


# -- keepalive


def test_a_quiet_peer_is_asked_and_given_up() -> None:
    script, connection = opened()
    connection.keep_alive(10)
    _, probe = script.wait(10.5)
    assert (probe.seq, probe.length) == (0, 0)
    script.send(ACK, 1, 1)
    assert len(script.wait(39)) == 3
    assert ended(connection, None)
    script.wait(12)
    assert ended(connection, End.TIMED_OUT)


def test_with_keepalive_silence_while_data_is_outstanding_ends_it_as_soon() -> None:
    script, connection = opened()
    connection.keep_alive(5)
    connection.write(b"data")
    script.wait(24)
    assert ended(connection, None)
    script.wait(2)
    assert ended(connection, End.TIMED_OUT)


@pytest.mark.parametrize("laid", [True, False])
@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32))
def test_what_comes_at_once_is_taken_as_if_it_came_one_by_one(laid: bool, seed: int) -> None:
    """Data with holes, in any order, some of it twice, with acknowledgements and windows."""
    size, count = 20, 24
    octets = Random(seed).randbytes(size * count)
    seen = []
    for at_once in (True, False):
        dice = Random(seed)
        script, connection = opened()
        connection.write(bytes(3000))
        script.out()
        order = sorted(range(count), key=lambda n: n + dice.choice([0, 0, 0, dice.uniform(0, 9)]))
        order = [n for n in order if dice.random() < 0.9]
        order += dice.sample(order, 2)
        ack, packets = 1, list[bytes]()
        for number in order:
            ack += dice.choice([0, 0, 0, 100])
            at = number * size
            window = dice.choice([0xFFFF, 0xFF00])
            packets += script.packet(ACK, at + 1, ack, octets[at : at + size], window=window)
        while packets:
            many = dice.randint(1, 12)
            batch, packets = packets[:many], packets[many:]
            if at_once:
                whole = Laid(b"".join(batch), len(batch[0])) if laid else batch
                script.stack.receive(whole, script.now)
            else:
                for packet in batch:
                    script.stack.receive([packet], script.now)
            script.out()
        receiver, sender = connection.receiver, connection.sender
        got = connection.read(1 << 20)
        assert got == octets[: len(got)]
        missing = sorted(set(range(count)) - set(order))
        assert len(got) == (missing[0] if missing else count) * size
        seen.append((got, receiver.nxt, sorted(receiver.blocks()), sender.una, sender.edge))
    assert seen[0] == seen[1]

"""Stories of a path that is not there yet, or again: held connections and kicks."""

from builder_orch.tunnel.ipv6.segment import ACK, SYN
from builder_orch.tunnel.ipv6.state import End
from tests.tunnel.ipv6.script import Script, ended, opened
from tests.tunnel.ipv6.world import LEFT, PORT, RIGHT, stack

MSS = 1360


# -- holding


def test_while_the_path_is_closed_nothing_moves_and_then_all_is_fresh() -> None:
    """A WireGuard handshake of 5 s must not be taken for the round trip of the network."""
    is_open = False
    script = Script(stack(LEFT, path=lambda _: is_open))
    connection = script.stack.connect((RIGHT.packed, PORT), script.now)
    assert script.out() == []
    assert script.stack.summons() == [RIGHT.packed]
    assert script.stack.summons() == []
    assert script.wait(5) == []
    assert script.stack.summons() == [RIGHT.packed]
    is_open = True
    (syn,) = script.out()
    assert syn.flags == SYN
    began = script.now
    (again,) = script.jump()
    assert script.now - began <= 1.0
    assert again.flags == SYN
    script.now = began + 1.02
    script.send(SYN | ACK, 0, 1)
    connection.write(b"data")
    script.out()
    assert script.stack.summons() == []


def test_the_first_timeout_after_a_held_handshake_is_short() -> None:
    is_open = False
    script = Script(stack(LEFT, path=lambda _: is_open))
    connection = script.stack.connect((RIGHT.packed, PORT), script.now)
    script.wait(5)
    is_open = True
    script.out()
    script.now += 0.02
    script.send(SYN | ACK, 0, 1)
    connection.write(b"lost")
    script.out()
    began = script.now
    (again,) = script.jump()
    assert again.payload == b"lost"
    assert script.now - began <= 0.25


def test_held_data_goes_out_at_once_when_the_path_opens() -> None:
    is_open = True
    script = Script(stack(LEFT, path=lambda _: is_open))
    connection = script.connect()
    connection.write(b"outstanding")
    script.out()
    is_open = False
    assert script.wait(20) == []
    assert script.stack.summons() == [RIGHT.packed]
    is_open = True
    (again,) = script.out()
    assert again.payload == b"outstanding"
    began = script.now
    script.jump()
    assert script.now - began < 0.25  # no back-off


def test_a_connect_timeout_runs_while_held() -> None:
    script = Script(stack(LEFT, path=lambda _: False))
    connection = script.stack.connect((RIGHT.packed, PORT), script.now, timeout_s=3)
    script.wait(3)
    assert ended(connection, End.TIMED_OUT)
    script.out()
    assert script.stack.summons() == []


def test_a_kick_repeats_what_is_outstanding_and_forgets_back_off() -> None:
    script, connection = opened()
    connection.write(bytes(3 * MSS))
    script.out()
    script.wait(13)
    script.stack.kick(script.now)
    again = script.out()
    assert [one.seq for one in again] == [1, MSS + 1, 2 * MSS + 1]
    began = script.now
    script.jump()
    assert script.now - began < 0.3


def test_a_kick_in_full_flow_repeats_only_the_first_segment() -> None:
    script, connection = opened()
    connection.write(bytes(8 * MSS))
    script.out()
    script.now += 0.01
    script.stack.kick(script.now)
    (again,) = script.out()
    assert (again.seq, len(again.payload)) == (1, MSS)


def test_a_kick_repeats_a_syn_at_once() -> None:
    script = Script()
    script.stack.connect((RIGHT.packed, PORT), script.now)
    script.out()
    script.wait(20)
    script.stack.kick(script.now)
    assert [one.flags for one in script.out()] == [SYN]
    began = script.now
    script.jump()
    assert script.now - began == 1.0


def test_a_kick_can_be_for_some_remotes_only() -> None:
    script, connection = opened()
    connection.write(b"data")
    script.out()
    script.stack.kick(script.now, lambda remote: remote != RIGHT.packed)
    assert script.out() == []

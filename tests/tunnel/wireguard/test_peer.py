"""The timers of the paper as stories on a clock that jumps."""

from dataclasses import replace
from itertools import pairwise

import pytest

from builder_orch.tunnel.wireguard.interface import (
    EndpointMoved,
    HandshakeGaveUp,
    HandshakeStarted,
    Interface,
    SessionStarted,
)
from builder_orch.tunnel.wireguard.message import INITIATION, TRANSPORT
from builder_orch.tunnel.wireguard.peer import STAGED_PACKETS, trains
from builder_orch.tunnel.wireguard.session import Session
from builder_orch.tunnel.wireguard.timers import REJECT_AFTER_MESSAGES, REKEY_AFTER_MESSAGES
from tests.tunnel.wireguard.lab import (
    EPOCH,
    LEFT_AT,
    LEFT_HOST,
    MTU,
    RIGHT_AT,
    RIGHT_HOST,
    Duo,
    cut,
    dice,
    kinds,
    packet,
    private_key,
    reply,
)

DAY = 24 * 3600.0


def connected(**settings: object) -> Duo:
    duo = Duo(**settings)  # type: ignore[arg-type]
    duo.connect()
    duo.told.clear()
    duo.right.events()
    return duo


def test_the_first_packet_waits_for_the_handshake_and_then_goes() -> None:
    duo = Duo()
    duo.left.send([packet(b"first")], duo.now)
    assert not duo.left.has_session(RIGHT_HOST)
    sent = duo.fetch(duo.left)
    assert kinds(sent) == [INITIATION]
    assert sent[0].endpoint == RIGHT_AT
    assert len(sent[0].octets) == sent[0].segment == 148
    duo.right.receive(sent[0].octets, 148, LEFT_AT, duo.now)
    assert not duo.right.has_session(LEFT_HOST), "nothing proves yet that this is no replay"
    lefts, rights = duo.exchange()
    assert (lefts, rights) == ([], [packet(b"first")])
    assert duo.left.has_session(RIGHT_HOST)
    assert duo.right.has_session(LEFT_HOST)
    key = duo.right.public_key
    assert duo.told == [HandshakeStarted(key, 1, RIGHT_AT), SessionStarted(key, 1, RIGHT_AT)]
    key = duo.left.public_key
    assert duo.right.events() == [EndpointMoved(key, LEFT_AT), SessionStarted(key, 0, LEFT_AT)]
    assert not duo.left.drops
    assert not duo.right.drops


def test_without_data_a_keepalive_confirms_the_session() -> None:
    duo = Duo()
    duo.left.summon(RIGHT_HOST, duo.now)
    (call,) = duo.fetch(duo.left)
    duo.right.receive(call.octets, call.segment, LEFT_AT, duo.now)
    (response,) = duo.fetch(duo.right)
    duo.left.receive(response.octets, response.segment, RIGHT_AT, duo.now)
    (keepalive,) = duo.fetch(duo.left)
    assert keepalive.octets[0] == TRANSPORT
    assert len(keepalive.octets) == 32


def test_the_responder_stays_on_the_old_session_until_the_new_one_is_confirmed() -> None:
    duo = connected()
    duo.at(duo.now + 121)
    duo.left.send([packet()], duo.now)
    data, call = duo.fetch(duo.left)
    assert kinds([data, call]) == [TRANSPORT, INITIATION]
    duo.right.receive(data.octets, data.segment, LEFT_AT, duo.now)
    duo.right.receive(call.octets, call.segment, LEFT_AT, duo.now)
    (response,) = duo.fetch(duo.right)
    old = data.octets[4:8]
    duo.right.send([reply(b"early")], duo.now)
    (early,) = duo.fetch(duo.right)
    # Left has not seen the response, so only the old session can be opened there.
    assert duo.left.receive(early.octets, early.segment, RIGHT_AT, duo.now) == [reply(b"early")]
    duo.left.receive(response.octets, response.segment, RIGHT_AT, duo.now)
    (confirmation,) = duo.fetch(duo.left)
    assert confirmation.octets[4:8] != old
    duo.right.receive(confirmation.octets, confirmation.segment, LEFT_AT, duo.now)
    duo.right.send([reply(b"late")], duo.now)
    (late,) = duo.fetch(duo.right)
    assert late.octets[4:8] != early.octets[4:8]
    assert duo.left.receive(late.octets, late.segment, RIGHT_AT, duo.now) == [reply(b"late")]


def test_packets_of_the_session_before_are_still_taken() -> None:
    duo = connected()
    duo.at(duo.now + 121)
    duo.left.send([packet(b"slow")], duo.now)
    slow, call = duo.fetch(duo.left)
    duo.right.receive(call.octets, call.segment, LEFT_AT, duo.now)
    duo.exchange()
    assert duo.right.receive(slow.octets, slow.segment, LEFT_AT, duo.now) == [packet(b"slow")]


def test_the_initiator_that_sends_asks_for_new_keys_at_120_seconds() -> None:
    duo = connected()
    born = duo.now
    duo.at(born + 119.9).left.send([packet()], duo.now)
    assert kinds(duo.fetch(duo.left)) == [TRANSPORT]
    duo.at(born + 120).left.send([packet()], duo.now)
    assert kinds(duo.fetch(duo.left)) == [TRANSPORT, INITIATION]
    duo.left.send([packet()], duo.now)
    assert kinds(duo.fetch(duo.left)) == [TRANSPORT], "one is under way"


@pytest.mark.parametrize("age", [121, 166, 179])
def test_the_responder_never_asks_for_new_keys_by_age(age: float) -> None:
    duo = connected()
    duo.at(duo.now + age).left.send([packet()], duo.now)
    (data, _) = duo.fetch(duo.left)
    duo.right.receive(data.octets, data.segment, LEFT_AT, duo.now)
    duo.right.send([reply()], duo.now)
    assert kinds(duo.fetch(duo.right)) == [TRANSPORT]


@pytest.mark.parametrize(("age", "asked"), [(119, []), (164.9, []), (165, [INITIATION])])
def test_the_initiator_that_only_receives_asks_in_the_last_minute(
    age: float, asked: list[int]
) -> None:
    duo = connected()
    duo.at(duo.now + age)
    for _ in range(3):
        duo.right.send([reply()], duo.now)
        (data,) = duo.fetch(duo.right)
        assert duo.left.receive(data.octets, data.segment, RIGHT_AT, duo.now) == [reply()]
    assert kinds(duo.fetch(duo.left)) == asked, "once"


def test_nobody_sends_on_a_session_of_180_seconds() -> None:
    duo = connected()
    born = duo.now
    duo.left.transmit(born + 179.9)
    assert duo.left.has_session(RIGHT_HOST)
    duo.at(born + 180).left.send([packet()], duo.now)
    assert not duo.left.has_session(RIGHT_HOST)
    assert kinds(duo.fetch(duo.left)) == [INITIATION]


def test_has_session_turns_false_by_itself() -> None:
    duo = connected()
    while duo.left.has_session(RIGHT_HOST):
        deadline = duo.left.deadline()
        assert deadline is not None
        assert deadline <= 1000.0 + 180
        duo.at(deadline).fetch(duo.left)
    assert duo.now == 1000.0 + 180


def test_a_packet_on_a_session_of_180_seconds_is_refused() -> None:
    duo = connected()
    duo.at(duo.now + 179.9).left.send([packet()], duo.now)
    data = duo.fetch(duo.left)[0]
    duo.at(duo.now + 0.2)
    assert duo.right.receive(data.octets, data.segment, LEFT_AT, duo.now) == []
    assert duo.right.drops == {"session expired": 1}


def test_keys_are_forgotten_540_seconds_after_the_last_handshake() -> None:
    duo = connected()
    duo.left.send([packet()], duo.now)
    (data,) = duo.fetch(duo.left)
    deadlines = []
    while (deadline := duo.right.deadline()) is not None:
        deadlines.append(deadline)
        assert duo.at(deadline).fetch(duo.right) == []
    assert deadlines[-1] == 1000.0 + 540
    assert duo.right.receive(data.octets, data.segment, LEFT_AT, duo.now) == []
    assert duo.right.drops == {"unknown index": 1}


def test_a_passive_keepalive_follows_data_that_was_not_answered() -> None:
    duo = connected()
    start = duo.now
    duo.left.send([packet()], duo.now)
    duo.exchange()
    assert duo.at(start + 9.9).fetch(duo.right) == []
    (keepalive,) = duo.at(start + 10).fetch(duo.right)
    assert len(keepalive.octets) == 32
    # A keepalive is no data: it provokes none in return.
    assert duo.left.receive(keepalive.octets, keepalive.segment, RIGHT_AT, duo.now) == []
    assert duo.at(start + 30).fetch(duo.left) == []
    assert duo.fetch(duo.right) == []


def test_data_after_data_earns_a_second_keepalive() -> None:
    duo = connected()
    start = duo.now
    for wait_s in (0, 4):
        duo.at(start + wait_s).left.send([packet()], duo.now)
        duo.exchange()
    assert len(duo.at(start + 10).fetch(duo.right)) == 1
    assert duo.at(start + 19.9).fetch(duo.right) == []
    assert len(duo.at(start + 20).fetch(duo.right)) == 1
    assert duo.at(start + 40).fetch(duo.right) == []


def test_an_answer_makes_the_keepalive_needless() -> None:
    duo = connected()
    duo.left.send([packet()], duo.now)
    duo.exchange()
    duo.at(duo.now + 5).right.send([reply()], duo.now)
    duo.fetch(duo.right)
    assert duo.at(duo.now + 6).fetch(duo.right) == []


def test_silence_after_data_calls_for_a_new_handshake_after_15_seconds() -> None:
    duo = connected()
    start = duo.now
    duo.left.send([packet()], duo.now)
    duo.fetch(duo.left)
    assert duo.at(start + 14.999).fetch(duo.left) == []
    assert kinds(duo.at(start + 15.334).fetch(duo.left)) == [INITIATION]


def test_an_authentic_answer_calms_it() -> None:
    duo = connected()
    duo.left.send([packet()], duo.now)
    duo.exchange()
    duo.run(duo.now + 100)
    assert duo.told == []


def unanswered(duo: Duo) -> list[float]:
    """When initiations go out until nothing is due any more."""
    at = [duo.now for kind in kinds(duo.fetch(duo.left)) if kind == INITIATION]
    while (deadline := duo.left.deadline()) is not None:
        sent = duo.at(deadline).fetch(duo.left)
        at += [duo.now for kind in kinds(sent) if kind == INITIATION]
    return at


def test_an_unanswered_handshake_is_repeated_given_up_and_begun_anew() -> None:
    duo = Duo()
    start = duo.now
    duo.left.send([packet(b"lost")], duo.now)
    at = unanswered(duo)
    assert len(at) == 20
    waits = [later - earlier for earlier, later in pairwise(at)]
    assert all(5.0 <= wait <= 5.334 for wait in waits)
    assert len(set(waits)) > 10, "retries are jittered"
    *started, gave_up = duo.left.events()
    key = duo.right.public_key
    assert started == [HandshakeStarted(key, number, RIGHT_AT) for number in range(1, 21)]
    assert isinstance(gave_up, HandshakeGaveUp)
    assert gave_up.attempts == 20
    assert gave_up.since_s == pytest.approx(duo.now - start)
    assert 100 <= gave_up.since_s <= 107
    assert duo.left.drops == {"handshake gave up": 1}

    duo.at(duo.now + 1000).left.send([packet(b"again")], duo.now)
    assert duo.exchange() == ([], [packet(b"again")])


@pytest.mark.parametrize("how", ["send", "summon"])
def test_asking_again_while_one_is_under_way_changes_nothing(how: str) -> None:
    duo = Duo()
    duo.left.summon(RIGHT_HOST, duo.now)
    duo.fetch(duo.left)
    for _ in range(1000):
        duo.at(duo.now + 0.2)
        if how == "send":
            duo.left.send([packet()], duo.now)
        else:
            duo.left.summon(RIGHT_HOST, duo.now)
        duo.fetch(duo.left)
    told = duo.left.events()
    assert sum(isinstance(event, HandshakeGaveUp) for event in told) == 1
    # It was given up once, and who still wanted it began anew.
    assert sum(isinstance(event, HandshakeStarted) for event in told) == pytest.approx(39, abs=2)


def test_no_more_than_128_packets_wait_and_the_oldest_go_first() -> None:
    duo = Duo()
    for number in range(STAGED_PACKETS + 10):
        duo.left.send([packet(number.to_bytes(2))], duo.now)
    assert duo.left.drops == {"staged full": 10}
    _, rights = duo.exchange()
    assert rights == [packet(number.to_bytes(2)) for number in range(10, STAGED_PACKETS + 10)]


def test_who_has_no_endpoint_cannot_call() -> None:
    duo = Duo()
    duo.right.send([reply()], duo.now)
    duo.right.summon(LEFT_HOST, duo.now)
    assert duo.fetch(duo.right) == []
    assert duo.right.drops == {"no endpoint": 1}
    assert duo.right.deadline() is None


def test_both_sides_may_call_at_the_same_time() -> None:
    duo = Duo(mutual=True)
    duo.left.send([packet(b"there")], duo.now)
    duo.right.send([reply(b"back")], duo.now)
    lefts, rights = duo.exchange()
    assert (lefts, rights) == ([reply(b"back")], [packet(b"there")])
    for _ in range(3):
        duo.left.send([packet(b"there")], duo.now)
        duo.right.send([reply(b"back")], duo.now)
        assert duo.exchange() == ([reply(b"back")], [packet(b"there")])
    assert not duo.left.drops
    assert not duo.right.drops


def test_a_day_of_idling_costs_no_handshake() -> None:
    duo = connected()
    duo.run(duo.now + DAY)
    assert duo.told == []
    assert duo.left.deadline() is None
    assert duo.right.deadline() is None


def test_a_day_of_persistent_keepalives_costs_a_handshake_each_125_seconds() -> None:
    duo = connected(keepalive_s=25.0)
    duo.run(duo.now + DAY)
    started = [event for event in duo.told if isinstance(event, SessionStarted)]
    assert len(started) == pytest.approx(DAY / 125, abs=3)
    (status,) = duo.left.status(duo.now)
    assert status.sent_octets >= 32 * (DAY / 25 - 1)
    assert duo.left.has_session(RIGHT_HOST)


def test_persistent_keepalive_begins_at_once_and_never_ends() -> None:
    duo = Duo(keepalive_s=25.0)
    assert kinds(duo.fetch(duo.left)) == [INITIATION]
    # Nobody answers for an hour.
    while duo.now < 1000.0 + 3600:
        deadline = duo.left.deadline()
        assert deadline is not None
        duo.at(deadline).fetch(duo.left)
    told = duo.left.events()
    assert sum(isinstance(event, HandshakeGaveUp) for event in told) > 20
    duo.run(duo.now + 60)
    assert duo.left.has_session(RIGHT_HOST)


def test_peers_of_the_constructor_begin_their_keepalives_with_the_first_transmit() -> None:
    duo = Duo()
    eager = Interface(
        private_key(9),
        mtu=MTU,
        entropy=dice(9),
        epoch=EPOCH,
        peers=[replace(duo.to_right, keepalive_s=25.0), replace(duo.to_left, endpoint=None)],
    )
    assert kinds(eager.transmit(5.0)) == [INITIATION]
    deadline = eager.deadline()
    assert deadline is not None
    assert 10.0 <= deadline <= 10.334


def test_hours_of_data_renew_the_keys_every_two_minutes() -> None:
    duo = connected()
    begin = duo.now
    for second in range(2 * 3600):
        duo.at(begin + second).left.send([packet(second.to_bytes(4))], duo.now)
        lefts, rights = duo.exchange()
        assert rights == [packet(second.to_bytes(4))]
        assert lefts == []
    renewed = [event for event in duo.told if isinstance(event, SessionStarted)]
    assert len(renewed) == pytest.approx(60, abs=1)
    assert not duo.left.drops
    assert not duo.right.drops


@pytest.mark.parametrize("psk", [bytes(32), bytes([8]) * 32])
def test_preshared_keys_must_be_the_same(psk: bytes) -> None:
    assert connected(psk=psk).left.has_session(RIGHT_HOST)
    duo = Duo(psk=psk, right_psk=bytes([9]) * 32)
    duo.left.send([packet()], duo.now)
    assert duo.exchange() == ([], [])
    assert duo.left.drops == {"forged handshake": 1}
    assert not duo.left.has_session(RIGHT_HOST)


def test_many_messages_also_call_for_new_keys_and_the_last_counter_is_the_end() -> None:
    made: list[Session] = []

    class Watched(Session):
        """A session the test can find."""

        def __init__(self, *arguments: object, **named: object) -> None:
            super().__init__(*arguments, **named)  # type: ignore[arg-type]
            made.append(self)

    duo = connected(session=Watched)
    right, left = made
    for session, interface, data in (
        (left, duo.left, packet()),
        (right, duo.right, reply()),
    ):
        duo.at(duo.now + 6)
        session.sent = REKEY_AFTER_MESSAGES
        interface.send([data], duo.now)
        assert kinds(duo.fetch(interface)) == [TRANSPORT, INITIATION], "either side"
    left.sent = REJECT_AFTER_MESSAGES - 2
    duo.left.send([packet()] * 3, duo.now)
    assert TRANSPORT not in kinds(duo.fetch(duo.left))
    assert left.sent == REJECT_AFTER_MESSAGES - 2
    assert duo.left.has_session(RIGHT_HOST), "for two more"
    duo.left.send([packet()] * 2, duo.now)
    assert kinds(duo.fetch(duo.left)) == [TRANSPORT]
    assert not duo.left.has_session(RIGHT_HOST)


def test_new_settings_leave_the_session_alone() -> None:
    duo = connected()
    duo.left.add_peer(duo.to_right, duo.now)
    duo.right.add_peer(duo.to_left, duo.now)
    duo.left.send([packet(b"on")], duo.now)
    duo.right.send([reply(b"too")], duo.now)
    assert duo.exchange() == ([reply(b"too")], [packet(b"on")])


def test_a_removed_peer_is_unknown() -> None:
    duo = connected()
    duo.left.send([packet()], duo.now)
    (data,) = duo.fetch(duo.left)
    duo.right.remove_peer(duo.left.public_key)
    duo.right.remove_peer(duo.left.public_key)
    assert duo.right.receive(data.octets, data.segment, LEFT_AT, duo.now) == []
    assert duo.right.drops == {"unknown index": 1}
    assert not duo.right.has_session(LEFT_HOST)
    duo.right.send([reply()], duo.now)
    duo.right.summon(LEFT_HOST, duo.now)
    assert duo.right.drops["no route"] == 2
    duo.run(duo.now + 1000)
    assert duo.right.drops["unknown peer"] > 0
    assert duo.right.status(duo.now) == []


def test_status_tells_age_traffic_and_attempts() -> None:
    duo = Duo()
    (before,) = duo.left.status(duo.now)
    assert (before.last_handshake_age_s, before.sent_octets, before.attempts) == (None, 0, 0)
    duo.left.summon(RIGHT_HOST, duo.now)
    (during,) = duo.left.status(duo.now)
    assert (during.attempts, during.sent_octets) == (1, 148)
    duo.exchange()
    (after,) = duo.left.status(duo.now + 3)
    assert after.public_key == duo.right.public_key
    assert (after.endpoint, after.last_handshake_age_s, after.attempts) == (RIGHT_AT, 3.0, 0)
    (theirs,) = duo.right.status(duo.now)
    assert theirs.received_octets == after.sent_octets == 148 + 32
    assert theirs.sent_octets == after.received_octets == 92


def test_an_uneven_sequence_is_cut_into_trains() -> None:
    sizes = [100, 100, 60, 60, 80, 80, 80] + [50] * 100
    packets = [bytes(size) for size in sizes]
    cut_up = list(trains(packets))
    assert [one for train in cut_up for one in train] == packets
    for train in cut_up:
        assert len(train) <= 44
        assert all(len(one) == len(train[0]) for one in train[:-1])
        assert len(train[-1]) <= len(train[0])
    duo = connected()
    uneven = [packet(bytes(size)) for size in sizes]
    duo.left.send(uneven, duo.now)
    sent = duo.fetch(duo.left)
    assert sum(len(cut(datagrams)) for datagrams in sent) == len(uneven)
    got: list[bytes] = []
    for octets, segment, _ in sent:
        got += duo.right.receive(octets, segment, LEFT_AT, duo.now)
    assert got == uneven


def test_the_clock_in_initiations_is_wall_clock() -> None:
    """Two lives of one process with the same key must not look like a replay."""
    first = Duo()
    first.connect()
    second = Duo()
    # The same machine a second later, its own clock begun anew: only epoch + now counts.
    assert EPOCH + second.now == EPOCH + first.now
    second.at(first.now + 1).left.summon(RIGHT_HOST, second.now)
    (call,) = second.fetch(second.left)
    first.right.receive(call.octets, call.segment, LEFT_AT, second.now)
    assert not first.right.drops


def test_mtu_is_a_limit() -> None:
    duo = connected()
    duo.left.send([packet(bytes(MTU - 39))], duo.now)
    assert duo.left.drops == {"longer than MTU": 1}
    full = packet(bytes(MTU - 40))
    duo.left.send([full], duo.now)
    assert duo.exchange() == ([], [full])

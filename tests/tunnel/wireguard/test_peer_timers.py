"""The timers of the paper as stories on a clock that jumps."""

from dataclasses import replace
from itertools import pairwise

import pytest

from builder_orch.tunnel.wireguard.interface import (
    HandshakeGaveUp,
    HandshakeStarted,
    Interface,
    SessionStarted,
)
from builder_orch.tunnel.wireguard.message import INITIATION, TRANSPORT
from tests.tunnel.wireguard.lab import (
    EPOCH,
    LEFT_AT,
    MTU,
    RIGHT_AT,
    RIGHT_HOST,
    Duo,
    connected,
    dice,
    kinds,
    packet,
    private_key,
    reply,
)
from tests.tunnel.wireguard.test_weather import Watched

DAY = 24 * 3600.0


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


@pytest.mark.parametrize("role", ["initiator", "responder"])
def test_keys_are_forgotten_540_seconds_after_the_last_handshake(role: str) -> None:
    duo = connected()
    sender, receiver, data = duo.left, duo.right, packet()
    if role == "initiator":
        sender, receiver, data = duo.right, duo.left, reply()
    sender.send([data], duo.now)
    (sealed,) = duo.fetch(sender)
    deadlines = []
    while (deadline := receiver.deadline()) is not None:
        deadlines.append(deadline)
        assert duo.at(deadline).fetch(receiver) == []
    assert deadlines[-1] == 1000.0 + 540
    assert receiver.receive(sealed.octets, sealed.segment, LEFT_AT, duo.now) == []
    assert receiver.drops == {"unknown index": 1}


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


@pytest.mark.parametrize(
    ("there", "back"),
    [(True, True), (True, False), (False, True)],
    ids=["both", "up", "down"],
)
def test_a_day_of_data_renews_the_keys_every_two_minutes(there: bool, back: bool) -> None:
    """Without one nonce used twice under a key. Who only receives asks for new keys later."""
    sealed: set[tuple[bytes, bytes]] = set()
    duo = connected(session=type("WatchedAllDay", (Watched,), {"sealed": sealed}))
    begin, sent, renewed = duo.now, 0, 0
    initiations: list[float] = []
    for moment in range(10, int(DAY), 10):
        duo.run(begin + moment)
        if there:
            duo.left.send([packet(moment.to_bytes(4))], duo.now)
        if back:
            duo.right.send([reply(moment.to_bytes(4))], duo.now)
        lefts, rights = duo.exchange()
        assert rights == [packet(moment.to_bytes(4))] * there
        assert lefts == [reply(moment.to_bytes(4))] * back
        sent += 1
        initiations += [duo.now for event in duo.told if isinstance(event, HandshakeStarted)]
        renewed += sum(isinstance(event, SessionStarted) for event in duo.told)
        duo.told.clear()
    assert renewed == pytest.approx(DAY / 120, abs=10) or not there
    assert DAY / 170 <= renewed <= DAY / 120
    assert all(later - earlier >= 5.0 for earlier, later in pairwise(initiations))
    assert renewed == len(initiations)
    assert not duo.left.drops
    assert not duo.right.drops
    assert len(sealed) >= sent * (there + back)

"""One peer: key slots, staging, settings, indices and what it tells."""

from dataclasses import replace
from itertools import cycle

import pytest

from builder_orch.tunnel.wireguard.interface import (
    EndpointMoved,
    HandshakeStarted,
    Interface,
    SessionStarted,
)
from builder_orch.tunnel.wireguard.message import INITIATION, RESPONSE, TRANSPORT
from builder_orch.tunnel.wireguard.peer import STAGED_PACKETS, trains
from builder_orch.tunnel.wireguard.session import Session
from builder_orch.tunnel.wireguard.timers import REJECT_AFTER_MESSAGES, REKEY_AFTER_MESSAGES
from tests.tunnel.wireguard.lab import (
    EPOCH,
    LEFT_AT,
    LEFT_HOST,
    LEFT_NET,
    MTU,
    RIGHT_AT,
    RIGHT_HOST,
    Duo,
    connected,
    cut,
    dice,
    kinds,
    packet,
    private_key,
    reply,
)


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


def test_who_answered_a_moment_ago_waits_five_seconds_before_calling_itself() -> None:
    duo = Duo(mutual=True)
    duo.left.summon(RIGHT_HOST, duo.now)
    (call,) = duo.fetch(duo.left)
    duo.right.receive(call.octets, call.segment, LEFT_AT, duo.now)
    assert kinds(duo.fetch(duo.right)) == [RESPONSE]
    # The response is lost, and so left will never confirm; right has something to say meanwhile.
    duo.right.send([reply(b"waiting")], duo.now)
    assert duo.fetch(duo.right) == []
    deadline = duo.right.deadline()
    assert deadline is not None
    assert 5.0 <= deadline - duo.now <= 5.334
    assert kinds(duo.at(deadline).fetch(duo.right)) == [INITIATION]


def test_a_packet_that_waits_goes_when_the_new_session_is_confirmed() -> None:
    duo = Duo(mutual=True)
    duo.left.summon(RIGHT_HOST, duo.now)
    (call,) = duo.fetch(duo.left)
    duo.right.receive(call.octets, call.segment, LEFT_AT, duo.now)
    duo.right.send([reply(b"waiting")], duo.now)
    assert duo.exchange() == ([reply(b"waiting")], [])
    duo.run(duo.now + 14)
    assert INITIATION not in kinds(duo.fetch(duo.right))
    assert not duo.right.drops


def test_indices_are_given_back() -> None:
    """With sixteen indices to choose from, a lost one would soon be missed."""
    numbers = cycle(range(16))
    plain = dice(4)
    draws = 0

    def scarce(count: int) -> bytes:
        nonlocal draws
        if count != 4:
            return plain(count)
        draws += 1
        assert draws < 3000, "no index is free"
        return next(numbers).to_bytes(4)

    duo = Duo()
    duo.right = Interface(private_key(2), mtu=MTU, entropy=scarce, epoch=EPOCH)
    duo.right.add_peer(duo.to_left, duo.now)
    for _ in range(100):
        duo.at(duo.now + 121).left.send([packet()], duo.now)
        sent = duo.fetch(duo.left)
        for _ in range(5):
            for octets, segment, _ in sent:
                duo.right.receive(octets, segment, LEFT_AT, duo.now)
        duo.exchange()
        assert duo.right.has_session(LEFT_HOST)
    assert duo.right.drops["initiation replayed"] == 400


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


def test_new_settings_take_effect() -> None:
    duo = connected()
    moved = ("198.51.100.7", 7)
    psk = bytes([3]) * 32
    duo.left.add_peer(replace(duo.to_right, endpoint=moved, preshared_key=psk), duo.now)
    duo.right.add_peer(replace(duo.to_left, preshared_key=psk), duo.now)
    duo.at(duo.now + 200).left.send([packet(b"there")], duo.now)
    (call,) = duo.fetch(duo.left)
    assert call.endpoint == moved
    duo.right.receive(call.octets, call.segment, LEFT_AT, duo.now)
    assert duo.exchange()[1] == [packet(b"there")]
    assert not duo.left.drops
    duo.left.add_peer(replace(duo.to_right, allowed=(LEFT_NET,)), duo.now)
    assert not duo.left.has_session(RIGHT_HOST), "no longer the peer's address"
    assert duo.left.has_session(LEFT_HOST)


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

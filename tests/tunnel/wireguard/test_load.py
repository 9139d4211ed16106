"""A responder that is asked too much: mac1 first, then cookies, then a limit."""

import pytest

from builder_orch.tunnel.config import PeerConfig, PublicKey
from builder_orch.tunnel.wireguard import noise
from builder_orch.tunnel.wireguard.cookie import Jar
from builder_orch.tunnel.wireguard.interface import (
    BUSY_HANDSHAKES,
    Interface,
)
from builder_orch.tunnel.wireguard.message import (
    COOKIE_REPLY,
    RESPONSE,
    CookieReply,
    Initiation,
)
from tests.tunnel.wireguard.lab import (
    EPOCH,
    LEFT_AT,
    MTU,
    RIGHT_AT,
    RIGHT_HOST,
    RIGHT_NET,
    Duo,
    dice,
    kinds,
    packet,
    private_key,
)

ELSEWHERE = ("198.51.100.9", 999)


def initiations(count: int, *, to: PublicKey, seed: int = 50) -> list[bytes]:
    """What somebody unknown, who knows the public key, can send: mac1 is right."""
    made = []
    for number in range(count):
        stranger = Interface(
            private_key(seed + number), mtu=MTU, entropy=dice(seed + number), epoch=EPOCH
        )
        stranger.add_peer(PeerConfig(to, (RIGHT_NET,), RIGHT_AT), 0.0)
        stranger.summon(RIGHT_HOST, 0.0)
        made += [bytes(each.octets) for each in stranger.transmit(0.0)]
    return made


def cheap(number: int, to: PublicKey) -> bytes:
    """An initiation that is wrong after a right mac1."""
    return Jar(to).stamp(Initiation(number, bytes(108)).emit(), 0.0)


def busy(duo: Duo) -> None:
    """Let right receive more handshakes than it likes."""
    for number in range(BUSY_HANDSHAKES):
        duo.right.receive(cheap(number, duo.right.public_key), 148, ELSEWHERE, duo.now)
    assert duo.fetch(duo.right) == []


def test_a_wrong_mac1_costs_no_key_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    duo = Duo()
    calls = initiations(1, to=duo.right.public_key)
    done: list[bytes] = []
    exchange = noise.Key.exchange

    def counted(self: noise.Key, public: bytes) -> bytes:
        done.append(public)
        return exchange(self, public)

    monkeypatch.setattr(noise.Key, "exchange", counted)
    for octets in [calls[0][:-32] + bytes(32), bytes([RESPONSE, 0, 0, 0]) + bytes(88)]:
        for _ in range(1000):
            duo.right.receive(octets, len(octets), ELSEWHERE, duo.now)
    assert done == []
    assert duo.right.drops == {"wrong mac1": 2000}
    assert duo.fetch(duo.right) == []
    duo.right.receive(calls[0], 148, ELSEWHERE, duo.now)
    assert len(done) == 1
    assert duo.right.drops["unknown peer"] == 1


def test_a_busy_responder_sends_cookies_and_the_next_attempt_gets_through() -> None:
    duo = Duo()
    busy(duo)
    duo.left.send([packet(b"patience")], duo.now)
    start = duo.now
    (call,) = duo.fetch(duo.left)
    assert call.octets[-16:] == bytes(16)
    duo.right.receive(call.octets, call.segment, LEFT_AT, duo.now)
    (cookie,) = duo.fetch(duo.right)
    assert kinds([cookie]) == [COOKIE_REPLY]
    assert cookie.endpoint == LEFT_AT
    duo.left.receive(cookie.octets, cookie.segment, RIGHT_AT, duo.now)
    assert not duo.left.drops
    duo.at(start + 5.334)
    busy(duo)
    (again,) = duo.fetch(duo.left)
    assert again.octets[-16:] != bytes(16)
    # The cookie proves one address: from another it is worth nothing.
    duo.right.receive(again.octets, again.segment, ELSEWHERE, duo.now)
    assert kinds(duo.fetch(duo.right)) == [COOKIE_REPLY]
    duo.right.receive(again.octets, again.segment, LEFT_AT, duo.now)
    (response,) = duo.fetch(duo.right)
    assert kinds([response]) == [RESPONSE]
    duo.left.receive(response.octets, response.segment, RIGHT_AT, duo.now)
    assert duo.exchange()[1] == [packet(b"patience")]


def test_a_busy_initiator_also_asks_for_a_cookie() -> None:
    duo = Duo()
    duo.left.summon(RIGHT_HOST, duo.now)
    (call,) = duo.fetch(duo.left)
    duo.right.receive(call.octets, call.segment, LEFT_AT, duo.now)
    (response,) = duo.fetch(duo.right)
    for number in range(BUSY_HANDSHAKES):
        duo.left.receive(cheap(number, duo.left.public_key), 148, ELSEWHERE, duo.now)
    duo.left.receive(response.octets, response.segment, RIGHT_AT, duo.now)
    (cookie,) = duo.fetch(duo.left)
    assert kinds([cookie]) == [COOKIE_REPLY]
    duo.right.receive(cookie.octets, cookie.segment, LEFT_AT, duo.now)
    assert not duo.right.drops
    # The next response carries mac2.
    (again,) = duo.at(duo.now + 5.334).fetch(duo.left)
    duo.right.receive(again.octets, again.segment, LEFT_AT, duo.now)
    (answer,) = duo.fetch(duo.right)
    assert kinds([answer]) == [RESPONSE]
    assert answer.octets[-16:] != bytes(16)


def test_load_passes_after_a_second() -> None:
    duo = Duo()
    busy(duo)
    duo.right.receive(cheap(0, duo.right.public_key), 148, ELSEWHERE, duo.now)
    assert kinds(duo.fetch(duo.right)) == [COOKIE_REPLY]
    duo.at(duo.now + 1.1).left.summon(RIGHT_HOST, duo.now)
    duo.exchange()
    assert duo.left.has_session(RIGHT_HOST)


def test_a_proven_source_gets_twenty_handshakes_a_second_under_load() -> None:
    """A flood from one address that does answer cookies costs a bounded number of exchanges."""
    duo = Duo()
    busy(duo)
    key = duo.right.public_key
    jars = [Jar(key) for _ in range(40)]
    for jar in jars:
        octets = jar.stamp(Initiation(1, bytes(108)).emit(), duo.now)
        duo.right.receive(octets, 148, ELSEWHERE, duo.now)
    replies = duo.fetch(duo.right)
    assert len(replies) == 40
    duo.right.drops.clear()
    for jar, each in zip(jars, replies, strict=True):
        jar.keep(CookieReply.parse(bytes(each.octets)), duo.now)
        octets = jar.stamp(Initiation(1, bytes(108)).emit(), duo.now)
        duo.right.receive(octets, 148, ELSEWHERE, duo.now)
    # Five were worked on (and found to be nonsense), the rest was not.
    assert duo.right.drops == {"low order point": 5, "too many handshakes": 35}

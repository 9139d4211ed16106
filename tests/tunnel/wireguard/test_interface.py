"""Two interfaces and what lies between them: weather, roaming, load, foreigners and garbage."""

from ipaddress import IPv6Address, IPv6Network
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder_orch.tunnel.config import PeerConfig, PublicKey
from builder_orch.tunnel.wireguard import noise
from builder_orch.tunnel.wireguard.cookie import Jar
from builder_orch.tunnel.wireguard.interface import (
    BUSY_HANDSHAKES,
    EndpointMoved,
    Interface,
    SessionStarted,
)
from builder_orch.tunnel.wireguard.message import (
    COOKIE_REPLY,
    INITIATION,
    RESPONSE,
    TRANSPORT,
    CookieReply,
    Initiation,
)
from builder_orch.tunnel.wireguard.peer import OUTGOING
from builder_orch.tunnel.wireguard.session import Aead, Session
from tests.tunnel.wireguard.lab import (
    EPOCH,
    LEFT_AT,
    LEFT_HOST,
    LEFT_NET,
    MTU,
    RIGHT_AT,
    RIGHT_HOST,
    RIGHT_NET,
    Duo,
    Weather,
    Wire,
    dice,
    kinds,
    packet,
    private_key,
    reply,
)

ELSEWHERE = ("198.51.100.9", 999)


class Watched(Session):
    """A session that notes every key and nonce it seals with."""

    sealed: set[tuple[bytes, bytes]]

    def cipher(self, key: bytes) -> Aead:
        cipher, used = super().cipher(key), self.sealed

        class Watch:
            """Refuses what must never happen."""

            def encrypt(self, nonce: bytes, data: bytes, associated: bytes | None) -> bytes:
                assert (key, nonce) not in used, "the same key and nonce twice"
                used.add((key, nonce))
                return cipher.encrypt(nonce, data, associated)

            def decrypt(
                self, nonce: bytes, data: bytes | memoryview, associated: bytes | None
            ) -> bytes:
                return cipher.decrypt(nonce, data, associated)

        return Watch()


def ends(*, mutual: bool, seed: int, session: type[Session] = Session) -> list[Interface]:
    """Left and right, introduced to each other at time 0."""
    keys = [private_key(seed), private_key(seed + 1)]
    made = [
        Interface(key, mtu=MTU, entropy=dice(seed + 2 + place), epoch=EPOCH, session=session)
        for place, key in enumerate(keys)
    ]
    left, right = made
    left.add_peer(PeerConfig(right.public_key, (RIGHT_NET,), RIGHT_AT), 0.0)
    right.add_peer(PeerConfig(left.public_key, (LEFT_NET,), LEFT_AT if mutual else None), 0.0)
    return made


WEATHERS = st.builds(
    Weather,
    loss=st.floats(0, 0.3),
    duplicate=st.floats(0, 0.3),
    reorder=st.floats(0, 0.3),
    delay_s=st.sampled_from([0.0001, 0.02, 0.4]),
)


@settings(max_examples=60, deadline=None)
@given(WEATHERS, st.booleans(), st.integers(0, 2**32))
def test_any_weather_delivers_packets_whole_and_once(
    weather: Weather, mutual: bool, seed: int
) -> None:
    """Ten minutes of trains, which cross several rekeys, with every key and nonce watched."""
    chance = Random(seed)
    watched = type("WatchedOnce", (Watched,), {"sealed": set()})
    left, right = ends(mutual=mutual, seed=seed, session=watched)
    wire = Wire(left, right, weather, seed)
    sent: dict[tuple[str, int], set[bytes]] = {LEFT_AT: set(), RIGHT_AT: set()}
    for number in range(60):
        for at, make in ((LEFT_AT, packet), (RIGHT_AT, reply)):
            size = chance.randint(4, 200)
            train = [
                make(number.to_bytes(2) + place.to_bytes(2) + bytes(size))
                for place in range(chance.randint(1, 20))
            ]
            sent[at].update(train)
            wire.send(at, train)
        wire.run(wire.now + chance.choice([0.0, 0.1, 3.0, 25.0]))
    wire.weather = Weather(delay_s=weather.delay_s)
    wire.run(wire.now + 60)
    for source, target in ((LEFT_AT, RIGHT_AT), (RIGHT_AT, LEFT_AT)):
        arrived = wire.arrived[target]
        assert len(set(arrived)) == len(arrived), "no packet twice"
        assert set(arrived) <= sent[source], "none changed"
    # In good weather everything arrives again.
    for at, make in ((LEFT_AT, packet), (RIGHT_AT, reply)):
        wire.send(at, [make(b"fair weather")])
    wire.run(wire.now + 30)
    assert packet(b"fair weather") in wire.arrived[RIGHT_AT]
    assert reply(b"fair weather") in wire.arrived[LEFT_AT]


@pytest.mark.parametrize("seed", range(4))
def test_the_same_seed_gives_the_same_octets(seed: int) -> None:
    runs = []
    for _ in range(2):
        left, right = ends(mutual=True, seed=seed)
        wire = Wire(left, right, Weather(loss=0.3, reorder=0.2, duplicate=0.2), seed)
        for number in range(20):
            wire.send(LEFT_AT, [packet(number.to_bytes(2))])
            wire.run(wire.now + 9)
        runs.append((wire.arrived, left.status(wire.now), left.drops, right.drops))
    assert runs[0] == runs[1]


def test_under_thirty_percent_loss_most_packets_still_arrive() -> None:
    """The layer itself must not add loss: staging, rekeys and reordering lose nothing."""
    left, right = ends(mutual=False, seed=9)
    wire = Wire(left, right, Weather(loss=0.3, reorder=0.3, duplicate=0.3), 9)
    wire.send(LEFT_AT, [packet()])
    wire.run(60.0)
    count = 6000
    for number in range(count):
        wire.send(LEFT_AT, [packet(number.to_bytes(4))])
        wire.run(wire.now + 0.1)
    wire.run(wire.now + 10)
    # A doubled datagram has two chances: at least 0.7, at most 0.7 * 1.3 of them arrive.
    assert 0.67 * count <= len(wire.arrived[RIGHT_AT]) <= 0.92 * count


# Roaming


def test_the_endpoint_follows_authentic_packets() -> None:
    duo = Duo()
    duo.connect()
    duo.right.events()
    duo.left.send([packet(b"moved")], duo.now)
    (data,) = duo.fetch(duo.left)
    assert duo.right.receive(data.octets, data.segment, ELSEWHERE, duo.now) == [packet(b"moved")]
    assert duo.right.events() == [EndpointMoved(duo.left.public_key, ELSEWHERE)]
    duo.right.send([reply()], duo.now)
    (back,) = duo.fetch(duo.right)
    assert back.endpoint == ELSEWHERE
    assert duo.right.status(duo.now)[0].endpoint == ELSEWHERE


def test_replayed_and_forged_packets_never_move_it() -> None:
    duo = Duo()
    duo.left.summon(RIGHT_HOST, duo.now)
    (call,) = duo.fetch(duo.left)
    duo.right.receive(call.octets, call.segment, LEFT_AT, duo.now)
    (response,) = duo.fetch(duo.right)
    duo.left.receive(response.octets, response.segment, RIGHT_AT, duo.now)
    duo.left.send([packet()] * 3, duo.now)
    seen = [call, *duo.fetch(duo.left)]
    for each in seen:
        duo.right.receive(each.octets, each.segment, LEFT_AT, duo.now)
    duo.right.events()
    duo.at(duo.now + 1)
    for each in [*seen, response]:
        duo.right.receive(each.octets, each.segment, ELSEWHERE, duo.now)
        for place in range(0, len(each.octets), 7):
            broken = bytearray(each.octets)
            broken[place] ^= 0x41
            duo.right.receive(bytes(broken), each.segment, ELSEWHERE, duo.now)
    assert duo.right.events() == []
    assert duo.right.status(duo.now)[0].endpoint == LEFT_AT
    # Those with a changed mac2 are still the peer's own, and old.
    assert duo.right.drops["initiation replayed"] >= 1
    assert duo.right.drops["replayed"] >= 4


# Crypto-routing


def test_a_peer_may_only_send_from_its_own_networks() -> None:
    duo = Duo()
    duo.connect()
    stranger = IPv6Address("fd00:3::1").packed
    foreign = [packet(source=stranger), packet(source=RIGHT_HOST), packet(b"own")]
    for each in foreign:
        duo.left.send([each], duo.now)
    _, rights = duo.exchange()
    assert rights == [packet(b"own")]
    assert duo.right.drops == {"inner source not allowed": 2}


def test_a_more_specific_network_of_another_peer_silences_the_first() -> None:
    duo = Duo()
    duo.connect()
    other = noise.Key(private_key(77)).public
    narrow = IPv6Network((LEFT_HOST, 128))
    duo.right.add_peer(PeerConfig(PublicKey(other), (narrow,)), duo.now)
    neighbour = IPv6Address("fd00:1::2").packed
    duo.left.send([packet(b"taken")], duo.now)
    duo.left.send([packet(b"still mine", source=neighbour)], duo.now)
    assert duo.exchange()[1] == [packet(b"still mine", source=neighbour)]
    duo.right.remove_peer(PublicKey(other))
    duo.left.send([packet(b"given back")], duo.now)
    assert duo.exchange()[1] == [packet(b"given back")]


def hostile(duo: Duo, octets: bytes) -> list[bytes]:
    """Seal anything at all for right, as a peer with a changed program could."""

    class Liar(Session):
        """Sends something else than it was given."""

        def seal(self, train: list[bytes], mtu: int) -> tuple[bytes, int]:
            return super().seal([octets if train[0] else b""], max(mtu, len(octets)))

    evil = Duo(session=Liar)
    evil.at(duo.now).connect()
    evil.left.send([packet()], evil.now)
    (data,) = evil.fetch(evil.left)
    got = evil.right.receive(data.octets, data.segment, LEFT_AT, evil.now)
    duo.right.drops.update(evil.right.drops)
    return got


HEADER = packet(bytes(60))[:40]


@pytest.mark.parametrize(
    ("octets", "reason"),
    [
        (bytes([0x45]) + bytes(59), "inner packet not IPv6"),
        (HEADER[:32], "inner packet not IPv6"),
        (bytes(64), "inner packet not IPv6"),
        (HEADER + bytes(57), None),
        (HEADER + bytes(40), "inner packet cut short"),
        (HEADER, "inner packet cut short"),
    ],
    ids=["IPv4", "short", "zeros", "padding as payload", "half", "header alone"],
)
def test_what_is_no_ipv6_packet_inside_is_dropped(octets: bytes, reason: str | None) -> None:
    duo = Duo()
    got = hostile(duo, octets)
    if reason is None:
        # 97 octets are padded to 112, so the promised 60 are there.
        assert got == [HEADER + bytes(60)]
    else:
        assert got == []
        assert duo.right.drops == {reason: 1}


def test_padding_is_cut_by_the_length_inside() -> None:
    duo = Duo()
    assert hostile(duo, packet(b"x") + bytes(300)) == [packet(b"x")]


def test_what_cannot_be_routed_is_counted() -> None:
    duo = Duo()
    nowhere = packet(destination=IPv6Address("fd00:9::1").packed)
    duo.left.send([nowhere, nowhere], duo.now)
    duo.left.send([bytes([0x45]) + bytes(39)], duo.now)
    duo.left.send([bytes(10)], duo.now)
    duo.left.send([], duo.now)
    duo.left.summon(IPv6Address("fd00:9::1").packed, duo.now)
    assert not duo.left.has_session(IPv6Address("fd00:9::1").packed)
    assert duo.left.drops == {"no route": 3, "not IPv6": 2}


def test_one_buffer_may_hold_datagrams_of_several_sessions() -> None:
    """What offloading gives: equal sizes laid together, whoever they are for, the last shorter."""
    duo = Duo()
    duo.connect()
    full = packet(bytes(72))
    duo.left.send([full, full, packet(b"end")], duo.now)
    (train,) = duo.fetch(duo.left)
    octets, segment, _ = train
    unknown = bytearray(octets[:segment])
    unknown[4:8] = b"????"
    buffer = bytes(octets[: 2 * segment]) + bytes(unknown) + bytes(octets[2 * segment :])
    got = duo.right.receive(memoryview(buffer), segment, LEFT_AT, duo.now)
    assert got == [full, full, packet(b"end")]
    assert duo.right.drops == {"unknown index": 1}
    assert duo.right.receive(b"", 0, LEFT_AT, duo.now) == []


# Load


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


def test_what_nobody_fetches_is_bounded() -> None:
    duo = Duo()
    duo.connect()
    for _ in range(OUTGOING + 10):
        duo.left.send([packet()], duo.now)
    assert duo.left.drops == {"outgoing full": 10}
    assert len(duo.fetch(duo.left)) == OUTGOING


def test_a_gateway_serves_a_thousand_peers() -> None:
    gateway = Interface(private_key(1), mtu=MTU, entropy=dice(1), epoch=EPOCH)
    clients = []
    for number in range(1000):
        client = Interface(private_key(number + 2), mtu=MTU, entropy=dice(number), epoch=EPOCH)
        client.add_peer(PeerConfig(gateway.public_key, (RIGHT_NET,), RIGHT_AT), 0.0)
        network = IPv6Network((LEFT_HOST[:8] + number.to_bytes(8), 128))
        gateway.add_peer(PeerConfig(client.public_key, (network,)), 0.0)
        clients.append(client)
    now = 0.0
    for number in range(0, 1000, 10):
        now += 0.01
        client = clients[number]
        host = LEFT_HOST[:8] + number.to_bytes(8)
        question = packet(b"?", source=host)
        client.send([question], now)
        got: list[bytes] = []
        for _ in range(3):
            for octets, segment, _ in client.transmit(now):
                got += gateway.receive(octets, segment, ("192.0.2.1", number + 1), now)
            for octets, segment, endpoint in gateway.transmit(now):
                assert endpoint == ("192.0.2.1", number + 1)
                client.receive(octets, segment, RIGHT_AT, now)
        assert got == [question]
        answer = packet(b"!", source=RIGHT_HOST, destination=host)
        gateway.send([answer], now)
        (back,) = gateway.transmit(now)
        assert client.receive(back.octets, back.segment, RIGHT_AT, now) == [answer]
    assert sum(status.last_handshake_age_s is not None for status in gateway.status(now)) == 100
    assert not gateway.drops


# Garbage


SHAPED = st.builds(
    lambda kind, rest: bytes([kind, 0, 0, 0]) + rest,
    st.sampled_from([INITIATION, RESPONSE, COOKIE_REPLY, TRANSPORT]),
    st.sampled_from([0, 12, 27, 28, 60, 88, 144, 300]).flatmap(
        lambda size: st.binary(min_size=size, max_size=size)
    ),
)

QUIET = Duo()
QUIET.connect()
QUIET.left.events()


def undisturbed(duo: Duo) -> None:
    """The session goes on and nothing has come of what was received."""
    assert duo.fetch(duo.left) == []
    assert duo.left.events() == []
    assert duo.left.status(duo.now)[0].endpoint == RIGHT_AT


@settings(max_examples=3500, deadline=None)
@given(st.binary(max_size=400) | SHAPED, st.integers(-1, 500))
def test_garbage_has_no_effect_but_a_count(octets: bytes, segment: int) -> None:
    before = QUIET.left.drops.total()
    assert QUIET.left.receive(octets, segment, ELSEWHERE, QUIET.now) == []
    undisturbed(QUIET)
    assert (QUIET.left.drops.total() > before) == bool(octets)


def good() -> list[tuple[bytes, Duo]]:
    """A fresh message of each kind and the pair of which left is about to receive it."""
    made = []
    duo = Duo(mutual=True)
    duo.right.summon(LEFT_HOST, duo.now)
    made.append((bytes(duo.fetch(duo.right)[0].octets), duo))
    duo = Duo()
    duo.left.summon(RIGHT_HOST, duo.now)
    (call,) = duo.fetch(duo.left)
    duo.right.receive(call.octets, call.segment, LEFT_AT, duo.now)
    made.append((bytes(duo.fetch(duo.right)[0].octets), duo))
    duo = Duo()
    busy(duo)
    duo.left.summon(RIGHT_HOST, duo.now)
    (call,) = duo.fetch(duo.left)
    duo.right.receive(call.octets, call.segment, LEFT_AT, duo.now)
    made.append((bytes(duo.fetch(duo.right)[0].octets), duo))
    duo = Duo()
    duo.connect()
    duo.right.send([reply(b"fine")], duo.now)
    made.append((bytes(duo.fetch(duo.right)[0].octets), duo))
    for _, each in made:
        each.left.events()
    return made


GOOD = good()


@settings(max_examples=3500, deadline=None)
@given(st.integers(0, 3), st.integers(0, 2**16), st.integers(0, 400))
def test_good_messages_with_a_flipped_bit_or_a_cut_have_no_effect(
    which: int, place: int, length: int
) -> None:
    octets, duo = GOOD[which]
    bit = place % (8 * len(octets))
    length = min(max(length, bit // 8 + 1), len(octets))
    broken = bytearray(octets[:length])
    broken[bit // 8] ^= 1 << bit % 8
    # mac2 means nothing to one who is not busy; the message would be a good one.
    if which < 2 and bit // 8 >= len(octets) - 16 and length == len(octets):
        return
    assert duo.left.receive(bytes(broken), length, ELSEWHERE, duo.now) == []
    undisturbed(duo)


def test_the_same_messages_untouched_do_have_an_effect() -> None:
    (call, called), (response, caller), (cookie, waiting), (data, receiver) = good()
    assert called.left.receive(call, len(call), RIGHT_AT, called.now) == []
    assert kinds(called.fetch(called.left)) == [RESPONSE]
    assert caller.left.receive(response, len(response), RIGHT_AT, caller.now) == []
    assert caller.left.has_session(RIGHT_HOST)
    assert waiting.left.receive(cookie, len(cookie), RIGHT_AT, waiting.now) == []
    (again,) = waiting.at(waiting.now + 5.334).fetch(waiting.left)
    assert again.octets[-16:] != bytes(16)
    assert receiver.left.receive(data, len(data), RIGHT_AT, receiver.now) == [reply(b"fine")]


# Secrets


def test_no_secret_shows_in_a_repr() -> None:
    psk = bytes(range(32))
    duo = Duo(psk=psk)
    duo.connect()
    secret = private_key(1)
    assert noise.Key(secret).public == duo.left.public_key
    shown = repr(duo.left) + repr(duo.to_right) + repr(duo.left.status(duo.now)) + repr(duo.told)
    for octets in (secret, psk):
        assert repr(octets)[2:-1] not in shown
        assert octets.hex() not in shown
    assert any(isinstance(event, SessionStarted) for event in duo.told)

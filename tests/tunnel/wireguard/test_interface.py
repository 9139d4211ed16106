"""Roaming, crypto-routing, many peers and bounds."""

from ipaddress import IPv6Address, IPv6Network

import pytest

from builder_orch.tunnel.config import PeerConfig, PublicKey
from builder_orch.tunnel.wireguard import noise
from builder_orch.tunnel.wireguard.interface import (
    EndpointMoved,
    Interface,
    SessionStarted,
)
from builder_orch.tunnel.wireguard.peer import OUTGOING
from builder_orch.tunnel.wireguard.session import Session
from tests.tunnel.wireguard.lab import (
    EPOCH,
    LEFT_AT,
    LEFT_HOST,
    MTU,
    RIGHT_AT,
    RIGHT_HOST,
    RIGHT_NET,
    Duo,
    cut,
    dice,
    packet,
    private_key,
    reply,
)

ELSEWHERE = ("198.51.100.9", 999)


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
    foreign = packet(source=stranger)
    for train in [[foreign] * 3, [packet(source=RIGHT_HOST)], [packet(), foreign, packet()]]:
        duo.left.send(train, duo.now)
    _, rights = duo.exchange()
    assert rights == [packet(), packet()]
    assert duo.right.drops == {"inner source not allowed": 5}


FULL = packet(bytes(MTU - 40))
STRANGE_BUT_GOOD = [
    packet(b"padded"),
    packet(bytes(MTU - 40), source=IPv6Address("fd00:1::2").packed),
    FULL[:5] + b"\x00" + FULL[6:],
]
STRANGE = [
    *STRANGE_BUT_GOOD,
    packet(bytes(MTU - 40), source=IPv6Address("fd00:3::1").packed),
    b"\x45" + FULL[1:],
    FULL[:4] + b"\xff\xff" + FULL[6:],
]


@pytest.mark.parametrize("strange", STRANGE, ids=range(len(STRANGE)))
@pytest.mark.parametrize("place", [1, 3, 7])
def test_a_train_is_received_as_its_packets_are_one_by_one(strange: bytes, place: int) -> None:
    train = [packet(bytes([number]) * (MTU - 40)) for number in range(8)]
    train[place] = strange
    got = []
    for at_once in (True, False):
        duo = Duo()
        duo.connect()
        duo.left.send(train, duo.now)
        received: list[bytes] = []
        for sent in duo.fetch(duo.left):
            for octets in [bytes(sent.octets)] if at_once else cut(sent):
                received += duo.right.receive(octets, sent.segment, LEFT_AT, duo.now)
        got.append((received, duo.right.drops))
    assert got[0] == got[1]
    received, drops = got[0]
    assert drops.total() == (strange not in STRANGE_BUT_GOOD)
    if drops:
        del train[place]
    assert received == [each[: 40 + int.from_bytes(each[4:6])] for each in train]


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
    return list(got)


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

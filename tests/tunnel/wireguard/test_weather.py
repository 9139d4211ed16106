"""Two interfaces over wires that lose, double and reorder, on a clock that jumps."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder_orch.tunnel.config import PeerConfig
from builder_orch.tunnel.wireguard.interface import (
    Interface,
)
from builder_orch.tunnel.wireguard.session import Aead, Session
from tests.tunnel.wireguard.lab import (
    EPOCH,
    LEFT_AT,
    LEFT_NET,
    MTU,
    RIGHT_AT,
    RIGHT_NET,
    Weather,
    Wire,
    dice,
    packet,
    private_key,
    reply,
)


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

            def encrypt_into(
                self, nonce: bytes, data: bytes, associated: bytes | None, buf: memoryview
            ) -> int:
                assert (key, nonce) not in used, "the same key and nonce twice"
                used.add((key, nonce))
                return cipher.encrypt_into(nonce, data, associated, buf)

            def decrypt(
                self, nonce: bytes, data: bytes | memoryview, associated: bytes | None
            ) -> bytes:
                return cipher.decrypt(nonce, data, associated)

            def decrypt_into(
                self,
                nonce: bytes,
                data: bytes | memoryview,
                associated: bytes | None,
                buf: memoryview,
            ) -> int:
                return cipher.decrypt_into(nonce, data, associated, buf)

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

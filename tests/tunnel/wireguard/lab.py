"""What the tests of the core share: seeded entropy, inner packets, vectors and a lossy wire."""

import json
from dataclasses import dataclass
from functools import cache
from heapq import heappop, heappush
from ipaddress import IPv6Address, IPv6Network
from pathlib import Path
from random import Random
from typing import Any

import pytest

from builder_orch.tunnel.config import PeerConfig, PrivateKey
from builder_orch.tunnel.machine import Datagrams, Endpoint, Entropy, Train
from builder_orch.tunnel.wireguard.interface import Event, Interface
from builder_orch.tunnel.wireguard.session import Session

VECTORS = Path(__file__).parents[3] / ".." / "shared" / "vectors" / "wg_vectors.json"
EPOCH = 1_700_000_000.0
MTU = 1420

LEFT_HOST = IPv6Address("fd00:1::1").packed
RIGHT_HOST = IPv6Address("fd00:2::1").packed
LEFT_NET = IPv6Network("fd00:1::/64")
RIGHT_NET = IPv6Network("fd00:2::/64")
LEFT_AT: Endpoint = ("192.0.2.1", 1111)
RIGHT_AT: Endpoint = ("192.0.2.2", 2222)


@cache
def vectors() -> Any:
    """The known answers, or a skip where they are not kept."""
    if not VECTORS.exists():
        pytest.skip("the known-answer vectors are not beside this repository")
    return json.loads(VECTORS.read_text())


def dice(seed: int) -> Entropy:
    """Entropy that repeats."""
    return Random(seed).randbytes


def private_key(seed: int) -> PrivateKey:
    return PrivateKey(dice(seed)(32))


def packet(
    payload: bytes = b"", *, source: bytes = LEFT_HOST, destination: bytes = RIGHT_HOST
) -> bytes:
    """An IPv6 packet without next header."""
    header = bytes([0x60, 0, 0, 0]) + len(payload).to_bytes(2) + bytes([59, 64])
    return header + source + destination + payload


def reply(payload: bytes = b"") -> bytes:
    """An IPv6 packet from right to left."""
    return packet(payload, source=RIGHT_HOST, destination=LEFT_HOST)


def cut(datagrams: Datagrams) -> list[bytes]:
    """The single datagrams of a train."""
    octets = bytes(datagrams.octets)
    return [octets[at : at + datagrams.segment] for at in range(0, len(octets), datagrams.segment)]


class Duo:
    """Two interfaces that know each other, a clock that jumps, and a wire the test may cut.

    Only left has an endpoint for the other, as a client has for its gateway, unless `mutual`.
    """

    def __init__(
        self,
        *,
        psk: bytes = bytes(32),
        right_psk: bytes | None = None,
        keepalive_s: float | None = None,
        mutual: bool = False,
        session: type[Session] = Session,
    ) -> None:
        left, right = private_key(1), private_key(2)
        self.now = 1000.0
        self.left = Interface(left, mtu=MTU, entropy=dice(3), epoch=EPOCH, session=session)
        self.right = Interface(right, mtu=MTU, entropy=dice(4), epoch=EPOCH, session=session)
        self.to_right = PeerConfig(
            self.right.public_key, (RIGHT_NET,), RIGHT_AT, keepalive_s, preshared_key=psk
        )
        self.to_left = PeerConfig(
            self.left.public_key,
            (LEFT_NET,),
            LEFT_AT if mutual else None,
            preshared_key=psk if right_psk is None else right_psk,
        )
        self.left.add_peer(self.to_right, self.now)
        self.right.add_peer(self.to_left, self.now)
        self.told: list[Event] = []

    def fetch(self, interface: Interface) -> list[Datagrams]:
        """What an interface wants to send now; checks the law of machines."""
        sent = interface.transmit(self.now)
        after = interface.deadline()
        assert after is None or after > self.now, "a machine may not ask for now again"
        return sent

    def exchange(self) -> tuple[list[bytes], list[bytes]]:
        """Carry everything both ways until silence; the packets that came out left and right."""
        lefts: list[bytes] = []
        rights: list[bytes] = []
        while True:
            there, back = self.fetch(self.left), self.fetch(self.right)
            if not there and not back:
                self.told += self.left.events()
                return lefts, rights
            for octets, segment, _ in there:
                rights += self.right.receive(octets, segment, LEFT_AT, self.now)
            for octets, segment, _ in back:
                lefts += self.left.receive(octets, segment, RIGHT_AT, self.now)

    def connect(self) -> None:
        """A session that left began and right has confirmed, without data sent on it."""
        self.left.summon(RIGHT_HOST, self.now)
        self.exchange()
        assert self.left.has_session(RIGHT_HOST)
        assert self.right.has_session(LEFT_HOST)

    def at(self, now: float) -> "Duo":
        """Jump the clock, without asking anybody on the way."""
        self.now = now
        return self

    def run(self, until: float) -> None:
        """Jump from deadline to deadline, carrying everything."""
        while True:
            self.exchange()
            deadlines = (self.left.deadline(), self.right.deadline())
            due = min((at for at in deadlines if at is not None), default=until)
            if due >= until:
                break
            self.now = due
        self.now = until
        self.exchange()


def connected(**settings: Any) -> Duo:
    """A pair with a session, of which nothing has been told."""
    duo = Duo(**settings)
    duo.connect()
    duo.told.clear()
    duo.right.events()
    return duo


def kinds(datagrams: list[Datagrams]) -> list[int]:
    """The message types of what was sent, a train counting once."""
    return [each.octets[0] for each in datagrams]


@dataclass(frozen=True)
class Weather:
    """What a wire does to datagrams; probabilities, and seconds."""

    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    delay_s: float = 0.02


class Wire:
    """Two interfaces, one clock, and weather between them."""

    def __init__(self, left: Interface, right: Interface, weather: Weather, seed: int) -> None:
        self.now = 0.0
        self.weather = weather
        self.arrived: dict[Endpoint, list[bytes]] = {LEFT_AT: [], RIGHT_AT: []}
        self._ends = {LEFT_AT: left, RIGHT_AT: right}
        self._dice = Random(seed)
        self._flying: list[tuple[float, int, Endpoint, Endpoint, bytes, int]] = []
        self._serial = 0

    def send(self, source: Endpoint, train: Train) -> None:
        """Give a train to one end."""
        self._ends[source].send(train, self.now)
        self._pump()

    def run(self, until: float) -> None:
        """Let everything happen up to `until`."""
        self._pump()
        while True:
            deadlines = [end.deadline() for end in self._ends.values()]
            due = [at for at in deadlines if at is not None]
            if self._flying:
                due.append(self._flying[0][0])
            if not due or min(due) > until:
                break
            self.now = max(self.now, min(due))
            while self._flying and self._flying[0][0] <= self.now:
                _, _, source, target, octets, segment = heappop(self._flying)
                end = self._ends[target]
                self.arrived[target] += end.receive(octets, segment, source, self.now)
            self._pump()
        self.now = until

    def _pump(self) -> None:
        for source, end in self._ends.items():
            for datagrams in end.transmit(self.now):
                self._throw(source, datagrams)
            after = end.deadline()
            assert after is None or after > self.now, "a machine may not ask for now again"

    def _throw(self, source: Endpoint, datagrams: Datagrams) -> None:
        """What survives of a train arrives as one buffer; what is delayed or doubled alone."""
        weather, chance = self.weather, self._dice.random
        buffer = b""
        for datagram in cut(datagrams):
            if chance() < weather.loss:
                continue
            if chance() < weather.duplicate:
                self._launch(source, datagrams.endpoint, datagram, datagrams.segment, late=True)
            if chance() < weather.reorder:
                self._launch(source, datagrams.endpoint, datagram, datagrams.segment, late=True)
            else:
                buffer += datagram
        if buffer:
            self._launch(source, datagrams.endpoint, buffer, datagrams.segment, late=False)

    def _launch(
        self, source: Endpoint, target: Endpoint, octets: bytes, segment: int, *, late: bool
    ) -> None:
        delay_s = self.weather.delay_s * (1 + (3 * self._dice.random() if late else 0))
        self._serial += 1
        heappush(self._flying, (self.now + delay_s, self._serial, source, target, octets, segment))

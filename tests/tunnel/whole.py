"""Two tunnels without their drivers: WireGuard around TCP/IPv6, on wires and clocks of ours."""

from collections.abc import Callable
from ipaddress import IPv6Network
from math import inf
from random import Random

from builder_orch.tunnel.config import PeerConfig, PrivateKey
from builder_orch.tunnel.ipv6.stack import Stack
from builder_orch.tunnel.machine import Endpoint, Train
from builder_orch.tunnel.wireguard.interface import (
    Event,
    HandshakeStarted,
    Interface,
    SessionStarted,
)
from builder_orch.tunnel.wireguard.session import Session
from tests.sim import Weather
from tests.tunnel.ipv6.world import LEFT, RIGHT, World, stack
from tests.tunnel.joined import public

MTU = 1420
EPOCH = 1_700_000_000.0
LEFT_AT: Endpoint = ("192.0.2.1", 1111)
RIGHT_AT: Endpoint = ("192.0.2.2", 2222)


class Host:
    """One end: what the driver does between the two cores, as a node for `sim.Pair`.

    `source` is where the packets of the other end seem to come from, and the one endpoint at which
    it is reached. `stamped` is told the time of each initiation before it leaves.
    """

    def __init__(
        self, interface: Interface, source: Endpoint, build: Callable[[Interface], Stack]
    ) -> None:
        self.interface = interface
        self.source = source
        self.stack = build(interface)
        self.told: list[Event] = []
        self.stamped: Callable[[float], None] = lambda now: None

    def receive(self, packets: list[bytes], now: float) -> None:
        """Open what came, and give the stack what was inside."""
        inner: list[bytes] = []
        for octets in packets:
            inner += self.interface.receive(octets, len(octets), self.source, now)
        if inner:
            self.stack.receive(inner, now)

    def transmit(self, now: float) -> list[Train]:
        """Move everything that is ready, as `Tunnel.pump` does."""
        sent: list[Train] = []
        while True:
            for train in self.stack.transmit(now):
                self.interface.send(train, now)
            for remote in self.stack.summons():
                self.interface.summon(remote, now)
            for octets, segment, endpoint in self.interface.transmit(now):
                whole = bytes(octets)
                if endpoint == self.source:
                    sent.append([whole[at : at + segment] for at in range(0, len(whole), segment)])
            events = self.interface.events()
            self.told += events
            if any(isinstance(event, HandshakeStarted) for event in events):
                self.stamped(now)
            if not any(isinstance(event, SessionStarted) for event in events):
                return sent
            self.stack.kick(now)

    def deadline(self) -> float | None:
        """The earlier one of both cores."""
        due = (self.interface.deadline(), self.stack.deadline())
        return min((at for at in due if at is not None), default=None)

    def sessions(self) -> int:
        """How many sessions have begun."""
        return sum(isinstance(event, SessionStarted) for event in self.told)


class Whole(World):
    """A client on the left and its gateway on the right, which knows it from the start or not."""

    def __init__(
        self,
        weather: Weather | None = None,
        *,
        seed: int = 0,
        back: Weather | None = None,
        known: bool = True,
        keepalive_s: float | None = None,
        session: type[Session] = Session,
    ) -> None:
        keys = [PrivateKey(Random(f"{seed} {side}").randbytes(32)) for side in "lr"]
        self.to_left = PeerConfig(public(keys[0]), (IPv6Network(LEFT),))
        self.to_right = PeerConfig(
            public(keys[1]), (IPv6Network(RIGHT),), RIGHT_AT, keepalive_s=keepalive_s
        )
        self.session = session
        self.left_key = keys[0]
        self.far = self.host(keys[1], [self.to_left] if known else [], seed=seed, left=False)
        self.near = self.host(keys[0], [self.to_right], seed=seed, left=True)
        super().__init__(
            weather, seed=seed, back=back, client=self.near.stack, server=self.far.stack
        )
        self.left, self.right = self.near, self.far

    def restart(self, epoch: float, *, seed: int) -> None:
        """The left process ends, and another one begins with the same key and its own clock."""
        self.near = self.host(self.left_key, [self.to_right], seed=seed, left=True, epoch=epoch)
        self.left, self.client = self.near, self.near.stack

    def roam(self, at: Endpoint) -> None:
        """The left end is at another address now; what is under way to the old one is lost."""
        self.far.source = at
        self.back.pop(inf)

    def host(
        self,
        key: PrivateKey,
        peers: list[PeerConfig],
        *,
        seed: int,
        left: bool,
        epoch: float = EPOCH,
    ) -> Host:
        """One end; `epoch` is what the clock on its wall said at time 0."""
        entropy = Random(f"{seed} {left}").randbytes
        interface = Interface(
            key, mtu=MTU, entropy=entropy, epoch=epoch, peers=peers, session=self.session
        )
        address = LEFT if left else RIGHT

        def build(made: Interface) -> Stack:
            return stack(address, mtu=MTU, seed=seed, path=made.has_session)

        return Host(interface, RIGHT_AT if left else LEFT_AT, build)

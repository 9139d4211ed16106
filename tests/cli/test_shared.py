"""Which peer a command uses by way of the agent: shared while it is good, another one otherwise."""

import asyncio
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass, field, replace
from ipaddress import IPv6Address, IPv6Network
from pathlib import Path

import pytest

from builder_orch.agent.call import end_agent
from builder_orch.agent.client import AgentTunnel
from builder_orch.agent.place import Place
from builder_orch.agent.server import Terms
from builder_orch.api.client import Platform
from builder_orch.api.keyring import Keyring
from builder_orch.api.models import Organization, Peer
from builder_orch.cli.shared import SharedPeers, SharedTunnel
from builder_orch.errors import BuilderOrchError, PlatformUnavailable
from builder_orch.events import Event, PhaseReason
from builder_orch.tunnel.carrier.choice import Choice
from builder_orch.tunnel.config import PeerConfig, PublicKey, decode_key
from tests.agent.rig import QUICK, UDP, Served, serving
from tests.agent.test_server import converse, echo
from tests.tunnel.joined import NETWORK, Pair, pair

US = Organization("1", "us", "us")
LASTING: Terms = replace(QUICK, tunnel_idle_s=60.0)


@dataclass
class Granting:
    """A platform whose gateway is the one of a pair; it counts what it is asked."""

    ends: Pair
    known: dict[str, IPv6Address] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    failure: BuilderOrchError | None = None

    async def add_peer(
        self, _: Organization, name: str, key: str, *, region: str | None, ephemeral: bool
    ) -> Peer:
        assert ephemeral
        address = NETWORK[0xA7B0000 + len(self.known)]
        self.known[name] = address
        if self.failure is not None:
            raise self.failure
        caller = PeerConfig(PublicKey(decode_key(key)), (IPv6Network(f"{address}/128"),))
        self.ends.gateway.add_peer(caller)
        (gateway,) = self.ends.config.peers
        assert gateway.endpoint is not None
        host, port = gateway.endpoint
        return Peer(address, f"{host}:{port}", gateway.public_key)

    async def remove_peer(self, _: Organization, name: str) -> None:
        self.removed.append(name)
        self.known.pop(name, None)

    async def validate_peers(self, addresses: Iterable[IPv6Address]) -> list[IPv6Address]:
        return [address for address in addresses if address not in self.known.values()]


@dataclass
class Desk:
    """An agent, a platform and a keyring."""

    served: Served
    platform: Granting
    peers: SharedPeers

    async def take(self, choice: Choice = UDP) -> tuple[SharedTunnel, str, list[Event]]:
        """One command's tunnel, its own address inside, and what was said."""
        said: list[Event] = []
        call = await self.served.call()
        shared = SharedTunnel(self.served.place, AgentTunnel(call), self.peers, choice)
        try:
            config = await shared.peer(US, said.append)
        except BaseException:
            shared.close()
            raise
        async with asyncio.timeout(20):
            async with shared.open_tunnel(config) as tunnel:
                assert await converse(tunnel, b"x") == b"x"
                return shared, str(config.address), said

    async def taken(self, choice: Choice = UDP) -> str:
        """The address that a command gets which is over at once."""
        return (await self.take(choice))[1]


@pytest.fixture
async def desk(home: Path) -> AsyncGenerator[Desk]:
    place = Place(home / "agent")
    async with pair() as ends, serving(place, LASTING) as served:
        await ends.serve(7, echo)
        platform = Granting(ends)
        ring = Keyring(home / "peers")
        # Only what a shared peer needs of a platform is there.
        real: Platform = platform  # type: ignore[assignment]
        yield Desk(served, platform, SharedPeers(real, ring, "here"))
    # One that took the place of ours is a process.
    await asyncio.to_thread(end_agent, place, now=True)


async def test_commands_share_a_peer_while_the_platform_knows_it(desk: Desk) -> None:
    first = await desk.taken()
    assert await desk.taken() == first
    assert len(desk.platform.known) == 1
    desk.platform.known.clear()
    second = await desk.taken()
    # What the platform has forgotten is forgotten here.
    assert [str(record.address) for record in await desk.peers.known(US)] == [second]


async def test_platforms_and_organizations_are_kept_apart(desk: Desk) -> None:
    await desk.taken()
    others = replace(desk.peers, identity="elsewhere")
    assert await others.known(US) == []
    assert await desk.peers.known(Organization("2", "them", "them")) == []


async def test_commands_that_begin_together_make_one_peer(desk: Desk) -> None:
    addresses = await asyncio.gather(*(desk.taken() for _ in range(8)))
    assert len(set(addresses)) == 1
    assert len(desk.platform.known) == 1


async def test_another_way_to_the_gateway_needs_another_peer(desk: Desk) -> None:
    call = await desk.served.call()
    shared = SharedTunnel(desk.served.place, AgentTunnel(call), desk.peers, UDP)
    config = await shared.peer(US, lambda _: None)
    async with shared.open_tunnel(config) as tunnel:
        assert await desk.taken(Choice("auto")) != str(config.address)
        assert await converse(tunnel, b"undisturbed") == b"undisturbed"


async def test_an_agent_that_leaves_is_replaced(desk: Desk) -> None:
    early = await desk.served.call()
    shared = SharedTunnel(desk.served.place, AgentTunnel(early), desk.peers, UDP)
    config = await shared.peer(US, lambda _: None)
    second = AgentTunnel(await desk.served.call())
    late = SharedTunnel(desk.served.place, second, desk.peers, UDP)
    async with shared.open_tunnel(config) as tunnel:
        retiring = await desk.served.call()
        await asyncio.to_thread(retiring.ask, {"do": "retire", "now": False})
        retiring.close()
        said: list[Event] = []
        other = await late.peer(US, said.append)
        assert other.address != config.address
        async with late.open_tunnel(other) as successor:
            assert successor.pid != tunnel.pid
            assert await converse(successor, b"new") == b"new"
            assert await converse(tunnel, b"old") == b"old"
    assert any("in use by pid" in e.reason for e in said if isinstance(e, PhaseReason))


async def test_a_peer_that_does_not_answer_any_more_is_replaced(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await desk.taken()
    (record,) = await desk.peers.known(US)
    desk.platform.ends.gateway.remove_peer(record.public_key)
    monkeypatch.setattr("builder_orch.cli.shared.PROBE_S", 0.2)
    _, second, said = await desk.take()
    assert second != first
    assert any("does not answer" in e.reason for e in said if isinstance(e, PhaseReason))
    # The next command takes the one that works at once.
    assert await desk.taken() == second


async def test_a_peer_of_which_nobody_knows_whether_it_was_made_is_removed(desk: Desk) -> None:
    desk.platform.failure = PlatformUnavailable("lost", hint="again")
    with pytest.raises(PlatformUnavailable):
        await desk.taken()
    assert len(desk.platform.removed) == 1
    assert await desk.peers.known(US) == []

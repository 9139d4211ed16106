"""How a command reaches the network inside: by the agent, or by a process and peer of its own."""

import asyncio
import os
import socket
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from ipaddress import IPv6Address
from pathlib import Path

from builder_orch.agent.call import Call
from builder_orch.agent.client import AgentTunnel, KeyBusy, Leaving
from builder_orch.agent.place import Place, locked
from builder_orch.agent.spawn import ensure_agent, find_agent
from builder_orch.api.keyring import Keyring, Purpose, Record
from builder_orch.api.models import Organization
from builder_orch.api.peer import new_key, public_key, tunnel_config
from builder_orch.cli.options import AGENT_MODES, Flags
from builder_orch.errors import (
    AgentFailed,
    AlreadyRunning,
    BuilderOrchError,
    NotAllowed,
    NotLoggedIn,
    PlatformRefused,
    UsageFailure,
)
from builder_orch.events import Emit, PhaseReason, Warned
from builder_orch.pipeline.outside import OpenTunnel, Platform, TakePeer, settle
from builder_orch.pipeline.peer import peer_name
from builder_orch.tunnel.carrier.choice import Choice
from builder_orch.tunnel.config import TunnelConfig, encode_key
from builder_orch.tunnel.hosted import hosting

AUTO, ON, OFF = AGENT_MODES
TRIES = 5
LOCK_LIMIT_S = 60.0
LOCK_POLL_S = 0.05
PROBE_S = 7.0
"""More than an initiation, one that was lost, and the second try 5 s later (whitepaper 6.4)."""


@dataclass(frozen=True, slots=True)
class Way:
    """What a run opens its tunnel with; `shared_peer` is None for a peer of its own."""

    open_tunnel: OpenTunnel
    shared_peer: TakePeer | None = None


@asynccontextmanager
async def reaching(
    place: Place, choice: Choice, flags: Flags, emit: Emit
) -> AsyncGenerator[Callable[["SharedPeers"], Way]]:
    """The way that the flags ask for, once it is known which peers are shared: a process that can
    open a tunnel, which begins at once, or the agent, which has one."""
    call = await find(flags.agent, place, flags.capture, emit)
    if call is None:
        async with hosting(choice=choice, capture=flags.capture) as open_tunnel:
            yield lambda _: Way(open_tunnel)
        return
    tunnel = AgentTunnel(call)
    with ExitStack() as closing:
        closing.callback(tunnel.close)

        def sharing(peers: SharedPeers) -> Way:
            shared = SharedTunnel(place, tunnel, peers, choice)
            closing.callback(shared.close)
            return Way(shared.open_tunnel, shared.peer)

        yield sharing


async def find(mode: str, place: Place, capture: Path | None, emit: Emit) -> Call | None:
    """The agent that a command uses: with `on` one is started if need be, with `auto` one that
    runs, if it is well. None for a command that goes without."""
    if mode == OFF:
        return None
    if capture is not None:
        if mode == ON:
            raise UsageFailure(
                "the agent's tunnel is not captured: it carries what other commands say as well",
                hint="Take --capture or --agent on away.",
            )
        return None
    try:
        if mode == ON:
            return await asyncio.to_thread(ensure_agent, place)
        return await asyncio.to_thread(find_agent, place)
    except BuilderOrchError as error:
        if mode == ON:
            raise
        emit(Warned("agent", f"{error}; this command goes without it"))
        return None


@dataclass(frozen=True, slots=True)
class SharedPeers:
    """The peers that commands share on one platform, which `identity` names in the keyring."""

    platform: Platform
    keyring: Keyring
    identity: str

    async def known(self, organization: Organization) -> list[Record]:
        """Ours for this organization that the platform still knows, the latest first; the others
        are forgotten."""
        found = [
            entry.record
            for entry in await asyncio.to_thread(self.keyring.entries)
            if entry.record is not None
            and entry.record.config is not None
            and entry.record.purpose is Purpose.KEPT
            and entry.record.platform == self.identity
            and entry.record.organization.id == organization.id
            and self.keyring.is_ours(entry.record)
        ]
        addresses = [record.address for record in found if record.address is not None]
        gone: list[IPv6Address] = []
        if addresses:
            gone = await self.platform.validate_peers(addresses)
        for record in found:
            if record.address in gone:
                await asyncio.to_thread(self.keyring.forget, record.name)
        left = [record for record in found if record.address not in gone]
        return sorted(left, key=lambda record: -record.made_at)

    async def make(self, organization: Organization, emit: Emit) -> Record:
        """A new one, which stays: the platform collects it when it was idle for long."""
        name, key = peer_name(socket.gethostname()), new_key()
        emit(PhaseReason("tunnel", f"asking for a WireGuard peer {name}"))
        public = public_key(key)
        try:
            peer = await self.platform.add_peer(
                organization, name, encode_key(public), region=None, ephemeral=True
            )
            record = Record(
                name,
                self.identity,
                organization,
                public,
                Purpose.KEPT,
                time.time(),
                self.keyring.machine,
                ephemeral=True,
                address=peer.address,
                config=tunnel_config(key, peer),
            )
            await asyncio.to_thread(self.keyring.write, record)
        except (NotAllowed, NotLoggedIn, PlatformRefused):
            raise
        except BaseException:
            # Whether it was made is not known, so it is removed by its name.
            remove = self.platform.remove_peer(organization, name)
            await settle("removing the WireGuard peer", remove, emit)
            raise
        return record


class SharedTunnel:
    """One command's use of a tunnel that the agent holds."""

    def __init__(
        self, place: Place, tunnel: AgentTunnel, peers: SharedPeers, choice: Choice
    ) -> None:
        self._place = place
        self._tunnel = tunnel
        self._peers = peers
        self._choice = choice

    async def peer(self, organization: Organization, emit: Emit) -> TunnelConfig:
        """The configuration of the tunnel that is opened now, in the agent.

        A peer that is in use in another way, or by an agent that is leaving, is not waited for, nor
        is one that used to work and does not answer: another one is made. Those that are left so
        are collected by the platform.
        """
        emit(PhaseReason("tunnel", f"asking the agent (pid {self._tunnel.pid})"))
        async with self._choosing():
            for record in await self._peers.known(organization):
                if await self._open(record, emit):
                    if await self._answers(_config(record)):
                        return _config(record)
                    emit(PhaseReason("tunnel", f"the peer {record.name} does not answer any more"))
                    await self._call_again()
                    break
            record = await self._peers.make(organization, emit)
            if await self._open(record, emit):
                return _config(record)
        raise AgentFailed(
            f"the agent does not take the new peer {record.name}",
            hint="Run it again, or use --agent off.",
        )

    @asynccontextmanager
    async def open_tunnel(self, _: TunnelConfig) -> AsyncGenerator[AgentTunnel]:
        """The tunnel that `peer` opened, for the length of the block."""
        try:
            yield self._tunnel
        finally:
            self.close()

    def close(self) -> None:
        """Hang up; what was dialled stays."""
        self._tunnel.close()

    async def _open(self, record: Record, emit: Emit) -> bool:
        """Whether the agent uses this peer for us now."""
        path = self._peers.keyring.path(record.name)
        for _ in range(TRIES):
            try:
                await self._tunnel.open_file(path, self._choice)
            except KeyBusy as busy:
                emit(PhaseReason("tunnel", f"another peer is needed: {busy}"))
                return False
            except (Leaving, ConnectionError):
                # It was told to leave, or died, after it had greeted us.
                await self._call_again()
            else:
                return True
        raise AgentFailed(
            "one agent after the other left before it could be used",
            hint="Look who stops them, or use --agent off.",
        )

    async def _answers(self, config: TunnelConfig) -> bool:
        """Whether anything comes back through a tunnel that has worked before."""
        if config.dns is None:
            return True
        try:
            await self._tunnel.ping(config.dns, timeout_s=PROBE_S)
        except OSError:
            return False
        return True

    async def _call_again(self) -> None:
        self._tunnel.close()
        self._tunnel = AgentTunnel(await asyncio.to_thread(ensure_agent, self._place))

    @asynccontextmanager
    async def _choosing(self) -> AsyncGenerator[None]:
        """Be the only command that looks for a peer or makes one."""
        self._place.prepare()
        path = self._place.folder / "peers.lock"
        loop = asyncio.get_running_loop()
        until = loop.time() + LOCK_LIMIT_S
        while (lock := locked(path, 0.0)) is None:
            if loop.time() > until:
                raise AlreadyRunning(
                    f"another command has been looking for a peer for {LOCK_LIMIT_S:g} s",
                    hint=f"Look which process has {path} open, or use --agent off.",
                )
            await asyncio.sleep(LOCK_POLL_S)
        try:
            yield
        finally:
            os.close(lock)


def _config(record: Record) -> TunnelConfig:
    assert record.config is not None
    return record.config

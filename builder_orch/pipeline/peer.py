"""A WireGuard peer of this run's own, removed when the run ends, or by the next if it could not."""

import asyncio
import re
import secrets
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import ClassVar

from builder_orch.api.keyring import Keyring, Purpose, Record
from builder_orch.api.models import Organization
from builder_orch.api.peer import new_key, public_key, tunnel_config
from builder_orch.errors import (
    AlreadyRunning,
    BuilderOrchError,
    NotAllowed,
    NotLoggedIn,
    PlatformRefused,
)
from builder_orch.events import Emit, PhaseReason, Warned
from builder_orch.pipeline.outside import Platform, settle
from builder_orch.tunnel.config import PrivateKey, TunnelConfig, encode_key

HOST_CHARACTERS = 24
TIDIED = 50
"""Peers of dead runs that are removed at a time."""


@dataclass(frozen=True, slots=True)
class AddPeer:
    """Make a key pair, let its public half in, and see to it that it is shut out again.

    Two runs never share a key: each would take the other's session away. With a keyring the peer is
    written down before it is asked for, without its key.
    """

    platform: Platform
    closing: AsyncExitStack
    host: str
    keyring: Keyring | None = None
    identity: str = ""
    name: ClassVar[str] = "tunnel"

    async def run(self, given: Organization, emit: Emit) -> TunnelConfig:
        if self.keyring is not None:
            await tidy(self.platform, self.keyring, self.identity, emit)
        name = peer_name(self.host)
        key = new_key()
        emit(PhaseReason(self.name, f"asking for a WireGuard peer {name}"))
        noted = await self._write_down(name, key, given, emit)

        async def remove() -> None:
            done = await settle(
                "removing the WireGuard peer", self.platform.remove_peer(given, name), emit
            )
            if done:
                await self._strike_out(noted, emit)

        try:
            peer = await self.platform.add_peer(
                given, name, encode_key(public_key(key)), region=None, ephemeral=True
            )
        except (NotAllowed, NotLoggedIn, PlatformRefused):
            await self._strike_out(noted, emit)
            raise
        except BaseException:
            # Whether it was made is not known, so it is removed by its name.
            await remove()
            raise
        self.closing.push_async_callback(remove)
        return tunnel_config(key, peer)

    async def _write_down(
        self, name: str, key: PrivateKey, organization: Organization, emit: Emit
    ) -> Record | None:
        """Note the peer and lock its key while we live; a disk that does not let us is no failure:
        the platform collects idle peers itself, only later."""
        if self.keyring is None:
            return None
        record = Record(
            name,
            self.identity,
            organization,
            public_key(key),
            Purpose.RUN,
            time.time(),
            self.keyring.machine,
            ephemeral=True,
        )
        try:
            self.closing.enter_context(self.keyring.lock(record))
            await asyncio.to_thread(self.keyring.write, record)
        except (BuilderOrchError, OSError) as error:
            emit(Warned("peers", f"the peer of this run is not written down: {error}"))
            return None
        return record

    async def _strike_out(self, noted: Record | None, emit: Emit) -> None:
        if noted is not None and self.keyring is not None:
            forgetting = asyncio.to_thread(self.keyring.forget, noted.name)
            await settle(f"removing the file of the peer {noted.name}", forgetting, emit)


async def tidy(platform: Platform, keyring: Keyring, identity: str, emit: Emit) -> None:
    """Remove the peers of runs that ended without doing it.

    Whether a run lives is told by the lock on its key, which no crash leaves behind. Failures are
    only told: whoever tidies up wants something else.
    """
    try:
        entries = await asyncio.to_thread(keyring.entries)
    except BuilderOrchError as error:
        emit(Warned("peers", f"the peers of earlier runs cannot be looked for: {error}"))
        return
    left = [
        entry.record
        for entry in entries
        if entry.record is not None
        and entry.record.platform == identity
        and entry.record.purpose is Purpose.RUN
        and entry.user is None
    ]
    removals = [_bury(platform, keyring, record, emit) for record in left[:TIDIED]]
    gone = sum(await asyncio.gather(*removals))
    if gone:
        emit(PhaseReason("tunnel", f"removed {gone} peers of runs that were killed"))


async def _bury(platform: Platform, keyring: Keyring, record: Record, emit: Emit) -> bool:
    try:
        with keyring.lock(record):
            # Somebody else may have been quicker.
            if not keyring.path(record.name).exists():
                return False
            doing = f"removing the peer {record.name} of an earlier run"
            removal = platform.remove_peer(record.organization, record.name)
            if not await settle(doing, removal, emit):
                return False
            await asyncio.to_thread(keyring.forget, record.name)
            return True
    except AlreadyRunning:
        return False
    except (BuilderOrchError, OSError) as error:
        emit(Warned("peers", f"the file of the peer {record.name} cannot be removed: {error}"))
        return False


def peer_name(host: str) -> str:
    """`fly-build-<host>-<random>`, in letters that every platform takes."""
    plain = re.sub(r"[^a-z0-9]+", "-", host.lower().partition(".")[0]).strip("-")
    return f"fly-build-{plain[:HOST_CHARACTERS].strip('-') or 'host'}-{secrets.token_hex(4)}"

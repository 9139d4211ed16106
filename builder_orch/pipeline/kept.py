"""Peers that outlive a run: made, listed, replaced and removed, at the platform and on disk alike.

The order of each change is chosen so that a crash between two steps leaves no peer at the platform
that no file knows: what is not finished looks like the peer of a run that ended, and is removed by
the next command.
"""

import asyncio
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from builder_orch.api.keyring import Keyring, Purpose, Record, write_export
from builder_orch.api.models import Granted, Organization, Peer
from builder_orch.api.peer import new_key, public_key, tunnel_config
from builder_orch.errors import (
    AlreadyRunning,
    NotAllowed,
    NotLoggedIn,
    PlatformRefused,
    UsageFailure,
)
from builder_orch.events import Emit, Warned
from builder_orch.pipeline.outside import Platform as RunPlatform
from builder_orch.pipeline.outside import settle
from builder_orch.pipeline.peer import tidy
from builder_orch.tunnel.config import TunnelConfig, encode_key

KEEPALIVE_S = 15.0
"""Written into files for other programs, which sit behind translators too."""

_GENERATION = re.compile(r"(.*)-r([0-9]{1,6})\Z")


class Platform(RunPlatform, Protocol):
    """What a platform does for those who look after their peers."""

    async def organizations(self) -> list[Organization]: ...
    async def peers(self, organization: Organization) -> list[Granted]: ...


@dataclass(frozen=True, slots=True)
class Kept:
    """Where the peers of one platform (`identity`) are kept, and who grants them."""

    platform: Platform
    keyring: Keyring
    identity: str
    emit: Emit

    async def create(
        self,
        organization: Organization,
        name: str,
        *,
        region: str | None = None,
        ephemeral: bool = False,
        export: bool = False,
        file: Path | None = None,
        force: bool = False,
    ) -> tuple[Record, TunnelConfig]:
        """A new peer and its configuration. With `export` the caller gets the only copy of the key,
        which is written to `file` if there is one; `force` lets it take another file's place.

        UsageFailure when there is one of that name here, or that file.
        """
        if file is not None and not force and await asyncio.to_thread(file.exists):
            raise UsageFailure(
                f"{file} is there already", hint="Name another file, or add --force."
            )
        await self.tidy()
        if self.keyring.path(name).exists():
            raise UsageFailure(
                f"there is a peer {name} already",
                hint=f"Name another, or replace it: fly-build wireguard reset {name}.",
            )
        made, config = await self._make(organization, name, region, ephemeral, export)
        if file is not None:
            try:
                await asyncio.to_thread(write_export, file, exported(config), force=force)
            except BaseException:
                # Nobody has its key: it is of no use to anybody.
                removal = self.remove(organization, name)
                await settle(f"removing the peer {name} again", removal, self.emit)
                raise
        return made, config

    async def _make(
        self,
        organization: Organization,
        name: str,
        region: str | None,
        ephemeral: bool,
        export: bool,
    ) -> tuple[Record, TunnelConfig]:
        key = new_key()
        record = Record(
            name,
            self.identity,
            organization,
            public_key(key),
            Purpose.RUN,
            time.time(),
            self.keyring.machine,
            region or "",
            ephemeral,
        )
        with self.keyring.lock(record):
            await asyncio.to_thread(self.keyring.write, record)
            try:
                peer = await self._add(record)
            except (NotAllowed, NotLoggedIn, PlatformRefused):
                await asyncio.to_thread(self.keyring.forget, name)
                raise
            config = tunnel_config(key, peer)
            made = replace(
                record,
                purpose=Purpose.EXPORTED if export else Purpose.KEPT,
                address=peer.address,
                config=None if export else config,
            )
            await asyncio.to_thread(self.keyring.write, made)
        return made, config

    async def _add(self, record: Record) -> Peer:
        return await self.platform.add_peer(
            record.organization,
            record.name,
            encode_key(record.public_key),
            region=record.region or None,
            ephemeral=record.ephemeral,
        )

    async def reset(self, name: str) -> tuple[Record, TunnelConfig]:
        """A new key and a new peer in place of an old one, which is then removed everywhere.

        AlreadyRunning while somebody uses the old one.
        """
        old = self.keyring.find(name)
        self._is_of_this_platform(old)
        if old.purpose is Purpose.EXPORTED:
            raise UsageFailure(
                f"the key of {name} is in another program's file, which would not learn of it",
                hint="Remove it, and create another one with --file.",
            )
        with self.keyring.lock(old):
            made, config = await self._make(
                old.organization, next_name(name), old.region or None, old.ephemeral, False
            )
            await asyncio.to_thread(self.keyring.mark_for_removal, old)
            removal = self.platform.remove_peer(old.organization, old.name)
            # If that fails the next command does it: the new peer is there and good in any case.
            if await settle(f"removing the peer {old.name}", removal, self.emit):
                await asyncio.to_thread(self.keyring.forget, old.name)
        return made, config

    async def remove(self, organization: Organization | None, name: str) -> bool:
        """Shut a peer out at the platform, and take its file away; was there a file?

        `organization` is for peers that were made elsewhere, which have no file here.
        """
        path = self.keyring.path(name)
        if not path.exists():
            if organization is None:
                organization = await self.platform.organization(None)
            if name not in {one.name for one in await self.platform.peers(organization)}:
                raise UsageFailure(
                    f"neither this machine nor {organization.slug} has a peer {name}",
                    hint="fly-build wireguard list shows those there are.",
                )
            await self.platform.remove_peer(organization, name)
            return False
        try:
            record = self.keyring.find(name)
        except UsageFailure:
            # Whatever is in there, nobody can use it; the platform is asked by name.
            organization = organization or await self.platform.organization(None)
            await self.platform.remove_peer(organization, name)
            await asyncio.to_thread(self.keyring.forget, name)
            return True
        self._is_of_this_platform(record)
        with self.keyring.lock(record):
            await asyncio.to_thread(self.keyring.mark_for_removal, record)
            await self.platform.remove_peer(record.organization, name)
            await asyncio.to_thread(self.keyring.forget, name)
        return True

    def _is_of_this_platform(self, record: Record) -> None:
        if record.platform != self.identity:
            raise UsageFailure(
                f"the peer {record.name} is of another platform: {record.platform}",
                hint="Name that platform, with FLY_BUILD_API_URL or --api-url.",
            )

    async def tidy(self) -> None:
        """Remove what runs left behind, and files of peers that the platform no longer knows."""
        await tidy(self.platform, self.keyring, self.identity, self.emit)
        entries = await asyncio.to_thread(self.keyring.entries)
        mine = [
            entry.record
            for entry in entries
            if entry.record is not None
            and entry.record.platform == self.identity
            and entry.record.purpose is not Purpose.RUN
            and entry.user is None
        ]
        for record in await self.invalid(mine):
            try:
                with self.keyring.lock(record):
                    await asyncio.to_thread(self.keyring.forget, record.name)
            except AlreadyRunning:
                continue
            said = f"the platform no longer knows the peer {record.name}: its file was removed"
            self.emit(Warned("peer-gone", said))

    async def invalid(self, records: Iterable[Record]) -> list[Record]:
        """Those that the platform disowns, as far as the token reaches: a token of one organization
        says nothing of another's peers."""
        asked = [record for record in records if record.address is not None]
        if not asked:
            return []
        reached = {one.id for one in await self.platform.organizations()}
        addresses = {
            record.address: record
            for record in asked
            if record.address is not None and record.organization.id in reached
        }
        if not addresses:
            return []
        return [addresses[gone] for gone in await self.platform.validate_peers(list(addresses))]


def next_name(name: str) -> str:
    """`laptop`, `laptop-r2`, `laptop-r3`: a platform's names are unique, also while two exist."""
    found = _GENERATION.match(name)
    stem, generation = (found[1], int(found[2])) if found else (name, 1)
    return f"{stem[:190]}-r{generation + 1}"


def exported(config: TunnelConfig) -> str:
    """wg-quick text for another program, with a keepalive for the translators before it."""
    peers = tuple(replace(peer, keepalive_s=KEEPALIVE_S, door=None) for peer in config.peers)
    return replace(config, peers=peers).dump()

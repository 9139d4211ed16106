"""A WireGuard peer of this run's own, removed when the run ends."""

import re
import secrets
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import ClassVar

from builder_orch.api.models import Organization
from builder_orch.api.peer import new_key, public_key, tunnel_config
from builder_orch.errors import NotAllowed, NotLoggedIn, PlatformRefused
from builder_orch.events import Emit, PhaseReason
from builder_orch.pipeline.outside import Platform, settle
from builder_orch.tunnel.config import TunnelConfig, encode_key

HOST_CHARACTERS = 24


@dataclass(frozen=True, slots=True)
class AddPeer:
    """Make a key pair, let its public half in, and see to it that it is shut out again.

    Two runs never share a key: each would take the other's session away.
    """

    platform: Platform
    closing: AsyncExitStack
    host: str
    name: ClassVar[str] = "tunnel"

    async def run(self, given: Organization, emit: Emit) -> TunnelConfig:
        name = peer_name(self.host)
        key = new_key()
        emit(PhaseReason(self.name, f"asking for a WireGuard peer {name}"))

        async def remove() -> None:
            await settle(
                "removing the WireGuard peer", self.platform.remove_peer(given, name), emit
            )

        try:
            peer = await self.platform.add_peer(
                given, name, encode_key(public_key(key)), region=None, ephemeral=True
            )
        except (NotAllowed, NotLoggedIn, PlatformRefused):
            raise
        except BaseException:
            # Whether it was made is not known, so it is removed by its name.
            await remove()
            raise
        self.closing.push_async_callback(remove)
        return tunnel_config(key, peer)


def peer_name(host: str) -> str:
    """`fly-build-<host>-<random>`, in letters that every platform takes."""
    plain = re.sub(r"[^a-z0-9]+", "-", host.lower().partition(".")[0]).strip("-")
    return f"fly-build-{plain[:HOST_CHARACTERS].strip('-') or 'host'}-{secrets.token_hex(4)}"

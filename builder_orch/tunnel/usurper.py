"""Noticing that somebody else uses our key: an echo each second, and sessions that get lost."""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from ipaddress import IPv6Address

from builder_orch.tunnel.config import PublicKey
from builder_orch.tunnel.wireguard.twin import SILENT, Twin

ECHO_S = 1.0

Ping = Callable[[IPv6Address], Awaitable[object]]
"""TimeoutError without an answer in ECHO_S."""


class Usurper:
    """What is known of whoever has our key as well. The tunnel tells of each session that began."""

    def __init__(self) -> None:
        self._twins: defaultdict[PublicKey, Twin] = defaultdict(Twin)
        self._seen = asyncio.Event()

    def began(self, key: PublicKey, now: float, attempt: int) -> None:
        """A session with this peer began with the `attempt`-th initiation of ours in a row."""
        if self._twins[key].began(now, attempt):
            self._seen.set()

    async def seen(
        self, host: IPv6Address | None, ping: Ping, renew: Callable[[IPv6Address], None]
    ) -> None:
        """Wait until it is clear that there is one.

        A `host` behind the peer is asked for an echo each second, to know a loss from its silence
        before WireGuard's timers do; `renew` begins another session with the peer.
        """
        if host is None:
            await self._seen.wait()
            return
        lost, worked = 0, False
        while not self._seen.is_set():
            try:
                await ping(host)
            except TimeoutError:
                lost += 1
            else:
                lost, worked = 0, True
                await self._pause()
            if lost >= SILENT and worked:
                worked = False
                renew(host)

    async def _pause(self) -> None:
        try:
            async with asyncio.timeout(ECHO_S):
                await self._seen.wait()
        except TimeoutError:
            return

"""Echoes that were asked for and have not come back (ICMPv6, RFC 4443 §4)."""

import asyncio
import os
import struct
from collections.abc import Callable
from ipaddress import IPv6Address

from builder_orch.tunnel.clock import boot_time
from builder_orch.tunnel.ipv6.events import EchoReplied

PAYLOAD = bytes(range(32))

Send = Callable[[bytes, int, int, bytes], None]
"""Given an address, an identifier, a sequence number and a payload: queues the request."""


class Echoes:
    """Who waits for which reply."""

    def __init__(self, send: Send, pump: Callable[[], None]) -> None:
        self._send = send
        self._pump = pump
        self._waiting: dict[tuple[bytes, int, int], asyncio.Future[None]] = {}

    async def ask(self, address: IPv6Address, timeout_s: float) -> float:
        """Seconds that one took there and back; TimeoutError without an answer."""
        identifier, sequence = struct.unpack("!HH", os.urandom(4))
        key = (address.packed, identifier, sequence)
        self._waiting[key] = future = asyncio.get_running_loop().create_future()
        began = boot_time()
        try:
            self._send(*key, PAYLOAD)
            self._pump()
            async with asyncio.timeout(timeout_s):
                await future
        finally:
            del self._waiting[key]
        return boot_time() - began

    def probe(self, address: IPv6Address) -> None:
        """Have something small answered; nobody waits for it."""
        self._send(address.packed, 0, 0, PAYLOAD)
        self._pump()

    def replied(self, reply: EchoReplied) -> None:
        """One came back; nobody may wait for it."""
        future = self._waiting.get((reply.remote, reply.identifier, reply.sequence))
        if future is not None and not future.done():
            future.set_result(None)

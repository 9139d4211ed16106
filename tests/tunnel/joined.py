"""Two tunnels over the loopback interface: a gateway that serves and a client that dials."""

import asyncio
import os
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import IPv6Address, IPv6Network

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from builder_orch.tunnel.carrier.udp import UdpCarrier
from builder_orch.tunnel.config import PeerConfig, PrivateKey, PublicKey, TunnelConfig
from builder_orch.tunnel.driver import Tunnel, open_tunnel

NETWORK = IPv6Network("fdaa:0:7::/48")
GATEWAY = IPv6Address("fdaa:0:7::3")
CLIENT = IPv6Address("fdaa:0:7:a7b::2")

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def public(private: bytes) -> PublicKey:
    return PublicKey(X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw())


@dataclass(frozen=True)
class Pair:
    """The two ends, and the configuration that the client was opened with."""

    client: Tunnel
    gateway: Tunnel
    config: TunnelConfig
    conversations: set[asyncio.Future[None]]

    async def serve(self, port: int, serve: Serve) -> None:
        """Let the gateway's address answer at `port` by a server of asyncio streams."""

        async def backend(*_: object) -> socket.socket:
            ours, theirs = socket.socketpair()
            try:
                reader, writer = await asyncio.open_connection(sock=theirs)
            except asyncio.CancelledError:
                ours.close()
                theirs.close()
                raise
            self.conversations.add(asyncio.ensure_future(serve(reader, writer)))
            return ours

        self.gateway.serve(GATEWAY, port, backend)


@asynccontextmanager
async def pair(*, known: bool = True) -> AsyncGenerator[Pair]:
    """Both ends; with `known=False` the gateway does not have the client's key yet."""
    ours, theirs = PrivateKey(os.urandom(32)), PrivateKey(os.urandom(32))
    carrier = UdpCarrier.bind("127.0.0.1", 0)
    caller = PeerConfig(public(ours), (IPv6Network(f"{CLIENT}/128"),))
    server = TunnelConfig(theirs, GATEWAY, (caller,) if known else ())
    client = TunnelConfig(
        ours, CLIENT, (PeerConfig(public(theirs), (NETWORK,), carrier.endpoint),), dns=GATEWAY
    )
    async with (
        open_tunnel(server, carrier=carrier) as gateway,
        open_tunnel(client) as tunnel,
    ):
        ends = Pair(tunnel, gateway, client, set())
        yield ends
    # What the servers still have open ends with the tunnels: their sockets are reset.
    await asyncio.gather(*ends.conversations, return_exceptions=True)


async def until(condition: Callable[[], object]) -> None:
    """Look again and again, within limits."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 (nobody tells of it)
            await asyncio.sleep(0.001)

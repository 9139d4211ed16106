"""The gateway: a tunnel with many peers, the organisation's name server, and doors to its hosts."""

import asyncio
import socket
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from ipaddress import IPv6Address, IPv6Network
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from builder_orch.errors import PortInUse
from builder_orch.selfhost.wgtcpd import Certificate, Wgtcpd
from builder_orch.tunnel.carrier.udp import UdpCarrier
from builder_orch.tunnel.config import Door, PeerConfig, PrivateKey, PublicKey, TunnelConfig
from builder_orch.tunnel.driver import Tunnel, open_tunnel
from builder_orch.tunnel.machine import Address, Endpoint

DNS_PORT = 53
DNS_IDLE_S = 10.0
PEER_PREFIX = 120
"""A client may use any address of the /120 that its own lies in."""

Connect = Callable[[int], Awaitable[socket.socket]]
"""Given the inside port that was called: a connected stream socket to what stands behind it."""
AnswerName = Callable[[bytes, bool], bytes]
"""Given a DNS query and whether it came over a stream: the answer, b"" for none."""


class Gateway:
    """Peers come and go by key; addresses are exposed by whoever stands behind them."""

    def __init__(
        self,
        tunnel: Tunnel,
        public_key: PublicKey,
        endpoint: Endpoint,
        *,
        install_delay_s: float = 0.0,
        websocket: Door | None = None,
    ) -> None:
        self._tunnel = tunnel
        self.websocket = websocket
        self._install_delay_s = install_delay_s
        self._doors: dict[IPv6Address, int | None] = {}
        self._delayed: dict[PublicKey, asyncio.TimerHandle] = {}
        self._installed: dict[PublicKey, IPv6Address] = {}
        self.public_key = public_key
        self.endpoint = endpoint

    async def install(self, public_key: PublicKey, address: IPv6Address) -> None:
        """When this returns the peer's handshake is answered.

        A gateway made with `install_delay_s` returns at once and does not know the peer for that
        long, like a platform whose gateways are told later: a way to see how clients wait.
        """
        if self._install_delay_s > 0:
            self._forget(public_key)
            self._delayed[public_key] = asyncio.get_running_loop().call_later(
                self._install_delay_s, self._install, public_key, address
            )
        else:
            self._install(public_key, address)

    def _install(self, public_key: PublicKey, address: IPv6Address) -> None:
        network = IPv6Network((address, PEER_PREFIX), strict=False)
        self._tunnel.add_peer(PeerConfig(public_key, (network,)))
        self._installed[public_key] = address

    def installed(self) -> set[IPv6Address]:
        """The addresses of the peers that are answered."""
        return set(self._installed.values())

    async def remove(self, public_key: PublicKey) -> None:
        """From now on the peer is a stranger."""
        self._forget(public_key)
        self._installed.pop(public_key, None)
        self._tunnel.remove_peer(public_key)

    def _forget(self, public_key: PublicKey) -> None:
        timer = self._delayed.pop(public_key, None)
        if timer is not None:
            timer.cancel()

    def expose(self, address: IPv6Address, port: int | None, connect: Connect) -> None:
        """Let peers reach what `connect` leads to, at one port of an inside address or at all."""

        async def backend(_: Address, local: Address) -> socket.socket:
            return await connect(local[1])

        if address in self._doors:
            self.withdraw(address)
        self._doors[address] = port
        self._tunnel.serve(address, port, backend)

    def withdraw(self, address: IPv6Address) -> None:
        """The end of `expose`: new callers are refused, those connected stay."""
        port = self._doors.pop(address)
        self._tunnel.withdraw(address, port)

    def last_heard(self) -> dict[PublicKey, float]:
        """Seconds since each peer's last handshake, for those that made one."""
        return {
            status.public_key: status.last_handshake_age_s
            for status in self._tunnel.status()
            if status.last_handshake_age_s is not None
        }

    def name_with(self, answer: AnswerName, address: IPv6Address) -> None:
        """Serve DNS at the organisation's name server address, over UDP and over TCP."""
        self._tunnel.answer_datagrams(DNS_PORT, lambda query, _: answer(query, False) or None)
        conversations: set[asyncio.Task[None]] = set()

        async def backend(*_: object) -> socket.socket:
            ours, theirs = socket.socketpair()
            task = asyncio.create_task(_converse(theirs, answer))
            conversations.add(task)
            task.add_done_callback(conversations.discard)
            return ours

        self._tunnel.serve(address, DNS_PORT, backend)

    def close(self) -> None:
        """Cancel what was put off; the tunnel itself closes with `open_gateway`."""
        for timer in self._delayed.values():
            timer.cancel()
        self._delayed.clear()


async def _converse(sock: socket.socket, answer: AnswerName) -> None:
    """DNS over one TCP connection (RFC 7766): each message behind its length."""
    reader, writer = await asyncio.open_connection(sock=sock)
    try:
        while True:
            async with asyncio.timeout(DNS_IDLE_S):
                (size,) = struct.unpack("!H", await reader.readexactly(2))
                reply = answer(await reader.readexactly(size), True)
            if not reply:
                return
            writer.write(struct.pack("!H", len(reply)) + reply)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError, TimeoutError):
        return
    finally:
        writer.close()


@asynccontextmanager
async def open_gateway(
    private_key: PrivateKey,
    address: IPv6Address,
    *,
    listen: str = "127.0.0.1",
    port: int = 0,
    install_delay_s: float = 0.0,
    certificate: Path | None = None,
    websocket_port: int = 0,
) -> AsyncGenerator[Gateway]:
    """A gateway at a UDP address of this host; `address` is its own inside (the name server's).

    With `certificate`, a file that is made if need be, clients may call by WebSocket as well: at
    `websocket_port` if it is free, else at another. PortInUse when the UDP port belongs to another
    program.
    """
    try:
        carrier = UdpCarrier.bind(listen, port)
    except OSError as error:
        raise PortInUse(
            f"the gateway cannot listen on UDP {listen}:{port}: {error.strerror}",
            hint="Choose another address or port, or end the program that has it.",
        ) from None
    endpoint = carrier.endpoint
    own = X25519PrivateKey.from_private_bytes(private_key).public_key().public_bytes_raw()
    config = TunnelConfig(private_key, address, ())
    both = Wgtcpd(carrier)
    async with open_tunnel(config, carrier=both) as tunnel:
        door = None
        if certificate is not None:
            door = await both.listen(Certificate.at(certificate), listen, websocket_port)
        gateway = Gateway(
            tunnel,
            PublicKey(own),
            endpoint,
            install_delay_s=install_delay_s,
            websocket=door,
        )
        try:
            yield gateway
        finally:
            gateway.close()

"""A conversation in which both sides send a stream and know each other's, through any tunnel.

The one who calls sends, ends its direction, is told what the other one heard, and hears in turn.
"""

import asyncio
import hashlib
import socket
from collections.abc import Iterator
from ipaddress import IPv6Address, IPv6Network

from builder_orch.tunnel.carrier.udp import UdpCarrier
from builder_orch.tunnel.config import PeerConfig, PrivateKey, TunnelConfig
from builder_orch.tunnel.driver import Tunnel
from builder_orch.tunnel.machine import Endpoint
from tests.system.lab import OUR_HOST, OURS, THEIR_HOST, THEIRS, Lab
from tests.tunnel.joined import public

BLOCK = 1 << 20
IPV4, IPV6 = socket.AF_INET, socket.AF_INET6
LIMIT_S = 300.0

STREAM = """
import hashlib, socket, sys
BLOCK = 1 << 20
def stream(seed, size):
    block = hashlib.shake_256(seed).digest(BLOCK)
    for start in range(0, size, BLOCK):
        yield (start.to_bytes(8, "big") + block[8:])[: size - start]
"""
"""`stream` for programs that run behind wireguard-go."""

SERVER = f"""{STREAM}
address, size = sys.argv[1], int(sys.argv[2])
listener = socket.create_server((address, 0), family=socket.AF_INET6)
print(listener.getsockname()[1], flush=True)
caller, _ = listener.accept()
heard = hashlib.sha256()
while octets := caller.recv(BLOCK):
    heard.update(octets)
caller.sendall(heard.digest())
for octets in stream(b"down", size):
    caller.sendall(octets)
caller.close()
"""
"""Listens behind wireguard-go: python -c SERVER ADDRESS OCTETS; prints its port."""

CLIENT = f"""{STREAM}
address, port, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
sock = socket.create_connection((address, port), timeout=60)
for octets in stream(b"up", size):
    sock.sendall(octets)
sock.shutdown(socket.SHUT_WR)
heard = hashlib.sha256()
while octets := sock.recv(BLOCK):
    heard.update(octets)
print(heard.hexdigest(), flush=True)
"""
"""Calls from behind wireguard-go: python -c CLIENT ADDRESS PORT OCTETS; prints what it heard."""


def stream(seed: bytes, size: int) -> Iterator[bytes]:
    """The stream of a seed; every block begins with its own position."""
    block = hashlib.shake_256(seed).digest(BLOCK)
    for start in range(0, size, BLOCK):
        yield (start.to_bytes(8, "big") + block[8:])[: size - start]


def digest(octets: Iterator[bytes]) -> bytes:
    """The SHA-256 of a stream."""
    heard = hashlib.sha256()
    for block in octets:
        heard.update(block)
    return heard.digest()


def call(sock: socket.socket, size: int) -> None:
    """Be the one who calls; AssertionError if either side heard anything else than was sent."""
    for block in stream(b"up", size):
        sock.sendall(block)
    sock.shutdown(socket.SHUT_WR)
    told = b""
    while len(told) < hashlib.sha256().digest_size:
        told += sock.recv(32 - len(told))
    assert told == digest(stream(b"up", size))
    heard, total = hashlib.sha256(), 0
    while octets := sock.recv(BLOCK):
        heard.update(octets)
        total += len(octets)
    assert total == size
    assert heard.digest() == digest(stream(b"down", size))


def answer(sock: socket.socket, size: int, *, telling: bool) -> None:
    """Be the one who is called, and with `telling` say what was heard before sending."""
    heard = hashlib.sha256()
    with sock:
        while octets := sock.recv(BLOCK):
            heard.update(octets)
        if telling:
            sock.sendall(heard.digest())
        for block in stream(b"down", size):
            sock.sendall(block)
    assert heard.digest() == digest(stream(b"up", size))


def serve_once(
    tunnel: Tunnel, address: IPv6Address, size: int, *, telling: bool
) -> "asyncio.Future[None]":
    """Answer one call at port 80; done when the conversation is."""
    calls: asyncio.Queue[socket.socket] = asyncio.Queue()

    async def backend(*_: object) -> socket.socket:
        near, far = socket.socketpair()
        calls.put_nowait(far)
        return near

    async def converse() -> None:
        await asyncio.to_thread(answer, await calls.get(), size, telling=telling)

    tunnel.serve(address, 80, backend)
    return asyncio.ensure_future(converse())


def bound(lab: Lab, host: str = OUR_HOST, *, family: socket.AddressFamily = IPV4) -> UdpCarrier:
    """A carrier of the left namespace that is not connected, so it may also be called."""
    sock = lab.socket(family=family)
    sock.bind((host, 0))
    return UdpCarrier(sock)


def settings(
    port: int | None, theirs: bytes, ours: bytes, psk: bytes | None, *, host: str = THEIR_HOST
) -> TunnelConfig:
    """Our end; without a port we have to be called."""
    endpoint: Endpoint | None = None if port is None else (host, port)
    allowed = (IPv6Network(f"{THEIRS}/128"),)
    peer = PeerConfig(public(theirs), allowed, endpoint, preshared_key=psk or bytes(32))
    return TunnelConfig(PrivateKey(ours), OURS, (peer,))


def mirrored(
    endpoint: Endpoint | None, theirs: bytes, ours: bytes, psk: bytes | None
) -> TunnelConfig:
    """The other end, where that is ours too."""
    allowed = (IPv6Network(f"{OURS}/128"),)
    peer = PeerConfig(public(ours), allowed, endpoint, preshared_key=psk or bytes(32))
    return TunnelConfig(PrivateKey(theirs), THEIRS, (peer,))

"""The whole tunnel against wireguard-go with the kernel's TCP behind it, byte for byte."""

import asyncio
import hashlib
import os
import socket
from collections.abc import Iterator
from ipaddress import IPv6Network

import pytest

from builder_orch.tunnel.carrier.udp import UdpCarrier
from builder_orch.tunnel.config import PeerConfig, PrivateKey, TunnelConfig
from builder_orch.tunnel.driver import Tunnel, open_tunnel
from tests.system.lab import OUR_HOST, OURS, THEIR_HOST, THEIRS, Lab, laboratory
from tests.tunnel.joined import public

pytestmark = pytest.mark.system

SIZE = 100_000_000
BLOCK = 1 << 20

# Runs behind wireguard-go: takes everything a caller sends, answers with its SHA-256, then sends as
# many octets of its own and closes.
SERVER = """
import hashlib, socket, sys
address, size = sys.argv[1], int(sys.argv[2])
listener = socket.create_server((address, 0), family=socket.AF_INET6)
print(listener.getsockname()[1], flush=True)
caller, _ = listener.accept()
heard = hashlib.sha256()
while octets := caller.recv(1 << 20):
    heard.update(octets)
caller.sendall(heard.digest())
block = hashlib.shake_256(b"down").digest(1 << 20)
for start in range(0, size, len(block)):
    caller.sendall(block[: size - start])
caller.close()
"""

# Runs behind wireguard-go: calls us, sends and receives as above, and prints what it heard.
CLIENT = """
import hashlib, socket, sys
address, port, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
sock = socket.create_connection((address, port), timeout=60)
block = hashlib.shake_256(b"up").digest(1 << 20)
for start in range(0, size, len(block)):
    sock.sendall(block[: size - start])
sock.shutdown(socket.SHUT_WR)
heard = hashlib.sha256()
while octets := sock.recv(1 << 20):
    heard.update(octets)
print(heard.hexdigest(), flush=True)
"""


@pytest.fixture
def lab() -> Iterator[Lab]:
    with laboratory() as built:
        yield built


def stream(seed: bytes, size: int) -> Iterator[bytes]:
    block = hashlib.shake_256(seed).digest(BLOCK)
    for start in range(0, size, BLOCK):
        yield block[: min(BLOCK, size - start)]


def digest(octets: Iterator[bytes]) -> str:
    heard = hashlib.sha256()
    for block in octets:
        heard.update(block)
    return heard.hexdigest()


def converse(sock: socket.socket, size: int) -> str:
    """Send `size` octets, end our direction, read the reply; the SHA-256 of its stream."""
    for block in stream(b"up", size):
        sock.sendall(block)
    sock.shutdown(socket.SHUT_WR)
    digest_of_ours = b""
    while len(digest_of_ours) < 32:
        digest_of_ours += sock.recv(32 - len(digest_of_ours))
    assert digest_of_ours.hex() == digest(stream(b"up", size))
    heard, total = hashlib.sha256(), 0
    while octets := sock.recv(BLOCK):
        heard.update(octets)
        total += len(octets)
    assert total == size
    return heard.hexdigest()


def bound(lab: Lab) -> UdpCarrier:
    sock = lab.socket()
    sock.bind((OUR_HOST, 0))
    return UdpCarrier(sock)


def settings(port: int | None, theirs: bytes, ours: bytes, psk: bytes | None) -> TunnelConfig:
    peer = PeerConfig(
        public(theirs),
        (IPv6Network(f"{THEIRS}/128"),),
        None if port is None else (THEIR_HOST, port),
        preshared_key=psk or bytes(32),
    )
    return TunnelConfig(PrivateKey(ours), OURS, (peer,))


@pytest.mark.parametrize("psk", [None, bytes(range(32))], ids=["plain", "psk"])
async def test_we_call_and_a_hundred_megabytes_pass_each_way(lab: Lab, psk: bytes | None) -> None:
    ours, theirs = os.urandom(32), os.urandom(32)
    port = lab.wireguard_go(private_key=theirs, our_public_key=public(ours), preshared_key=psk)
    server = lab.spawn(SERVER, str(THEIRS), str(SIZE))
    assert server.stdout is not None
    inside_port = int(server.stdout.readline())
    async with open_tunnel(settings(port, theirs, ours, psk), carrier=bound(lab)) as tunnel:
        await tunnel.ready(timeout_s=20)
        with await tunnel.dial(str(THEIRS), inside_port) as sock:
            heard = await asyncio.to_thread(converse, sock, SIZE)
        assert heard == digest(stream(b"down", SIZE))


async def test_we_are_called_and_a_hundred_megabytes_pass_each_way(lab: Lab) -> None:
    ours, theirs = os.urandom(32), os.urandom(32)
    carrier = bound(lab)
    lab.wireguard_go(private_key=theirs, our_public_key=public(ours), endpoint=carrier.endpoint)
    async with open_tunnel(settings(None, theirs, ours, None), carrier=carrier) as tunnel:
        heard = await answer_one_call(tunnel, lab)
        assert heard == digest(stream(b"up", SIZE))


async def answer_one_call(tunnel: Tunnel, lab: Lab) -> str:
    """Serve port 80; what the caller behind wireguard-go sent, as SHA-256."""
    result: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def backend(*_: object) -> socket.socket:
        near, far = socket.socketpair()
        conversation = asyncio.ensure_future(asyncio.to_thread(listen, far))
        conversation.add_done_callback(lambda done: result.set_result(done.result()))
        return near

    def listen(sock: socket.socket) -> str:
        heard = hashlib.sha256()
        with sock:
            while octets := sock.recv(BLOCK):
                heard.update(octets)
            for block in stream(b"down", SIZE):
                sock.sendall(block)
        return heard.hexdigest()

    tunnel.serve(OURS, 80, backend)
    caller = lab.spawn(CLIENT, str(OURS), "80", str(SIZE))
    assert caller.stdout is not None
    async with asyncio.timeout(120):
        said = await asyncio.to_thread(caller.stdout.readline)
        assert said.decode().strip() == digest(stream(b"down", SIZE))
        return await result

"""The two ends of a carrier test, each a process in a namespace of its own; they talk JSON lines.

usage: carrier_ends gateway FOLDER | carrier_ends client CARRIER [hurried] < what the gateway said

Who is hurried takes a silence for a lost gateway sooner than WireGuard and the race of carriers do.
"""

import asyncio
import hashlib
import json
import os
import socket
import sys
import time
from base64 import b64decode, b64encode
from collections import deque
from ipaddress import IPv6Address, IPv6Network
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from builder_orch.selfhost.gateway import open_gateway
from builder_orch.tunnel.carrier import Route, race
from builder_orch.tunnel.carrier.choice import Choice
from builder_orch.tunnel.config import PeerConfig, PrivateKey, PublicKey, TunnelConfig
from builder_orch.tunnel.driver import Tunnel, open_tunnel
from builder_orch.tunnel.wireguard import peer as wireguard_peer
from tests.system.lab import THEIR_HOST

NETWORK = IPv6Network("fdaa:0:7::/48")
GATEWAY, SINK, CLIENT = NETWORK[3], NETWORK[16], IPv6Address("fdaa:0:7:a7b::2")
BLOCK = 64 << 10
PACE_S = 0.01
"""Between blocks: a test of carriers need not use up the machine."""


def say(**fields: object) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


async def gateway(folder: str) -> None:
    """A gateway with one peer, whose key it makes itself, and a sink that acknowledges blocks."""
    own, theirs = os.urandom(32), os.urandom(32)
    tasks: list[asyncio.Future[None]] = []

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        digest, count = hashlib.sha256(), 0
        while octets := await reader.read(BLOCK):
            digest.update(octets)
            for _ in range((count + len(octets)) // BLOCK - count // BLOCK):
                writer.write(b"+")
            count += len(octets)
        writer.write(digest.digest())
        writer.close()

    async def connect(_: int) -> socket.socket:
        ours, far = socket.socketpair()
        tasks.append(asyncio.ensure_future(swallow(*await asyncio.open_connection(sock=far))))
        return ours

    opening = open_gateway(
        PrivateKey(own), GATEWAY, listen=THEIR_HOST, certificate=Path(folder) / "wgtcpd.pem"
    )
    async with opening as here:
        public = X25519PrivateKey.from_private_bytes(theirs).public_key().public_bytes_raw()
        await here.install(PublicKey(public), CLIENT)
        here.expose(SINK, 7, connect)
        assert here.websocket is not None
        say(
            key=b64encode(theirs).decode(),
            gateway=b64encode(here.public_key).decode(),
            port=here.endpoint[1],
            websocket=here.websocket.port,
            pin=here.websocket.pin.hex(),
        )
        await asyncio.get_running_loop().create_future()


async def upload(tunnel: Tunnel, stopped: asyncio.Event) -> None:
    """Send blocks until told to stop; say what carries them whenever that changes."""
    sock = await tunnel.dial(str(SINK), 7, timeout_s=60)
    reader, writer = await asyncio.open_connection(sock=sock)
    digest, waiting = hashlib.sha256(), deque[float]()
    blocks, stall_s, said = 0, 0.0, Route("", "", "")

    async def pour() -> None:
        # Not one by one: where all that was sent has been acknowledged and only the answer to it
        # gets lost, nobody at this end has a reason to think so.
        number = 0
        while not stopped.is_set():
            block = hashlib.shake_128(str(number).encode()).digest(BLOCK)
            digest.update(block)
            number += 1
            waiting.append(time.monotonic())
            writer.write(block)
            await writer.drain()
            await asyncio.sleep(PACE_S)
        writer.write_eof()

    pouring = asyncio.create_task(pour())
    answer = await reader.readexactly(1)
    while waiting:
        blocks += 1
        stall_s = max(stall_s, time.monotonic() - waiting.popleft())
        route = await tunnel.route()
        if route != said:
            said = route
            say(event="route", kind=route.kind, why=route.why, stall_s=stall_s, blocks=blocks)
        answer = await reader.readexactly(1)
    await pouring
    exact = answer + await reader.readexactly(31) == digest.digest()
    say(event="done", exact=exact, stall_s=stall_s, blocks=blocks)
    writer.close()


def hurry() -> None:
    """The story of minutes in seconds: the same proportions, a fifth and less of the time."""
    for name, seconds in {"KEEPALIVE_TIMEOUT": 2.0, "REKEY_TIMEOUT": 1.0}.items():
        setattr(wireguard_peer, name, seconds)
    race.DEAF_S, race.PROBE_FIRST_S, race.PROBE_AGAIN_S = 2.2, 1.0, 0.2


async def client(kind: str, haste: str = "") -> None:
    """Wait until the tunnel is ready, then upload until stdin ends."""
    if haste:
        hurry()
    stdin = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    told = json.loads(await stdin.readline())
    peer = PeerConfig(PublicKey(b64decode(told["gateway"])), (NETWORK,), (THEIR_HOST, told["port"]))
    config = TunnelConfig(PrivateKey(b64decode(told["key"])), CLIENT, (peer,), dns=GATEWAY)
    choice = Choice(kind, told["websocket"], bytes.fromhex(told["pin"]))
    async with open_tunnel(config, choice=choice) as tunnel:
        took = await tunnel.ready(timeout_s=30)
        route = await tunnel.route()
        say(event="ready", took_s=took, kind=route.kind, why=route.why)
        stopped = asyncio.Event()
        sending = asyncio.create_task(upload(tunnel, stopped))
        await stdin.read()
        stopped.set()
        await sending


if __name__ == "__main__":
    asyncio.run((gateway if sys.argv[1] == "gateway" else client)(*sys.argv[2:]))

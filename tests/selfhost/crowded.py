"""A gateway in a process of its own, so that its memory and its descriptors can be counted.

usage: crowded FOLDER PEERS LINKS LINKS_OF_ONE

It begins with the soft limit of descriptors that most systems give, says in one line of JSON what
clients need, and ends with its standard input.
"""

import asyncio
import hashlib
import json
import resource
import socket
import sys
from base64 import b64encode
from ipaddress import IPv6Network
from pathlib import Path

import structlog

from builder_orch.api.peer import new_key, public_key
from builder_orch.selfhost import wgtcpd
from builder_orch.selfhost.gateway import open_gateway

NETWORK = IPv6Network("fdaa:0:7::/48")
GATEWAY, SINK = NETWORK[3], NETWORK[16]
FIRST_CLIENT = 0xA7B0000
SOFT = 1024
BLOCK = 1 << 16


async def main(folder: str, peers: int) -> None:
    """Serve a sink that answers with the digest of what it swallowed."""
    tasks: set[asyncio.Future[None]] = set()

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        digest = hashlib.sha256()
        while octets := await reader.read(BLOCK):
            digest.update(octets)
        writer.write(digest.digest())
        writer.close()

    async def connect(_: int) -> socket.socket:
        ours, far = socket.socketpair()
        task = asyncio.ensure_future(swallow(*await asyncio.open_connection(sock=far)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return ours

    keys = [new_key() for _ in range(peers)]
    certificate = Path(folder) / "wgtcpd.pem"
    async with open_gateway(new_key(), GATEWAY, certificate=certificate) as gateway:
        for number, key in enumerate(keys):
            # A client may use the whole /120 around its address.
            await gateway.install(public_key(key), NETWORK[FIRST_CLIENT + (number << 8)])
        gateway.expose(SINK, 7, connect)
        told = {
            "keys": [b64encode(key).decode() for key in keys],
            "gateway": b64encode(gateway.public_key).decode(),
            "endpoint": gateway.endpoint,
            "door": str(gateway.websocket),
        }
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.buffer.read)


if __name__ == "__main__":
    folder, peers, wgtcpd.LINKS, wgtcpd.LINKS_OF_ONE = sys.argv[1], *map(int, sys.argv[2:])
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (SOFT, hard))
    # Nobody reads more of its output than that one line.
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    asyncio.run(main(folder, peers))

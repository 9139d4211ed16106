"""Thousands of WebSockets at one gateway: most do nothing, a few carry streams."""

import asyncio
import hashlib
import json
import os
import resource
import subprocess
import sys
from base64 import b64decode
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from builder_orch.selfhost.wgtcpd import LINKS_OF_ONE
from builder_orch.tunnel.carrier.choice import WEBSOCKET, Choice
from builder_orch.tunnel.carrier.frames import Framer
from builder_orch.tunnel.carrier.upgrade import request
from builder_orch.tunnel.carrier.websocket import unverified
from builder_orch.tunnel.config import Door, PeerConfig, PrivateKey, PublicKey, TunnelConfig
from builder_orch.tunnel.driver import open_tunnel
from tests.selfhost.crowded import FIRST_CLIENT, NETWORK, SINK

ROOT = Path(__file__).parents[2]
STREAMS = 3
SPARE = 200
"""Descriptors for everything else that either process has open."""
AT_ONCE = 50
LINK_OCTETS = 64_000
"""What an idle connection may cost the gateway: TLS, the event loop's buffers and ours. Measured
are 29 to 39 thousand."""


@dataclass
class Crowded:
    """The gateway's process and how its clients reach it."""

    process: "subprocess.Popen[bytes]"
    door: Door
    configs: list[TunnelConfig]

    @property
    def memory(self) -> int:
        """Its resident octets."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * resource.getpagesize()


@contextmanager
def crowded(folder: Path, links: int, of_one: int) -> Iterator[Crowded]:
    words = [sys.executable, "-m", "tests.selfhost.crowded", str(folder)]
    process = subprocess.Popen(
        [*words, *map(str, (STREAMS, links, of_one))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        told = json.loads(process.stdout.readline())
        door = Door.parse(told["door"])
        host, port = told["endpoint"]
        key = PublicKey(b64decode(told["gateway"]))
        peer = PeerConfig(key, (NETWORK,), (host, port), door=door)
        configs = [
            TunnelConfig(PrivateKey(b64decode(own)), NETWORK[FIRST_CLIENT + (number << 8)], (peer,))
            for number, own in enumerate(told["keys"])
        ]
        yield Crowded(process, door, configs)
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


class Idle(asyncio.Protocol):
    """A client that has said what every client says first, and keeps its connection alive."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._framer = Framer(os.urandom)
        self._transport: asyncio.Transport | None = None
        self.welcome: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.heard = asyncio.Event()
        self.lost = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(request("127.0.0.1", self._door.port, "a" * 22 + "=="))
        transport.write(self._framer.magic())

    def data_received(self, data: bytes) -> None:
        if self.welcome.done():
            self.heard.set()
        else:
            self.welcome.set_result(data.startswith(b"HTTP/1.1 101 "))

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()
        if not self.welcome.done():
            self.welcome.set_result(False)

    def keep_alive(self) -> None:
        if self._transport is not None:
            self._transport.write(self._framer.keepalive())

    async def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()
            await self.lost.wait()


class Crowd:
    """Clients that do nothing, from as many addresses of this machine as it takes."""

    def __init__(self, door: Door) -> None:
        self.members: list[Idle] = []
        self._door = door
        self._tls = unverified()

    async def call(self, source: str) -> bool:
        """One more; was it let in?"""
        member = Idle(self._door)
        try:
            await asyncio.get_running_loop().create_connection(
                lambda: member,
                "127.0.0.1",
                self._door.port,
                ssl=self._tls,
                local_addr=(source, 0),
            )
        except ConnectionError:
            # Turned away before the last word of TLS was said.
            return False
        if not await member.welcome:
            return False
        self.members.append(member)
        return True

    async def grow(self, count: int, source: str) -> None:
        """So many more, AT_ONCE at a time."""
        gate = asyncio.Semaphore(AT_ONCE)

        async def one() -> bool:
            async with gate:
                return await self.call(source)

        assert all(await asyncio.gather(*(one() for _ in range(count))))

    async def keep_alive(self) -> None:
        """What clients do: a word each second."""
        while True:
            for member in self.members:
                member.keep_alive()
            await asyncio.sleep(1)

    async def hear(self) -> None:
        """Until the gateway has said something to each of them from now on."""
        for member in self.members:
            member.heard.clear()
        await asyncio.gather(*(member.heard.wait() for member in self.members))

    async def leave(self) -> None:
        """All of them."""
        await asyncio.gather(*(member.close() for member in self.members))
        self.members.clear()


@asynccontextmanager
async def crowd(door: Door) -> AsyncGenerator[Crowd]:
    made = Crowd(door)
    keeping = asyncio.create_task(made.keep_alive())
    try:
        yield made
    finally:
        keeping.cancel()
        await made.leave()


async def upload(config: TunnelConfig, octets: bytes) -> str:
    """Send these to the sink by WebSocket; what it says that it got."""
    async with open_tunnel(config, choice=Choice(WEBSOCKET)) as tunnel:
        await tunnel.ready(timeout_s=60)
        sock = await tunnel.dial(str(SINK), 7, timeout_s=60)
        reader, writer = await asyncio.open_connection(sock=sock)
        writer.write(octets)
        writer.write_eof()
        digest = await reader.read()
        writer.close()
        return digest.hex()


@pytest.fixture
def descriptors() -> Iterator[int]:
    """How many this process may have open, which is raised as far as it may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield hard if hard != resource.RLIM_INFINITY else sys.maxsize
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("links", "of_one", "size"),
    [
        (200, 110, 1 << 20),
        pytest.param(2000, LINKS_OF_ONE, 16 << 20, marks=pytest.mark.long),
    ],
)
async def test_a_crowd_at_the_gateway_disturbs_no_stream(
    tmp_path: Path, descriptors: int, links: int, of_one: int, size: int
) -> None:
    needed = 2 * (links + STREAMS) + SPARE
    if descriptors < needed:
        pytest.skip(f"needs {needed} descriptors, and the hard limit is {descriptors}")
    with crowded(tmp_path, links + STREAMS, of_one) as gateway:
        async with asyncio.timeout(150), crowd(gateway.door) as idle:
            await idle.grow(AT_ONCE, "127.0.0.2")
            await idle.leave()
            before = gateway.memory
            await idle.grow(of_one, "127.0.0.3")
            assert not await idle.call("127.0.0.3"), "more than one address may have"
            await idle.grow(links - of_one, "127.0.0.4")
            await idle.hear()
            assert (gateway.memory - before) / links < LINK_OCTETS
            sent = [os.urandom(size) for _ in gateway.configs]
            came = await asyncio.gather(*map(upload, gateway.configs, sent))
            assert came == [hashlib.sha256(octets).hexdigest() for octets in sent]
            await idle.hear()
            assert not any(member.lost.is_set() for member in idle.members)
            while await idle.call("127.0.0.5"):
                assert len(idle.members) <= links + STREAMS, "more than there may be"
            await idle.members.pop().close()
            while not await idle.call("127.0.0.5"):
                # It has not heard yet that one is gone.
                continue

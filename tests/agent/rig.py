"""An agent in this process, with a gateway for its tunnels, and clients of it."""

import asyncio
import json
import socket
import struct
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from builder_orch.agent.call import Call, greet
from builder_orch.agent.client import AgentTunnel
from builder_orch.agent.place import Place
from builder_orch.agent.server import Agent, Terms, serve
from builder_orch.agent.session import Patience
from builder_orch.tunnel.carrier.choice import Choice
from builder_orch.tunnel.config import TunnelConfig

QUICK = Terms(tunnel_idle_s=0.05, tick_s=0.02)
HASTY = replace(QUICK, patience=Patience(frame_s=0.2, quiet_s=0.4, stall_s=0.2))
UDP = Choice()


@dataclass
class Served:
    """A running agent; `task` ends when it does."""

    agent: Agent
    place: Place
    task: "asyncio.Task[None]"

    async def call(self, **how: Any) -> Call:
        """A client that waits for each answer."""
        found = await asyncio.to_thread(greet, self.place, **how)
        assert found is not None
        return found

    @asynccontextmanager
    async def client(self) -> AsyncGenerator[AgentTunnel]:
        """A client that has not opened a tunnel yet."""
        tunnel = AgentTunnel(await self.call())
        try:
            yield tunnel
        finally:
            tunnel.close()

    @asynccontextmanager
    async def tunnel(self, path: Path, choice: Choice = UDP) -> AsyncGenerator[AgentTunnel]:
        """A client that uses the tunnel of a file."""
        async with self.client() as tunnel:
            await tunnel.open_file(path, choice)
            yield tunnel

    async def until(self, **wanted: object) -> None:
        """Ask for the status until it says so."""
        while not wanted.items() <= self.agent.status().items():
            # A turn of the agent's own; its sessions and tunnels move on meanwhile.
            await asyncio.to_thread(self.place.socket.exists)


@asynccontextmanager
async def serving(place: Place, terms: Terms = QUICK) -> AsyncGenerator[Served]:
    """An agent for the length of the block."""
    begun: asyncio.Future[Agent] = asyncio.get_running_loop().create_future()
    task = asyncio.ensure_future(serve(place, terms, begun.set_result))
    task.add_done_callback(lambda _: begun.cancel())
    try:
        agent = await begun
    except asyncio.CancelledError:
        await task
        raise
    try:
        async with asyncio.timeout(30):
            yield Served(agent, place, task)
    finally:
        agent.stop()
        await task


def keep(config: TunnelConfig, path: Path) -> Path:
    """A wg-quick file of ours, as the agent wants it."""
    path.touch(mode=0o600)
    path.write_text(config.dump())
    return path


def framed(message: object) -> bytes:
    """Octets of a message, made without the code that is under test."""
    text = json.dumps(message).encode()
    return struct.pack("!I", len(text)) + text


HELLO = framed({"id": 1, "do": "hello", "protocols": [1, 1], "version": "0"})


def raw(place: Place) -> socket.socket:
    """A connection to the agent that says nothing by itself."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(str(place.socket))
    sock.settimeout(10)
    return sock

"""A command that talks to an app inside, for a test that runs several of them at once.

    python -m tests.system.talker AGENT_MODE HOST PORT short|bulk

It says `ready` when it is connected, then either asks short questions one after the other, as an
interactive session does, or sends as much as it can, until its input ends; every answer is checked.
The last line counts the octets.
"""

import asyncio
import os
import sys
from contextlib import AsyncExitStack
from pathlib import Path

from builder_orch.cli.deploy import open_world
from builder_orch.cli.options import Flags
from builder_orch.pipeline.peer import AddPeer
from builder_orch.pipeline.tunnel import Open
from builder_orch.settings import Environment

SIZES = {"short": 40, "bulk": 1 << 18}


async def talk(mode: str, host: str, port: int, size: int) -> int:
    """Converse until standard input ends; octets that came back as they were sent."""
    chosen = Environment.current().platform()
    assert chosen is not None
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    async with (
        open_world(chosen, lambda _: None, Flags(Path(), agent=mode)) as world,
        AsyncExitStack() as closing,
    ):
        organization = await world.platform.organization(None)
        take = world.shared_peer or AddPeer(world.platform, closing, "talker").run
        config = await take(organization, lambda _: None)
        tunnel, _ = await Open(world.open_tunnel, closing, world.limits).run(config, lambda _: None)
        sock = await tunnel.dial(host, port)
        reader, writer = await asyncio.open_connection(sock=sock)
        loop.add_reader(0, over.set)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        done = 0
        while not over.is_set():
            octets = os.urandom(size)
            writer.write(octets)
            assert await reader.readexactly(size) == octets
            done += size
        writer.close()
    return done


if __name__ == "__main__":
    mode, host, port, how = sys.argv[1:]
    sys.stdout.write(f"{asyncio.run(talk(mode, host, int(port), SIZES[how]))}\n")

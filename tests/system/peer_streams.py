"""A process with an ephemeral peer of its own that talks to the builder's engine until stdin ends.

usage: peer_streams stream | proxy

`stream` keeps one connection through the tunnel, as ssh would; `proxy` forwards a local port and
makes a new connection through it for each question. At the end a line of JSON tells how it went.
"""

import asyncio
import json
import sys
from contextlib import AsyncExitStack
from ipaddress import IPv6Address
from pathlib import Path

from builder_orch.api.client import IDEMPOTENT_SELFHOST, Platform
from builder_orch.api.keyring import Keyring
from builder_orch.api.models import Secret
from builder_orch.pipeline.peer import AddPeer
from builder_orch.settings import Environment
from builder_orch.tunnel.forward import Dialled, forward_port
from builder_orch.tunnel.hosted import HostedTunnel, hosting

PORT = 2375
ASK = b"GET /_ping HTTP/1.1\r\nHost: builder\r\n\r\n"


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(ASK)
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head
    assert await reader.readexactly(2) == b"OK"


async def talk(
    tunnel: HostedTunnel, address: IPv6Address, local: int | None, over: asyncio.Task[bytes]
) -> dict[str, object]:
    """Ask again and again: on one connection, or through `local`, each time on a new one."""
    clock = asyncio.get_running_loop().time
    rounds, worst_s, routes = 0, 0.0, {await tunnel.route()}
    kept = (
        None if local else await asyncio.open_connection(sock=await tunnel.dial(str(address), PORT))
    )
    while not over.done():
        began = clock()
        reader, writer = kept or await asyncio.open_connection("127.0.0.1", local)
        await ask(reader, writer)
        if kept is None:
            writer.close()
        rounds, worst_s = rounds + 1, max(worst_s, clock() - began)
        routes.add(await tunnel.route())
        if rounds == 1:
            say(event="talking")
        await asyncio.wait({over}, timeout=0.05)
    if kept is not None:
        kept[1].close()
    return {"rounds": rounds, "worst_s": worst_s, "routes": len(routes)}


def say(**fields: object) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


async def main(kind: str) -> None:
    environment = Environment.current()
    chosen = environment.platform()
    assert chosen is not None
    folder: Path = environment.state_folder()
    keyring = Keyring(folder.parent / "peers")
    token = Secret(chosen.token)
    stdin = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    async with (
        hosting() as open_tunnel,
        Platform(chosen.api_url, token, idempotent=IDEMPOTENT_SELFHOST) as platform,
        AsyncExitStack() as closing,
    ):
        app = await platform.app("hello")
        builder = await platform.ensure_builder(app, None)
        add = AddPeer(platform, closing, kind, keyring, str(folder))
        config = await add.run(app.organization, lambda _: None)
        opening = await closing.enter_async_context(open_tunnel(config))
        await opening.ready(timeout_s=60)
        over = asyncio.ensure_future(stdin.read())
        if kind == "proxy":
            forward = forward_port(Dialled(opening.dial), str(builder.address), PORT)
            local = await closing.enter_async_context(forward)
            found = await talk(opening, builder.address, int(local), over)
        else:
            found = await talk(opening, builder.address, None, over)
        say(event="done", **found)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))

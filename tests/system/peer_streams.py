"""A process with an ephemeral peer of its own that talks through its tunnel until stdin ends.

usage: peer_streams stream | proxy

`stream` keeps one connection, as ssh would, and asks the resolver by it; `proxy` forwards a local
port to the builder's engine and makes a new connection through it for each question. At the end a
line of JSON tells how it went.
"""

import asyncio
import json
import struct
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import dns.message

from builder_orch.api.client import IDEMPOTENT_SELFHOST, Platform
from builder_orch.api.keyring import Keyring
from builder_orch.api.models import Secret
from builder_orch.pipeline.peer import AddPeer
from builder_orch.settings import Environment
from builder_orch.tunnel.forward import Dialled, forward_port
from builder_orch.tunnel.hosted import HostedTunnel, hosting

PORT = 2375
RESOLVER_PORT = 53
ASK = b"GET /_ping HTTP/1.1\r\nHost: builder\r\n\r\n"
QUERY = dns.message.make_query("_api.internal", "AAAA")

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def ask_resolver(streams: Streams) -> None:
    reader, writer = streams
    query = QUERY.to_wire()
    writer.write(struct.pack("!H", len(query)) + query)
    (size,) = struct.unpack("!H", await reader.readexactly(2))
    assert QUERY.is_response(dns.message.from_wire(await reader.readexactly(size)))


async def ask_engine(local: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", local)
    writer.write(ASK)
    said = await reader.read()
    assert said.startswith(b"HTTP/1.1 200"), said
    assert said.endswith(b"\r\n\r\nOK"), said
    writer.close()


async def talk(
    tunnel: HostedTunnel, ask: Callable[[], Awaitable[None]], over: asyncio.Task[bytes]
) -> dict[str, object]:
    """Ask again and again."""
    clock = asyncio.get_running_loop().time
    rounds, worst_s, routes = 0, 0.0, {await tunnel.route()}
    while not over.done():
        began = clock()
        await ask()
        rounds, worst_s = rounds + 1, max(worst_s, clock() - began)
        routes.add(await tunnel.route())
        if rounds == 1:
            say(event="talking")
        await asyncio.wait({over}, timeout=0.05)
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
            local = int(await closing.enter_async_context(forward))
            found = await talk(opening, lambda: ask_engine(local), over)
        else:
            sock = await opening.dial(str(config.dns), RESOLVER_PORT)
            kept = await asyncio.open_connection(sock=sock)
            found = await talk(opening, lambda: ask_resolver(kept), over)
            kept[1].close()
        say(event="done", **found)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))

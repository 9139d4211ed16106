"""One subject doing one piece of work in a process of its own; prints its figures as JSON.

usage: subject server ADDRESS
       | subject gateway CONFIG CERTIFICATE HOST PORT WEBSOCKET_PORT BACKEND
       | subject forward CONFIG ADDRESS SOCKET
       | subject kit CONFIG CONTEXT
       | subject classic SOCKET CONTEXT
       | subject kernel ADDRESS PORT WORK OCTETS STREAMS
       | subject ours|inside|hosted|websocket CONFIG ADDRESS PORT WORK OCTETS STREAMS
"""

import asyncio
import functools
import socket
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path

from bench import inside, work

WEBSOCKET_PORT = 8443
ENGINE_PORT = 2375


def kernel(address: str, port: str, kind: str, octets: str, streams: str) -> None:
    """Plain sockets: whatever carries the packets is the kernel's business."""

    def dial() -> socket.socket:
        return socket.create_connection((address, int(port)), timeout=60)

    work.measure(time.perf_counter(), dial, kind, int(octets), int(streams))


async def gateway(
    text: str, certificate: str, host: str, port: str, websocket_port: str, behind: str
) -> None:
    """A gateway as selfhost's, for UDP and WebSocket; leads every stream to the server."""
    from builder_orch.selfhost.wgtcpd import Certificate, Wgtcpd
    from builder_orch.tunnel.carrier.udp import UdpCarrier
    from builder_orch.tunnel.config import TunnelConfig
    from builder_orch.tunnel.driver import open_tunnel

    async def backend(_remote: object, _local: object) -> socket.socket:
        local = "/" in behind
        sock = socket.socket(socket.AF_UNIX if local else socket.AF_INET6)
        sock.setblocking(False)
        address = behind if local else ("::1", int(behind))
        await asyncio.get_running_loop().sock_connect(sock, address)
        return sock

    carrier = Wgtcpd(UdpCarrier.bind(host, int(port)))
    await carrier.listen(Certificate.at(Path(certificate)), host, int(websocket_port))
    async with open_tunnel(TunnelConfig.parse(text), carrier=carrier) as tunnel:
        tunnel.serve(None, None, backend)
        print("up", flush=True)
        await asyncio.Event().wait()


async def ours(
    subject: str, text: str, address: str, port: str, kind: str, octets: str, streams: str
) -> None:
    """Our tunnel, in a process of its own (hosted) or in this one; threads use its streams, or
    protocols in the tunnel's own loop (inside)."""
    # Here and not above, so that the other subjects do not pay for it.
    from builder_orch.tunnel.carrier.choice import Choice
    from builder_orch.tunnel.config import TunnelConfig
    from builder_orch.tunnel.driver import open_tunnel
    from builder_orch.tunnel.hosted import hosting

    config = TunnelConfig.parse(text)
    async with AsyncExitStack() as closing:
        hosted = subject == "hosted"
        opener = await closing.enter_async_context(hosting()) if hosted else open_tunnel
        if subject == "websocket":
            opener = functools.partial(open_tunnel, choice=Choice("websocket", WEBSOCKET_PORT))
        began = time.perf_counter()
        tunnel = await closing.enter_async_context(opener(config))
        if subject == "inside":
            make = functools.partial(tunnel.create_connection, inside.Stream, address, int(port))
            await inside.measure(began, make, kind, int(octets), int(streams))
            return

        def dial() -> socket.socket:
            return tunnel.dial_blocking(address, int(port), timeout_s=60)

        busy = threading.Event()
        if kind.startswith("busy-"):
            threading.Thread(target=_spin, args=(busy,), daemon=True).start()
        await asyncio.to_thread(
            work.measure,
            began,
            dial,
            kind.removeprefix("busy-"),
            int(octets),
            int(streams),
            tunnel.pid if hosted else None,
        )
        busy.set()


async def forward(text: str, address: str, path: str) -> None:
    """A tunnel, and a Unix socket that leads to the engine behind it."""
    from builder_orch.tunnel.config import TunnelConfig
    from builder_orch.tunnel.forward import Dialled, forward_unix
    from builder_orch.tunnel.hosted import hosting

    async with (
        hosting() as opener,
        opener(TunnelConfig.parse(text)) as tunnel,
        forward_unix(Dialled(tunnel.dial), address, ENGINE_PORT, path),
    ):
        print("up", flush=True)
        await asyncio.Event().wait()


async def kit(text: str, folder: str) -> None:
    """A build by our BuildKit session, its tunnel included.

    As in a deploy, the tunnel's process starts first, and the context is looked at meanwhile.
    """
    from builder_orch.tunnel.config import TunnelConfig
    from builder_orch.tunnel.hosted import hosting

    def ignore(_: object) -> None:
        """Nobody looks."""

    config = TunnelConfig.parse(text)
    (network,) = config.peers[0].allowed
    async with hosting() as opener:
        from builder_orch.pipeline.build import Build, Send, building
        from builder_orch.pipeline.context import Directory, scan
        from builder_orch.pipeline.engine import BUILDKIT, Engine, Recipe, wait_for_engine
        from builder_orch.pipeline.stage import perform

        context = scan(Directory(Path(folder)), ignore)
        recipe = Recipe(context.dockerfile_name, builder=BUILDKIT, node="bench")
        async with opener(config) as tunnel:
            engine = Engine(network.network_address, tunnel.dial)
            ready = await wait_for_engine(engine, ignore, limit_s=30)
            async with building(ready, context, recipe, ignore) as under_way:
                await perform(Send(), under_way, ignore)
                await perform(Build(), under_way, ignore)


def classic(path: str, folder: str) -> None:
    """A build as any program does it with docker-py."""
    import docker

    client = docker.APIClient(base_url=f"unix://{path}", timeout=600)
    for line in client.build(path=folder, rm=True, decode=True):
        if "error" in line:
            raise SystemExit(line["error"])
    client.close()


def _spin(done: threading.Event) -> None:
    """What a careless application does: pure Python without a pause."""
    number = 0
    while not done.is_set():
        number += 1


ON_CONFIG: dict[str, Callable[..., Coroutine[None, None, None]]] = {
    "gateway": gateway,
    "forward": forward,
    "kit": kit,
}


def main(arguments: list[str]) -> None:
    """Run the subject that the first argument names."""
    if arguments[0] == "server":
        work.serve(arguments[1])
    elif arguments[0] == "kernel":
        kernel(*arguments[1:])
    elif arguments[0] == "classic":
        classic(*arguments[1:])
    elif arguments[0] in ON_CONFIG:
        asyncio.run(ON_CONFIG[arguments[0]](Path(arguments[1]).read_text(), *arguments[2:]))
    else:
        asyncio.run(ours(arguments[0], Path(arguments[1]).read_text(), *arguments[2:]))


if __name__ == "__main__":
    main(sys.argv[1:])

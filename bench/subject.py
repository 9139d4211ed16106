"""One subject doing one piece of work in a process of its own; prints its figures as JSON.

usage: subject server ADDRESS | subject kernel ADDRESS PORT WORK OCTETS STREAMS
       | subject ours|inline CONFIG ADDRESS PORT WORK OCTETS STREAMS
"""

import asyncio
import socket
import sys
import threading
import time
from contextlib import AsyncExitStack
from pathlib import Path

from bench import work


def kernel(address: str, port: str, kind: str, octets: str, streams: str) -> None:
    """Plain sockets: whatever carries the packets is the kernel's business."""

    def dial() -> socket.socket:
        return socket.create_connection((address, int(port)), timeout=60)

    work.measure(time.perf_counter(), dial, kind, int(octets), int(streams))


async def ours(
    subject: str, text: str, address: str, port: str, kind: str, octets: str, streams: str
) -> None:
    """Our tunnel, in a process of its own or in this one; threads use its streams."""
    # Here and not above, so that the other subjects do not pay for it.
    from builder_orch.tunnel.config import TunnelConfig
    from builder_orch.tunnel.driver import open_tunnel
    from builder_orch.tunnel.hosted import hosting

    config = TunnelConfig.parse(text)
    async with AsyncExitStack() as closing:
        hosted = subject == "ours"
        opener = await closing.enter_async_context(hosting()) if hosted else open_tunnel
        began = time.perf_counter()
        tunnel = await closing.enter_async_context(opener(config))

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


def _spin(done: threading.Event) -> None:
    """What a careless application does: pure Python without a pause."""
    number = 0
    while not done.is_set():
        number += 1


def main(arguments: list[str]) -> None:
    """Run the subject that the first argument names."""
    if arguments[0] == "server":
        work.serve(arguments[1])
    elif arguments[0] == "kernel":
        kernel(*arguments[1:])
    else:
        asyncio.run(ours(arguments[0], Path(arguments[1]).read_text(), *arguments[2:]))


if __name__ == "__main__":
    main(sys.argv[1:])

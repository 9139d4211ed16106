"""One subject doing one piece of work in a process of its own; prints its figures as JSON.

usage: subject server ADDRESS | subject kernel ADDRESS PORT WORK OCTETS STREAMS
       | subject ours CONFIG ADDRESS PORT WORK OCTETS STREAMS
"""

import asyncio
import socket
import sys
import threading
import time
from pathlib import Path

from bench import work


def kernel(address: str, port: str, kind: str, octets: str, streams: str) -> None:
    """Plain sockets: whatever carries the packets is the kernel's business."""

    def dial() -> socket.socket:
        return socket.create_connection((address, int(port)), timeout=60)

    work.measure(time.perf_counter(), dial, kind, int(octets), int(streams))


async def ours(text: str, address: str, port: str, kind: str, octets: str, streams: str) -> None:
    """Our tunnel in this process, its streams used by threads as docker-py would."""
    # Here and not above, so that the other subjects do not pay for it.
    from builder_orch.tunnel.config import TunnelConfig
    from builder_orch.tunnel.driver import open_tunnel

    config = TunnelConfig.parse(text)
    began = time.perf_counter()
    async with open_tunnel(config) as tunnel:

        def dial() -> socket.socket:
            return tunnel.dial_blocking(address, int(port), timeout_s=60)

        busy = threading.Event()
        if kind.startswith("busy-"):
            threading.Thread(target=_spin, args=(busy,), daemon=True).start()
        await asyncio.to_thread(
            work.measure, began, dial, kind.removeprefix("busy-"), int(octets), int(streams)
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
        asyncio.run(ours(Path(arguments[1]).read_text(), *arguments[2:]))


if __name__ == "__main__":
    main(sys.argv[1:])

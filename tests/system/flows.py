"""Streams through a tunnel in a process of its own, to the kernel's TCP, checked octet by octet.

`python -m tests.system.flows serve ADDRESS` listens behind wireguard-go and prints its port.
`python -m tests.system.flows call` reads an order, a line of JSON, from standard input, carries it
out and prints what it saw. A caller names its stream and how many octets go up and come down, sends
and ends its direction; the one called greets, checks, sends, and ends with its verdict.
"""

import asyncio
import json
import os
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from builder_orch.tunnel.config import TunnelConfig
from builder_orch.tunnel.hosted import HostedTunnel, open_hosted_tunnel
from tests.sim import Stream

BLOCK = 1 << 16
GREETING = b"!"
VERDICT_LEN = 16
RCV_MSS_AT = 20
"""Where TCP_INFO has the size of the segments that come in."""

Called = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass(frozen=True)
class Order:
    """`streams` are names with octets up and down; so many are open `at_once`."""

    config: str
    host: str
    port: int
    streams: list[tuple[str, int, int]]
    at_once: int


@dataclass(frozen=True)
class Seen:
    """One stream: seconds until the first octet came, in all, the longest in which none arrived.

    `segment` is the size of our segments in the eyes of the kernel.
    """

    name: str
    first_s: float
    took_s: float
    idle_s: float
    segment: int


@dataclass(frozen=True)
class Report:
    """What came of an order. Sizes in kilobytes, of the process that has the tunnel; `early` when a
    tenth of the streams was over.
    """

    seen: list[Seen]
    took_s: float
    early_kb: int
    last_kb: int
    peak_kb: int
    descriptors_before: int
    descriptors_after: int


class Progress:
    """Notes the longest time in which nothing arrived."""

    def __init__(self) -> None:
        self.began = self._moved = time.monotonic()
        self.longest = 0.0
        self.first: float | None = None

    def moved(self) -> None:
        """Something did."""
        now = time.monotonic()
        self.longest = max(self.longest, now - self._moved)
        self._moved = now

    def greeted(self) -> None:
        """The first octet came."""
        self.first = self._moved = time.monotonic()


async def pour(stream: Stream, writer: asyncio.StreamWriter) -> None:
    """Send a whole stream."""
    for start in range(0, stream.length, BLOCK):
        writer.write(stream.octets(start, BLOCK))
        await writer.drain()


async def check(stream: Stream, reader: asyncio.StreamReader, progress: Progress) -> None:
    """Receive a whole stream and nothing else; AssertionError names the first wrong octet."""
    got = 0
    while got < stream.length:
        octets = await reader.read(min(BLOCK, stream.length - got))
        assert octets, f"the stream ended after {got} of {stream.length}"
        stream.check(got, octets)
        got += len(octets)
        progress.moved()


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serve one caller; whoever sent something wrong is reset."""
    try:
        writer.write(GREETING)
        name, up, down = (await reader.readline()).decode().split()
        progress = Progress()
        await asyncio.gather(
            check(Stream(f"up {name}", int(up)), reader, progress),
            pour(Stream(f"down {name}", int(down)), writer),
        )
        assert not await reader.read(1), "more than was announced"
        info = writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 64)
        segment = int.from_bytes(info[RCV_MSS_AT : RCV_MSS_AT + 4], sys.byteorder)
        writer.write(b"%8d%8d" % (segment, progress.longest * 1000))
        writer.close()
        await writer.wait_closed()
    except (AssertionError, OSError, ValueError) as error:
        sys.stderr.write(f"a stream failed: {error!r}\n")
        writer.transport.abort()


async def serve(address: str, called: Called) -> None:
    """Listen until killed. Every kernel has Reno, and it is fair; the default may be anything."""
    server = await asyncio.start_server(called, address, 0, backlog=1024)
    listening = server.sockets[0]
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
    sys.stdout.write(f"{listening.getsockname()[1]}\n")
    sys.stdout.flush()
    async with server:
        await server.serve_forever()


async def call(tunnel: HostedTunnel, order: Order, stream: tuple[str, int, int]) -> Seen:
    """One stream from dialling to the verdict."""
    name, up, down = stream
    progress = Progress()
    sock = await tunnel.dial(order.host, order.port)
    reader, writer = await asyncio.open_connection(sock=sock)
    try:
        assert await reader.readexactly(1) == GREETING
        progress.greeted()
        writer.write(f"{name} {up} {down}\n".encode())

        async def send() -> None:
            await pour(Stream(f"up {name}", up), writer)
            writer.write_eof()

        await asyncio.gather(send(), check(Stream(f"down {name}", down), reader, progress))
        verdict = await reader.readexactly(VERDICT_LEN)
        assert not await reader.read(1), "more than a verdict"
    finally:
        writer.close()
        await writer.wait_closed()
    assert progress.first is not None
    took_s = time.monotonic() - progress.began
    idle_s = max(progress.longest, int(verdict[8:]) / 1000)
    return Seen(name, progress.first - progress.began, took_s, idle_s, int(verdict[:8]))


async def carry_out(order: Order) -> Report:
    """All streams of an order, after a small one by which host and tunnel get to know the way."""
    async with open_hosted_tunnel(TunnelConfig.parse(order.config)) as tunnel:
        await tunnel.ready(timeout_s=30)
        await call(tunnel, order, ("first", 1, 1))
        before, began = descriptors(tunnel.pid), time.monotonic()
        seen: list[Seen] = []
        early: list[int] = []
        left = iter(order.streams)

        async def work() -> None:
            for stream in left:
                seen.append(await call(tunnel, order, stream))
                if len(seen) * 10 >= len(order.streams) and not early:
                    early.append(memory(tunnel.pid, "VmRSS"))

        await asyncio.gather(*(work() for _ in range(order.at_once)))
        took_s = time.monotonic() - began
        # The tunnel closes its ends when it has seen ours.
        await tunnel.drops()
        return Report(
            seen,
            took_s,
            early[0],
            memory(tunnel.pid, "VmRSS"),
            memory(tunnel.pid, "VmHWM"),
            before,
            descriptors(tunnel.pid),
        )


def memory(pid: int, name: str) -> int:
    """A figure of a process's memory in kilobytes."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def descriptors(pid: int) -> int:
    """How many descriptors a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 - a Path for each would be slow


def read_order(text: str) -> Order:
    """An order as `dump` writes it."""
    order = Order(**json.loads(text))
    streams = [(str(name), int(up), int(down)) for name, up, down in order.streams]
    return Order(order.config, order.host, order.port, streams, order.at_once)


def read_report(text: str) -> Report:
    """A report as the caller prints it."""
    fields = json.loads(text)
    return Report(**{**fields, "seen": [Seen(**one) for one in fields["seen"]]})


def main() -> None:
    """The two roles."""
    if sys.argv[1] == "serve":
        asyncio.run(serve(sys.argv[2], answer))
    else:
        report = asyncio.run(carry_out(read_order(sys.stdin.readline())))
        sys.stdout.write(f"{json.dumps(asdict(report))}\n")


if __name__ == "__main__":
    main()

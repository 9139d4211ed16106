"""The work of `work.py` by protocols in the loop that the tunnel runs in."""

import asyncio
import os
import statistics
import struct
import time
from collections.abc import Awaitable, Callable

from bench.work import BLOCK, ECHO, HEADER, processor, tell


class Stream(asyncio.Protocol):
    """Counts what comes, and knows when it may write."""

    def __init__(self) -> None:
        self.heard = 0
        self.last = b""
        self._roomy = asyncio.Event()
        self._roomy.set()
        self._heard_more = asyncio.Event()
        self._over: str | None = None

    def data_received(self, data: bytes) -> None:
        """Some octets came."""
        self.heard += len(data)
        self.last = data
        self._heard_more.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more will come."""
        self._over = str(exc or "closed early")
        self._heard_more.set()

    def pause_writing(self) -> None:
        """The peer does not keep up."""
        self._roomy.clear()

    def resume_writing(self) -> None:
        """It has caught up."""
        self._roomy.set()

    async def drain(self) -> None:
        """Wait until there is room."""
        await self._roomy.wait()

    async def hear(self, count: int) -> None:
        """Wait until so much has come in all."""
        while self.heard < count:
            if self._over:
                raise ConnectionError(f"{self.heard} of {count} octets arrived: {self._over}")
            self._heard_more.clear()
            await self._heard_more.wait()


Make = Callable[[], Awaitable[tuple[asyncio.Transport, asyncio.BaseProtocol]]]


async def _begin(make: Make, work: str, count: int) -> tuple[asyncio.Transport, Stream]:
    transport, stream = await make()
    assert isinstance(stream, Stream)
    transport.write(HEADER.pack(work[0].encode(), count))
    return transport, stream


async def _send(transport: asyncio.Transport, stream: Stream, count: int) -> None:
    block = os.urandom(BLOCK)
    for start in range(0, count, BLOCK):
        transport.write(block[: count - start])
        await stream.drain()


async def _one(make: Make, work: str, count: int) -> float:
    transport, stream = await _begin(make, work, count)
    median = 0.0
    if work == "up":
        await _send(transport, stream, count)
        transport.write_eof()
        await stream.hear(8)
        if stream.last != struct.pack("!Q", count):
            raise ConnectionError(f"not all of {count} octets arrived")
    elif work == "down":
        await stream.hear(count)
    elif work == "both":
        await asyncio.gather(_send(transport, stream, count), stream.hear(count))
    else:
        times = []
        for number in range(1, count + 1):
            began = time.perf_counter()
            transport.write(bytes(ECHO))
            await stream.hear(number * ECHO)
            times.append(time.perf_counter() - began)
        median = statistics.median(times)
    transport.close()
    return median


async def measure(began: float, make: Make, work: str, octets: int, streams: int) -> None:
    """As `work.measure`."""
    transport, stream = await _begin(make, "down", 1)
    await stream.hear(1)
    first_byte_s = time.perf_counter() - began
    transport.close()
    before, begun = processor(None), time.perf_counter()
    works = (_one(make, work, octets // streams) for _ in range(streams))
    medians = await asyncio.gather(*works)
    seconds = time.perf_counter() - begun
    tell(seconds, processor(None) - before, first_byte_s, medians[0])

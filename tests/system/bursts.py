"""Bursts of single octets both ways through a tunnel to the kernel's TCP, each by its position.

`python -m tests.system.bursts serve ADDRESS` listens behind wireguard-go and prints its port.
`python -m tests.system.bursts call` reads an order, a line of JSON, from standard input, carries it
out and prints what both ends saw. A caller names its stream and says who sends when: both together,
each waiting for the other's burst before the next of its own, or by turns, so that nothing follows
the last octet of a burst. It goes on until the caller ends its direction; then the one called says
what it saw.
"""

import asyncio
import json
import socket
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import StrEnum, auto
from random import Random

from builder_orch.tunnel.config import TunnelConfig
from builder_orch.tunnel.driver import Tunnel, open_tunnel
from tests.sim import Stream
from tests.system.flows import GREETING, Progress, serve

ENDLESS = 1 << 40
LARGEST = 30
"""Octets in a burst at most."""
PAUSES_S = (None, None, 0.001, 0.02, 0.05)
"""What may come before a burst."""
TOTAL_RETRANS, MIN_RTT, DATA_SEGS_IN, RCV_OOOPACK = 100, 148, 152, 224
"""Where TCP_INFO has what was sent twice, the shortest round trip in microseconds, the segments
with data that came, and those of them that came behind a hole."""
INFO_LEN = 228


@dataclass(frozen=True)
class Order:
    """So many streams for so long."""

    config: str
    host: str
    port: int
    streams: int
    seconds: float


@dataclass(frozen=True)
class Heard:
    """One end of a stream: bursts and octets that came, and the longest time in which none did.

    In that time something was outstanding but for one or two pauses of `PAUSES_S`.
    """

    bursts: int
    octets: int
    idle_s: float


@dataclass(frozen=True)
class Seen:
    """One stream at our end, at the kernel's, and what its TCP tells of it.

    `segments` with data came to the kernel, `late` of them behind a hole; it sent `repeated` ones
    again. `rtt_us` is the shortest round trip it has measured.
    """

    ours: Heard
    theirs: Heard
    segments: int
    late: int
    repeated: int
    rtt_us: int


class Turn(StrEnum):
    """When an end sends."""

    FIRST = auto()
    SECOND = auto()
    TOGETHER = auto()


TURNS = ((Turn.FIRST, Turn.SECOND), (Turn.TOGETHER, Turn.TOGETHER))
"""Of ours and theirs, for one stream after the other."""


class Bursts:
    """What goes in one direction; both ends know it by its name."""

    def __init__(self, name: str) -> None:
        self._stream = Stream(name, ENDLESS)
        self._dice = Random(name)
        self._octets = 0

    def following(self) -> tuple[bytes, float | None, bool]:
        """The next burst, what comes before it, and whether its octets are spread a little."""
        start, dice = self._octets, self._dice
        self._octets += dice.randint(1, LARGEST)
        burst = self._stream.octets(start, self._octets - start)
        return burst, dice.choice(PAUSES_S), dice.random() < 0.5


async def send(writer: asyncio.StreamWriter, burst: bytes, *, spread: bool) -> None:
    """Each octet by itself, if `spread` after whatever else this loop has to do.

    At our end that includes the tunnel, which then finds one octet and no more.
    """
    for at in range(len(burst)):
        writer.write(burst[at : at + 1])
        if spread:
            await asyncio.sleep(0)
            await asyncio.sleep(0)


class Ear(Progress):
    """Receives the bursts of a name and notes how long nothing arrived."""

    def __init__(self, reader: asyncio.StreamReader, name: str) -> None:
        super().__init__()
        self.greeted()
        self.bursts = self.octets = 0
        self._reader = reader
        self._expected = Bursts(name)

    async def hear(self) -> bool:
        """Receive exactly the next burst; False for an end of file in its place."""
        burst, _, _ = self._expected.following()
        got = 0
        while got < len(burst):
            octets = await self._reader.read(len(burst) - got)
            if not octets:
                assert not got, f"an end after {got} of {len(burst)} octets of a burst"
                return False
            assert octets == burst[got : got + len(octets)], f"after {self.octets + got} octets"
            got += len(octets)
            self.moved()
        self.bursts += 1
        self.octets += got
        return True


async def converse(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    names: tuple[str, str],
    turn: Turn,
    over: asyncio.Event,
) -> Heard:
    """Send and hear until it is `over` or the other one has ended."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sending, ear = Bursts(names[0]), Ear(reader, names[1])
    while True:
        if turn is Turn.SECOND and not await ear.hear():
            break
        burst, pause_s, spread = sending.following()
        if pause_s is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await over.wait()
        if over.is_set():
            writer.write_eof()
            if turn is Turn.TOGETHER:
                assert await ear.hear(), "an end where a burst was due"
            break
        await send(writer, burst, spread=spread)
        if turn is not Turn.SECOND and not await ear.hear():
            break
    return Heard(ear.bursts, ear.octets, ear.longest)


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serve one caller; whoever sent something wrong is reset."""
    try:
        writer.write(GREETING)
        name, turn = (await reader.readline()).decode().split()
        names = f"down {name}", f"up {name}"
        heard = await converse(reader, writer, names, Turn(turn), asyncio.Event())
        sock = writer.get_extra_info("socket")
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, INFO_LEN)
        places = (DATA_SEGS_IN, RCV_OOOPACK, TOTAL_RETRANS, MIN_RTT)
        figures = [int.from_bytes(info[at : at + 4], sys.byteorder) for at in places]
        writer.write(json.dumps([asdict(heard), *figures]).encode())
        writer.close()
        await writer.wait_closed()
    except (AssertionError, OSError, ValueError) as error:
        sys.stderr.write(f"a stream failed: {error!r}\n")
        writer.transport.abort()


async def call(tunnel: Tunnel, order: Order, number: int, over: asyncio.Event) -> Seen:
    """One stream from dialling to what the other end says of it."""
    ours, theirs = TURNS[number % len(TURNS)]
    sock = await tunnel.dial(order.host, order.port)
    reader, writer = await asyncio.open_connection(sock=sock)
    try:
        assert await reader.readexactly(1) == GREETING
        writer.write(f"{number} {theirs}\n".encode())
        names = f"up {number}", f"down {number}"
        heard = await converse(reader, writer, names, ours, over)
        told, *figures = json.loads(await reader.read())
    finally:
        writer.close()
        await writer.wait_closed()
    return Seen(heard, Heard(**told), *figures)


async def carry_out(order: Order) -> list[Seen]:
    """All streams of an order at once."""
    over = asyncio.Event()
    async with open_tunnel(TunnelConfig.parse(order.config)) as tunnel:
        await tunnel.ready(timeout_s=30)
        asyncio.get_running_loop().call_later(order.seconds, over.set)
        calls = (call(tunnel, order, number, over) for number in range(order.streams))
        return await asyncio.gather(*calls)


def read_seen(text: str) -> list[Seen]:
    """What the caller prints."""
    seen = json.loads(text)
    return [
        Seen(**{**one, "ours": Heard(**one["ours"]), "theirs": Heard(**one["theirs"])})
        for one in seen
    ]


def main() -> None:
    """The two roles."""
    if sys.argv[1] == "serve":
        asyncio.run(serve(sys.argv[2], answer))
    else:
        seen = asyncio.run(carry_out(Order(**json.loads(sys.stdin.readline()))))
        sys.stdout.write(f"{json.dumps([asdict(one) for one in seen])}\n")


if __name__ == "__main__":
    main()

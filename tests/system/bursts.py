"""Bursts of single octets both ways through a tunnel to the kernel's TCP, each by its position.

`python -m tests.system.bursts serve ADDRESS` listens behind wireguard-go and prints its port.
`python -m tests.system.bursts call` reads an order, a line of JSON, from standard input, carries it
out and prints what both ends saw. A caller names its stream; from then on both ends send a burst,
hear the other's to its end and send the next one, some after a moment of silence, until the caller
ends its direction; then the one called says what it saw.
"""

import asyncio
import json
import socket
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
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

    In that time something was outstanding but for a pause of `PAUSES_S`.
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


class Bursts:
    """What goes in one direction; both ends know it by its name."""

    def __init__(self, name: str) -> None:
        self._stream = Stream(name, ENDLESS)
        self._dice = Random(name)
        self.count = self.octets = 0

    def following(self) -> tuple[bytes, float | None, bool]:
        """The next burst, what comes before it, and whether its octets are spread a little."""
        start, dice = self.octets, self._dice
        self.octets += dice.randint(1, LARGEST)
        self.count += 1
        burst = self._stream.octets(start, self.octets - start)
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


async def hear(reader: asyncio.StreamReader, burst: bytes, progress: Progress) -> bool:
    """Receive exactly this; False for an end of file in its place."""
    got = 0
    while got < len(burst):
        octets = await reader.read(len(burst) - got)
        if not octets:
            assert not got, f"an end after {got} of {len(burst)} octets of a burst"
            return False
        assert octets == burst[got : got + len(octets)], "other octets than were sent"
        got += len(octets)
        progress.moved()
    return True


async def converse(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    names: tuple[str, str],
    over: asyncio.Event,
) -> Heard:
    """Send and hear by turns until it is `over` or the other one has ended."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sending, hearing = map(Bursts, names)
    progress = Progress()
    progress.greeted()
    while True:
        burst, pause_s, spread = sending.following()
        if pause_s is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await over.wait()
        ends = over.is_set()
        if ends:
            writer.write_eof()
        else:
            await send(writer, burst, spread=spread)
        bursts, octets = hearing.count, hearing.octets
        if not await hear(reader, hearing.following()[0], progress):
            assert not ends, "the one called ended too early"
            return Heard(bursts, octets, progress.longest)
        if ends:
            return Heard(hearing.count, hearing.octets, progress.longest)


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serve one caller; whoever sent something wrong is reset."""
    try:
        writer.write(GREETING)
        name = (await reader.readline()).decode().strip()
        heard = await converse(reader, writer, (f"down {name}", f"up {name}"), asyncio.Event())
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


async def call(tunnel: Tunnel, order: Order, name: str, over: asyncio.Event) -> Seen:
    """One stream from dialling to what the other end says of it."""
    sock = await tunnel.dial(order.host, order.port)
    reader, writer = await asyncio.open_connection(sock=sock)
    try:
        assert await reader.readexactly(1) == GREETING
        writer.write(f"{name}\n".encode())
        ours = await converse(reader, writer, (f"up {name}", f"down {name}"), over)
        theirs, *figures = json.loads(await reader.read())
    finally:
        writer.close()
        await writer.wait_closed()
    return Seen(ours, Heard(**theirs), *figures)


async def carry_out(order: Order) -> list[Seen]:
    """All streams of an order at once."""
    over = asyncio.Event()
    async with open_tunnel(TunnelConfig.parse(order.config)) as tunnel:
        await tunnel.ready(timeout_s=30)
        asyncio.get_running_loop().call_later(order.seconds, over.set)
        calls = (call(tunnel, order, f"{number}", over) for number in range(order.streams))
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

"""Goodput over loss, round trip and window: `python -m tests.tunnel.ipv6.goodput` writes it anew.

The table beside this file is committed, so a change of congestion control shows as a diff.
Everything is virtual and seeded: the figures depend on no machine.
"""

from itertools import product
from math import sqrt
from pathlib import Path

from tests.sim import Stream, Weather
from tests.tunnel.ipv6.world import LEFT, RIGHT, Flow, World, stack

TABLE = Path(__file__).with_suffix(".txt")
HEAD = "KB/s over a 100 Mbit/s link with 250 KB of queue\n"
RATE = 12.5e6
LOSSES = (0.0, 0.001, 0.01, 0.02, 0.05, 0.1, 0.2)
ROUND_TRIPS = (0.001, 0.02, 0.1, 0.3)
WINDOWS = (1 << 16, 1 << 20)
MSS = 1360

Cell = tuple[float, float, int]


def cells() -> list[Cell]:
    """Loss, round trip, window."""
    return list(product(LOSSES, ROUND_TRIPS, WINDOWS))


def goodput(loss: float, rtt: float, window: int) -> float:
    """Octets a second that one upload gets, its handshake and slow start included."""
    there = Weather(delay_s=rtt / 2, loss=loss, rate=RATE, queue=250_000)
    back = Weather(delay_s=rtt / 2, loss=loss)
    client, server = stack(LEFT, seed=1, capacity=window), stack(RIGHT, seed=1, capacity=window)
    world = World(there, seed=1, back=back, client=client, server=server)
    length = 1 << 20 if loss <= 0.02 else 1 << 17
    stream, nothing = Stream("goodput", length), Stream("", 0)
    ours, theirs = Flow(stream, nothing), Flow(nothing, stream)
    world.flows = [ours, theirs]
    ours.connection = world.connect()
    return length / world.run(lambda: theirs.is_done, limit_s=1000)


def mathis(loss: float, rtt: float) -> float:
    """What a loss-based sender gets at best, octets a second."""
    return 1.22 * MSS / (rtt * sqrt(loss))


def render(measured: dict[Cell, float]) -> str:
    """The table as text."""
    lines = [HEAD + "".join(f"{word:>10}" for word in ("loss %", "RTT ms", "window", "KB/s"))]
    for (loss, rtt, window), got in measured.items():
        lines.append(f"{loss * 100:10g}{rtt * 1000:10g}{window:10}{got / 1000:10.1f}")
    return "\n".join(lines) + "\n"


def read() -> dict[Cell, float]:
    """The committed table."""
    rows = [line.split() for line in TABLE.read_text(encoding="utf-8").splitlines()[2:]]
    return {
        (round(float(loss) / 100, 6), round(float(rtt) / 1000, 6), int(window)): float(got) * 1000
        for loss, rtt, window, got in rows
    }


if __name__ == "__main__":
    TABLE.write_text(render({cell: goodput(*cell) for cell in cells()}), encoding="utf-8")

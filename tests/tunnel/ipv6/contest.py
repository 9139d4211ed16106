"""The shipped congestion control against CUBIC: `python -m tests.tunnel.ipv6.contest` prints both.

Takes some minutes. Virtual time, seeded, with timers that are a millisecond exact.
"""

from collections.abc import Callable
from dataclasses import replace

from builder_orch.tunnel.ipv6.bbr import Bbr
from builder_orch.tunnel.ipv6.congestion import Congestion
from tests.sim import Stream, Weather
from tests.tunnel.ipv6.cubic import Cubic
from tests.tunnel.ipv6.world import LEFT, Flow, World, stack

Kind = Callable[[int], Congestion]

LINK = Weather(delay_s=0.01, rate=12.5e6, queue=250_000)
"""100 Mbit/s, 20 ms, a queue of one bandwidth-delay product."""
WIDE = Weather(delay_s=0.01, reorder_s=0.03, reorder_from_s=0.001, rate=25e6, queue=1 << 20)
"""Packets that are reordered come 1 to 30 ms late."""
PATHS: dict[str, tuple[Weather, float]] = {
    "0.1 % loss, 40 ms": (Weather(delay_s=0.02, loss=0.001, rate=50e6, queue=2 << 20), 4),
    "1 % loss, 20 ms": (Weather(delay_s=0.01, loss=0.01, rate=50e6, queue=1 << 20), 4),
    "5 % loss, 1 ms": (Weather(delay_s=0.0005, loss=0.05, rate=30e6, queue=1 << 18), 3),
    "20 ms in order": (WIDE, 4),
    "20 ms, 5 % reordered": (replace(WIDE, reorder=0.05), 4),
    "20 ms, 10 % reordered": (replace(WIDE, reorder=0.1), 4),
    "1 GB/s, 0.2 ms, 250 KB": (Weather(delay_s=0.0001, rate=1e9, queue=250_000), 0.2),
    "1 GB/s, 0.2 ms, 4 MB": (Weather(delay_s=0.0001, rate=1e9, queue=4 << 20), 0.2),
    "100 MB/s, 0.4 ms, 60 KB": (Weather(delay_s=0.0002, rate=1e8, queue=60_000), 0.5),
}


def begin(world: World) -> list[Flow]:
    """One more endless upload; its two ends."""
    stream, nothing = Stream("endless", 1 << 40), Stream("", 0)
    world.flows = [Flow(stream, nothing), Flow(nothing, stream)]
    world.flows[0].connection = world.connect()
    world.run_for(0.001)
    return world.flows


def alone(kind: Kind, path: Weather, seconds: float) -> str:
    """Goodput and the share that its queue dropped or the path lost."""
    client = stack(LEFT, seed=1, congestion=kind)
    back = Weather(delay_s=path.delay_s)
    world = World(path, seed=1, back=back, client=client, grain_s=1e-3)
    _, theirs = begin(world)
    world.run_for(seconds)
    lost = world.there.lost / world.there.carried
    return f"{theirs.got / seconds / 1e6:8.1f} MB/s {lost:8.2%} lost"


def together(kinds: list[Kind], seconds: float) -> str:
    """Shares of one link, and how long packets waited for it."""
    rest = iter(kinds)

    def next_kind(mss: int) -> Congestion:
        return next(rest)(mss)

    client = stack(LEFT, seed=1, congestion=next_kind)
    back = replace(LINK, rate=None)
    world = World(LINK, seed=1, back=back, client=client, grain_s=1e-3)
    flows: list[Flow] = []
    for _ in kinds:
        world.flows = flows
        flows += begin(world)
        world.flows = flows
        world.run_for(0.5)
    got = [flow.got for flow in flows[1::2]]
    waits = []
    for _ in range(int(seconds * 20)):
        world.run_for(0.05)
        waits.append(world.there.waiting(world.now))
    shares = [flow.got - before for flow, before in zip(flows[1::2], got, strict=True)]
    text = ", ".join(f"{share / sum(shares):.0%}" for share in shares)
    return f"{text} of {sum(shares) / seconds / 1e6:.1f} MB/s, at most {max(waits) * 1e3:.0f} ms"


def main() -> None:
    """Print everything."""
    for name, (path, seconds) in PATHS.items():
        for kind in (Bbr, Cubic):
            print(f"{name:26}{kind.__name__:6}{alone(kind, path, seconds)}", flush=True)  # noqa: T201
    for first in (Bbr, Cubic):
        for second in (Bbr, Cubic):
            names = f"{first.__name__}, then {second.__name__}"
            print(f"{names:32}{together([first, second], 20)}", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()

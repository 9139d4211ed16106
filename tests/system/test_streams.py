"""Large streams, many streams and very many short ones to the kernel's TCP, and what they cost."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import pytest

from builder_orch.tunnel.config import TunnelConfig
from tests.system.conversation import settings
from tests.system.flows import Order, Report, read_report
from tests.system.lab import ROOT, THEIRS, Lab, laboratory, run
from tests.tunnel.joined import public

pytestmark = pytest.mark.system

MEGABYTE = 1_000_000
LIMIT_S = 300
MEMORY_KB = 200_000
STALL_S = 3.0

LOSS = """
table inet t { chain in {
    type filter hook input priority 0
    meta l4proto udp numgen random mod 100 < 1 drop
}
}
"""


@dataclass(frozen=True)
class Bench:
    """A laboratory with a server of streams behind wireguard-go."""

    lab: Lab
    config: TunnelConfig
    port: int
    host: str = str(THEIRS)

    def carry_out(self, streams: list[tuple[str, int, int]], at_once: int) -> Report:
        """Have a process of its own, with a tunnel in yet another one, run these streams."""
        order = Order(self.config.dump(), self.host, self.port, streams, at_once)
        return read_report(self.call("tests.system.flows", asdict(order), LIMIT_S))

    def call(self, module: str, order: dict[str, object], limit_s: float) -> str:
        """What a program at our end says of an order."""
        words = ("ip", "netns", "exec", self.lab.left, sys.executable, "-m", module, "call")
        done = subprocess.run(
            words,
            cwd=ROOT,
            input=json.dumps(order) + "\n",
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def lose(self) -> None:
        """From now on one datagram in a hundred is lost, each way."""
        for side in (self.lab.left, self.lab.right):
            self.lab.nft(side, LOSS)
            # A train is taken apart before the cable, so that packets are lost and not trains.
            run("ip", "-n", side, "link", "set", "v0", "gso_max_segs", "1")


@pytest.fixture
def bench() -> Iterator[Bench]:
    with laboratory() as lab:
        ours, theirs = os.urandom(32), os.urandom(32)
        port = lab.wireguard_go(private_key=theirs, our_public_key=public(ours))
        server = lab.module("tests.system.flows", "serve", str(THEIRS))
        assert server.stdout is not None
        yield Bench(lab, settings(port, theirs, ours, None), int(server.stdout.readline()))


def jain(shares: list[float]) -> float:
    """1 when all are equal, 1/n when one has everything."""
    return sum(shares) ** 2 / (len(shares) * sum(share * share for share in shares))


CLEAN = [
    pytest.param(8, 1, 1, 8, id="8-both-8MB"),
    *(
        pytest.param(count, up, 1 - up, 256, id=f"{count}-{way}-256MB", marks=pytest.mark.long)
        for count in (1, 8)
        for up, way in ((1, "up"), (0, "down"))
    ),
]


@pytest.mark.parametrize(("count", "up", "down", "megabytes"), CLEAN)
def test_clean_streams_arrive_and_take_little_memory(
    bench: Bench, count: int, up: int, down: int, megabytes: int
) -> None:
    octets = megabytes * MEGABYTE // count
    streams = [(f"{count}-{number}", up * octets, down * octets) for number in range(count)]
    report = bench.carry_out(streams, count)
    assert len(report.seen) == count
    assert report.peak_kb < MEMORY_KB
    assert max(seen.idle_s for seen in report.seen) < STALL_S
    print(f"{megabytes / report.took_s:.0f} MB/s, {report.peak_kb} KB at most")  # noqa: T201


CROWDS = [
    pytest.param(100_000, id="100KB"),
    pytest.param(10 * MEGABYTE, id="10MB", marks=pytest.mark.long),
]


@pytest.mark.parametrize("octets", CROWDS)
def test_a_hundred_streams_share_a_lossy_way(bench: Bench, octets: int) -> None:
    """Half of them up, half of them down; nobody starves and nobody waits."""
    bench.lose()
    crowd = [(f"{n}", octets * (n % 2), octets * (1 - n % 2)) for n in range(100)]
    report = bench.carry_out(crowd, 100)
    assert len(report.seen) == 100
    assert max(seen.idle_s for seen in report.seen) < STALL_S
    firsts = sorted(seen.first_s for seen in report.seen)
    sides = [[seen for seen in report.seen if int(seen.name) % 2 == up] for up in (1, 0)]
    shares = [jain([octets / seen.took_s for seen in side]) for side in sides]
    print(f"Jain {shares}, first octet {firsts[98]:.3f} s, {report.took_s:.1f} s")  # noqa: T201
    assert [len(side) for side in sides] == [50, 50]
    if octets >= MEGABYTE:  # a short one is as fast as its handshake, which may be lost
        assert min(shares) >= 0.9


@pytest.mark.parametrize("number", [300, pytest.param(10_000, marks=pytest.mark.long)])
def test_short_connections_leave_nothing_behind(bench: Bench, number: int) -> None:
    """1 KB there and back each; memory and descriptors are afterwards what they were."""
    report = bench.carry_out([(f"{n}", 1024, 1024) for n in range(number)], 16)
    assert len(report.seen) == number
    # Before, the first stream of all may not have been closed yet.
    assert report.descriptors_after <= report.descriptors_before
    print(f"{report.early_kb} KB, then {report.last_kb} KB; {report.took_s:.1f} s")  # noqa: T201
    assert report.last_kb - report.early_kb < 5000

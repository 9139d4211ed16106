"""Single octets over a very short and lossy way to the kernel's TCP: what is lost soon follows."""

import os
from collections.abc import Iterator
from dataclasses import asdict

import pytest

from tests.system.bursts import Order, Seen, read_seen
from tests.system.conversation import settings
from tests.system.lab import OURS, THEIRS, laboratory, run
from tests.system.test_streams import Bench
from tests.tunnel.joined import public

pytestmark = pytest.mark.system

STREAMS = 4
STALL_S = 1.0
MARGIN_S = 60
SECONDS = [10, pytest.param(600, marks=pytest.mark.long)]


def converse(bench: Bench, seconds: float) -> list[Seen]:
    """Have a process of its own, with a tunnel in yet another one, send bursts for so long."""
    order = Order(bench.config.dump(), bench.host, bench.port, STREAMS, seconds)
    return read_seen(bench.call("tests.system.bursts", asdict(order), seconds + MARGIN_S))


@pytest.fixture
def bench() -> Iterator[Bench]:
    """A lossy way to a server of bursts.

    The kernel's own timeouts begin with 200 ms and are doubled, so three losses in a row would be a
    second of its making, which happens in ten minutes. From 50 ms it takes five.
    """
    with laboratory() as lab:
        ours, theirs = os.urandom(32), os.urandom(32)
        port = lab.wireguard_go(private_key=theirs, our_public_key=public(ours))
        hasty = f"route add {OURS}/128 dev {lab.interface} rto_min 50ms"
        run("ip", "-n", lab.right, "-6", *hasty.split())
        server = lab.module("tests.system.bursts", "serve", str(THEIRS))
        assert server.stdout is not None
        made = Bench(lab, settings(port, theirs, ours, None), int(server.stdout.readline()))
        made.lose()
        yield made


@pytest.mark.parametrize("seconds", SECONDS, ids=lambda seconds: f"{seconds}s")
def test_single_octets_over_a_tiny_round_trip_never_stall(bench: Bench, seconds: int) -> None:
    """gvisor #6113: where nothing follows a lost one, nothing but a timer repairs it."""
    seen = converse(bench, seconds)
    assert len(seen) == STREAMS
    for one in seen:
        print(one)  # noqa: T201
    # Both ways something was lost, and ours were not joined to large segments.
    assert all(one.late and one.repeated for one in seen)
    assert sum(one.segments for one in seen) > sum(one.theirs.octets for one in seen) / 4
    assert max(max(one.ours.idle_s, one.theirs.idle_s) for one in seen) < STALL_S

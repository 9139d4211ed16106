"""Packets out of order and none lost: nothing to repair, and no reason to go slower."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.system.conversation import settings
from tests.system.flows import Report
from tests.system.lab import THEIRS, Lab, laboratory, run
from tests.system.test_streams import MEGABYTE, Bench
from tests.tunnel.joined import public

pytestmark = pytest.mark.system

LATE_MS = ("1", "30")
STRAIGHT, MIXED = "0", "0.1"
SIZES = [2, pytest.param(32, marks=pytest.mark.long)]


@dataclass(frozen=True)
class Ways:
    """A laboratory whose ways to wireguard-go take 10 ms each way, in order or not.

    They are of 40 Mbit/s, so that this is what limits a stream and not the processors.
    """

    lab: Lab
    port: int
    inside: int
    keys: tuple[bytes, bytes]

    def upload(self, share: str, octets: int) -> Report:
        """A stream up, `share` of its packets and of their acknowledgements 1 to 30 ms late."""
        weather = ("10", "0", share, "0", "0", "5", *LATE_MS)
        relay = self.lab.module("tests.system.relay", "127.0.0.1", str(self.port), *weather)
        assert relay.stdout is not None
        config = settings(int(relay.stdout.readline()), *self.keys, None)
        return Bench(self.lab, config, self.inside).carry_out([("up", octets, 0)], 1)

    def came_twice(self) -> int:
        """How many segments the kernel has told us that it had them already (RFC 2883)."""
        inside = ("ip", "netns", "exec", self.lab.right)
        names, figures = run(*inside, "cat", "/proc/net/netstat").splitlines()[:2]
        counts = dict(zip(names.split(), figures.split(), strict=True))
        return int(counts["TCPDSACKOldSent"]) + int(counts["TCPDSACKOfoSent"])


@pytest.fixture
def ways() -> Iterator[Ways]:
    with laboratory() as lab:
        narrow = "qdisc add dev v0 root tbf rate 40mbit burst 128kb latency 100ms"
        run("tc", "-n", lab.left, *narrow.split())
        ours, theirs = os.urandom(32), os.urandom(32)
        port = lab.wireguard_go(private_key=theirs, our_public_key=public(ours))
        server = lab.module("tests.system.flows", "serve", str(THEIRS))
        assert server.stdout is not None
        yield Ways(lab, port, int(server.stdout.readline()), (theirs, ours))


@pytest.mark.parametrize("megabytes", SIZES, ids=lambda size: f"{size}MB")
def test_reordered_packets_are_not_sent_twice(ways: Ways, megabytes: int) -> None:
    octets = megabytes * MEGABYTE
    straight = ways.upload(STRAIGHT, octets)
    before = ways.came_twice()
    mixed = ways.upload(MIXED, octets)
    needless = ways.came_twice() - before
    rates = [octets / report.took_s / 1e6 for report in (straight, mixed)]
    print(f"in order {rates[0]:.1f}, mixed {rates[1]:.1f} MB/s, {needless} needless")  # noqa: T201
    assert needless < 0.01 * octets / 1360 + 10
    if megabytes > 8:  # a short one is all slow start
        assert rates[1] >= 0.85 * rates[0]

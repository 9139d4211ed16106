"""Behind the gateway a link that takes less: told, not told, and told by somebody who lies."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv6Address, IPv6Network

import pytest

from builder_orch.tunnel.config import PeerConfig, PrivateKey, TunnelConfig
from tests.system.flows import Seen
from tests.system.lab import OURS, ROOT, THEIR_HOST, THEIRS, Lab, laboratory, run
from tests.system.test_streams import Bench
from tests.tunnel.joined import public

pytestmark = pytest.mark.system

ROUTER, FAR = IPv6Address("fdaa:0:a::1"), IPv6Address("fdaa:0:a::2")
FULL = 1360
OCTETS = 400_000
ESCAPE_S = 5.0

SILENT = """
table ip6 t { chain out {
    type filter hook output priority 0
    icmpv6 type packet-too-big drop
}
}
"""

# Answers each data packet of ours that it sees on its way with three lies about the path: an MTU
# that IPv6 does not have, and two about packets that are not under way.
LIAR = """
import socket, sys
ours = socket.inet_pton(socket.AF_INET6, sys.argv[1])
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
wire.bind(("v1", 0))
raw = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
print("listens", flush=True)
while True:
    packet = wire.recv(65535)[14:]
    if len(packet) < 1000 or packet[6] != socket.IPPROTO_TCP or packet[8:24] != ours:
        continue
    seq = int.from_bytes(packet[44:48], "big")
    for mtu, number in (576, seq), (1280, seq + (1 << 30)), (1280, seq - (1 << 30)):
        quoted = packet[:44] + (number % (1 << 32)).to_bytes(4, "big") + packet[48:160]
        raw.sendto(bytes([2, 0, 0, 0]) + mtu.to_bytes(4, "big") + quoted, (sys.argv[1], 0))
    print("lied", flush=True)
"""


@dataclass(frozen=True)
class Beyond:
    """A third namespace behind the gateway, where the kernel's TCP answers."""

    lab: Lab
    name: str
    keys: tuple[bytes, bytes]
    port: int

    def link(self, mtu: int) -> None:
        """Lead a cable of this MTU there. What its TCP says of its own segments is not lowered."""
        right = self.lab.right
        run("ip", "netns", "add", self.name)
        run("ip", "-n", self.name, "link", "set", "lo", "up")
        run("ip", "-n", right, *f"link add v1 type veth peer v1 netns {self.name}".split())
        for name, address in ((right, ROUTER), (self.name, FAR)):
            run("ip", "-n", name, "link", "set", "v1", "mtu", str(mtu), "up")
            run("ip", "-n", name, "address", "add", f"{address}/64", "dev", "v1", "nodad")
        route = f"route add {OURS}/128 via {ROUTER} advmss {FULL}"
        run("ip", "-n", self.name, "-6", *route.split())
        inside = ("ip", "netns", "exec", right)
        run(*inside, "sysctl", "-q", "-w", "net.ipv6.conf.all.forwarding=1")

    def bench(self) -> Bench:
        """A server of streams over there."""
        words = ("ip", "netns", "exec", self.name, sys.executable, "-m", "tests.system.flows")
        child = subprocess.Popen((*words, "serve", str(FAR)), cwd=ROOT, stdout=subprocess.PIPE)
        self.lab.children.append(child)
        assert child.stdout is not None
        theirs, ours = self.keys
        allowed = (IPv6Network(f"{THEIRS}/128"), IPv6Network(f"{FAR}/128"))
        peer = PeerConfig(public(theirs), allowed, (THEIR_HOST, self.port))
        config = TunnelConfig(PrivateKey(ours), OURS, (peer,))
        return Bench(self.lab, config, int(child.stdout.readline()), str(FAR))


@pytest.fixture
def beyond() -> Iterator[Beyond]:
    with laboratory() as lab:
        ours, theirs = os.urandom(32), os.urandom(32)
        port = lab.wireguard_go(private_key=theirs, our_public_key=public(ours))
        made = Beyond(lab, f"{lab.right}-far", (theirs, ours), port)
        try:
            yield made
        finally:
            lab.dismiss()
            subprocess.run(["ip", "netns", "del", made.name], capture_output=True, check=False)


LONG = pytest.mark.long
mtus = pytest.mark.parametrize(
    "mtu", [pytest.param(1280, marks=LONG), 1320, pytest.param(1400, marks=LONG)]
)


def both_ways(bench: Bench) -> Seen:
    return bench.carry_out([("narrow", OCTETS, OCTETS)], 1).seen[0]


@mtus
def test_a_narrow_link_that_says_so_gets_segments_that_fit(beyond: Beyond, mtu: int) -> None:
    beyond.link(mtu)
    seen = both_ways(beyond.bench())
    assert seen.segment == mtu - 60
    assert seen.took_s < ESCAPE_S


@mtus
def test_a_narrow_link_that_says_nothing_is_passed_all_the_same(beyond: Beyond, mtu: int) -> None:
    beyond.link(mtu)
    beyond.lab.nft(beyond.lab.right, SILENT)
    seen = both_ways(beyond.bench())
    assert seen.segment == 1220
    assert seen.took_s < ESCAPE_S


def test_lies_about_the_path_change_nothing(beyond: Beyond) -> None:
    beyond.link(1420)
    bench = beyond.bench()
    liar = beyond.lab.spawn(LIAR, str(OURS))
    assert liar.stdout is not None
    assert liar.stdout.readline() == b"listens\n"
    seen = both_ways(bench)
    liar.kill()
    assert b"lied\n" in liar.stdout.read()
    assert seen.segment == FULL

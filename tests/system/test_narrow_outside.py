"""Between us and the gateway a link that takes less than our datagrams: told of it, and not told.

Both ends are ours, so that both directions are.
"""

import asyncio
import os
import socket
import subprocess
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from builder_orch.tunnel.carrier.udp import UdpCarrier
from builder_orch.tunnel.driver import Tunnel, open_tunnel
from tests.system.conversation import IPV4, IPV6, call, mirrored, serve_once, settings
from tests.system.lab import THEIRS, Lab, laboratory, run

pytestmark = pytest.mark.system

OCTETS = 400_000
ECHO = 7
ESCAPE_S = 5.0
FULL, LEAST = 1360, 1220
"""Octets in a segment: of an inner MTU of 1420, and of 1280."""

SILENT = """
table inet t { chain out {
    type filter hook output priority 0
    icmpv6 type packet-too-big drop
    icmp type destination-unreachable drop
}
}
"""


@dataclass(frozen=True)
class Way:
    """Three cables and two routers between the namespaces of a laboratory.

    The n-th cable has the networks 198.18.n.0/24 and 2001:db8:n::/64, its ends are 1 and 2.
    """

    lab: Lab

    @property
    def routers(self) -> tuple[str, str]:
        return f"{self.lab.left}-1", f"{self.lab.left}-2"

    def build(self) -> None:
        """In the place of the one cable that there was."""
        left, right, (first, second) = self.lab.left, self.lab.right, self.routers
        run("ip", "-n", left, "link", "del", "v0")
        forward = ("net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        for name in self.routers:
            run("ip", "netns", "add", name)
            run("ip", "netns", "exec", name, "sysctl", "-q", "-w", *forward)
        for number, (near, far) in enumerate(((left, first), (first, second), (second, right)), 1):
            devices = f"far{number}", f"near{number}"
            cable = f"link add {devices[0]} type veth peer {devices[1]} netns {far}"
            run("ip", "-n", near, *cable.split())
            for end, (name, device) in enumerate(zip((near, far), devices, strict=True), 1):
                for address in (f"198.18.{number}.{end}/24", f"2001:db8:{number}::{end}/64"):
                    quick = ("nodad",) if ":" in address else ()
                    run("ip", "-n", name, "address", "add", address, "dev", device, *quick)
                run("ip", "-n", name, "link", "set", device, "up")
        for name, number, end in ((left, 1, 2), (first, 2, 2), (second, 2, 1), (right, 3, 1)):
            for router in (f"198.18.{number}.{end}", f"2001:db8:{number}::{end}"):
                family = ("-6",) if ":" in router else ()
                run("ip", "-n", name, *family, "route", "add", "default", "via", router)

    def narrow(self, mtu: int, *, told: bool) -> None:
        """From now on the middle cable takes so much, and the routers say so or not."""
        for name, device in zip(self.routers, ("far2", "near2"), strict=True):
            run("ip", "-n", name, "link", "set", device, "mtu", str(mtu))
            if not told:
                self.lab.nft(name, SILENT)

    def demolish(self) -> None:
        for name in self.routers:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.fixture
def way() -> Iterator[Way]:
    with laboratory() as lab:
        made = Way(lab)
        try:
            made.build()
            yield made
        finally:
            made.demolish()


@asynccontextmanager
async def tunnels(lab: Lab, family: socket.AddressFamily) -> AsyncGenerator[tuple[Tunnel, Tunnel]]:
    """Ours, which calls, and the one that it calls."""
    there = "198.18.3.2" if family is IPV4 else "2001:db8:3::2"
    ours, theirs = os.urandom(32), os.urandom(32)
    near, far = lab.socket(family), lab.socket(family, far=True)
    far.bind((there, 0))
    near.connect(far.getsockname())
    port = far.getsockname()[1]
    async with (
        open_tunnel(
            settings(port, theirs, ours, None, host=there), carrier=UdpCarrier(near)
        ) as our_end,
        open_tunnel(mirrored(None, theirs, ours, None), carrier=UdpCarrier(far)) as far_end,
    ):
        await our_end.ready(timeout_s=20)
        yield our_end, far_end


async def echoing(*_: object) -> socket.socket:
    """A backend that sends back what it hears."""
    near, far = socket.socketpair()

    def echo() -> None:
        with far:
            while octets := far.recv(1 << 16):
                far.sendall(octets)

    asyncio.get_running_loop().run_in_executor(None, echo)
    return near


OUTSIDE = {"IPv4": IPV4, "IPv6": IPV6}
# Routers do not cut IPv6 to pieces: untold, an inner packet of 1280 octets needs 1360 outside.
SHORT = [("IPv4", 1280, "silent"), ("IPv6", 1400, "silent"), ("IPv6", 1280, "told")]
LONG = [
    *(("IPv4", mtu, "silent") for mtu in (1320, 1400)),
    *(("IPv4", mtu, "told") for mtu in (1280, 1320, 1400)),
    *(("IPv6", mtu, "told") for mtu in (1320, 1400)),
]


@pytest.mark.parametrize(
    ("outside", "mtu", "routers"),
    [*SHORT, *(pytest.param(*cell, marks=pytest.mark.long) for cell in LONG)],
)
async def test_a_narrow_link_outside_is_passed_both_ways(
    way: Way, outside: str, mtu: int, routers: str
) -> None:
    """By a lone segment, with nothing behind it that could help, and by a stream."""
    way.narrow(mtu, told=routers == "told")
    async with tunnels(way.lab, OUTSIDE[outside]) as (ours, theirs):
        theirs.serve(THEIRS, ECHO, echoing)
        for size in (LEAST, FULL):
            async with asyncio.timeout(ESCAPE_S):
                sock = await ours.dial(str(THEIRS), ECHO)
                reader, writer = await asyncio.open_connection(sock=sock)
                octets = os.urandom(size)
                writer.write(octets)
                assert await reader.readexactly(size) == octets
            writer.close()
        async with asyncio.timeout(2 * ESCAPE_S):
            ended = serve_once(theirs, THEIRS, OCTETS, telling=True)
            with await ours.dial(str(THEIRS), 80) as sock:
                await asyncio.to_thread(call, sock, OCTETS)
            await ended

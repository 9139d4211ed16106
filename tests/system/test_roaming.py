"""Addresses that change under a transfer, and translators that forget whose packets these are."""

import asyncio
import os
import socket
import subprocess
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from builder_orch.tunnel.carrier import Deliver
from builder_orch.tunnel.carrier.udp import UdpCarrier
from builder_orch.tunnel.config import TunnelConfig
from builder_orch.tunnel.driver import Tunnel, open_tunnel
from builder_orch.tunnel.machine import Datagrams, Endpoint
from tests.system.conversation import (
    CLIENT,
    SERVER,
    call,
    digest,
    serve_once,
    settings,
    stream,
)
from tests.system.lab import OUR_HOST, OURS, THEIR_HOST, THEIRS, Lab, laboratory, run
from tests.tunnel.joined import public

pytestmark = pytest.mark.system

SIZE = 16_000_000
EARLY = 2_000_000
"""Octets after which something happens: in the midst of a stream of SIZE."""
STRANGER, NEXT, LAST = "192.0.2.77", "192.0.2.5", "192.0.2.6"
KEPT = 40
LIMIT_S = 60.0
PORT = 4242
FORGETFUL_S = 1

# Sends one datagram to us.
CALLER = """
import socket, sys
with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as udp:
    udp.sendto(sys.argv[2].encode(), (sys.argv[1], 4242))
"""


@pytest.fixture
def lab() -> Iterator[Lab]:
    with laboratory() as built:
        yield built


class Overheard(UdpCarrier):
    """A carrier whose datagrams somebody else has read, both ways."""

    def __init__(
        self, sock: socket.socket, *, reopen: Callable[[], socket.socket] | None = None
    ) -> None:
        super().__init__(sock, reopen=reopen)
        self.sent: list[bytes] = []
        self.received: list[bytes] = []

    def start(self, deliver: Deliver, settled: Callable[[], None]) -> None:
        def heard(octets: memoryview, segment: int, source: Endpoint) -> None:
            self.received = [bytes(octets[:segment]), *self.received[:KEPT]]
            deliver(octets, segment, source)

        super().start(heard, settled)

    def send(self, datagrams: Datagrams) -> None:
        self.sent = [bytes(datagrams.octets[: datagrams.segment]), *self.sent[:KEPT]]
        super().send(datagrams)


def forge(lab: Lab, overheard: list[bytes], to: tuple[str, int], *, again: bool) -> None:
    """From a third address: what was heard with wrong bits, cut short, of another, and `again`.

    Only what has arrived may be sent again: a copy that comes first is as good as the true one.
    """
    run("ip", "-n", lab.right, "address", "add", f"{STRANGER}/24", "dev", "v0")
    with lab.socket(far=True) as stranger:
        stranger.bind((STRANGER, 0))
        for octets in overheard:
            wrong = bytearray(octets)
            wrong[-1] ^= 1
            ahead = octets[:8] + (1 << 40).to_bytes(8, "little") + octets[16:]
            for forged in (bytes(wrong), ahead, octets[:-16], os.urandom(148)):
                stranger.sendto(forged, to)
            if again:
                stranger.sendto(octets, to)
    run("ip", "-n", lab.right, "address", "del", f"{STRANGER}/24", "dev", "v0")


def move(side: str, old: str, new: str) -> None:
    """Another address in the place of the only one: nothing gets out in between."""
    run("ip", "-n", side, "address", "del", f"{old}/24", "dev", "v0")
    run("ip", "-n", side, "address", "add", f"{new}/24", "dev", "v0")


async def until(reached: Callable[[], bool]) -> None:
    """Look again and again, within limits."""
    pause = threading.Event()
    async with asyncio.timeout(LIMIT_S):
        while not reached():
            await asyncio.to_thread(pause.wait, 0.005)


def far_endpoint(lab: Lab) -> str:
    """Where wireguard-go believes that we are: host and port."""
    words = ("ip", "netns", "exec", lab.right, "wg", "show", lab.interface, "endpoints")
    return run(*words).split()[-1]


async def test_our_address_changes_while_we_send_and_while_we_receive(lab: Lab) -> None:
    ours, theirs = os.urandom(32), os.urandom(32)
    port = lab.wireguard_go(private_key=theirs, our_public_key=public(ours))
    server = lab.spawn(SERVER, str(THEIRS), str(SIZE))
    assert server.stdout is not None
    inside_port = int(server.stdout.readline())
    config = settings(port, theirs, ours, None)
    carrier = connected(lab, (THEIR_HOST, port))
    async with open_tunnel(config, carrier=carrier) as tunnel:
        await tunnel.ready(timeout_s=20)
        with await tunnel.dial(str(THEIRS), inside_port) as sock:
            talk = asyncio.create_task(asyncio.to_thread(call, sock, SIZE))
            await until(lambda: tunnel.status()[0].sent_octets > EARLY)
            first = far_endpoint(lab)
            forge(lab, carrier.sent, (THEIR_HOST, port), again=False)
            assert far_endpoint(lab) == first
            move(lab.left, OUR_HOST, NEXT)
            await until(lambda: far_endpoint(lab).startswith(f"{NEXT}:"))
            await until(lambda: tunnel.status()[0].received_octets > EARLY)
            move(lab.left, NEXT, LAST)
            await until(lambda: far_endpoint(lab).startswith(f"{LAST}:"))
            await talk
        await tunnel.ping(THEIRS)
        assert carrier.endpoint[0] == LAST


def connected(lab: Lab, endpoint: tuple[str, int]) -> Overheard:
    def reopen() -> socket.socket:
        sock = lab.socket()
        try:
            sock.connect(endpoint)
        except OSError:
            sock.close()
            raise
        return sock

    return Overheard(reopen(), reopen=reopen)


@pytest.mark.long
async def test_their_port_and_address_change_while_they_send(lab: Lab) -> None:
    ours, theirs = os.urandom(32), os.urandom(32)
    sock = lab.socket()
    sock.bind((OUR_HOST, 0))
    carrier = Overheard(sock)
    lab.wireguard_go(private_key=theirs, our_public_key=public(ours), endpoint=carrier.endpoint)
    async with open_tunnel(settings(None, theirs, ours, None), carrier=carrier) as tunnel:

        def endpoint() -> tuple[str, int]:
            return tunnel.status()[0].endpoint or ("", 0)

        ended = serve_once(tunnel, OURS, SIZE, telling=False)
        caller = lab.spawn(CLIENT, str(OURS), "80", str(SIZE))
        await until(lambda: tunnel.status()[0].received_octets > EARLY)
        before = endpoint()
        forge(lab, carrier.received, carrier.endpoint, again=True)
        await until(lambda: tunnel.drops().get("replayed", 0) >= 1)
        assert endpoint() == before
        inside = ("ip", "netns", "exec", lab.right)
        run(*inside, "wg", "set", lab.interface, "listen-port", str(before[1] ^ 1))
        await until(lambda: endpoint() == (THEIR_HOST, before[1] ^ 1))
        move(lab.right, THEIR_HOST, NEXT)
        await until(lambda: endpoint()[0] == NEXT)
        assert caller.stdout is not None
        said = await asyncio.to_thread(caller.stdout.readline)
        assert said.decode().strip() == digest(stream(b"down", SIZE)).hex()
        await ended


def behind_a_translator(lab: Lab) -> None:
    """Everything from the left gets another port, which is forgotten after a moment of silence."""
    lab.nft(
        lab.left,
        "table inet t { chain out { type nat hook postrouting priority 100\n"
        "meta l4proto udp masquerade to :20000-40000 random\n}\n}",
    )
    inside = ("ip", "netns", "exec", lab.left, "sysctl", "-q")
    for name in ("nf_conntrack_udp_timeout", "nf_conntrack_udp_timeout_stream"):
        run(*inside, f"net.netfilter.{name}={FORGETFUL_S}")


def flows(lab: Lab) -> int:
    """How many the translator remembers."""
    table = run("ip", "netns", "exec", lab.left, "cat", "/proc/net/nf_conntrack")
    return sum(" udp " in line for line in table.splitlines())


async def say(lab: Lab, payload: str) -> None:
    """One datagram to us from behind wireguard-go."""
    words = ("ip", "netns", "exec", lab.right, "python3", "-c", CALLER, str(OURS), payload)
    await asyncio.to_thread(subprocess.run, words, check=True)


@asynccontextmanager
async def listening(lab: Lab, config: TunnelConfig) -> AsyncGenerator[tuple[Tunnel, list[bytes]]]:
    """A tunnel that has answered once, and what comes to a port of it."""
    heard: list[bytes] = []
    endpoint = config.peers[0].endpoint
    assert endpoint is not None
    async with open_tunnel(config, carrier=connected(lab, endpoint)) as tunnel:
        tunnel.answer_datagrams(PORT, lambda payload, _: heard.append(payload))
        await tunnel.ready(timeout_s=20)
        await tunnel.ping(THEIRS)
        yield tunnel, heard


async def test_a_translator_that_forgets_is_reminded_or_heals_with_the_next_packet(
    lab: Lab,
) -> None:
    ours, theirs = os.urandom(32), os.urandom(32)
    port = lab.wireguard_go(private_key=theirs, our_public_key=public(ours))
    behind_a_translator(lab)
    config = settings(port, theirs, ours, None)
    async with listening(lab, config) as (tunnel, heard):
        await until(lambda: flows(lab) == 0)
        await say(lab, "lost")
        before = far_endpoint(lab)
        assert await tunnel.ping(THEIRS) < FORGETFUL_S
        assert far_endpoint(lab) != before
        await say(lab, "heard")
        await until(lambda: bool(heard))
        assert heard == [b"heard"]
    (peer,) = config.peers
    reminding = replace(config, peers=(replace(peer, keepalive_s=FORGETFUL_S / 3),))
    async with listening(lab, reminding) as (tunnel, heard):
        before = far_endpoint(lab)
        sent = tunnel.status()[0].sent_octets
        # Six empty packets, which is twice as long as it remembers.
        await until(lambda: tunnel.status()[0].sent_octets >= sent + 6 * 32)
        await say(lab, "heard")
        await until(lambda: bool(heard))
        assert far_endpoint(lab) == before

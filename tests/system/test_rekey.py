"""New keys every few moments under a stream at full speed: nothing is lost, nobody waits.

`REKEY_AFTER_TIME` is shortened in this process; against wireguard-go we are the initiator, against
ourselves both roles are ours. One datagram in a hundred is lost, each way.
"""

import asyncio
import hashlib
import json
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import pytest

from builder_orch.tunnel.carrier.udp import UdpCarrier
from builder_orch.tunnel.driver import open_tunnel
from builder_orch.tunnel.wireguard.session import Session
from builder_orch.tunnel.wireguard.timers import REKEY_AFTER_TIME, REKEY_TIMEOUT
from tests.system.conversation import BLOCK, STREAM, bound, digest, mirrored, settings, stream
from tests.system.lab import THEIR_HOST, THEIRS, Lab, laboratory, run
from tests.tunnel.joined import public

pytestmark = pytest.mark.system

LOSS = """
table inet t { chain in {
    type filter hook input priority 0
    meta l4proto udp numgen random mod 100 < 1 drop
}
}
"""
RUNS = [
    pytest.param(24_000_000, 0.2, 1, id="24MB-every 0.2s"),
    pytest.param(256_000_000, 2.0, 3, id="256MB-every 2s", marks=pytest.mark.long),
]
"""Octets of a stream, seconds between keys, streams with and without new keys."""
GAP_S = 0.25
PORT = 80

# Runs behind wireguard-go. Sends a stream to everybody who calls.
SOURCE = f"""{STREAM}
listener = socket.create_server((sys.argv[1], 0), family=socket.AF_INET6)
print(listener.getsockname()[1], flush=True)
while True:
    caller, _ = listener.accept()
    for octets in stream(b"rekey", int(sys.argv[2])):
        caller.sendall(octets)
    caller.close()
"""

# Likewise; takes stream after stream; tells of each its SHA-256, the longest pause
# in it and how long it took, in seconds.
SINK = """
import hashlib, json, socket, sys, time
listener = socket.create_server((sys.argv[1], 0), family=socket.AF_INET6)
print(listener.getsockname()[1], flush=True)
while True:
    caller, _ = listener.accept()
    heard, gap, began, last = hashlib.sha256(), 0.0, None, None
    while octets := caller.recv(1 << 20):
        now = time.monotonic()
        began, gap = began or now, max(gap, now - (last or now))
        last = now
        heard.update(octets)
    told = {"digest": heard.hexdigest(), "gap_s": gap, "took_s": last - began}
    print(json.dumps(told), flush=True)
    caller.close()
"""


@dataclass(frozen=True)
class Heard:
    """What came of a stream: its SHA-256, its longest pause and its length in time."""

    digest: str
    gap_s: float
    took_s: float


def pour(sock: socket.socket, size: int) -> None:
    for octets in stream(b"rekey", size):
        sock.sendall(octets)
    sock.shutdown(socket.SHUT_WR)


def drink(sock: socket.socket) -> Heard:
    heard, gap_s = hashlib.sha256(), 0.0
    last = began = 0.0
    while octets := sock.recv(BLOCK):
        now = time.monotonic()
        began, gap_s = began or now, max(gap_s, now - (last or now))
        last = now
        heard.update(octets)
    return Heard(heard.hexdigest(), gap_s, last - began)


@pytest.fixture
def lab() -> Iterator[Lab]:
    with laboratory() as built:
        for side in (built.left, built.right):
            built.nft(side, LOSS)
            # A train is taken apart before the cable, so that packets are lost and not trains.
            run("ip", "-n", side, "link", "set", "v0", "gso_max_segs", "1")
        yield built


class Keys:
    """All sessions that begin in this process, in both roles, and how often they shall."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch
        self.made = 0
        begin = Session.__init__

        def noted(session: Session, *arguments: Any, **named: Any) -> None:
            begin(session, *arguments, **named)
            self.made += 1

        patch.setattr(Session, "__init__", noted)

    def renew(self, every_s: float | None) -> None:
        """New keys every so often from now on; None for as seldom as always."""
        after, between = (
            (REKEY_AFTER_TIME, REKEY_TIMEOUT) if not every_s else (every_s, every_s / 2)
        )
        self._patch.setattr("builder_orch.tunnel.wireguard.session.REKEY_AFTER_TIME", after)
        self._patch.setattr("builder_orch.tunnel.wireguard.peer.REKEY_TIMEOUT", between)


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Keys:
    return Keys(monkeypatch)


Transfer = Callable[[int], Awaitable[Heard]]


async def compare(
    transfer: Transfer, keys: Keys, *, size: int, every_s: float, streams: int, ends: int
) -> None:
    """Streams without and with new keys in turns; `ends` of each session are in this process."""
    wanted = digest(stream(b"rekey", size)).hex()
    calm: list[Heard] = []
    busy: list[Heard] = []
    for _ in range(streams):
        keys.renew(None)
        calm.append(await transfer(size))
        keys.renew(every_s)
        before = keys.made
        busy.append(await transfer(size))
        renewed, took_s = (keys.made - before) / ends, busy[-1].took_s
        # One that gets lost is repeated after half the time.
        assert took_s / every_s / 2 - 1 <= renewed <= took_s / every_s + 2
    assert {heard.digest for heard in calm + busy} == {wanted}
    if streams > 1:
        # One of many may be disturbed by others on this machine, with new keys and without.
        assert min(one.took_s for one in busy) * 0.9 <= median(one.took_s for one in calm)
        assert min(one.gap_s for one in busy) <= GAP_S


@pytest.mark.parametrize(("size", "every_s", "streams"), RUNS)
@pytest.mark.parametrize("receiving", [False, True], ids=["sending", "receiving"])
async def test_as_the_initiator_against_wireguard_go(
    lab: Lab, keys: Keys, receiving: bool, size: int, every_s: float, streams: int
) -> None:
    ours, theirs = os.urandom(32), os.urandom(32)
    port = lab.wireguard_go(private_key=theirs, our_public_key=public(ours))
    far = lab.spawn(SOURCE if receiving else SINK, str(THEIRS), str(size))
    assert far.stdout is not None
    said, inside_port = far.stdout, int(far.stdout.readline())
    async with open_tunnel(settings(port, theirs, ours, None), carrier=bound(lab)) as tunnel:
        await tunnel.ready(timeout_s=20)

        async def transfer(size: int) -> Heard:
            with await tunnel.dial(str(THEIRS), inside_port) as sock:
                if receiving:
                    return await asyncio.to_thread(drink, sock)
                await asyncio.to_thread(pour, sock, size)
                return Heard(**json.loads(await asyncio.to_thread(said.readline)))

        await compare(transfer, keys, size=size, every_s=every_s, streams=streams, ends=1)


@pytest.mark.parametrize(("size", "every_s", "streams"), RUNS)
@pytest.mark.parametrize("sending", ["initiator", "responder"])
async def test_in_both_roles_against_ourselves(
    lab: Lab, keys: Keys, sending: str, size: int, every_s: float, streams: int
) -> None:
    ours, theirs = os.urandom(32), os.urandom(32)
    sock = lab.socket(far=True)
    sock.bind((THEIR_HOST, 0))
    carrier = UdpCarrier(sock)
    config = settings(carrier.endpoint[1], theirs, ours, None)
    mirror = mirrored(None, theirs, ours, None)
    async with (
        open_tunnel(config, carrier=bound(lab)) as tunnel,
        open_tunnel(mirror, carrier=carrier) as gateway,
    ):
        await tunnel.ready(timeout_s=20)
        called: asyncio.Queue[socket.socket] = asyncio.Queue()

        async def backend(*_: object) -> socket.socket:
            near, far = socket.socketpair()
            called.put_nowait(far)
            return near

        gateway.serve(THEIRS, PORT, backend)

        async def transfer(size: int) -> Heard:
            with await tunnel.dial(str(THEIRS), PORT) as near, await called.get() as far:
                source, sink = (near, far) if sending == "initiator" else (far, near)
                poured = asyncio.create_task(asyncio.to_thread(pour, source, size))
                heard = await asyncio.to_thread(drink, sink)
                await poured
                return heard

        await compare(transfer, keys, size=size, every_s=every_s, streams=streams, ends=2)

"""Through loss, reordering, duplicates and corruption to the kernel's TCP, and back, byte for byte.

FLY_BUILD_TEST_MB sets how much; a gigabyte takes minutes.
"""

import asyncio
import os
import select
import socket
import time
from collections.abc import Iterator

import pytest

from builder_orch.tunnel.driver import open_tunnel
from tests.sim import Stream
from tests.system.conversation import bound, settings
from tests.system.lab import THEIR_HOST, THEIRS, Lab, laboratory
from tests.tunnel.joined import public

pytestmark = pytest.mark.system

OCTETS = int(os.environ.get("FLY_BUILD_TEST_MB", "32")) * 1_000_000
BLOCK = 1 << 16
STALL_S = 3.0
WEATHER = ("0.5", "0.05", "0.05", "0.01", "0.01", "7")
"""Milliseconds each way; shares lost, reordered, doubled, corrupted; the seed."""

# Sends back what it receives, until the caller has ended its direction.
ECHO = """
import socket, sys, threading
listener = socket.create_server((sys.argv[1], 0), family=socket.AF_INET6)
print(listener.getsockname()[1], flush=True)
caller, _ = listener.accept()
while octets := caller.recv(1 << 16):
    caller.sendall(octets)
caller.close()
"""


@pytest.fixture
def lab() -> Iterator[Lab]:
    with laboratory() as built:
        yield built


def converse(sock: socket.socket) -> float:
    """Send a stream and check what comes back, octet by octet; the longest silence in seconds."""
    stream = Stream("dirty", OCTETS)
    sock.setblocking(False)
    sent = received = 0
    pending = b""
    longest, heard = 0.0, time.monotonic()
    while received < OCTETS:
        writers = [sock] if sent < OCTETS else []
        readable, writable, _ = select.select([sock], writers, [], STALL_S * 10)
        now = time.monotonic()
        longest = max(longest, now - heard)
        if readable:
            octets = sock.recv(BLOCK)
            assert octets, f"the stream ended after {received} octets"
            stream.check(received, octets)
            received += len(octets)
            heard = now
        if writable:
            pending = pending or stream.octets(sent, BLOCK)
            done = sock.send(pending)
            sent += done
            pending = pending[done:]
    return longest


async def test_a_dirty_way_delays_but_neither_stalls_nor_harms(lab: Lab) -> None:
    ours, theirs = os.urandom(32), os.urandom(32)
    port = lab.wireguard_go(private_key=theirs, our_public_key=public(ours))
    relay = lab.module("tests.system.relay", "127.0.0.1", str(port), *WEATHER)
    echo = lab.spawn(ECHO, str(THEIRS))
    assert relay.stdout is not None
    assert echo.stdout is not None
    relay_port, inside_port = int(relay.stdout.readline()), int(echo.stdout.readline())
    config = settings(relay_port, theirs, ours, None)
    assert config.peers[0].endpoint == (THEIR_HOST, relay_port)
    async with open_tunnel(config, carrier=bound(lab)) as tunnel:
        await tunnel.ready(timeout_s=30)
        with await tunnel.dial(str(THEIRS), inside_port) as sock:
            longest = await asyncio.to_thread(converse, sock)
    assert longest < STALL_S

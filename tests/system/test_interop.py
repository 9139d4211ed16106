"""The whole tunnel against wireguard-go with the kernel's TCP behind it, and against itself.

Every cell of the matrix: who the peer is, whether there is a preshared key, who calls, and by which
Internet protocol the datagrams travel. An echo, and a stream each way, octet by octet.
"""

import asyncio
import os
from collections.abc import Iterator
from itertools import product

import pytest

from builder_orch.tunnel.carrier.udp import UdpCarrier
from builder_orch.tunnel.driver import open_tunnel
from tests.system.conversation import (
    CLIENT,
    IPV4,
    IPV6,
    LIMIT_S,
    SERVER,
    bound,
    call,
    digest,
    mirrored,
    serve_once,
    settings,
    stream,
)
from tests.system.lab import (
    OUR_HOST,
    OUR_HOST6,
    OURS,
    THEIR_HOST,
    THEIR_HOST6,
    THEIRS,
    Lab,
    laboratory,
)
from tests.tunnel.joined import public

pytestmark = pytest.mark.system

SIZES = [4_000_000, pytest.param(100_000_000, marks=pytest.mark.long)]
SHARED = bytes(range(32))
OUTSIDE = {"IPv4": (IPV4, OUR_HOST, THEIR_HOST), "IPv6": (IPV6, OUR_HOST6, THEIR_HOST6)}
CELLS = list(product([None, SHARED], OUTSIDE))
CELL_NAMES = [f"{'psk' if psk else 'plain'}-{outside}" for psk, outside in CELLS]

cells = pytest.mark.parametrize(("psk", "outside"), CELLS, ids=CELL_NAMES)
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size // 1_000_000}MB")


@pytest.fixture(scope="module")
def cable() -> Iterator[Lab]:
    with laboratory() as built:
        yield built


@pytest.fixture
def lab(cable: Lab) -> Iterator[Lab]:
    """The laboratory without programs in it."""
    yield cable
    cable.dismiss()


@sizes
@cells
async def test_we_call_wireguard_go(lab: Lab, psk: bytes | None, outside: str, size: int) -> None:
    family, our_host, their_host = OUTSIDE[outside]
    ours, theirs = os.urandom(32), os.urandom(32)
    port = lab.wireguard_go(private_key=theirs, our_public_key=public(ours), preshared_key=psk)
    server = lab.spawn(SERVER, str(THEIRS), str(size))
    assert server.stdout is not None
    inside_port = int(server.stdout.readline())
    config = settings(port, theirs, ours, psk, host=their_host)
    async with open_tunnel(config, carrier=bound(lab, our_host, family=family)) as tunnel:
        await tunnel.ready(timeout_s=20)
        await tunnel.ping(THEIRS)
        with await tunnel.dial(str(THEIRS), inside_port) as sock:
            await asyncio.to_thread(call, sock, size)


@sizes
@cells
async def test_wireguard_go_calls_us(lab: Lab, psk: bytes | None, outside: str, size: int) -> None:
    family, our_host, their_host = OUTSIDE[outside]
    ours, theirs = os.urandom(32), os.urandom(32)
    carrier = bound(lab, our_host, family=family)
    lab.wireguard_go(
        private_key=theirs,
        our_public_key=public(ours),
        endpoint=carrier.endpoint,
        preshared_key=psk,
    )
    config = settings(None, theirs, ours, psk, host=their_host)
    async with open_tunnel(config, carrier=carrier) as tunnel, asyncio.timeout(LIMIT_S):
        ended = serve_once(tunnel, OURS, size, telling=False)
        caller = lab.spawn(CLIENT, str(OURS), "80", str(size))
        assert caller.stdout is not None
        said = await asyncio.to_thread(caller.stdout.readline)
        assert said.decode().strip() == digest(stream(b"down", size)).hex()
        await ended
        await tunnel.ping(THEIRS)


@sizes
@pytest.mark.parametrize("calling", ["left", "right"])
@cells
async def test_we_call_ourselves(
    lab: Lab, psk: bytes | None, outside: str, calling: str, size: int
) -> None:
    family, our_host, their_host = OUTSIDE[outside]
    ours, theirs = os.urandom(32), os.urandom(32)
    left = bound(lab, our_host, family=family)
    far = lab.socket(family, far=True)
    far.bind((their_host, 0))
    right = UdpCarrier(far)
    port = right.endpoint[1] if calling == "left" else None
    config = settings(port, theirs, ours, psk, host=their_host)
    mirror = mirrored(left.endpoint if calling == "right" else None, theirs, ours, psk)
    async with (
        open_tunnel(config, carrier=left) as our_end,
        open_tunnel(mirror, carrier=right) as far_end,
        asyncio.timeout(LIMIT_S),
    ):
        caller, callee, there = our_end, far_end, THEIRS
        if calling == "right":
            caller, callee, there = far_end, our_end, OURS
        ended = serve_once(callee, there, size, telling=True)
        await caller.ready(timeout_s=20)
        await caller.ping(there)
        with await caller.dial(str(there), 80) as sock:
            await asyncio.to_thread(call, sock, size)
        await ended

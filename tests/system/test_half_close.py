"""Whoever ends its direction first, the other one is heard to its end.

socat calls through a forwarded port, the tunnel and wireguard-go; the kernel's TCP answers.
"""

import asyncio
import hashlib
import os
import shutil
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from builder_orch.tunnel.driver import open_tunnel
from builder_orch.tunnel.forward import Dialled, forward_port
from tests.system.conversation import bound, settings
from tests.system.lab import THEIRS, laboratory
from tests.tunnel.joined import public

pytestmark = pytest.mark.system

PATIENCE_S = "30"
ROUNDS = [5, pytest.param(100, marks=pytest.mark.long)]
REQUEST = os.urandom(300_000)
ANSWER_LEN = 700_000

# Listens behind wireguard-go and answers callers one after the other: "after" hears the whole
# request before it answers, "before" answers, ends its direction and then hears the request. Prints
# the SHA-256 of each request.
SERVER = """
import hashlib, socket, sys
order, size = sys.argv[2], int(sys.argv[3])
listener = socket.create_server((sys.argv[1], 0), family=socket.AF_INET6)
print(listener.getsockname()[1], flush=True)
def answer(caller):
    caller.sendall(hashlib.shake_256(b"answer").digest(size))
    caller.shutdown(socket.SHUT_WR)
while True:
    caller, _ = listener.accept()
    if order == "before":
        answer(caller)
    heard = hashlib.sha256()
    while octets := caller.recv(1 << 20):
        heard.update(octets)
    if order == "after":
        answer(caller)
    caller.close()
    print(heard.hexdigest(), flush=True)
"""


@asynccontextmanager
async def forwarded(order: str) -> AsyncGenerator[tuple[int, asyncio.Queue[str]]]:
    """A local port that leads to the server, and the digests that it prints."""
    with laboratory() as lab:
        ours, theirs = os.urandom(32), os.urandom(32)
        port = lab.wireguard_go(private_key=theirs, our_public_key=public(ours))
        server = lab.spawn(SERVER, str(THEIRS), order, str(ANSWER_LEN))
        assert server.stdout is not None
        inside = int(server.stdout.readline())
        said: asyncio.Queue[str] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def listen() -> None:
            assert server.stdout is not None
            for line in server.stdout:
                loop.call_soon_threadsafe(said.put_nowait, line.decode().strip())

        listening = asyncio.create_task(asyncio.to_thread(listen))
        async with open_tunnel(settings(port, theirs, ours, None), carrier=bound(lab)) as tunnel:
            await tunnel.ready(timeout_s=30)
            async with forward_port(Dialled(tunnel.dial), str(THEIRS), inside) as local:
                yield local, said
        server.kill()
        await listening


async def converse(port: int) -> bytes:
    """What socat brings back for the request."""
    caller = await asyncio.create_subprocess_exec(
        *("socat", "-t", PATIENCE_S, "-", f"TCP:127.0.0.1:{port}"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    answer, _ = await caller.communicate(REQUEST)
    assert caller.returncode == 0
    return answer


@pytest.mark.skipif(shutil.which("socat") is None, reason="needs socat")
@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("order", ["after", "before"])
async def test_each_direction_is_heard_to_its_end(order: str, rounds: int) -> None:
    wanted = hashlib.shake_256(b"answer").digest(ANSWER_LEN)
    asked = hashlib.sha256(REQUEST).hexdigest()
    async with forwarded(order) as (port, said):
        for number in range(rounds):
            answer = await converse(port)
            assert answer == wanted, f"{len(answer)} of {ANSWER_LEN} octets, round {number}"
            async with asyncio.timeout(30):
                assert await said.get() == asked

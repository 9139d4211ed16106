"""Whoever ends its direction first, the other one is heard to its end.

socat calls through a forwarded port, the tunnel, of this process or of an agent, and wireguard-go;
the kernel's TCP answers.
"""

import asyncio
import hashlib
import os
import shutil
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from builder_orch.agent.call import end_agent
from builder_orch.agent.client import AgentTunnel
from builder_orch.agent.place import Place
from builder_orch.agent.spawn import COMMAND, ensure_agent
from builder_orch.tunnel.carrier.choice import Choice
from builder_orch.tunnel.config import TunnelConfig
from builder_orch.tunnel.driver import Tunnel, open_tunnel
from builder_orch.tunnel.forward import Dialled, forward_port
from tests.agent.rig import keep
from tests.system.conversation import bound, settings
from tests.system.lab import THEIRS, Lab, laboratory
from tests.tunnel.joined import public

pytestmark = pytest.mark.system

PATIENCE_S = "30"
SMALL, LARGE = (300_000, 700_000), (20_000_000, 30_000_000)
"""Octets of a request and its answer; the large ones are more than all buffers on the way hold."""
ROUNDS = [
    pytest.param(5, *SMALL, id="5"),
    pytest.param(100, *SMALL, id="100", marks=pytest.mark.long),
    pytest.param(10, *LARGE, id="10-large", marks=pytest.mark.long),
]

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
async def of_this_process(lab: Lab, config: TunnelConfig) -> AsyncGenerator[Tunnel]:
    """A tunnel whose carrier is in the left namespace."""
    async with open_tunnel(config, carrier=bound(lab)) as tunnel:
        yield tunnel


@asynccontextmanager
async def of_an_agent(lab: Lab, config: TunnelConfig) -> AsyncGenerator[AgentTunnel]:
    """The tunnel of an agent that was started in the left namespace."""
    home = Path(os.environ["FLY_BUILD_HOME"])
    place = Place(home / "agent")
    command = ("ip", "netns", "exec", lab.left, *COMMAND)
    call = await asyncio.to_thread(ensure_agent, place, command=command)
    try:
        tunnel = AgentTunnel(call)
        try:
            await tunnel.open_file(keep(config, home / "peer.conf"), Choice())
            yield tunnel
        finally:
            tunnel.close()
    finally:
        await asyncio.to_thread(end_agent, place, now=True)


Opened = AbstractAsyncContextManager[Tunnel | AgentTunnel]
WAYS: dict[str, Callable[[Lab, TunnelConfig], Opened]] = {
    "tunnel": of_this_process,
    "agent": of_an_agent,
}


@asynccontextmanager
async def forwarded(
    way: str, order: str, answer_len: int
) -> AsyncGenerator[tuple[int, asyncio.Queue[str]]]:
    """A local port that leads to the server, and the digests that it prints."""
    with laboratory() as lab:
        ours, theirs = os.urandom(32), os.urandom(32)
        port = lab.wireguard_go(private_key=theirs, our_public_key=public(ours))
        server = lab.spawn(SERVER, str(THEIRS), order, str(answer_len))
        assert server.stdout is not None
        inside = int(server.stdout.readline())
        said: asyncio.Queue[str] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def listen() -> None:
            assert server.stdout is not None
            for line in server.stdout:
                loop.call_soon_threadsafe(said.put_nowait, line.decode().strip())

        listening = asyncio.create_task(asyncio.to_thread(listen))
        async with WAYS[way](lab, settings(port, theirs, ours, None)) as tunnel:
            await tunnel.ready(timeout_s=30)
            async with forward_port(Dialled(tunnel.dial), str(THEIRS), inside) as local:
                yield local, said
        server.kill()
        await listening


async def converse(port: int, request: bytes) -> bytes:
    """What socat brings back for the request."""
    caller = await asyncio.create_subprocess_exec(
        *("socat", "-t", PATIENCE_S, "-", f"TCP:127.0.0.1:{port}"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    answer, _ = await caller.communicate(request)
    assert caller.returncode == 0
    return answer


@pytest.mark.skipif(shutil.which("socat") is None, reason="needs socat")
@pytest.mark.parametrize(("rounds", "request_len", "answer_len"), ROUNDS)
@pytest.mark.parametrize("order", ["after", "before"])
@pytest.mark.parametrize("way", WAYS)
async def test_each_direction_is_heard_to_its_end(
    way: str, order: str, rounds: int, request_len: int, answer_len: int
) -> None:
    request, wanted = os.urandom(request_len), hashlib.shake_256(b"answer").digest(answer_len)
    asked = hashlib.sha256(request).hexdigest()
    async with forwarded(way, order, answer_len) as (port, said):
        for number in range(rounds):
            answer = await converse(port, request)
            assert answer == wanted, f"{len(answer)} of {answer_len} octets, round {number}"
            async with asyncio.timeout(30):
                assert await said.get() == asked

"""A process that hosts one tunnel for the process that started it, and ends with it.

`python -m builder_orch.tunnel.host DESCRIPTOR`, where the descriptor is one end of a socket pair.
"""

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import AsyncGenerator
from functools import partial
from ipaddress import IPv6Address
from pathlib import Path
from typing import Protocol

from builder_orch.errors import TunnelNotUp
from builder_orch.tunnel import control
from builder_orch.tunnel.capture import capturing
from builder_orch.tunnel.carrier import Route
from builder_orch.tunnel.carrier.choice import Choice
from builder_orch.tunnel.config import TunnelConfig
from builder_orch.tunnel.control import Inbox, Message
from builder_orch.tunnel.driver import Tunnel, open_tunnel
from builder_orch.tunnel.failures import NameUnknown

FAILURES: tuple[tuple[type[Exception], str], ...] = (
    (TunnelNotUp, "tunnel-not-up"),
    (NameUnknown, "name-unknown"),
    (ConnectionRefusedError, "refused"),
    (ConnectionResetError, "reset"),
    (TimeoutError, "timed-out"),
    (OSError, "unreachable"),
)
"""How failures are named between the processes; the first that fits."""


class Answer(Protocol):
    """Sends a message; a descriptor is duplicated, the caller still owns its own."""

    def __call__(self, message: Message, descriptor: int | None = None) -> None: ...


class Host:
    """Carries out requests for one tunnel, each in a task of its own."""

    def __init__(self, tunnel: Tunnel, answer: Answer) -> None:
        self._tunnel = tunnel
        self._answer = answer

    async def attend(self, request: Message) -> None:
        """Carry out one request and answer it."""
        number = request["id"]
        try:
            await self._do(request, number)
        except tuple(kind for kind, _ in FAILURES) as error:
            self._answer(failure(number, error))

    async def _do(self, request: Message, number: object) -> None:
        tunnel, timeout_s = self._tunnel, float(str(request.get("timeout_s", 30.0)))
        match request:
            case {"do": "dial", "host": str(host), "port": int(port)}:
                with await tunnel.dial(host, port, timeout_s=timeout_s) as sock:
                    self._answer({"id": number, "result": control.DESCRIPTOR}, sock.fileno())
            case {"do": "resolve", "name": str(name)}:
                found = await tunnel.resolve(name)
                self._answer({"id": number, "result": [str(address) for address in found]})
            case {"do": "ping", "address": str(address)}:
                took = await tunnel.ping(IPv6Address(address), timeout_s=timeout_s)
                self._answer({"id": number, "result": took})
            case {"do": "ready"}:

                def report(reason: str) -> None:
                    self._answer({"id": number, "reason": reason})

                took = await tunnel.ready(timeout_s=timeout_s, report=report)
                self._answer({"id": number, "result": took})
            case {"do": "route"}:
                self._answer({"id": number, "result": list(await tunnel.route())})
            case {"do": "signs"}:
                signs = await tunnel.signs()
                self._answer({"id": number, "result": [list(sign) for sign in signs]})
            case {"do": "twin"}:
                await tunnel.twin()
                self._answer({"id": number, "result": None})
            case {"do": "moved", "from": [str(kind), str(where), str(why)]}:
                route = await tunnel.moved(Route(kind, where, why))
                self._answer({"id": number, "result": list(route)})
            case {"do": "drops"}:
                self._answer({"id": number, "result": tunnel.drops()})
            case _:
                raise OSError("the host does not know this request")


def failure(number: object, error: Exception) -> Message:
    """What is told of a failure."""
    name = next(name for kind, name in FAILURES if isinstance(error, kind))
    hint = error.hint if isinstance(error, TunnelNotUp) else ""
    return {"id": number, "failure": name, "message": str(error), "hint": hint}


def answer(sock: socket.socket, message: Message, descriptor: int | None = None) -> None:
    """Send; if the other side is gone, its end of the stream says so in a moment."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        control.send(sock, message, descriptor)


async def requests(sock: socket.socket) -> AsyncGenerator[Message]:
    """What the other process asks for, until it is gone."""
    inbox = Inbox()
    arrived = asyncio.Event()
    asyncio.get_running_loop().add_reader(sock, arrived.set)
    while True:
        await arrived.wait()
        arrived.clear()
        try:
            while inbox.receive(sock):
                for request in inbox.messages():
                    yield request
        except BlockingIOError:
            continue
        except ConnectionResetError:
            return
        return


async def serve(sock: socket.socket) -> None:
    """Open the tunnel that the first request describes, then carry out the others."""
    asked = requests(sock)
    async for first in asked:
        number, path = first["id"], str(first["capture"])
        async with contextlib.AsyncExitStack() as closing:
            try:
                config = TunnelConfig.parse(str(first["config"]))
                capture = closing.enter_context(capturing(Path(path))) if path else None
                choice = Choice.load(first["carrier"])
                opening = open_tunnel(config, choice=choice, capture=capture)
                tunnel = await closing.enter_async_context(opening)
            except (TunnelNotUp, OSError) as error:
                answer(sock, failure(number, error))
                return
            answer(sock, {"id": number, "result": None})
            await _carry_out(Host(tunnel, partial(answer, sock)), asked)
        return


async def _carry_out(host: Host, asked: AsyncGenerator[Message]) -> None:
    tasks: set[asyncio.Task[None]] = set()
    async for request in asked:
        task = asyncio.create_task(host.attend(request))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def main(descriptor: int) -> None:
    """Serve until the other end of the pair is closed."""
    # Whoever ends a service or a job signals all of its processes; the one that uses us decides
    # what that means, and has things to say by this tunnel before it closes it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=descriptor) as sock:
        sock.setblocking(False)
        asyncio.run(serve(sock))


if __name__ == "__main__":
    main(int(sys.argv[1]))

"""A tunnel in a process of its own, used from this one as if it were here.

Packets are sealed and opened in Python, and every system call gives the interpreter away: a thread
that computes beside the tunnel takes nine tenths of its speed. In a process of its own the tunnel
keeps its pace whatever the application does; what crosses between them in bulk is a descriptor's
octets, which the kernel copies.
"""

import asyncio
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from ipaddress import IPv6Address
from pathlib import Path

from builder_orch.errors import TunnelNotUp
from builder_orch.tunnel import control
from builder_orch.tunnel.carrier import Route, Sign
from builder_orch.tunnel.carrier.choice import Choice
from builder_orch.tunnel.config import TunnelConfig
from builder_orch.tunnel.control import Inbox, Message
from builder_orch.tunnel.failures import NameUnknown

EXIT_TIMEOUT_S = 5.0
_KINDS: dict[object, type[OSError]] = {
    "name-unknown": NameUnknown,
    "refused": ConnectionRefusedError,
    "reset": ConnectionResetError,
    "timed-out": TimeoutError,
}


class HostedTunnel:
    """The abilities of `Tunnel`, carried out by another process; belongs to the loop it was made on
    but for `dial_blocking`. When that process ends, what is open is reset and requests fail.
    """

    def __init__(self, sock: socket.socket, pid: int) -> None:
        self.pid = pid
        self._socket = sock
        self._inbox = Inbox()
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count(1)
        self._waiting: dict[object, asyncio.Future[object]] = {}
        self._reports: dict[object, Callable[[str], None]] = {}
        self._gone = False
        sock.setblocking(False)
        self._loop.add_reader(sock, self._on_readable)

    async def open(self, config: TunnelConfig, choice: Choice, capture: Path | None) -> None:
        """Have the tunnel opened; the first request there is. Failures as of `open_tunnel`."""
        # Over the pair and not by argument: the configuration holds the private key, the choice
        # perhaps a proxy's password.
        request: Message = {"do": "open", "config": config.dump(), "carrier": choice.dump()}
        await self.ask({**request, "capture": str(capture) if capture else ""})

    async def dial(self, host: str, port: int, *, timeout_s: float = 30.0) -> socket.socket:
        """As `Tunnel.dial`."""
        request: Message = {"do": "dial", "host": host, "port": port, "timeout_s": timeout_s}
        descriptor = await self.ask(request)
        assert isinstance(descriptor, int)
        return socket.socket(fileno=descriptor)

    def dial_blocking(self, host: str, port: int, *, timeout_s: float = 30.0) -> socket.socket:
        """`dial` for any other thread than the event loop's."""
        dialling = self.dial(host, port, timeout_s=timeout_s)
        return asyncio.run_coroutine_threadsafe(dialling, self._loop).result()

    async def resolve(self, name: str) -> list[IPv6Address]:
        """As `Tunnel.resolve`."""
        found = await self.ask({"do": "resolve", "name": name})
        assert isinstance(found, list)
        return [IPv6Address(address) for address in found]

    async def ping(self, address: IPv6Address, *, timeout_s: float = 5.0) -> float:
        """As `Tunnel.ping`."""
        request: Message = {"do": "ping", "address": str(address), "timeout_s": timeout_s}
        return float(str(await self.ask(request)))

    async def ready(
        self, *, timeout_s: float, report: Callable[[str], None] = lambda _: None
    ) -> float:
        """As `Tunnel.ready`."""
        took = await self.ask({"do": "ready", "timeout_s": timeout_s}, report)
        return float(str(took))

    async def route(self) -> Route:
        """As `Tunnel.route`."""
        route = await self.ask({"do": "route"})
        assert isinstance(route, list)
        return Route(*map(str, route))

    async def signs(self) -> tuple[Sign, ...]:
        """As `Tunnel.signs`."""
        found = await self.ask({"do": "signs"})
        assert isinstance(found, list)
        return tuple(Sign(*map(str, sign)) for sign in found)

    async def twin(self) -> None:
        """As `Tunnel.twin`."""
        await self.ask({"do": "twin"})

    async def moved(self, route: Route) -> Route:
        """As `Tunnel.moved`."""
        found = await self.ask({"do": "moved", "from": list(route)})
        assert isinstance(found, list)
        return Route(*map(str, found))

    async def drops(self) -> dict[str, int]:
        """How many packets each core threw away, by reason."""
        drops = await self.ask({"do": "drops"})
        assert isinstance(drops, dict)
        return {str(reason): int(count) for reason, count in drops.items()}

    async def ask(self, request: Message, report: Callable[[str], None] | None = None) -> object:
        """Have a request carried out there; its result, or its failure raised."""
        if self._gone:
            raise _lost()
        number = next(self._numbers)
        self._waiting[number] = future = self._loop.create_future()
        if report is not None:
            self._reports[number] = report
        try:
            control.send(self._socket, {"id": number, **request})
        except (BrokenPipeError, ConnectionResetError):
            self._lose()
        try:
            # Given up, it stays in the table: its answer may bring a descriptor to be closed.
            return await future
        finally:
            self._reports.pop(number, None)

    def _on_readable(self) -> None:
        try:
            going = self._inbox.receive(self._socket)
        except BlockingIOError:
            return
        except OSError:
            going = False
        for message in self._inbox.messages():
            self._settle(message)
        if not going:
            self._lose()

    def _settle(self, message: Message) -> None:
        number = message.get("id")
        if "reason" in message:
            if (report := self._reports.get(number)) is not None:
                report(str(message["reason"]))
            return
        waiting = self._waiting.pop(number, None)
        if message.get("result") == control.DESCRIPTOR:
            descriptor = self._inbox.descriptor()
            if waiting is None or waiting.done():
                os.close(descriptor)
            else:
                waiting.set_result(descriptor)
        elif waiting is None or waiting.done():
            return
        elif "failure" in message:
            waiting.set_exception(_failure(message))
        else:
            waiting.set_result(message.get("result"))

    def _lose(self) -> None:
        self._gone = True
        self._loop.remove_reader(self._socket)
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(_lost())
        self._waiting.clear()

    def close(self) -> None:
        """Let the other process end, and with it all that is open."""
        if not self._gone:
            self._lose()
        self._inbox.close()
        self._socket.close()


def _failure(message: Message) -> Exception:
    text = str(message.get("message"))
    if message["failure"] == "tunnel-not-up":
        return TunnelNotUp(text, hint=str(message.get("hint")))
    return _KINDS.get(message["failure"], OSError)(text)


def _lost() -> ConnectionResetError:
    return ConnectionResetError("the tunnel's process has ended")


OpenHosted = Callable[[TunnelConfig], AbstractAsyncContextManager[HostedTunnel]]


@asynccontextmanager
async def hosting(
    *, choice: Choice | None = None, capture: Path | None = None
) -> AsyncGenerator[OpenHosted]:
    """Start the other process now; what is yielded opens its one tunnel when it is needed.

    The process ends with the block, or with this process. `choice` is as of `open_tunnel`,
    `capture` names a new file for the inner packets. TunnelNotUp where no process can be had.
    """
    child, ours = await _begin()
    tunnel = HostedTunnel(ours, child.pid)

    @asynccontextmanager
    async def open_in_it(config: TunnelConfig) -> AsyncGenerator[HostedTunnel]:
        try:
            await tunnel.open(config, choice or Choice(), capture)
        except ConnectionResetError:
            code = await asyncio.to_thread(_reap, child)
            raise TunnelNotUp(
                f"the process for the tunnel ended before it was up ({_ended(code)})",
                hint=f"See whether {sys.executable} -m builder_orch works, then run it again.",
            ) from None
        try:
            yield tunnel
        finally:
            tunnel.close()

    try:
        yield open_in_it
    finally:
        tunnel.close()
        await asyncio.to_thread(_reap, child)


@asynccontextmanager
async def open_hosted_tunnel(
    config: TunnelConfig, *, choice: Choice | None = None, capture: Path | None = None
) -> AsyncGenerator[HostedTunnel]:
    """`open_tunnel` in a process of its own."""
    async with (
        hosting(choice=choice, capture=capture) as open_in_it,
        open_in_it(config) as tunnel,
    ):
        yield tunnel


async def _begin() -> tuple["subprocess.Popen[bytes]", socket.socket]:
    """The other process, and our end of what leads to it."""
    ours, theirs = socket.socketpair()
    words = [sys.executable, "-m", "builder_orch.tunnel.host", str(theirs.fileno())]
    with theirs:
        try:
            child = await asyncio.to_thread(_start, words, theirs.fileno())
        except OSError as error:
            ours.close()
            raise TunnelNotUp(
                f"no process for the tunnel could be started: {sys.executable}: {error.strerror}",
                hint="See whether this Python is still there and the machine has memory left.",
            ) from None
    return child, ours


def _start(words: list[str], descriptor: int) -> "subprocess.Popen[bytes]":
    # A group of its own: Ctrl-C and what else goes to all of ours is for us to act on, and to tell
    # the engine of it needs the tunnel.
    return subprocess.Popen(  # noqa: S603 - our own interpreter, no shell
        words, pass_fds=[descriptor], stdin=subprocess.DEVNULL, process_group=0
    )


def _reap(child: "subprocess.Popen[bytes]") -> int:
    try:
        return child.wait(EXIT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


def _ended(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"

"""Local listeners whose callers are spliced, each to an inside connection of its own."""

import asyncio
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

from builder_orch.tunnel.driver import Tunnel

BACKLOG = 128
DIAL_TIMEOUT_S = 30.0

Failed = Callable[[OSError], None]


@asynccontextmanager
async def forward_port(
    tunnel: Tunnel,
    host: str,
    port: int,
    *,
    bind: str = "127.0.0.1",
    local_port: int = 0,
    failed: Failed = lambda _: None,
) -> AsyncGenerator[int]:
    """Listen on a local TCP port (0: a free one, which is yielded) and forward callers to
    `host`:`port` inside. OSError (EADDRINUSE) if it is taken; `failed` hears of callers that could
    not be connected, who see a reset.
    """
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    with socket.create_server((bind, local_port), family=family, backlog=BACKLOG) as listener:
        async with _accepting(tunnel, listener, host, port, failed):
            yield listener.getsockname()[1]


@asynccontextmanager
async def forward_unix(
    tunnel: Tunnel, host: str, port: int, path: str, *, failed: Failed = lambda _: None
) -> AsyncGenerator[str]:
    """The same from a Unix socket, which only this user can open."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen(BACKLOG)
        async with _accepting(tunnel, listener, host, port, failed):
            yield path


@asynccontextmanager
async def _accepting(
    tunnel: Tunnel, listener: socket.socket, host: str, port: int, failed: Failed
) -> AsyncGenerator[None]:
    listener.setblocking(False)
    loop = asyncio.get_running_loop()

    async def connect(caller: socket.socket) -> None:
        try:
            await tunnel.attach(caller, host, port, timeout_s=DIAL_TIMEOUT_S)
        except OSError as error:
            failed(error)

    async def accept(callers: asyncio.TaskGroup) -> None:
        while True:
            caller, _ = await loop.sock_accept(listener)
            caller.setblocking(False)
            callers.create_task(connect(caller))

    async with asyncio.TaskGroup() as callers:
        accepting = callers.create_task(accept(callers))
        try:
            yield
        finally:
            accepting.cancel()

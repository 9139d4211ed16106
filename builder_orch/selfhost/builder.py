"""The builder of one organisation as the platform sees it: a machine with a Docker engine."""

import asyncio
import socket
from ipaddress import IPv6Address
from typing import Final

from builder_orch.selfhost.engine import Engine
from builder_orch.selfhost.guard import attend
from builder_orch.selfhost.process import State

DOCKER_PORT: Final = 2375


class BuilderMachine:
    """One builder: its id, its private address, and the way to its engine."""

    def __init__(self, engine: Engine, *, machine_id: str, address: IPv6Address) -> None:
        self.machine_id = machine_id
        self.address = address
        self._engine = engine
        self._attending: set[asyncio.Task[None]] = set()

    async def ensure(self, app: str) -> tuple[str, State, IPv6Address]:
        """Return id, state and address of the builder of an app; all apps of one organisation
        share it. The state is STARTED only when the engine has just answered; one of ours that
        was given up is started again."""
        del app
        return self.machine_id, await self._engine.ensure(), self.address

    async def connect(self, port: int) -> socket.socket:
        """Return a fresh, non-blocking connection to the engine, past its guard and for one
        request; any port but 2375 is refused."""
        if port != DOCKER_PORT:
            raise ConnectionRefusedError(f"the builder serves port {DOCKER_PORT} only")
        engine = await self._engine.connect()
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
        attending = asyncio.create_task(attend(theirs, engine))
        self._attending.add(attending)
        attending.add_done_callback(self._attending.discard)
        return ours

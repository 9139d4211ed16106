"""The way to a builder's Docker Engine API for other programs: a local socket that leads there.

The same first stages as a deploy, in the same order; then a listener instead of a build. Peer,
tunnel and listener end with the block.
"""

import errno
import tempfile
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from builder_orch.errors import BuilderOrchError, PortInUse, TunnelNotUp, UsageFailure
from builder_orch.events import Emit, Warned
from builder_orch.pipeline.engine import Engine
from builder_orch.pipeline.outside import Tunnel, World
from builder_orch.pipeline.provision import Authorize, Provision
from builder_orch.pipeline.stage import perform
from builder_orch.pipeline.tunnel import Reach, Reached
from builder_orch.tunnel.forward import Dialled, forward_port, forward_unix

LOOPBACK = "127.0.0.1"
SOCKET = "docker.sock"


@dataclass(frozen=True, slots=True)
class Wanted:
    """Whose builder, and where it should appear: at a port of the loopback interface (0: a free
    one), or as a Unix socket in a directory of its own below `folder`."""

    app: str
    folder: Path
    port: int | None = None
    host: str = "host"


@dataclass(frozen=True, slots=True)
class Way:
    """An open way to a builder. `url` is what DOCKER_HOST should be."""

    url: str
    tunnel: Tunnel
    engine: Engine

    async def over(self) -> None:
        """Wait for the end of the tunnel, which only comes when its process ends; TunnelNotUp."""
        route = await self.tunnel.route()
        try:
            while True:
                route = await self.tunnel.moved(route)
        except OSError as error:
            raise TunnelNotUp(
                f"the tunnel to the builder has ended: {error}",
                hint="Run it again.",
            ) from None


@asynccontextmanager
async def reached(app: str, world: World, emit: Emit, host: str) -> AsyncGenerator[Reached]:
    """The builder of an app, with an engine that answers; raises what a deploy would."""
    found = (await perform(Authorize(world.platform), app, emit)).app
    limits = world.limits
    provision = Provision(world.platform, limits.provision_s)
    builder = (await perform(provision, found, emit, limit_s=limits.provision_s)).builder
    async with AsyncExitStack() as closing:
        reach = Reach(world, found, closing, host)
        limit_s = limits.handshake_s + limits.resolver_s + limits.engine_s
        yield await perform(reach, builder, emit, limit_s=limit_s)


@asynccontextmanager
async def connect(wanted: Wanted, world: World, emit: Emit) -> AsyncGenerator[Way]:
    """Lead local callers to the builder for the length of the block.

    PortInUse when the port belongs to another program, else what a deploy would fail with.
    """

    def failed(error: OSError) -> None:
        emit(Warned("caller", f"a caller could not be led to the builder: {error}"))

    async with AsyncExitStack() as stack:
        there = await stack.enter_async_context(reached(wanted.app, world, emit, wanted.host))
        engine = there.engine
        callers = Dialled(there.tunnel.dial)
        far = str(engine.address), engine.port
        if wanted.port is None:
            prefix = "fly-build-"
            folder = stack.enter_context(
                tempfile.TemporaryDirectory(prefix=prefix, dir=wanted.folder)
            )
            path = str(Path(folder) / SOCKET)
            await stack.enter_async_context(forward_unix(callers, *far, path, failed=failed))
            url = f"unix://{path}"
        else:
            try:
                opening = forward_port(
                    callers, *far, bind=LOOPBACK, local_port=wanted.port, failed=failed
                )
                port = await stack.enter_async_context(opening)
            except OSError as error:
                raise _taken(wanted.port, error) from None
            url = f"tcp://{LOOPBACK}:{port}"
        yield Way(url, there.tunnel, engine)


def _taken(port: int, error: OSError) -> BuilderOrchError:
    if error.errno == errno.EADDRINUSE:
        return PortInUse(
            f"port {port} of {LOOPBACK} belongs to another program",
            hint="Name another with --port, or 0 for a free one.",
        )
    return UsageFailure(
        f"port {port} of {LOOPBACK} cannot be listened at: {error.strerror}",
        hint="Take a port from 1024 on, or 0 for a free one.",
    )

"""A build from end to end: a session beside it, the solve, and its status as events.

attached     the engine may ask us for files, secrets and logins
Solve        one call that answers when everything is built and exported
Status       a stream beside it: what is done, what it prints
"""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from builder_orch.buildkit.control import Control
from builder_orch.buildkit.grpc import Call, Failed
from builder_orch.buildkit.http2 import Lost
from builder_orch.buildkit.messages import Cache, SolveRequest, StatusResponse, solve_response
from builder_orch.buildkit.progress import Watching
from builder_orch.buildkit.session import CONTROL, Offer, Session, attached, new_id
from builder_orch.events import Emit, EngineStatus, Warned
from builder_orch.tunnel.machine import Malformed

FRONTEND = "dockerfile.v0"
STATUS_TRIES = 5
STATUS_AGAIN_S = 0.2
LAST_WORDS_S = 5.0
"""How long the status may go on after the solve ended."""
FAREWELL_S = 1.0
"""How long telling the engine that a build is given up may take."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a Dockerfile is built with, in the words of its frontend."""

    filename: str = "Dockerfile"
    build_args: Mapping[str, str] = field(default_factory=dict, repr=False)
    labels: Mapping[str, str] = field(default_factory=dict)
    target: str = ""
    platforms: Sequence[str] = ()
    network: str = ""
    hosts: Mapping[str, str] = field(default_factory=dict)
    no_cache: bool = False
    cache_from: Sequence[Cache] = ()
    cache_to: Sequence[Cache] = ()
    ulimits: Mapping[str, str] = field(default_factory=dict)
    """`soft:hard` by name."""
    contexts: Mapping[str, str] = field(default_factory=dict)
    """What a name in FROM and --from means: `local:NAME` of the session, `docker-image://REF`."""

    def attributes(self) -> dict[str, str]:
        """As the frontend takes them; caches have to be named here, not in the request."""
        made = {"filename": self.filename}
        made |= {f"build-arg:{name}": value for name, value in self.build_args.items()}
        made |= {f"label:{name}": value for name, value in self.labels.items()}
        plain = {
            "target": self.target,
            "platform": ",".join(self.platforms),
            "force-network-mode": self.network,
            "add-hosts": ",".join(f"{name}={address}" for name, address in self.hosts.items()),
            "ulimit": ",".join(f"{name}={limits}" for name, limits in self.ulimits.items()),
        }
        made |= {name: value for name, value in plain.items() if value}
        if self.no_cache:
            made["no-cache"] = ""
        if self.cache_from:
            caches = [{"Type": one.kind, "Attrs": one.attributes} for one in self.cache_from]
            made["cache-imports"] = json.dumps(caches)
        if self.contexts:
            made |= {f"context:{name}": value for name, value in self.contexts.items()}
            # One that does not know them has to refuse, not to take a name for an image's.
            made["frontend.caps"] = "moby.buildkit.frontend.contexts+forward"
        return made


@dataclass(frozen=True, slots=True)
class Result:
    """What becomes of a build: an exporter of the engine's, and what it is told; "" for none."""

    exporter: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)


async def solve(
    control: Control,
    offer: Offer,
    options: Options,
    emit: Emit,
    *,
    result: Result,
    watching: Watching,
    begun: Callable[[Session], None] = lambda _: None,
) -> dict[str, str]:
    """Build a Dockerfile; what the exporter says of the result.

    Failed when the engine reports a failure (`watching` knows the
    step), Lost when it is gone, or the leaf that something on this side failed with. Cancelling it
    cancels the build on the engine.
    """
    channel = control.channel
    async with attached(channel, offer) as session:
        begun(session)
        request = SolveRequest(
            new_id(),
            session.id,
            FRONTEND,
            options.attributes(),
            result.exporter,
            result.attributes,
            tuple(options.cache_to),
        )
        solving = channel.call(f"{CONTROL}/Solve")
        status = asyncio.create_task(_watch(control, request.ref, watching, emit))
        try:
            await solving.send(request.encode(), end=True)
            answer = await _answer(solving)
        except Failed:
            if session.failure is not None:
                raise session.failure from None
            raise
        finally:
            await _part(control, solving, status)
        for event in watching.finish():
            emit(event)
        return answer


async def _answer(solving: Call) -> dict[str, str]:
    answer = await solving.receive()
    await solving.receive()
    try:
        return solve_response(answer or b"")
    except Malformed as error:
        raise Lost(f"its answer is none: {error}") from None


async def _part(control: Control, solving: Call, status: asyncio.Task[None]) -> None:
    """Hear the rest of the status, or make sure that the engine hears that we leave."""
    cancelled = (task := asyncio.current_task()) is not None and task.cancelling() > 0
    solving.cancel()
    if not cancelled:
        await asyncio.wait({status}, timeout=LAST_WORDS_S)
    status.cancel()
    await asyncio.gather(status, return_exceptions=True)
    try:
        async with asyncio.timeout(FAREWELL_S):
            await control.channel.connection.drained()
    except (TimeoutError, Lost):
        # Whoever reads so slowly notices the end of the connection instead.
        return


async def _watch(control: Control, ref: str, watching: Watching, emit: Emit) -> None:
    """Follow the status; it may be asked for before the engine has begun with the solve."""
    for _ in range(STATUS_TRIES):
        call = control.channel.call(f"{CONTROL}/Status")
        try:
            await call.send(SolveRequest(ref, "", "").encode(), end=True)
            while (message := await call.receive()) is not None:
                emit(EngineStatus(message))
                for event in watching.take(StatusResponse.decode(message)):
                    emit(event)
        except Failed:
            await asyncio.sleep(STATUS_AGAIN_S)
        except Malformed as error:
            emit(Warned("engine-garbage", f"the builder's progress was not understood: {error}"))
            return
        except Lost:
            # The solve itself says it.
            return
        else:
            return
        finally:
            call.cancel()

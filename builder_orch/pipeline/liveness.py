"""How long a build may take, how long it may stand still, and how it goes on after a loss.

That an engine is gone is noticed elsewhere (`engine.attend`, `buildkit.http2`) and needs no limit
of the user's. Here are the limits for engines that are there.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from typing import ClassVar, TypeVar

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt

from builder_orch.api.models import App, Builder
from builder_orch.errors import (
    BuilderLost,
    BuilderOrchError,
    BuildStalled,
    BuildTimedOut,
    TunnelNotUp,
)
from builder_orch.events import (
    Emit,
    Event,
    PhaseReason,
    PhaseStarted,
    Retry,
    Step,
    StepFinished,
    Warned,
)
from builder_orch.pipeline.engine import Again, Engine, wait_for_engine
from builder_orch.pipeline.outside import Tunnel, World
from builder_orch.pipeline.provision import Provision, Ready
from builder_orch.pipeline.stage import perform

RETURNS = 2
"""How often a run goes back to a builder that was lost, or to the one in its place."""

Made = TypeVar("Made")


@dataclass(slots=True)
class Patience:
    """A user's limits for a build, in seconds; None for none.

    `build_s` is for everything from the first octet of the context to the image, however often it
    was begun again; `stall_s` for a time in which it comes no further.
    """

    build_s: float | None = None
    stall_s: float | None = None
    _ends_at: float | None = None

    def ends_at(self, now: float) -> float | None:
        """When the whole build has to be over; the first who asks begins it."""
        if self.build_s is not None and self._ends_at is None:
            self._ends_at = now + self.build_s
        return self._ends_at


@dataclass(slots=True)
class Pulse:
    """Passes events on, and puts the end of patience off as long as a build comes further.

    A step that runs may be silent for as long as it likes: the engine answers for it. FROM is no
    such step, because what it waits for is somebody else's registry.
    """

    emit: Emit
    stall_s: float | None
    limit: asyncio.Timeout
    doing: str = "its beginning"
    working: set[tuple[int, int, str]] = field(default_factory=set)
    over: bool = False

    def __call__(self, event: Event) -> None:
        """Take one event."""
        match event:
            case Warned():
                # Somebody worries: no sign of life.
                self.emit(event)
                return
            case Step(number, total, name, cached):
                self.doing = f"step {number}/{total} ({name[:200]})"
                if not cached and not name.upper().startswith("FROM "):
                    self.working.add((number, total, name))
                if cached:
                    self.working.discard((number, total, name))
            case StepFinished(Step(number, total, name)):
                self.doing = f"what follows step {number}/{total} ({name[:200]})"
                self.working.discard((number, total, name))
            case PhaseStarted(phase):
                self.doing = phase
            case _:
                pass
        self._beat()
        self.emit(event)

    def _beat(self) -> None:
        if self.stall_s is None or self.over or self.limit.expired():
            return
        now = asyncio.get_running_loop().time()
        self.limit.reschedule(None if self.working else now + self.stall_s)


async def bounded(work: Callable[[Emit], Awaitable[Made]], patience: Patience, emit: Emit) -> Made:
    """Do a build's work, which is cancelled when patience ends: BuildTimedOut or BuildStalled."""
    now = asyncio.get_running_loop().time()
    whole = asyncio.timeout_at(patience.ends_at(now))
    stall = asyncio.timeout(patience.stall_s)
    pulse = Pulse(emit, patience.stall_s, stall)
    try:
        async with whole, stall:
            return await work(pulse)
    except TimeoutError:
        if whole.expired():
            raise BuildTimedOut(
                f"the build took longer than {patience.build_s:g} s, and was at {pulse.doing}",
                hint="Give it more time with --build-timeout; what was built so far is cached.",
            ) from None
        if stall.expired():
            raise BuildStalled(
                f"the build stood still for {patience.stall_s:g} s at {pulse.doing}: no step ran, "
                "nothing was printed, sent or fetched, though the engine answers",
                hint="Run it again: a registry that an image comes from may be slow. "
                "--stall-timeout waits longer.",
            ) from None
        raise
    finally:
        pulse.over = True


@dataclass(frozen=True, slots=True)
class Back:
    """An engine that answers again, after one was lost."""

    engine: Engine
    builder: Builder

    def __str__(self) -> str:
        return f"back, engine API {self.engine.version} at [{self.engine.address}]"


@dataclass(frozen=True, slots=True)
class GoBack:
    """Wait until the engine of a builder answers again, through the tunnel that is there."""

    world: World
    tunnel: Tunnel
    again: Again
    name: ClassVar[str] = "tunnel"

    async def run(self, given: Builder, emit: Emit) -> Back:
        def report(reason: str) -> None:
            emit(PhaseReason(self.name, reason))

        try:
            await self.tunnel.route()
        except OSError as error:
            raise TunnelNotUp(f"the tunnel has ended: {error}", hint="Run it again.") from None
        report(f"waiting for the engine at [{given.address}] to answer again")
        engine = await wait_for_engine(
            Engine(given.address, self.tunnel.dial, pause=self.world.pause, emit=emit),
            report,
            limit_s=self.world.limits.return_s,
            again=self.again,
        )
        return Back(engine, given)


@dataclass(slots=True)
class Return:
    """The way back to a builder: the platform is asked for it again, and may give another one."""

    world: World
    app: App
    builder: Builder
    tunnel: Tunnel
    emit: Emit

    async def find(self) -> Engine:
        """An engine that answers; raises what asking for a builder and its engine can.

        A platform that was asked in the moment of the loss may not have noticed it yet, so it is
        asked again when the engine does not answer soon.
        """
        limits = self.world.limits
        provision = Provision(self.world.platform, limits.provision_s)
        self._take(await perform(provision, self.app, self.emit, limit_s=limits.provision_s))
        going = GoBack(self.world, self.tunnel, self._again)
        return (await perform(going, self.builder, self.emit, limit_s=limits.return_s)).engine

    async def _again(self) -> IPv6Address:
        provision = Provision(self.world.platform, self.world.limits.return_s)
        self._take(await provision.run(self.app, self.emit))
        return self.builder.address

    def _take(self, ready: Ready) -> None:
        if ready.builder.machine_id != self.builder.machine_id:
            said = f"{ready.builder.machine_id} takes the place of {self.builder.machine_id}"
            self.emit(Warned("builder-replaced", f"machine {said}; its cache may be cold"))
        self.builder = ready.builder


async def persist(
    engine: Engine, work: Callable[[Engine], Awaitable[Made]], way: Return, emit: Emit
) -> Made:
    """Do work that may be repeated as a whole; begun again when the builder is lost meanwhile.

    What the engine has of context and steps it need not be given again. A loss that cannot be made
    good is raised as it was, with why not.
    """
    losses: list[BuilderLost] = []

    async def attempt() -> Made:
        there = engine
        if losses:
            emit(Retry("build", len(losses), str(losses[-1]), 0.0))
            try:
                there = await way.find()
            except BuilderOrchError as error:
                raise _Final(losses[-1], error) from None
        try:
            return await work(there)
        except BuilderLost as error:
            losses.append(error)
            raise

    again = AsyncRetrying(
        retry=retry_if_exception_type(BuilderLost),
        stop=stop_after_attempt(1 + RETURNS),
        reraise=True,
    )
    try:
        return await again(attempt)
    except _Final as final:
        raise BuilderLost(
            f"{final.loss}; it did not come back: {final.error}", hint=final.loss.hint
        ) from None


class _Final(Exception):
    """There is no way back from a loss."""

    def __init__(self, loss: BuilderLost, error: BuilderOrchError) -> None:
        super().__init__(loss, error)
        self.loss = loss
        self.error = error

"""A stage takes a value and returns the next; only `perform` times and announces."""

from asyncio import CancelledError
from time import monotonic
from typing import Protocol, TypeVar

from builder_orch.events import Emit, PhaseFailed, PhaseFinished, PhaseStarted

In = TypeVar("In", contravariant=True)
Out = TypeVar("Out", covariant=True)
Given = TypeVar("Given")
Made = TypeVar("Made")


class Stage(Protocol[In, Out]):
    """A frozen dataclass of what it needs besides its input."""

    @property
    def name(self) -> str:
        """The phase's name in events and reports."""
        ...

    async def run(self, given: In, emit: Emit) -> Out:
        """Do the work; raise a leaf of `BuilderOrchError` when it fails."""
        ...


async def perform(
    stage: Stage[Given, Made], given: Given, emit: Emit, *, limit_s: float | None = None
) -> Made:
    """Run one stage between its two events; a failure is announced once and raised again."""
    began = monotonic()
    emit(PhaseStarted(stage.name, limit_s))
    try:
        made = await stage.run(given, emit)
    except (Exception, CancelledError) as error:
        emit(PhaseFailed(stage.name, monotonic() - began, error))
        raise
    emit(PhaseFinished(stage.name, monotonic() - began, str(made)))
    return made

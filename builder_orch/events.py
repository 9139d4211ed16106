"""What happens during a run, as frozen values; only the renderer prints them."""

from collections.abc import Callable
from dataclasses import dataclass, field

from builder_orch.errors import BuilderOrchError


@dataclass(frozen=True, slots=True)
class PhaseStarted:
    """A phase began; `limit_s` is when it will be given up, if it has a limit of its own."""

    phase: str
    limit_s: float | None = None


@dataclass(frozen=True, slots=True)
class PhaseReason:
    """What a phase that is still under way is waiting for."""

    phase: str
    reason: str


@dataclass(frozen=True, slots=True)
class PhaseFinished:
    """A phase reached its end; `outcome` says in a few words what it made."""

    phase: str
    elapsed_s: float
    outcome: str


@dataclass(frozen=True, slots=True)
class PhaseFailed:
    """A phase ended with a failure; nobody but the first `perform` around it reports it."""

    phase: str
    elapsed_s: float
    error: BaseException


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a Dockerfile as the engine announces it, and in which stage if it says so."""

    number: int
    total: int
    name: str
    cached: bool = False
    stage: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class StepFinished:
    """A step came to its end, well or not; `elapsed_s` is what it took by the engine's clock if
    that says so, else by ours."""

    step: Step
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class Log:
    """A line of somebody else's output (a build step, the engine); untrusted text.

    `step` is the one that printed it, as far as anybody knows.
    """

    text: str
    stream: str = "stdout"
    step: Step | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """A message of BuildKit's status stream, as it came; the events after it say the same."""

    octets: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ContextWeighed:
    """How much may be sent, and which paths make most of it, the largest first.

    `unused` is how many octets no step of the Dockerfile can reach.
    """

    files: int
    octets: int
    largest: tuple[tuple[str, int], ...] = ()
    unused: int = 0


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """Why a step was not taken from the cache, as far as the last good build from here tells.

    `paths` are files that changed and that the step takes, `more` how many are not named.
    `cost_s` is what this step and those after it took that were built anew because of it.
    """

    step: Step
    cause: str
    paths: tuple[str, ...] = ()
    more: int = 0
    cost_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a phase has come; `total` is None where nobody knows."""

    phase: str
    done: int
    total: int | None
    unit: str = "bytes"


@dataclass(frozen=True, slots=True)
class Retry:
    """Something transient failed and is tried again after `wait_s`."""

    phase: str
    attempt: int
    cause: str
    wait_s: float


@dataclass(frozen=True, slots=True)
class Transport:
    """How the gateway is reached, and why so."""

    kind: str
    endpoint: str
    handshake_s: float
    why: str = ""


@dataclass(frozen=True, slots=True)
class Warned:
    """Something the user should know that stops nothing; `line` is one of the Dockerfile, or 0."""

    id: str
    message: str
    line: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of every run. `values` holds what the command made (JSON types only)."""

    ok: bool
    exit_code: int
    elapsed_s: float
    values: dict[str, object] = field(default_factory=dict)
    error: BuilderOrchError | None = None


Event = (
    PhaseStarted
    | PhaseReason
    | PhaseFinished
    | PhaseFailed
    | Step
    | StepFinished
    | Log
    | EngineStatus
    | ContextWeighed
    | Rebuilt
    | Progress
    | Retry
    | Transport
    | Warned
    | Finished
)
Emit = Callable[[Event], None]

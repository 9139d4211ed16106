"""A run as lines that are only ever added: for CI, pipes and terminals that cannot be drawn on."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol, TextIO

from builder_orch.cli.text import amount, encodable, plain
from builder_orch.events import (
    ContextWeighed,
    Event,
    Log,
    PhaseFailed,
    PhaseFinished,
    PhaseReason,
    PhaseStarted,
    Progress,
    Rebuilt,
    Retry,
    Step,
    StepFinished,
    Transport,
    Warned,
)

PROGRESS_EVERY_S = 5.0
"""Between two lines that only say how far something has come."""
STEP_LINES = 2000
"""Lines of one step that are shown; the failure's report has its last ones in any case."""
STEP_CHARACTERS = 1 << 20
"""Characters of one step that are shown."""
TELLING_S = 1.0
"""A step that took less is not worth a line about how long it took."""
WORTH_S = 0.05
"""What is lost in less than this costs nothing, or nobody knows what."""
HEAVY = 1_000_000
"""A context of fewer octets is not taken apart."""


class Display(Protocol):
    """What draws a run while it goes on."""

    def show(self, event: Event) -> None:
        """Take one event; never two at a time."""
        ...

    def close(self) -> None:
        """Leave the terminal as it was found; any number of times."""
        ...


class Nothing:
    """Shows nothing at all: the result and a failure are told by others."""

    def show(self, event: Event) -> None:
        """Take one event."""

    def close(self) -> None:
        """There is nothing to leave."""


@dataclass(slots=True)
class Quiet:
    """Shows what should be known although nobody asked for it: warnings."""

    err: TextIO

    def show(self, event: Event) -> None:
        """Take one event."""
        if isinstance(event, Warned):
            self.err.write(encodable(warning(event), self.err) + "\n")
            self.err.flush()

    def close(self) -> None:
        """There is nothing to leave."""


@dataclass(slots=True)
class _Output:
    """How much of a step was shown, and how many lines were not."""

    lines: int = 0
    characters: int = 0
    dropped: int = 0

    def takes(self, text: str) -> bool:
        """Is there room for one more line?"""
        self.lines += 1
        self.characters += len(text)
        if self.lines <= STEP_LINES and self.characters <= STEP_CHARACTERS:
            return True
        self.dropped += 1
        return False


@dataclass(slots=True)
class Lines:
    """Adds lines to a stream, each with the seconds since the beginning."""

    err: TextIO
    clock: Callable[[], float] = time.monotonic
    _began: float = 0.0
    _phase: str = ""
    _progress_at: dict[str, float] = field(default_factory=dict)
    _outputs: dict[tuple[int, int, str], _Output] = field(default_factory=dict)
    _printing: tuple[int, int, str] | None = None

    def __post_init__(self) -> None:
        self._began = self.clock()

    def show(self, event: Event) -> None:
        """Take one event."""
        if isinstance(event, PhaseStarted):
            self._phase = event.phase
        for line in self._lines(event):
            text = f"{self.clock() - self._began:7.1f}s  {line}"
            self.err.write(encodable(text, self.err) + "\n")
            self.err.flush()

    def close(self) -> None:
        """Nothing was drawn that could be in the way."""

    def _lines(self, event: Event) -> Iterator[str]:
        match event:
            case Step():
                yield from self._step(event)
            case StepFinished(step, elapsed_s):
                yield from self._step_end(step, elapsed_s)
            case Log(_, stream):
                if stream != "engine":
                    yield from self._output(event)
            case Progress():
                yield from self._how_far(event)
            case Transport(kind, endpoint, handshake_s, why):
                because = f" ({plain(why)})" if why else ""
                took = f"handshake {handshake_s * 1000:.0f} ms"
                yield f"{self._phase:<10} {kind} {plain(endpoint)}, {took}{because}"
            case _:
                yield from said(event)

    def _step(self, event: Step) -> Iterator[str]:
        if event.cached:
            yield f"{self._phase:<10} step {event.number}/{event.total} is cached"
        else:
            self._printing = key(event)
            yield f"{self._phase:<10} step {event.number}/{event.total} {plain(event.name)}"

    def _step_end(self, step: Step, elapsed_s: float) -> Iterator[str]:
        where = f"{self._phase:<10} step {step.number}/{step.total}"
        output = self._outputs.pop(key(step), None)
        if output is not None and output.dropped:
            yield f"{where}: {output.dropped} lines of its output were not shown"
        if elapsed_s >= TELLING_S:
            yield f"{where} took {elapsed_s:.1f} s"

    def _output(self, event: Log) -> Iterator[str]:
        text = plain(event.text)
        whose = None if event.step is None else key(event.step)
        number = ""
        if event.step is not None and whose is not None:
            output = self._outputs.setdefault(whose, _Output())
            if not output.takes(text):
                if output.dropped == 1:
                    where = f"{self._phase:<10} step {event.step.number}/{event.step.total}"
                    yield f"{where}: the rest of its output is not shown (--output ndjson has it)"
                return
            if whose != self._printing:
                # Steps that run side by side; which one this is cannot be seen from the line above.
                number = f"[{event.step.number}/{event.step.total}] "
        yield f"{self._phase:<10} | {number}{text}"

    def _how_far(self, event: Progress) -> Iterator[str]:
        now = self.clock()
        last = self._progress_at.setdefault(event.phase, now)
        if now - last < PROGRESS_EVERY_S:
            return
        self._progress_at[event.phase] = now
        yield how_far(event)


def key(step: Step) -> tuple[int, int, str]:
    """What tells a step from others, whether it was cached or not."""
    return step.number, step.total, step.name


def how_far(event: Progress) -> str:
    """One line about a transfer."""
    total = f" of {amount(event.total, event.unit)}" if event.total else ""
    return f"{event.phase:<10} {amount(event.done, event.unit)}{total}"


def warning(event: Warned) -> str:
    """One line about something that stops nothing."""
    return f"warning    {plain(event.message)} [{event.id}]"


def said(event: Event) -> Iterator[str]:
    """What is told in the same words wherever it is told; nothing for other events."""
    match event:
        case PhaseStarted() | PhaseReason() | PhaseFinished() | PhaseFailed():
            yield _phase_line(event)
        case Retry(phase, attempt, cause, wait_s):
            yield f"{phase:<10} try {attempt}: {plain(cause)}; again in {wait_s:.1f} s"
        case Warned():
            yield warning(event)
        case ContextWeighed():
            yield from _weighed(event)
        case Rebuilt():
            yield _rebuilt(event)
        case _:
            return


def _phase_line(event: PhaseStarted | PhaseReason | PhaseFinished | PhaseFailed) -> str:
    match event:
        case PhaseStarted(phase, limit_s):
            limit = "" if limit_s is None else f" (at most {limit_s:.0f} s)"
            return f"{phase:<10} ...{limit}"
        case PhaseReason(phase, reason):
            return f"{phase:<10} {plain(reason)}"
        case PhaseFinished(phase, elapsed_s, outcome):
            return f"{phase:<10} done in {elapsed_s:.1f} s: {plain(outcome)}"
        case PhaseFailed(phase, elapsed_s, error):
            how = "failed" if isinstance(error, Exception) else "stopped"
            return f"{phase:<10} {how} after {elapsed_s:.1f} s"


def _weighed(event: ContextWeighed) -> Iterator[str]:
    if event.octets < HEAVY:
        return
    unused = ""
    if event.unused * 100 >= event.octets:
        unused = f", {amount(event.unused, 'bytes')} of it out of reach of every COPY and ADD"
    yield f"{'context':<10} {amount(event.octets, 'bytes')} in {event.files} files{unused}"
    for path, octets in event.largest:
        yield f"{'context':<10} {amount(octets, 'bytes'):>10}  {plain(path)}"


def _rebuilt(event: Rebuilt) -> str:
    step = event.step
    what = f"step {step.number}/{step.total} {plain(step.name)} was not cached: {event.cause}"
    if event.paths:
        more = f" and {event.more} more" if event.more else ""
        what += f": {', '.join(map(plain, event.paths))}{more}"
    if event.cost_s >= WORTH_S:
        what += f"; that cost {event.cost_s:.1f} s"
    return f"{'cache':<10} {what}"

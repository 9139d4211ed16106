"""The only place that prints: events as lines on stderr, results on stdout.

text    lines on stderr as things happen, the result on stdout
json    lines on stderr, and one object on stdout at the end
ndjson  one object per event on stdout, `result` always the last; nothing else on stderr
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from builder_orch.cli.lines import Display, Lines
from builder_orch.cli.streams import give_up
from builder_orch.cli.text import encodable, plain
from builder_orch.errors import Blame, BuilderOrchError, Interrupted, Terminated
from builder_orch.events import (
    ContextWeighed,
    EngineStatus,
    Event,
    Finished,
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

SCHEMA_VERSION = 1

_BLAMED = {
    Blame.YOU: "what was given (yours to correct)",
    Blame.NETWORK: "the network between here and the gateway",
    Blame.PLATFORM: "the platform",
    Blame.BUILDER: "the builder",
    Blame.REGISTRY: "the registry",
    Blame.TOOL: "fly-build",
}


def card(error: BuilderOrchError, run: str = "") -> Iterator[str]:
    """The lines of a failure: what failed, whose it is, what to do, and its id."""
    first, *more = str(error).split("\n")
    yield f"error: {plain(first)}"
    for line in more:
        yield plain(line)
    again = "; the same command may work later" if error.retryable else ""
    signalled = isinstance(error, Interrupted | Terminated)
    yield f"cause: {'a signal' if signalled else _BLAMED[error.blame]}{again}"
    yield f"next:  {plain(error.hint)}"
    yield f"id:    {error.kind}, exit code {int(error.code)}" + (f", run {run}" if run else "")


class Renderer:
    """Takes events from one run, in order and from any thread; `display` shows it meanwhile."""

    def __init__(
        self,
        mode: str,
        run: str,
        out: TextIO,
        err: TextIO,
        *,
        display: Display | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._mode = mode
        self._run = run
        self._out = out
        self._err = err
        self._display = display or Lines(err, clock)
        self._wall = wall
        self._lock = threading.Lock()
        self._seq = 0
        self._phase = ""

    def start(self, command: str) -> None:
        """The first line of machine-readable output."""
        if self._mode == "ndjson":
            self._write_json("run.start", {"command": command})

    def __call__(self, event: Event) -> None:
        """Print one event."""
        with self._lock:
            if isinstance(event, PhaseStarted):
                self._phase = event.phase
            if self._mode == "ndjson":
                self._ndjson(event)
                return
            try:
                self._show(event)
            except BrokenPipeError:
                raise
            except OSError:
                # A disk that is full, or a terminal that was closed: the run goes on without words.
                give_up(self._err)
            if isinstance(event, Finished):
                self._finish(event)

    # --- text

    def _show(self, event: Event) -> None:
        if not isinstance(event, Finished):
            self._display.show(event)
            return
        self._display.close()
        if event.error is None:
            return
        from builder_orch.cli.rawjson import RawJson

        if isinstance(self._display, RawJson):
            # Who reads objects there gets one more; text would end the parsing.
            print(json.dumps({"error": _error(event.error)}), file=self._err, flush=True)
            return
        for line in card(event.error, self._run):
            print(encodable(line, self._err), file=self._err, flush=True)

    def _finish(self, event: Finished) -> None:
        if self._mode == "json":
            print(json.dumps(self._result(event)), file=self._out, flush=True)
            return
        lines = event.values.get("lines")
        if event.ok and isinstance(lines, list):
            for line in lines:
                print(encodable(plain(str(line)), self._out), file=self._out, flush=True)

    # --- json

    def _ndjson(self, event: Event) -> None:
        kind, fields = self._fields(event)
        if isinstance(event, Finished) and event.error is not None:
            self._write_json("error", {**_error(event.error), "phase": self._phase})
        if kind:
            # What BuildKit says in its own words is told by the events that follow.
            self._write_json(kind, fields)

    def _fields(self, event: Event) -> tuple[str, dict[str, object]]:
        match event:
            case PhaseStarted() | PhaseReason() | PhaseFinished() | PhaseFailed():
                return _phase_fields(event)
            case Step() | StepFinished() | ContextWeighed() | Rebuilt():
                return _build_fields(event)
            case Log(text, stream, step):
                values = {"stream": stream, "text": text, "step": step.number if step else None}
                return "log", {"phase": self._phase, **values}
            case Progress(phase, done, total, unit):
                return "progress", {"phase": phase, "done": done, "total": total, "unit": unit}
            case Retry(phase, attempt, cause, wait_s):
                values = {"n": attempt, "cause": cause, "wait_ms": _ms(wait_s)}
                return "retry", {"phase": phase, **values}
            case Transport(kind, endpoint, handshake_s, why):
                values = {"endpoint": endpoint, "rtt_ms": _ms(handshake_s), "why": why}
                return "transport", {"kind": kind, **values}
            case Warned(name, message, line):
                return "warning", {"id": name, "message": message, "line": line or None}
            case EngineStatus():
                return "", {}
            case Finished():
                return "result", self._result(event)

    def _result(self, event: Finished) -> dict[str, object]:
        result: dict[str, object] = {
            "ok": event.ok,
            "run": self._run,
            "exit_code": event.exit_code,
            "elapsed_ms": _ms(event.elapsed_s),
        }
        result.update((name, value) for name, value in event.values.items() if name != "lines")
        if event.error is not None:
            result["error"] = _error(event.error)
        return result

    def _write_json(self, kind: str, fields: dict[str, object]) -> None:
        envelope = {
            "v": SCHEMA_VERSION,
            "t": kind,
            "run": self._run,
            "seq": self._seq,
            "at_ms": _ms(self._wall()),
        }
        self._seq += 1
        # ASCII only, so that no terminal or parser can be upset by what a build printed.
        print(json.dumps({**fields, **envelope}), file=self._out, flush=True)


def _phase_fields(
    event: PhaseStarted | PhaseReason | PhaseFinished | PhaseFailed,
) -> tuple[str, dict[str, object]]:
    match event:
        case PhaseStarted(phase, limit_s):
            return "phase.start", {"phase": phase, "limit_ms": _ms(limit_s)}
        case PhaseReason(phase, reason):
            return "phase.reason", {"phase": phase, "reason": reason}
        case PhaseFinished(phase, elapsed_s, outcome):
            values = {"ok": True, "elapsed_ms": _ms(elapsed_s), "outcome": outcome}
            return "phase.end", {"phase": phase, **values}
        case PhaseFailed(phase, elapsed_s, error):
            kind = error.kind if isinstance(error, BuilderOrchError) else type(error).__name__
            values = {"ok": False, "elapsed_ms": _ms(elapsed_s), "error": kind}
            return "phase.end", {"phase": phase, **values}


def _build_fields(
    event: Step | StepFinished | ContextWeighed | Rebuilt,
) -> tuple[str, dict[str, object]]:
    match event:
        case Step(number, total, name, cached):
            return "step", {"number": number, "total": total, "name": name, "cached": cached}
        case StepFinished(step, elapsed_s):
            return "step.end", {**_step_fields(step), "elapsed_ms": _ms(elapsed_s)}
        case ContextWeighed(files, octets, largest, unused):
            paths = [{"path": path, "bytes": size} for path, size in largest]
            sizes = {"files": files, "bytes": octets, "unused_bytes": unused}
            return "context", {**sizes, "largest": paths}
        case Rebuilt(step, cause, paths, more, cost_s):
            why = {"cause": cause, "paths": list(paths), "more": more, "cost_ms": _ms(cost_s)}
            return "cache.miss", {**_step_fields(step), **why}


def _step_fields(step: Step) -> dict[str, object]:
    return {"number": step.number, "total": step.total, "name": step.name}


def _error(error: BuilderOrchError) -> dict[str, object]:
    return {
        "id": error.kind,
        "class": type(error).__name__,
        "message": str(error),
        "blame": error.blame.value,
        "retryable": error.retryable,
        "hint": error.hint,
        "exit_code": int(error.code),
    }


def _ms(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1000)

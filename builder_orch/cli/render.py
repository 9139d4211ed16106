"""The only place that prints: events as lines on stderr, results on stdout.

text    lines on stderr as things happen, the result on stdout
json    lines on stderr, and one object on stdout at the end
ndjson  one object per event on stdout, `result` always the last; nothing else on stderr
"""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO
from unicodedata import category

from builder_orch.errors import Blame, BuilderOrchError, Interrupted, Terminated
from builder_orch.events import (
    Event,
    Finished,
    Log,
    PhaseFailed,
    PhaseFinished,
    PhaseReason,
    PhaseStarted,
    Progress,
    Retry,
    Step,
    Transport,
    Warned,
)

SCHEMA_VERSION = 1
PROGRESS_EVERY_S = 5.0
"""Between two lines that only say how far something has come."""
LINE_LIMIT = 4000
"""Characters of one line that somebody else wrote."""

_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?"
    r"|\x1b[ -/]*[0-~]"
)
_REORDERING = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_BLAMED = {
    Blame.YOU: "what was given (yours to correct)",
    Blame.NETWORK: "the network between here and the gateway",
    Blame.PLATFORM: "the platform",
    Blame.BUILDER: "the builder",
    Blame.REGISTRY: "the registry",
    Blame.TOOL: "fly-build",
}


def plain(text: str) -> str:
    """Somebody else's text on one line, unable to move the cursor, recolour or reorder anything."""
    # A progress bar draws over itself: what it showed last is what counts.
    text = _ESCAPES.sub("", text).rstrip("\r\n")
    text = text.rpartition("\r")[2]
    if not (text.isascii() and text.isprintable()):
        text = "".join(map(_visible, text))
    return text if len(text) <= LINE_LIMIT else text[: LINE_LIMIT - 3] + "..."


def _visible(char: str) -> str:
    if char == "\t":
        return "    "
    if category(char) in {"Cc", "Cs", "Zl", "Zp"} or char in _REORDERING:
        return f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}"
    return char


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
    """Takes events from one run, in order and from any thread."""

    def __init__(
        self,
        mode: str,
        run: str,
        out: TextIO,
        err: TextIO,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._mode = mode
        self._run = run
        self._out = out
        self._err = err
        self._clock = clock
        self._wall = wall
        self._began = clock()
        self._lock = threading.Lock()
        self._seq = 0
        self._phase = ""
        self._progress_at: dict[str, float] = {}

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
            elif isinstance(event, Finished):
                self._finish(event)
            else:
                for line in self._lines(event):
                    self._say(line)

    # --- text

    def _say(self, line: str) -> None:
        text = f"{self._clock() - self._began:7.1f}s  {line}"
        print(_encodable(text, self._err), file=self._err, flush=True)

    def _lines(self, event: Event) -> Iterator[str]:
        match event:
            case PhaseStarted() | PhaseReason() | PhaseFinished() | PhaseFailed():
                yield _phase_line(event)
            case Step():
                yield from self._step(event)
            case Log(text, stream):
                if stream != "engine":
                    yield f"{self._phase:<10} | {plain(text)}"
            case Progress():
                yield from self._how_far(event)
            case Retry(phase, attempt, cause, wait_s):
                yield f"{phase:<10} try {attempt}: {plain(cause)}; again in {wait_s:.1f} s"
            case Transport(kind, endpoint, handshake_s, why):
                because = f" ({plain(why)})" if why else ""
                took = f"handshake {handshake_s * 1000:.0f} ms"
                yield f"{self._phase:<10} {kind} {plain(endpoint)}, {took}{because}"
            case Warned(name, message):
                yield f"warning    {plain(message)} [{name}]"
            case Finished():
                return

    def _step(self, event: Step) -> Iterator[str]:
        if event.cached:
            yield f"{self._phase:<10} step {event.number}/{event.total} is cached"
        else:
            yield f"{self._phase:<10} step {event.number}/{event.total} {plain(event.name)}"

    def _how_far(self, event: Progress) -> Iterator[str]:
        now = self._clock()
        last = self._progress_at.setdefault(event.phase, now)
        if now - last < PROGRESS_EVERY_S:
            return
        self._progress_at[event.phase] = now
        total = f" of {_amount(event.total, event.unit)}" if event.total else ""
        yield f"{event.phase:<10} {_amount(event.done, event.unit)}{total}"

    def _finish(self, event: Finished) -> None:
        if event.error is not None:
            for line in card(event.error, self._run):
                print(_encodable(line, self._err), file=self._err, flush=True)
        if self._mode == "json":
            print(json.dumps(self._result(event)), file=self._out, flush=True)
            return
        lines = event.values.get("lines")
        if event.ok and isinstance(lines, list):
            for line in lines:
                print(_encodable(plain(str(line)), self._out), file=self._out, flush=True)

    # --- json

    def _ndjson(self, event: Event) -> None:
        kind, fields = self._fields(event)
        if isinstance(event, Finished) and event.error is not None:
            self._write_json("error", {**_error(event.error), "phase": self._phase})
        self._write_json(kind, fields)

    def _fields(self, event: Event) -> tuple[str, dict[str, object]]:
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
            case Step(number, total, name, cached):
                return "step", {"number": number, "total": total, "name": name, "cached": cached}
            case Log(text, stream):
                return "log", {"phase": self._phase, "stream": stream, "text": text}
            case Progress(phase, done, total, unit):
                return "progress", {"phase": phase, "done": done, "total": total, "unit": unit}
            case Retry(phase, attempt, cause, wait_s):
                values = {"n": attempt, "cause": cause, "wait_ms": _ms(wait_s)}
                return "retry", {"phase": phase, **values}
            case Transport(kind, endpoint, handshake_s, why):
                values = {"endpoint": endpoint, "rtt_ms": _ms(handshake_s), "why": why}
                return "transport", {"kind": kind, **values}
            case Warned(name, message):
                return "warning", {"id": name, "message": message}
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


def _amount(count: int, unit: str) -> str:
    return f"{count / 1e6:.1f} MB" if unit == "bytes" else f"{count} {unit}"


def _encodable(text: str, stream: TextIO) -> str:
    """What the stream can take: a terminal without UTF-8 must not end a deploy."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)

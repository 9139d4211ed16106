"""A run drawn on a terminal: what is over scrolls by, what goes on is below it and redrawn."""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from builder_orch.cli.lines import how_far, key, said
from builder_orch.cli.text import amount, encodable, plain
from builder_orch.events import (
    Event,
    Log,
    PhaseFailed,
    PhaseFinished,
    PhaseReason,
    PhaseStarted,
    Progress,
    Retry,
    Step,
    StepFinished,
    Transport,
    Warned,
)

EVERY_S = 0.125
"""Between two drawings."""
TAIL = 5
"""Lines of a running step that can be seen."""
SPARE = 2
"""Rows of the terminal that are left alone, so that drawing never scrolls."""
SMALLEST = (20, 5)
"""Columns and rows below which nothing is drawn."""

_MARKS = {"done": "✓", "cached": "=", "running": "▸", "failed": "✗"}
_ASCII = {"done": "+", "cached": "=", "running": ">", "failed": "x"}
_STYLES = {"done": "green", "cached": "cyan", "running": "bold", "failed": "red"}


@dataclass(slots=True)
class _Running:
    """A step that is under way."""

    step: Step
    began: float
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL))


@dataclass(slots=True)
class _Transfer:
    """Octets on their way, and when the first of them were seen."""

    event: Progress
    began: float
    first: int


class Screen:
    """Draws on `err`, a terminal; `tick` draws anew and is called from a thread or by a test."""

    def __init__(
        self,
        err: TextIO,
        variables: Mapping[str, str],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._err = err
        self._clock = clock
        self._console = Console(
            file=err,
            force_terminal=True,
            legacy_windows=False,
            no_color=bool(variables.get("NO_COLOR")) or variables.get("CLICOLOR") == "0",
            highlight=False,
            markup=False,
            emoji=False,
            _environ={name: variables[name] for name in ("TERM", "COLORTERM") if name in variables},
        )
        utf8 = "utf" in (getattr(err, "encoding", None) or "").lower()
        self._marks = _MARKS if utf8 else _ASCII
        # The model is read by the thread that draws. Nothing is printed while it is held: rich has
        # a lock of its own, which that thread holds when it asks.
        self._lock = threading.Lock()
        self._phase = ""
        self._began = clock()
        self._reason = ""
        self._transfer: _Transfer | None = None
        self._running: dict[tuple[int, int, str], _Running] = {}
        self._closed = False
        self._fit()
        self._live = Live(
            console=self._console,
            get_renderable=self._drawn,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="crop",
        )
        self._live.start()

    def show(self, event: Event) -> None:
        """Take one event; what is over is printed for good."""
        with self._lock:
            over = self._take(event)
        for line in over:
            self._console.print(line, soft_wrap=True)

    def tick(self) -> None:
        """Draw what goes on, in the size that the terminal has now."""
        if not self._closed:
            self._fit()
            self._live.refresh()

    def close(self) -> None:
        """Take away what was drawn and give the cursor back."""
        if not self._closed:
            self._closed = True
            self._live.stop()

    def _fit(self) -> None:
        try:
            size = os.get_terminal_size(self._err.fileno())
        except (OSError, ValueError):
            return
        if size.columns and size.lines:
            self._console.size = size

    def _take(self, event: Event) -> list[Text]:
        match event:
            case PhaseStarted(phase):
                self._phase, self._began, self._reason = phase, self._clock(), ""
                self._transfer = None
                return []
            case PhaseReason(_, reason):
                self._reason = plain(reason)
                return []
            case PhaseFinished(phase, elapsed_s, outcome):
                self._transfer = None
                return [self._mark("done", f"{phase:<10} {plain(outcome)}", elapsed_s)]
            case PhaseFailed(phase, elapsed_s):
                self._transfer = None
                return [self._mark("failed", f"{phase:<10}", elapsed_s)]
            case Step() | StepFinished() | Log():
                return self._take_step(event)
            case Progress():
                self._take_transfer(event)
                return []
            case Transport(kind, endpoint, handshake_s, why):
                because = f" ({plain(why)})" if why else ""
                line = f"{self._phase:<10} {kind} {plain(endpoint)}{because}"
                return [self._mark("done", line, handshake_s)]
            case _:
                style = "yellow" if isinstance(event, Warned | Retry) else ""
                return [self._line(f"  {line}", style) for line in said(event)]

    def _take_step(self, event: Step | StepFinished | Log) -> list[Text]:
        match event:
            case Step(number, total, name, cached):
                if not cached:
                    self._running.setdefault(key(event), _Running(event, self._clock()))
                    return []
                self._running.pop(key(event), None)
                return [self._mark("cached", f"[{number}/{total}] {plain(name)}  cached")]
            case StepFinished(step, elapsed_s):
                self._running.pop(key(step), None)
                line = f"[{step.number}/{step.total}] {plain(step.name)}"
                return [self._mark("done", line, elapsed_s)]
            case Log(text, stream, of):
                found = self._running.get(key(of)) if of is not None else None
                if found is not None and stream != "engine":
                    found.tail.append(plain(text))
                return []

    def _take_transfer(self, event: Progress) -> None:
        if self._transfer is None or self._transfer.event.phase != event.phase:
            self._transfer = _Transfer(event, self._clock(), event.done)
        self._transfer.event = event

    def _drawn(self) -> Group:
        """What goes on, from the thread that draws: never wider or higher than the terminal."""
        columns, rows = self._console.size
        with self._lock:
            lines = self._going_on(self._clock())
        if (columns, rows) < SMALLEST or rows < SMALLEST[1]:
            return Group()
        room = rows - SPARE
        if len(lines) > room:
            lines = [*lines[: room - 1], self._line(f"  and {len(lines) - room + 1} more lines")]
        for line in lines:
            line.truncate(columns - 1, overflow="ellipsis")
        return Group(*lines)

    def _going_on(self, now: float) -> list[Text]:
        lines: list[Text] = []
        for running in self._running.values():
            step = running.step
            line = f"[{step.number}/{step.total}] {plain(step.name)}"
            lines.append(self._mark("running", line, now - running.began))
            lines += [self._line(f"    {text}", "dim") for text in running.tail]
        if self._phase:
            doing = self._reason
            if self._transfer is not None:
                doing = self._rate(self._transfer, now)
            line = f"{self._phase:<10} {doing}"
            lines.append(self._mark("running", line, now - self._began))
        return lines

    def _rate(self, transfer: _Transfer, now: float) -> str:
        event, elapsed_s = transfer.event, now - transfer.began
        moved = event.done - transfer.first
        line = how_far(event)[11:]
        if elapsed_s > 0 and moved > 0:
            line += f", {amount(round(moved / elapsed_s), event.unit)}/s"
        return line

    def _mark(self, kind: str, line: str, elapsed_s: float | None = None) -> Text:
        """A line with its mark, and how long it has taken or took."""
        made = Text(no_wrap=True)
        made.append(f"{self._marks[kind]} ", _STYLES[kind])
        made.append(encodable(line.rstrip(), self._err))
        if elapsed_s is not None:
            made.append(f"  {elapsed_s:.1f}s", "dim")
        return made

    def _line(self, text: str, style: str = "") -> Text:
        return Text(encodable(text, self._err), style, no_wrap=True)


class Drawing:
    """A screen that is drawn anew by a thread of its own until it is closed."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._draw, name="fly-build-screen", daemon=True)
        self._thread.start()

    def show(self, event: Event) -> None:
        """Take one event."""
        self._screen.show(event)

    def close(self) -> None:
        """End the thread, then leave the terminal as it was."""
        self._stop.set()
        self._thread.join()
        self._screen.close()

    def _draw(self) -> None:
        while not self._stop.wait(EVERY_S):
            try:
                self._screen.tick()
            except OSError:
                # The terminal went away; whoever prints next finds out in its own time.
                return

"""What the engine says while it builds, as the project's events, and what is left when it fails."""

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from builder_orch.buildkit.messages import (
    StatusResponse,
    Vertex,
    VertexLog,
    VertexStatus,
    VertexWarning,
)
from builder_orch.events import Event, Log, Progress, Step, StepFinished, Warned

TAIL = 50
"""Lines of every step that are kept for the report of its failure."""
TEXT_LIMIT = 64 * 1024
"""Octets of one line of output, at most; a longer one is cut into several."""
PROGRESS_STEP = 1 << 20
"""Octets between two announcements."""

_STEP = re.compile(
    r"\[(?:(?P<stage>\S.*?) +)?(?P<number>\d{1,6})/(?P<total>\d{1,6})\] (?P<name>.*)\Z"
)
_INTERNAL = re.compile(r"\[(internal|auth)\] ")
_STREAMS = {1: "stdout", 2: "stderr"}


@dataclass(slots=True)
class Work:
    """One vertex as it was last heard of; `number` 0 for what is no step of the Dockerfile."""

    name: str
    step: Step | None
    announced: bool = False
    cached: bool = False
    completed: bool = False
    error: str = ""
    began_ns: int | None = None
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL))
    pending: dict[int, bytes] = field(default_factory=dict)


@dataclass(slots=True)
class Watching:
    """Turns a status stream into events."""

    phase: str = "build"
    works: dict[str, Work] = field(default_factory=dict)
    _how_far: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    _said: int = 0
    _warned: set[tuple[str, int]] = field(default_factory=set)

    def take(self, status: StatusResponse) -> Iterator[Event]:
        """What is new."""
        for vertex in status.vertices:
            yield from self._vertex(vertex)
        for log in status.logs:
            yield from self._log(log)
        for one in status.statuses:
            yield from self._progress(one)
        for warning in status.warnings:
            yield from self._warning(warning)

    def finish(self) -> Iterator[Event]:
        """Lines that nothing ended."""
        for work in self.works.values():
            for stream in list(work.pending):
                yield from _lines(work, stream, b"\n")

    @property
    def failed(self) -> Work | None:
        """The work that failed: not those that were only given up because of it."""
        broken = [work for work in self.works.values() if work.error]
        own = [work for work in broken if "context canceled" not in work.error]
        return next(iter(own or broken), None)

    def _vertex(self, vertex: Vertex) -> Iterator[Event]:
        work = self.works.get(vertex.digest)
        if work is None:
            work = self.works[vertex.digest] = Work(vertex.name, _step(vertex.name))
        begun = vertex.started_ns is not None and not work.announced
        cached = vertex.cached and not work.cached
        work.cached = work.cached or vertex.cached
        if vertex.started_ns is not None and work.began_ns is None:
            work.began_ns = vertex.started_ns
        if begun or cached:
            work.announced = True
            if work.step is not None:
                step = work.step
                yield Step(step.number, step.total, step.name, work.cached, step.stage)
            elif begun and not _INTERNAL.match(work.name):
                yield Log(work.name, "engine")
        if vertex.completed_ns is not None and not work.completed:
            work.completed = True
            for stream in list(work.pending):
                yield from _lines(work, stream, b"\n")
            if work.step is not None and not work.cached:
                # The clock of a machine that was just woken may go backwards.
                took_ns = max(0, vertex.completed_ns - (work.began_ns or vertex.completed_ns))
                yield StepFinished(work.step, took_ns / 1e9)
        work.error = vertex.error or work.error

    def _log(self, log: VertexLog) -> Iterator[Event]:
        work = self.works.get(log.vertex)
        if work is None:
            work = self.works[log.vertex] = Work("", None)
        yield from _lines(work, log.stream, log.octets)

    def _progress(self, status: VertexStatus) -> Iterator[Event]:
        if status.total <= 0 or status.vertex not in self.works:
            return
        self._how_far[status.vertex, status.name] = (status.current, status.total)
        done = sum(current for current, _ in self._how_far.values())
        if done - self._said >= PROGRESS_STEP:
            self._said = done
            total = sum(max(pair) for pair in self._how_far.values())
            yield Progress(self.phase, done, total)

    def _warning(self, warning: VertexWarning) -> Iterator[Event]:
        key = (warning.message, warning.line)
        if key not in self._warned:
            self._warned.add(key)
            where = f"Dockerfile line {warning.line}: " if warning.line else ""
            more = f" ({warning.url})" if warning.url else ""
            yield Warned("dockerfile", f"{where}{warning.message}{more}", warning.line)


def _step(name: str) -> Step | None:
    found = _STEP.match(name)
    if found is None:
        return None
    stage = found["stage"]
    shown = (
        f"{found['name']} ({stage})" if stage and not stage.startswith("stage-") else found["name"]
    )
    return Step(int(found["number"]), int(found["total"]), shown, stage=stage or "")


def _lines(work: Work, stream: int, octets: bytes) -> Iterator[Event]:
    """Whole lines; a letter that was cut in two on the way is put together again."""
    *whole, rest = (work.pending.pop(stream, b"") + octets).split(b"\n")
    while len(rest) > TEXT_LIMIT:
        whole.append(rest[:TEXT_LIMIT])
        rest = rest[TEXT_LIMIT:]
    if rest:
        work.pending[stream] = rest
    for line in whole:
        for at in range(0, max(1, len(line)), TEXT_LIMIT):
            text = line[at : at + TEXT_LIMIT].decode("utf-8", "replace").rstrip("\r")
            if text.strip():
                work.tail.append(text)
                yield Log(text, _STREAMS.get(stream, "stdout"), work.step)

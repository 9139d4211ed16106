"""The JSON messages of an engine that builds or pushes: octets in, events and evidence out."""

import json
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from builder_orch.events import Event, Log, PhaseReason, Progress, Step, StepFinished

LINE_LIMIT = 32 * 1024 * 1024
"""Octets of one message, at most; a longer one is not kept."""
TEXT_LIMIT = 64 * 1024
"""Characters of one line of output, at most; a longer one is cut into several."""
TAIL = 50
"""Lines of output that are kept for the report of a failing step."""
PROGRESS_STEP = 1 << 20
"""Octets between two announcements of how far a push has come."""

DENIED = re.compile(
    r"\bdenied\b|unauthorized|no basic auth credentials|authentication required|forbidden"
    r"|insufficient_scope|HTTP status:? 40[13]",
    re.IGNORECASE,
)
"""How an engine says that a registry turned us away."""

_STEP = re.compile(r"Step (\d{1,6})/(\d{1,6}) : (.*)\Z")
_RETRYING = re.compile(r"Retrying in (\d{1,6}) seconds?\Z")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_IMAGE_ID = re.compile(r"sha256:[0-9a-f]{64}\Z")
_EXIT_CODE = re.compile(r"returned a non-zero code: (\d{1,10})")
_ENGINE_SPEAKS = (
    " ---> ",
    "Removing intermediate container ",
    "Successfully built ",
    "Successfully tagged ",
)

Message = dict[str, object]


@dataclass(slots=True)
class Lines:
    """Cuts a stream into messages, however it was cut into pieces on the way.

    What is no JSON object is dropped and counted: only evidence makes a success.
    """

    garbage: int = 0
    _pending: bytearray = field(default_factory=bytearray)
    _searched: int = 0
    _skipping: bool = False

    def feed(self, octets: bytes) -> Iterator[Message]:
        """The messages that are complete now."""
        self._pending += octets
        while (end := self._pending.find(b"\n", self._searched)) >= 0:
            line = bytes(self._pending[:end])
            del self._pending[: end + 1]
            self._searched = 0
            if self._skipping:
                self._skipping = False
                continue
            yield from self._message(line)
        self._searched = len(self._pending)
        if self._searched > LINE_LIMIT:
            self.garbage += not self._skipping
            self._skipping = True
            self._pending.clear()
            self._searched = 0

    def rest(self) -> Iterator[Message]:
        """A last message that nothing ended."""
        line = bytes(self._pending)
        self._pending.clear()
        self._searched = 0
        if not self._skipping:
            yield from self._message(line)

    def _message(self, line: bytes) -> Iterator[Message]:
        if not line.strip():
            return
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            self.garbage += 1
            return
        if isinstance(message, dict):
            yield message
        else:
            self.garbage += 1


@dataclass(frozen=True, slots=True)
class Failure:
    """What the engine said went wrong, and the code of the program that failed, if one did."""

    message: str
    code: int | None = None


@dataclass(slots=True)
class BuildMessages:
    """What a build says. `image_id` is the only sign of success, `failure` beats it."""

    image_id: str = ""
    failure: Failure | None = None
    step: Step | None = None
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL))
    lines: Lines = field(default_factory=Lines)
    _text: str = ""

    def feed(self, octets: bytes) -> Iterator[Event]:
        """Take what arrived; what can be told of it."""
        for message in self.lines.feed(octets):
            yield from self._take(message)

    def finish(self) -> Iterator[Event]:
        """The stream ended; what was still incomplete counts as it is."""
        for message in self.lines.rest():
            yield from self._take(message)
        if self._text:
            yield from self._line(self._text)
            self._text = ""

    def _take(self, message: Message) -> Iterator[Event]:
        failure = failure_of(message)
        if failure is not None:
            self.failure = self.failure or failure
        match message.get("aux"):
            case {"ID": str(found)} if _IMAGE_ID.match(found):
                self.image_id = found
            case _:
                pass
        stream = message.get("stream")
        if isinstance(stream, str):
            yield from self._output(stream)
        status = message.get("status")
        if isinstance(status, str) and not message.get("progressDetail"):
            layer = message.get("id")
            text = f"{layer}: {status}" if isinstance(layer, str) else status
            yield Log(text[:TEXT_LIMIT], "engine")

    def _output(self, text: str) -> Iterator[Event]:
        *whole, self._text = (self._text + text).split("\n")
        for line in whole:
            yield from self._line(line)
        while len(self._text) > TEXT_LIMIT:
            yield from self._line(self._text[:TEXT_LIMIT])
            self._text = self._text[TEXT_LIMIT:]

    def _line(self, text: str) -> Iterator[Event]:
        for start in range(0, max(1, len(text)), TEXT_LIMIT):
            yield from self._piece(text[start : start + TEXT_LIMIT])

    def _piece(self, text: str) -> Iterator[Event]:
        # The engine reddens what a step writes to stderr, and the line after it begins with the end
        # of that colour.
        bare = _COLOUR.sub("", text)
        begun = _STEP.match(bare)
        if begun is not None:
            self.step = Step(int(begun[1]), int(begun[2]), begun[3])
            self.tail.clear()
            yield self.step
        elif bare == " ---> Using cache" and self.step is not None:
            self.step = Step(self.step.number, self.step.total, self.step.name, cached=True)
            yield self.step
        elif bare.startswith(_ENGINE_SPEAKS):
            yield Log(bare, "engine")
        elif bare.strip():
            self.tail.append(bare)
            yield Log(text, step=self.step)


@dataclass(slots=True)
class StepTimes:
    """Says when the steps of a classic build end: when the next begins, or the build ends."""

    clock: Callable[[], float]
    _step: Step | None = None
    _began: float = 0.0

    def take(self, event: Event) -> Iterator[Event]:
        """The event, and before it the end of a step if it means that."""
        if isinstance(event, Step):
            if event.cached:
                self._step = None
            else:
                yield from self.finish()
                self._step, self._began = event, self.clock()
        yield event

    def finish(self) -> Iterator[Event]:
        """There are no more steps."""
        if self._step is not None:
            yield StepFinished(self._step, self.clock() - self._began)
            self._step = None


@dataclass(slots=True)
class PushMessages:
    """What a push says. `digest` is the registry's answer to the manifest."""

    digest: str = ""
    failure: Failure | None = None
    lines: Lines = field(default_factory=Lines)
    _layers: dict[str, tuple[int, int]] = field(default_factory=dict)
    _said: int = -1
    _countdown: int = 0

    def feed(self, octets: bytes) -> Iterator[Event]:
        """Take what arrived; what can be told of it."""
        for message in self.lines.feed(octets):
            yield from self._take(message)

    def finish(self) -> Iterator[Event]:
        """The stream ended."""
        for message in self.lines.rest():
            yield from self._take(message)

    def _take(self, message: Message) -> Iterator[Event]:
        failure = failure_of(message)
        if failure is not None:
            self.failure = self.failure or failure
        match message:
            case {"aux": {"Digest": str(digest)}} if _IMAGE_ID.match(digest):
                self.digest = digest
            case {"id": str(layer), "progressDetail": {"current": int(done), **more}}:
                total = more.get("total")
                size = max(done, total) if isinstance(total, int) else done
                self._layers[layer] = (done, size)
                yield from self._progress()
            case {"status": str(status)}:
                yield from self._repetition(status)
            case _:
                pass

    def _repetition(self, status: str) -> Iterator[Event]:
        """The engine repeats what failed for up to a minute; it counts down, and that is all."""
        found = _RETRYING.match(status)
        if found is None:
            return
        left_s = int(found[1])
        if left_s > self._countdown + 1:
            yield PhaseReason(
                "push", f"the registry did not take a layer; the engine tries again in {left_s} s"
            )
        self._countdown = left_s

    def _progress(self) -> Iterator[Event]:
        done = sum(done for done, _ in self._layers.values())
        if done - self._said >= PROGRESS_STEP or self._said < 0:
            self._said = done
            yield Progress("push", done, sum(size for _, size in self._layers.values()))


def failure_of(message: Message) -> Failure | None:
    """The failure that a message tells of; `message` alone is the body of an HTTP error."""
    detail = message.get("errorDetail")
    said: object = None
    code: object = None
    if isinstance(detail, dict):
        said, code = detail.get("message"), detail.get("code")
    said = said or message.get("error") or message.get("message")
    if not said and detail is None and "error" not in message:
        return None
    text = said if isinstance(said, str) and said else "the engine failed without a reason"
    found = _EXIT_CODE.search(text)
    if found is not None:
        return Failure(text, int(found[1]))
    return Failure(text, code if isinstance(code, int) and code else None)

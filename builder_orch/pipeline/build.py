"""Send the context, then build: two phases of one request."""

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import ClassVar

from builder_orch.errors import (
    BuilderFull,
    BuilderLost,
    BuilderOrchError,
    BuildFailed,
    DockerfileInvalid,
)
from builder_orch.events import Emit, Progress, Warned
from builder_orch.pipeline.context import Context, readable
from builder_orch.pipeline.engine import Engine, Recipe, Refused
from builder_orch.pipeline.line import Line
from builder_orch.pipeline.messages import BuildMessages, Failure
from builder_orch.pipeline.pack import archive, archive_size
from builder_orch.pipeline.thread import Relay

PROGRESS_EVERY_S = 0.5
OUT_OF_MEMORY = 137
"""What a program exits with when the kernel kills it, as it does for want of memory."""

_BAD_DOCKERFILE = re.compile(
    r"dockerfile parse error|unknown instruction|target stage|build target|requires buildkit"
    r"|cannot locate specified dockerfile|the dockerfile .*cannot be empty|syntax error",
    re.IGNORECASE,
)
_FULL = re.compile(r"no space left on device", re.IGNORECASE)
_HINTS = (
    (
        re.compile(r"stat \S+: (file does not exist|no such file)|no source files", re.IGNORECASE),
        "Check that the path is in the build context and not in .dockerignore.",
    ),
    (
        re.compile(r"pull access denied|manifest unknown|manifest for .* not found", re.IGNORECASE),
        "Check the name of the image in FROM, and whether it is public.",
    ),
    (
        re.compile(r"dial tcp|i/o timeout|TLS handshake|no such host", re.IGNORECASE),
        "The builder cannot reach that registry: build FROM an image that it can reach.",
    ),
)
_CUT = re.compile(r"processing tar|unexpected EOF|invalid tar header", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Sent:
    """The whole context left this machine."""

    octets: int
    elapsed_s: float

    def __str__(self) -> str:
        rate = self.octets / max(self.elapsed_s, 0.001)
        return f"{readable(self.octets)} sent, {readable(round(rate))}/s"


@dataclass(frozen=True, slots=True)
class Built:
    """An image that the engine has: its ID came with the build and was read back."""

    image_id: str
    size_bytes: int
    ports: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.image_id[:19]}, {readable(self.size_bytes)}"


@dataclass(frozen=True, slots=True)
class Building:
    """A build under way: first the context is sent, then there is an image."""

    sent: asyncio.Future[Sent]
    built: asyncio.Task[Built]


@dataclass(frozen=True, slots=True)
class Send:
    """Wait until the engine has the whole context."""

    name: ClassVar[str] = "context"

    async def run(self, given: Building, emit: Emit) -> Sent:  # noqa: ARG002
        either: list[asyncio.Future[Sent] | asyncio.Future[Built]] = [given.sent, given.built]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if given.built.done():
            # Either it failed, which says why the context was not taken, or it was very quick.
            given.built.result()
        return await given.sent


@dataclass(frozen=True, slots=True)
class Build:
    """Wait for the image."""

    name: ClassVar[str] = "build"

    async def run(self, given: Building, emit: Emit) -> Built:  # noqa: ARG002
        return await given.built


@asynccontextmanager
async def building(
    engine: Engine, context: Context, recipe: Recipe, emit: Emit
) -> AsyncGenerator[Building]:
    """Begin a build; leaving the block before its end resets the upload or stops the build."""
    sent: asyncio.Future[Sent] = asyncio.get_running_loop().create_future()
    built = asyncio.create_task(_build(engine, context, recipe, sent, emit))
    try:
        yield Building(sent, built)
    finally:
        built.cancel()
        await asyncio.gather(built, return_exceptions=True)
        sent.cancel()


async def _build(
    engine: Engine, context: Context, recipe: Recipe, sent: asyncio.Future[Sent], emit: Emit
) -> Built:
    loop = asyncio.get_running_loop()
    messages = BuildMessages()
    relay = Relay(emit)

    def arrived(whole: Sent) -> None:
        if not sent.done():
            sent.set_result(whole)

    def body(line: Line) -> Iterator[bytes]:
        whole = yield from _upload(context, line, relay)
        loop.call_soon_threadsafe(arrived, whole)

    def take(octets: bytes) -> None:
        for event in messages.feed(octets):
            relay(event)

    try:
        await engine.build(recipe, body, take)
    except Refused as error:
        raise judge(messages, Failure(str(error)), status=error.status) from None
    finally:
        relay.close()
    for event in messages.finish():
        emit(event)
    if messages.lines.garbage:
        emit(Warned("engine-garbage", f"{messages.lines.garbage} messages were not understood"))
    if messages.failure is not None:
        raise judge(messages, messages.failure)
    return await _read_back(engine, messages)


def _upload(context: Context, line: Line, relay: Relay) -> Generator[bytes, None, Sent]:
    """The archive, counted; until its end was taken every end of the line is a reset."""
    line.fragile(True)
    began = said = time.monotonic()
    octets, total = 0, archive_size(context)
    for chunk in archive(context):
        yield chunk
        octets += len(chunk)
        now = time.monotonic()
        if now - said >= PROGRESS_EVERY_S:
            said = now
            relay(Progress("context", octets, max(total, octets)))
    relay(Progress("context", octets, octets))
    line.fragile(False)
    return Sent(octets, time.monotonic() - began)


async def _read_back(engine: Engine, messages: BuildMessages) -> Built:
    """Success is an ID that came with the build and that the engine knows; nothing less."""
    if not messages.image_id:
        where = f" in {_step(messages)}" if messages.step else ""
        raise BuilderLost(
            f"the build's output ended{where} without an image",
            hint="Run it again; what was built so far is cached.",
        )
    image = await engine.inspect(messages.image_id)
    if image is None or image.id != messages.image_id:
        raise BuilderLost(
            f"the builder says it built {messages.image_id}, but has no such image",
            hint="Run it again; if it stays so, the builder's disk may be damaged.",
        )
    return Built(image.id, image.size_bytes, image.ports)


def judge(messages: BuildMessages, failure: Failure, status: int = 200) -> BuilderOrchError:
    """Whose fault a failed build is, by what the engine said of it."""
    said, where = failure.message, _step(messages)
    if failure.code is not None and messages.step is not None:
        # What the engine says of a failed RUN is its command, which may hold any words.
        return _failed_step(messages, failure.code, where)
    if _FULL.search(said):
        return _full(f"{where}: {said}")
    if _BAD_DOCKERFILE.search(said):
        return DockerfileInvalid(
            f"the builder does not accept the Dockerfile: {said}", hint=_dockerfile_hint(said)
        )
    if messages.step is None and (status >= 500 or _CUT.search(said)):
        return BuilderLost(
            f"the builder could not take the build: {said}",
            hint="Run it again; if it stays so, look at the builder's own log.",
        )
    for form, hint in _HINTS:
        if form.search(said):
            return BuildFailed(f"{where}: {said}", hint=hint)
    return BuildFailed(_with_tail(f"{where} failed: {said}", messages), hint="Correct that step.")


def _full(said: str) -> BuilderFull:
    return BuilderFull(
        f"the builder's disk is full ({said})",
        hint="Prune what the builder no longer needs, or give it a larger disk.",
    )


def _failed_step(messages: BuildMessages, code: int, where: str) -> BuilderOrchError:
    if any(_FULL.search(line) for line in messages.tail):
        return _full(_with_tail(where, messages))
    hint = "The step is yours: correct it; the steps before it are cached."
    if code == OUT_OF_MEMORY:
        hint = "It was killed, perhaps for want of memory: use less, or a larger builder."
    return BuildFailed(_with_tail(f"{where} failed with exit code {code}", messages), hint=hint)


def _with_tail(headline: str, messages: BuildMessages) -> str:
    return "\n".join([headline, *(f"  | {line}" for line in messages.tail)])


def _step(messages: BuildMessages) -> str:
    step = messages.step
    if step is None:
        return "before the first step"
    return f"step {step.number}/{step.total} ({step.name[:200]})"


def _dockerfile_hint(said: str) -> str:
    if "buildkit" in said.lower():
        return "This builder has the classic engine only: write the step without BuildKit's syntax."
    return "Correct the Dockerfile at the line named above."

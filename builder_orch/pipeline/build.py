"""Send the context, then build: two phases of one request.

By BuildKit where the engine has it, which asks for what it lacks; else by the classic builder,
which takes the context whole. Which of them, and why, is said before anything is sent.
"""

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Collection, Generator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import ClassVar, Protocol

from builder_orch.buildkit.control import Unavailable, connected
from builder_orch.buildkit.http2 import Lost
from builder_orch.errors import (
    BuilderFull,
    BuilderLost,
    BuilderOrchError,
    BuildFailed,
    DockerfileInvalid,
    PushDenied,
    UsageFailure,
)
from builder_orch.events import Emit, PhaseReason, Progress, Step, Warned
from builder_orch.pipeline.abilities import beyond_classic, check_abilities
from builder_orch.pipeline.amount import readable
from builder_orch.pipeline.context import Context
from builder_orch.pipeline.dockerfile import Dockerfile
from builder_orch.pipeline.engine import BUILDKIT, CLASSIC, Engine, Recipe, Refused, lost
from builder_orch.pipeline.kit import Broken, Host, Journey, build_by_kit
from builder_orch.pipeline.line import Line
from builder_orch.pipeline.liveness import Patience, bounded
from builder_orch.pipeline.messages import DENIED, BuildMessages, Failure, StepTimes
from builder_orch.pipeline.output import Exported
from builder_orch.pipeline.outside import Logins, nobody
from builder_orch.pipeline.pack import archive, archive_size
from builder_orch.pipeline.thread import Relay

PROGRESS_EVERY_S = 0.5
OUT_OF_MEMORY = 137
"""What a program exits with when the kernel kills it, as it does for want of memory."""

_BAD_DOCKERFILE = re.compile(
    r"dockerfile parse error|unknown instruction|target stage|build target|requires buildkit"
    r"|failed to parse stage name"
    r"|cannot locate specified dockerfile|the dockerfile .*cannot be empty|syntax error",
    re.IGNORECASE,
)
_FULL = re.compile(r"no space left on device", re.IGNORECASE)
_NO_PROGRAM = (
    re.compile(r"runc create failed|unable to start container process", re.IGNORECASE),
    "The image so far lacks that program. Without /bin/sh only the form "
    '["/path/to/program", "argument"] runs, and only if it is whole JSON.',
)
_HINTS = (
    _NO_PROGRAM,
    (
        re.compile(
            r"stat \S+: (file does not exist|no such file)|no source files"
            r"|failed to (compute cache key|calculate checksum).*not found",
            re.IGNORECASE,
        ),
        "Check that the path is in the build context and not in .dockerignore.",
    ),
    (
        re.compile(r"forbidden path outside the build context", re.IGNORECASE),
        "A link leads out of the build context or in a circle: put the file itself there.",
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
_CONTEXTS = re.compile(r"unsupported frontend capability \S*contexts")
_PUSHING = re.compile(r"failed to push (\S+):")
_CUT = re.compile(r"processing tar|unexpected EOF|invalid tar header", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Sent:
    """The engine has the whole context; `whole` is how much that is, if not all of it was sent."""

    octets: int
    elapsed_s: float
    whole: int | None = None

    def __str__(self) -> str:
        rate = readable(round(self.octets / max(self.elapsed_s, 0.001)))
        of = "" if self.whole is None else f" for a context of {readable(self.whole)}"
        return f"{readable(self.octets)} sent{of}, {rate}/s"


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
    built: asyncio.Task[Built | Exported]


@dataclass(frozen=True, slots=True)
class Send:
    """Wait until the engine has the whole context."""

    name: ClassVar[str] = "context"

    async def run(self, given: Building, emit: Emit) -> Sent:  # noqa: ARG002
        either: list[asyncio.Future[Sent] | asyncio.Future[Built | Exported]] = [
            given.sent,
            given.built,
        ]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if given.built.done():
            # Either it failed, which says why the context was not taken, or it was very quick.
            given.built.result()
        return await given.sent


@dataclass(frozen=True, slots=True)
class Build:
    """Wait for the image, or for the result that is none."""

    name: ClassVar[str] = "build"

    async def run(self, given: Building, emit: Emit) -> Built | Exported:  # noqa: ARG002
        return await given.built


@asynccontextmanager
async def building(
    engine: Engine | Host,
    context: Context,
    recipe: Recipe,
    emit: Emit,
    logins: Logins = nobody,
    patience: Patience | None = None,
) -> AsyncGenerator[Building]:
    """Begin a build; leaving the block before its end resets the upload or stops the build.

    `logins` are asked for when the engine wants one for a registry that this build names.
    """
    sent: asyncio.Future[Sent] = asyncio.get_running_loop().create_future()

    async def work(emit: Emit) -> Built | Exported:
        return await _build(engine, context, recipe, sent, emit, logins)

    built = asyncio.create_task(bounded(work, patience or Patience(), emit))
    try:
        yield Building(sent, built)
    finally:
        built.cancel()
        await asyncio.gather(built, return_exceptions=True)
        sent.cancel()


async def _build(
    engine: Engine | Host,
    context: Context,
    recipe: Recipe,
    sent: asyncio.Future[Sent],
    emit: Emit,
    logins: Logins,
) -> Built | Exported:
    """Choose; what BuildKit has begun with is never begun again by the other."""
    why = "--builder classic was given"
    if recipe.builder != CLASSIC:
        try:
            return await _by_kit(engine, context, recipe, sent, emit, logins)
        except Unavailable as error:
            why = str(error)
        except Lost as error:
            raise lost("asking it for BuildKit", str(error)) from None
        if not isinstance(engine, Engine):
            raise BuilderLost(
                f"the buildkitd cannot be used: {why}",
                hint="Check its address and whether it wants TLS (--buildkit-certs).",
            )
        if recipe.builder == BUILDKIT:
            raise UsageFailure(
                f"the builder's engine has no BuildKit: {why}",
                hint="Take --builder buildkit away, or use a builder with Docker 18.09 or later.",
            )
    if not isinstance(engine, Engine):
        raise UsageFailure("a buildkitd has no classic builder", hint="Take --builder away.")
    _check_classic(context, recipe, why)
    emit(PhaseReason("context", f"classic builder, which takes the whole context: {why}"))
    return await _by_classic(engine, context, recipe, sent, emit)


async def _by_kit(
    engine: Engine | Host,
    context: Context,
    recipe: Recipe,
    sent: asyncio.Future[Sent],
    emit: Emit,
    logins: Logins,
) -> Built | Exported:
    began = time.monotonic()
    sock = await engine.connect("asking it for BuildKit")
    async with connected(sock, engine.version, engine.vigilance, engine.tls) as control:
        store = "containerd's store" if control.containerd_store else "Docker's own store"
        kind = "a buildkitd" if engine.bare else f"BuildKit with {store}"
        emit(PhaseReason("context", f"{kind}: only what changed is sent"))

        def arrived() -> None:
            if not sent.done():
                octets = control.pipe.sent
                sent.set_result(Sent(octets, time.monotonic() - began, context.size))

        store_of_containerd = control.containerd_store or engine.bare
        check_abilities(recipe, store_of_containerd, engine.version)
        journey = Journey(emit, arrived)
        try:
            made = await build_by_kit(engine, control, context, recipe, journey, logins)
        except Broken as error:
            raise judge(error, error.failure, dockerfile=context.dockerfile) from None
        arrived()
    if isinstance(made, Exported):
        return made
    if isinstance(engine, Engine):
        return await _read_back(engine, made.names, None)
    # The daemon pushed it: this is the digest that the registry took. Without a name there is none.
    return Built(made.names[0] if made.names else "", 0)


def _check_classic(context: Context, recipe: Recipe, why: str) -> None:
    """Refuse, before anything is sent, what the classic builder would stumble over or ignore."""
    hint = "Use a builder with BuildKit, or do without it."
    flags = [name for name, given in beyond_classic(recipe) if given]
    if flags:
        raise UsageFailure(f"{flags[0]} needs BuildKit, which is not to be had: {why}", hint=hint)
    if beyond := context.dockerfile.beyond_classic(recipe.target):
        raise DockerfileInvalid(
            f"{beyond} needs BuildKit, which is not to be had: {why}", hint=hint
        )


async def _by_classic(
    engine: Engine, context: Context, recipe: Recipe, sent: asyncio.Future[Sent], emit: Emit
) -> Built:
    loop = asyncio.get_running_loop()
    messages = BuildMessages()
    times = StepTimes(time.monotonic)
    relay = Relay(emit)

    def arrived(whole: Sent) -> None:
        if not sent.done():
            sent.set_result(whole)

    def body(line: Line) -> Iterator[bytes]:
        whole = yield from _upload(context, line, relay)
        loop.call_soon_threadsafe(arrived, whole)

    def take(octets: bytes) -> None:
        for event in messages.feed(octets):
            for each in times.take(event):
                relay(each)

    try:
        await engine.build(recipe, body, take)
    except Refused as error:
        raise judge(messages, Failure(str(error)), status=error.status) from None
    finally:
        relay.close()
    for event in (*messages.finish(), *times.finish()):
        emit(event)
    if messages.lines.garbage:
        emit(Warned("engine-garbage", f"{messages.lines.garbage} messages were not understood"))
    if messages.failure is not None:
        raise judge(messages, messages.failure, dockerfile=context.dockerfile)
    names = (messages.image_id,) if messages.image_id else ()
    return await _read_back(engine, names, messages.step)


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


async def _read_back(engine: Engine, names: Collection[str], step: Step | None) -> Built:
    """Success is an ID that came with the build and that the engine knows; nothing less."""
    if not names:
        where = f" in {_step(step)}" if step else ""
        raise BuilderLost(
            f"the build's output ended{where} without an image",
            hint="Run it again; what was built so far is cached.",
        )
    for name in names:
        image = await engine.inspect(name)
        if image is not None and image.id == name:
            return Built(image.id, image.size_bytes, image.ports)
    raise BuilderLost(
        f"the builder says it built {', '.join(names)}, but has no such image",
        hint="Run it again; if it stays so, the builder's disk may be damaged.",
    )


class Told(Protocol):
    """What is known of the step that a build ended in."""

    @property
    def step(self) -> Step | None:
        """The step, if it came to one."""
        ...

    @property
    def tail(self) -> Collection[str]:
        """Its last lines."""
        ...


def judge(
    told: Told, failure: Failure, status: int = 200, dockerfile: Dockerfile | None = None
) -> BuilderOrchError:
    """Whose fault a failed build is, by what the engine said of it."""
    said, where = failure.message, _step(told.step, dockerfile)
    if failure.code is not None and told.step is not None:
        # What the engine says of a failed RUN is its command, which may hold any words.
        return _failed_step(told, failure.code, where)
    if _CONTEXTS.search(said):
        return UsageFailure(
            f"--build-context needs Docker 23.0 or later on the builder: {said}",
            hint="Do without it, or begin the Dockerfile with `# syntax=docker/dockerfile:1`.",
        )
    if _FULL.search(said):
        return _full(f"{where}: {said}")
    if (pushing := _PUSHING.search(said)) and DENIED.search(said):
        return PushDenied(
            f"the registry refuses to let us push {pushing[1]}: {said}",
            hint="Log in to it (docker login), as somebody who may write there.",
        )
    if _BAD_DOCKERFILE.search(said):
        return DockerfileInvalid(
            f"the builder does not accept the Dockerfile: {said}", hint=_dockerfile_hint(said)
        )
    if told.step is None and (status >= 500 or _CUT.search(said)):
        return BuilderLost(
            f"the builder could not take the build: {said}",
            hint="Run it again; if it stays so, look at the builder's own log.",
        )
    for form, hint in _HINTS:
        if form.search(said):
            return BuildFailed(f"{where}: {said}", hint=hint)
    if told.step is None:
        return BuildFailed(f"{where}: {said}", hint="Correct what it says of the Dockerfile.")
    return BuildFailed(_with_tail(f"{where} failed: {said}", told), hint="Correct that step.")


def _full(said: str) -> BuilderFull:
    return BuilderFull(
        f"the builder's disk is full: {said}",
        hint="Throw away what is cached there: fly-build builder prune. If that is not enough, the "
        "builder needs a larger disk.",
    )


def _failed_step(told: Told, code: int, where: str) -> BuilderOrchError:
    if any(_FULL.search(line) for line in told.tail):
        return _full(_with_tail(where, told))
    hint = "The step is yours: correct it; the steps before it are cached."
    missing, what = _NO_PROGRAM
    if any(missing.search(line) for line in told.tail):
        hint = what
    elif code == OUT_OF_MEMORY:
        hint = "It was killed, perhaps for want of memory: use less, or a larger builder."
    return BuildFailed(_with_tail(f"{where} failed with exit code {code}", told), hint=hint)


def _with_tail(headline: str, told: Told) -> str:
    return "\n".join([headline, *(f"  | {line}" for line in told.tail)])


def _step(step: Step | None, dockerfile: Dockerfile | None = None) -> str:
    if step is None:
        return "before the first step"
    line = dockerfile.line_of(step.name.removesuffix(f" ({step.stage})")) if dockerfile else 0
    place = f"{dockerfile.path}:{line}: " if dockerfile and line else ""
    return f"{place}step {step.number}/{step.total} ({step.name[:200]})"


def _dockerfile_hint(said: str) -> str:
    if "buildkit" in said.lower():
        return "This builder has the classic engine only: write the step without BuildKit's syntax."
    if "target" in said.lower():
        return "Name one of its stages with --target."
    if re.search(r"line \d|:\d", said):
        return "Correct the Dockerfile at the line named above."
    return "Correct the Dockerfile."

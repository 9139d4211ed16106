"""From an image on the builder to a digest in the registry."""

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import ClassVar

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    wait_random_exponential,
)

from builder_orch.errors import (
    BuilderFull,
    BuilderOrchError,
    BuildStalled,
    PushDenied,
    PushFailed,
)
from builder_orch.events import Emit, Retry, Warned
from builder_orch.pipeline.amount import readable
from builder_orch.pipeline.build import Built
from builder_orch.pipeline.engine import Engine, Login, Pause, Refused
from builder_orch.pipeline.liveness import Patience, bounded
from builder_orch.pipeline.messages import DENIED, PushMessages
from builder_orch.pipeline.thread import Relay

TRIES = 3

_TRANSPORT = re.compile(
    r"connection (refused|reset)|broken pipe|\bEOF\b|time-?out|timed out|no such host|dial tcp"
    r"|HTTP status:? (5\d\d|429)|\b(500|502|503|504)\b|internal server error|bad gateway"
    r"|service unavailable|too ?many ?requests|server closed|no route to host|unreachable"
    r"|blob upload (unknown|invalid)|temporar|does not (start|answer)",
    re.IGNORECASE,
)


class _Broke(PushFailed):
    """A push that may be repeated as a whole: the registry keeps the layers that it has."""


@dataclass(frozen=True, slots=True)
class Pushed:
    """An image in the registry. `reference` names it by the digest that the registry returned."""

    reference: str
    digest: str
    tag: str
    image_id: str
    size_bytes: int

    def __str__(self) -> str:
        return f"{self.tag} is {self.digest[:19]}, {readable(self.size_bytes)}"


@dataclass(frozen=True, slots=True)
class Push:
    """Name the image, push it, and compare the registry's digest with the engine's; `stall_s` is
    for a time in which nothing is heard of the push."""

    engine: Engine
    repository: str
    label: str
    credentials: Callable[[], Awaitable[Login | None]]
    pause: Pause
    stall_s: float | None = None
    name: ClassVar[str] = "push"

    async def run(self, given: Built, emit: Emit) -> Pushed:
        def tell(state: RetryCallState) -> None:
            assert state.outcome is not None
            assert state.next_action is not None
            cause = str(state.outcome.exception())
            emit(Retry(self.name, state.attempt_number, cause, state.next_action.sleep))

        again = AsyncRetrying(
            retry=retry_if_exception_type(_Broke),
            stop=stop_after_attempt(TRIES),
            wait=wait_random_exponential(multiplier=1, max=10),
            before_sleep=tell,
            sleep=self.pause,
            reraise=True,
        )
        return await again(self._once, given, emit)

    async def _once(self, built: Built, emit: Emit) -> Pushed:
        tag = f"{self.repository}:{self.label}"
        try:
            await self.engine.tag(built.image_id, self.repository, self.label)
        except Refused as error:
            raise PushFailed(
                f"the builder cannot name the image {tag}: {error}",
                hint="Check --image-label: letters, digits, dots, dashes and underscores.",
            ) from None
        messages = PushMessages()
        login = await self.credentials()

        async def work(emit: Emit) -> None:
            relay = Relay(emit)

            def take(octets: bytes) -> None:
                for event in messages.feed(octets):
                    relay(event)

            try:
                await self.engine.push(self.repository, self.label, login, take)
            finally:
                relay.close()

        try:
            await bounded(work, Patience(stall_s=self.stall_s), emit)
        except Refused as error:
            raise self._judge(str(error)) from None
        except BuildStalled:
            registry = self.repository.partition("/")[0]
            raise PushFailed(
                f"the push to {registry} stood still for {self.stall_s:g} s, though the engine "
                "answers",
                hint="Look at the registry, which does not answer; --stall-timeout waits longer.",
            ) from None
        for event in messages.finish():
            emit(event)
        if messages.lines.garbage:
            emit(Warned("engine-garbage", f"{messages.lines.garbage} messages were not understood"))
        if messages.failure is not None:
            raise self._judge(messages.failure.message)
        return await self._compared(built, tag, messages.digest)

    async def _compared(self, built: Built, tag: str, digest: str) -> Pushed:
        """The evidence: what the registry returned is what the engine remembers of this image."""
        if not digest:
            raise _Broke(
                "the push ended without the registry's digest",
                hint="Run it again: layers that arrived are not sent twice.",
            )
        image = await self.engine.inspect(tag)
        reference = f"{self.repository}@{digest}"
        if image is None or image.id != built.image_id:
            raise PushFailed(
                f"{tag} was given to another image while it was pushed",
                hint="Use another --image-label, or none: then every run has its own.",
            )
        if reference not in image.digests:
            raise PushFailed(
                f"the registry says {digest} of what was pushed as {tag}, "
                f"the builder says {', '.join(image.digests) or 'nothing'}",
                hint="Run it again; if it stays so, do not trust this registry.",
            )
        return Pushed(reference, digest, tag, built.image_id, image.size_bytes)

    def _judge(self, said: str) -> BuilderOrchError:
        registry = self.repository.partition("/")[0]
        if DENIED.search(said):
            return PushDenied(
                f"the registry {registry} refuses to let us push {self.repository}: {said}",
                hint="Check that the token may write to this app's images.",
            )
        if "no space left on device" in said and registry not in said:
            return BuilderFull(
                f"a disk is full, the builder's or the registry's: {said}",
                hint="Make room with fly-build builder prune, or look at the registry's disk.",
            )
        if _TRANSPORT.search(said):
            return _Broke(
                f"the push to {registry} broke off: {said}",
                hint="Check that the registry runs and that the builder reaches it.",
            )
        return PushFailed(
            f"the push to {registry} failed: {said}", hint="The registry's own log says more."
        )

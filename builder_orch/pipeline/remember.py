"""Beside a build: read what the context holds, then say what broke the cache, and remember it."""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from builder_orch.errors import BuilderOrchError
from builder_orch.events import Emit, Event, Warned
from builder_orch.pipeline.context import Context
from builder_orch.pipeline.explain import Difference, explain
from builder_orch.pipeline.history import Memory, Run, Steps, hashed, key_of
from builder_orch.pipeline.manifest import Marks, marks_of
from builder_orch.pipeline.sources import read_link
from builder_orch.pipeline.thread import in_thread
from builder_orch.pipeline.walk import Kind


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What of a build besides its context decides about the cache."""

    platform: str = ""
    arguments: Mapping[str, str] = field(default_factory=dict, repr=False)
    no_cache: bool = False
    node: str = field(default="", repr=False)


@dataclass(slots=True)
class Remembering:
    """A build that is listened to; `emit` takes the place of the outer one."""

    context: Context
    circumstances: Circumstances
    outside: Emit
    memory: Memory
    key: str
    before: Run | None
    marks: "asyncio.Task[Marks]"
    began_ns: int
    steps: Steps = field(default_factory=Steps)

    def emit(self, event: Event) -> None:
        """Pass an event on."""
        self.steps.take(event)
        self.outside(event)

    async def built(self, builder: str) -> None:
        """The build was good: say what was built anew and why, and keep it as the last good one.

        What fails here is only warned of: the image is there.
        """
        given = self.circumstances
        try:
            marks = await self.marks
            now = Run(
                f"{builder} {'buildkit' if self.steps.kit else 'classic'}",
                hashed(given.arguments, given.node),
                self.steps.ran(self.before),
                marks,
                stages_of(self.context),
                self.began_ns,
            )
            if self.before is not None:
                links = links_of(self.context)
                difference = Difference.between(self.before, now, links, no_cache=given.no_cache)
                for event in explain(self.before, now, difference):
                    self.outside(event)
            await asyncio.to_thread(self.memory.save, self.key, now)
        except (OSError, BuilderOrchError) as error:
            self.outside(Warned("not-remembered", f"this build is not remembered: {error}"))


def key_for(context: Context, circumstances: Circumstances) -> str:
    """Under which name a context is remembered."""
    return key_of(context.root, context.dockerfile.path, context.target, circumstances.platform)


def stages_of(context: Context) -> tuple[tuple[str, str], ...]:
    """The stages of its Dockerfile, as they are remembered."""
    return tuple((stage.name, stage.base) for stage in context.dockerfile.stages)


def links_of(context: Context) -> dict[str, str]:
    """The symbolic links of a context and where they lead."""
    return {one.name: read_link(one.path) for one in context.entries if one.kind is Kind.LINK}


@dataclass(frozen=True, slots=True)
class Forgetting:
    """A build of which nothing is kept."""

    emit: Emit

    async def built(self, builder: str) -> None:
        """The build was good."""


@asynccontextmanager
async def remembering(
    memory: Memory | None, context: Context, circumstances: Circumstances, emit: Emit
) -> AsyncGenerator[Remembering | Forgetting]:
    """Read the context in a thread while the block builds it; given up with the block."""
    if memory is None:
        yield Forgetting(emit)
        return
    key = key_for(context, circumstances)
    before = await asyncio.to_thread(memory.load, key)
    stop = threading.Event()
    began_ns = time.time_ns()

    def work() -> Marks:
        known, known_ns = (before.marks, before.taken_ns) if before else ({}, 0)
        return marks_of(context.entries, known, known_ns, going_on=lambda: not stop.is_set())

    marks = asyncio.create_task(in_thread(work, give_up=stop.set))
    try:
        yield Remembering(context, circumstances, emit, memory, key, before, marks, began_ns)
    finally:
        stop.set()
        marks.cancel()
        await asyncio.gather(marks, return_exceptions=True)

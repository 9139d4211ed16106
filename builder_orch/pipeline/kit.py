"""A build by BuildKit: which files it may have, how it failed, which image came of it."""

import asyncio
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from builder_orch.buildkit.control import Control
from builder_orch.buildkit.filesync import FileSync, Synced
from builder_orch.buildkit.grpc import Failed
from builder_orch.buildkit.http2 import Lost
from builder_orch.buildkit.progress import Watching
from builder_orch.buildkit.session import Offer
from builder_orch.buildkit.solve import Options, solve
from builder_orch.buildkit.tree import Member, Tree
from builder_orch.events import Emit, Event, Progress, Retry, Step
from builder_orch.pipeline.context import IGNORE_FILE, OUTSIDE_NAME, Context
from builder_orch.pipeline.engine import Engine, Recipe, lost
from builder_orch.pipeline.ignore import Ignore
from builder_orch.pipeline.messages import Failure
from builder_orch.pipeline.outside import Credentials

CONTEXT, DOCKERFILE = "context", "dockerfile"
"""What the frontend calls its two directories."""
PROGRESS_EVERY_S = 0.5

_EXIT_CODE = re.compile(r"exit code: (\d{1,10})\Z")
_WRAPPED = re.compile(
    r"(?:failed to solve(?: with frontend \S+)?: |failed to (?:build LLB|create LLB definition): "
    r"|rpc error: code = \w+ desc = )+"
)
_NO_SESSION = re.compile(r"no active session|session healthcheck failed", re.IGNORECASE)


class Broken(Exception):
    """The engine says that the build failed, and at which step after which lines."""

    def __init__(self, failure: Failure, step: Step | None, tail: tuple[str, ...]) -> None:
        super().__init__(failure.message)
        self.failure = failure
        self.step = step
        self.tail = tail


@dataclass(frozen=True, slots=True)
class Made:
    """The image as the engine calls it: the first of these names that it knows."""

    names: tuple[str, ...]


@dataclass(slots=True)
class Journey:
    """What is on its way: when the context may be said to be there, and how far it has come."""

    emit: Emit
    arrived: Callable[[], None]
    syncing: int = 0
    sent: int = 0
    _said: float = field(default_factory=time.monotonic)

    def moved(self, name: str, octets: int) -> None:
        """Content was sent."""
        if name != CONTEXT:
            return
        self.sent += octets
        now = time.monotonic()
        if now - self._said >= PROGRESS_EVERY_S:
            self._said = now
            self.emit(Progress("context", self.sent, None))

    def synced(self, one: Synced) -> None:
        """The engine has what it wanted of a directory. It may look for rules of its own first."""
        rules_only = IGNORE_FILE in (*one.wanted.follow, *one.wanted.include)
        if one.name == CONTEXT and not rules_only:
            self.emit(Progress("context", self.sent, self.sent))
            self.arrived()

    def __call__(self, event: Event) -> None:
        """Pass an event on. A step other than FROM that begins before anything of the context was
        sent needs none of it, and nobody should wait for that."""
        if isinstance(event, Step) and not self.sent and not event.name.startswith("FROM "):
            self.arrived()
        self.emit(event)


async def build_by_kit(
    engine: Engine,
    control: Control,
    context: Context,
    recipe: Recipe,
    journey: Journey,
    credentials: Credentials | None,
) -> Made:
    """Have BuildKit build it. Broken when a step fails, BuilderLost when the engine is gone."""

    async def login(host: str) -> tuple[str, str] | None:
        # The platform's own registry only: a builder is not shown the user's other passwords.
        if credentials is None or host != recipe.name.partition("/")[0]:
            return None
        given = await credentials()
        return given.username, given.password.reveal()

    files = FileSync(trees(context), journey.moved, journey.synced)
    key = shared_key(recipe.node, context.root)
    offer = Offer(files, key, recipe.secrets, recipe.agents, login)
    options = Options(
        _dockerfile(context).name,
        recipe.build_args,
        recipe.labels,
        recipe.target,
        recipe.platform,
        recipe.network,
        recipe.hosts,
        recipe.no_cache,
        recipe.cache_from,
    )

    async def once() -> dict[str, str]:
        watching = Watching()
        try:
            return await solve(
                control, offer, options, journey, name=recipe.name, watching=watching
            )
        except Failed as error:
            raise _broken(watching, str(error)) from None

    async def work() -> dict[str, str]:
        try:
            return await once()
        except Broken as error:
            if error.step is not None or not _NO_SESSION.search(error.failure.message):
                raise
            journey(Retry("build", 1, "the engine lost sight of our session", 0.0))
            return await once()

    working = asyncio.create_task(work())
    pipe = control.pipe
    try:
        made = await engine.attend("the build", working, lambda: pipe.sent + pipe.received)
    except Lost as error:
        raise lost("the build", str(error)) from None
    keys = ["containerimage.digest", "containerimage.config.digest"]
    if not control.containerd_store:
        keys.reverse()
    return Made(tuple(made[key] for key in keys if key in made))


def shared_key(node: str, root: Path) -> str:
    """By what the engine finds the files that it has of this directory of this user."""
    return sha256(os.fsencode(f"{node}\0{root.resolve()}")).hexdigest()


def trees(context: Context) -> dict[str, Tree]:
    """The two directories. The rules that were applied here travel beside the Dockerfile, where
    they come before any other file of rules."""
    members = [
        Member(entry.name, entry.path) for entry in context.entries if entry.name != OUTSIDE_NAME
    ]
    dockerfile = _dockerfile(context)
    beside = [dockerfile]
    if context.ignore.source:
        lines = ["# the rules of this build", *(rule.text for rule in context.ignore.rules), ""]
        text = "\n".join(lines).encode("utf-8", "surrogateescape")
        beside.append(Member(f"{dockerfile.name}{IGNORE_FILE}", content=text))
    return {
        CONTEXT: Tree(members, compile_patterns, context.root),
        DOCKERFILE: Tree(beside, compile_patterns),
    }


def compile_patterns(patterns: Sequence[str]) -> Callable[[str], bool]:
    """The one matcher, for patterns that the engine sends."""
    return Ignore.of(patterns).matcher()


def _dockerfile(context: Context) -> Member:
    entry = next(one for one in context.entries if one.name == context.dockerfile_name)
    return Member(entry.name.rpartition("/")[2].lstrip(".") or "Dockerfile", entry.path)


def _broken(watching: Watching, said: str) -> Broken:
    """What failed, in the words of the step if one did."""
    said = _WRAPPED.sub("", said)
    work = watching.failed
    found = _EXIT_CODE.search(said)
    code = int(found[1]) if found else None
    if work is None:
        return Broken(Failure(said, code), None, ())
    if work.step is None:
        return Broken(Failure(f"{work.name}: {said}" if work.name not in said else said), None, ())
    return Broken(Failure(said, code), work.step, tuple(work.tail))

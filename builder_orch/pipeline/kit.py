"""A build by BuildKit: which files it may have, how it failed, which image came of it."""

import asyncio
import os
import re
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, TypeVar

from builder_orch.buildkit.control import Control, Tls
from builder_orch.buildkit.export import Unsafe
from builder_orch.buildkit.filesync import FileSync, Synced
from builder_orch.buildkit.grpc import Failed
from builder_orch.buildkit.http2 import Lost, Vigilance
from builder_orch.buildkit.progress import Watching
from builder_orch.buildkit.session import Credentials, Offer
from builder_orch.buildkit.solve import Options, Result, solve
from builder_orch.buildkit.tree import Member, Tree
from builder_orch.events import Emit, Event, Progress, Retry, Step, Warned
from builder_orch.pipeline.context import IGNORE_FILE, OUTSIDE_NAME, Context, members_of
from builder_orch.pipeline.engine import Recipe, lost
from builder_orch.pipeline.ignore import Ignore
from builder_orch.pipeline.logins import Named
from builder_orch.pipeline.messages import Failure
from builder_orch.pipeline.output import (
    Exported,
    Form,
    Output,
    discarding,
    not_written,
    put_in_place,
)
from builder_orch.pipeline.outside import Logins

CONTEXT, DOCKERFILE = "context", "dockerfile"
"""What the frontend calls its two directories."""
NAMED = "named-"
"""Before the names of further ones, which must not be taken for those two."""
IMAGE_URL = "docker-image://"
PROGRESS_EVERY_S = 0.5

Done = TypeVar("Done")

_EXIT_CODE = re.compile(r"exit code: (\d{1,10})\Z")
_WRAPPED = re.compile(
    r"(?:failed to solve(?: with frontend \S+)?: |failed to (?:build LLB|create LLB definition): "
    r"|rpc error: code = \w+ desc = )+"
)
_NO_SESSION = re.compile(
    r"no active session|session healthcheck failed|context cancell?ed\Z"
    r"|transport is closing|client connection is closing"
    r"|no such job|error reading from server: EOF",
    re.IGNORECASE,
)
"""What an engine says when it took us for gone: its build is cancelled, by nobody here."""


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


class Host(Protocol):
    """Whoever has a BuildKit: a Docker engine, or a daemon that is nothing else (`bare`)."""

    @property
    def bare(self) -> bool: ...
    @property
    def version(self) -> str: ...
    @property
    def vigilance(self) -> Vigilance: ...
    @property
    def tls(self) -> Tls | None: ...
    async def connect(self, doing: str) -> socket.socket: ...
    async def attend(
        self, doing: str, working: asyncio.Task[Done], moved: Callable[[], int]
    ) -> Done: ...


async def build_by_kit(
    engine: Host,
    control: Control,
    context: Context,
    recipe: Recipe,
    journey: Journey,
    logins: Logins,
) -> Made | Exported:
    """Have BuildKit build it. Broken when a step fails, BuilderLost when the engine is gone."""
    output = recipe.output
    target = output.target() if _comes_here(engine, output) else None
    files = FileSync(trees(context, recipe.contexts), journey.moved, journey.synced)
    offer = Offer(
        files,
        shared_key(recipe.node, context.root),
        recipe.secrets,
        recipe.agents,
        _login(context, recipe, journey, logins),
        target,
    )
    options = _options(context, recipe)
    result = _result(engine, recipe)

    async def once() -> dict[str, str]:
        watching = Watching()
        try:
            with discarding(target, only_failed=True):
                return await solve(
                    control, offer, options, journey, result=result, watching=watching
                )
        except Failed as error:
            raise _broken(watching, str(error)) from None
        except (OSError, Unsafe) as error:
            assert output.place is not None
            raise not_written(output.place, error) from None

    working = asyncio.create_task(_by_two_sessions(once, journey))
    pipe = control.pipe
    with discarding(target):
        try:
            made = await engine.attend("the build", working, lambda: pipe.received)
        except Lost as error:
            raise lost("the build", str(error)) from None
        if target is not None:
            return put_in_place(target, output, made.get("containerimage.digest", ""))
    return _made(made, control)


def _made(made: Mapping[str, str], control: Control) -> Made:
    keys = ["containerimage.digest", "containerimage.config.digest"]
    if not control.containerd_store:
        keys.reverse()
    return Made(tuple(made[key] for key in keys if key in made))


def _comes_here(engine: Host, output: Output) -> bool:
    """In the build itself, that is: an engine gives its images away afterwards."""
    return output.exported or (engine.bare and output.form is Form.DOCKER)


def _result(engine: Host, recipe: Recipe) -> Result:
    """Which exporter: an engine keeps its images, a bare daemon pushes them."""
    form = recipe.output.form
    named = {"name": recipe.name} if recipe.name else {}
    if _comes_here(engine, recipe.output):
        return Result(form.value, named if form in {Form.OCI, Form.DOCKER} else {})
    if not engine.bare:
        return Result("moby", named)
    return Result("image", {**named, "push": "true"}) if named else Result()


async def _by_two_sessions(
    once: Callable[[], Awaitable[dict[str, str]]], journey: Journey
) -> dict[str, str]:
    """Do it by another session when the engine loses one; Lost when it loses that as well."""
    try:
        return await once()
    except Broken as error:
        if not _NO_SESSION.search(error.failure.message):
            raise
    # What was sent whole it still has, so this takes up where that ended.
    journey(Retry("build", 1, "the engine lost sight of our session", 0.0))
    try:
        return await once()
    except Broken as error:
        if not _NO_SESSION.search(error.failure.message):
            raise
        raise Lost(f"the engine lost sight of our session twice: {error}") from None


def _options(context: Context, recipe: Recipe) -> Options:
    named = {
        name: f"local:{NAMED}{name}" if isinstance(given, Path) else given
        for name, given in recipe.contexts.items()
    }
    return Options(
        filename=_dockerfile(context).name,
        build_args=recipe.build_args,
        labels=recipe.labels,
        target=recipe.target,
        platforms=recipe.platforms,
        network=recipe.network,
        hosts=recipe.hosts,
        no_cache=recipe.no_cache,
        cache_from=recipe.cache_from,
        cache_to=recipe.cache_to,
        ulimits=recipe.ulimits,
        contexts=named,
    )


def _login(context: Context, recipe: Recipe, emit: Emit, logins: Logins) -> Credentials:
    """Logins for the registries that this build names, and for no others."""
    caches = [one.attributes.get("ref", "") for one in (*recipe.cache_from, *recipe.cache_to)]
    urls = [str(given) for given in recipe.contexts.values()]
    images = [url.removeprefix(IMAGE_URL) for url in urls if url.startswith(IMAGE_URL)]
    named = Named.by(context.dockerfile, recipe.build_args, [recipe.name, *caches, *images])

    async def login(host: str) -> tuple[str, str] | None:
        if host not in named:
            emit(Warned("login", f"the builder asked for a login to {host}, which this build does "
                        "not name; it got none"))  # fmt: skip
            return None
        given = await logins(host)
        return None if given is None else (given.username, given.password.reveal())

    return login


def shared_key(node: str, root: Path) -> str:
    """By what the engine finds the files that it has of this directory of this user."""
    return sha256(os.fsencode(f"{node}\0{root.resolve()}")).hexdigest()


def trees(
    context: Context, named: Mapping[str, Path | str] = MappingProxyType({})
) -> dict[str, Tree]:
    """The two directories, and those with names of their own. The rules that were applied here
    travel beside the Dockerfile, where they come before any other file of rules."""
    members = [
        Member(entry.name, entry.path) for entry in context.entries if entry.name != OUTSIDE_NAME
    ]
    dockerfile = _dockerfile(context)
    beside = [dockerfile]
    if context.ignore.source:
        lines = ["# the rules of this build", *(rule.text for rule in context.ignore.rules), ""]
        text = "\n".join(lines).encode("utf-8", "surrogateescape")
        beside.append(Member(f"{dockerfile.name}{IGNORE_FILE}", content=text))
    others = {
        f"{NAMED}{name}": _named(root) for name, root in named.items() if isinstance(root, Path)
    }
    return others | {
        CONTEXT: Tree(members, compile_patterns, context.root),
        DOCKERFILE: Tree(beside, compile_patterns),
    }


def _named(root: Path) -> Tree:
    """Of another directory, by its own .dockerignore."""
    members = [Member(entry.name, entry.path) for entry in members_of(root)]
    return Tree(members, compile_patterns, root)


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

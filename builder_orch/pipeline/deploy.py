"""The order of a deploy; read this first.

    preflight   walk the directory, read the Dockerfile, refuse what cannot be built
    auth        the app, by the token
    provision   a builder machine
    tunnel      a peer of our own, the handshake, the resolver inside, the engine
    context     the archive, written while it is sent
    build       the engine builds; the image is read back
    load        where it is wanted here: the engine gives the image away
    push        the engine pushes; two digests are compared
    release     the platform releases that digest
    verify      the release answers an HTTP request, through the tunnel

Every resource has one owner, who ends it whatever happens: the peer is removed, the tunnel closed,
the upload reset, the record of the build finished as completed, failed or cancelled.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from secrets import randbits

from builder_orch.api.models import App, Build, Builder
from builder_orch.buildkit.messages import Cache
from builder_orch.buildkit.sshagent import Agent
from builder_orch.events import Emit, Event, PhaseFinished, Warned
from builder_orch.pipeline.build import Build as BuildStage
from builder_orch.pipeline.build import Built, Send, building
from builder_orch.pipeline.context import Context, Directory
from builder_orch.pipeline.engine import AUTO, Engine, Recipe
from builder_orch.pipeline.history import Memory
from builder_orch.pipeline.liveness import Patience, Return, persist
from builder_orch.pipeline.load import Load, Loaded
from builder_orch.pipeline.logins import registry_of
from builder_orch.pipeline.output import IMAGE, Exported, Form, Output
from builder_orch.pipeline.outside import Platform, World, settle
from builder_orch.pipeline.pack import Pack
from builder_orch.pipeline.provision import Authorize, Provision
from builder_orch.pipeline.push import Push, Pushed
from builder_orch.pipeline.release import Publish, Released
from builder_orch.pipeline.remember import Circumstances, remembering
from builder_orch.pipeline.room import Room
from builder_orch.pipeline.stage import perform
from builder_orch.pipeline.tunnel import Reach
from builder_orch.pipeline.verify import Address, Answered, Verify

STRATEGIES = ("Dockerfile",)
"""How we know to build, in the platform's words."""
DEFAULT_PORT = 8080
"""Where an app is taken to listen if neither its file nor its image says so."""
CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"

_TIMINGS = {"tunnel": "builder_init", "context": "context_build", "build": "image_build"}


@dataclass(frozen=True, slots=True)
class Order:
    """What the user asked for. `label` names the image; "" for one of this run's own.

    `publish` and `release` say how far to go: an image on the builder, in the registry, running.
    `image` is `REPOSITORY:TAG` in whatever registry instead of the app's; `output` is what comes to
    this machine; `memory` keeps what the last good build was, to explain the next.
    """

    directory: Directory
    app: str
    create_app: bool = False
    organization: str | None = None
    build_args: Mapping[str, str] = field(default_factory=dict, repr=False)
    no_cache: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    platforms: tuple[str, ...] = ()
    network: str = ""
    hosts: Mapping[str, str] = field(default_factory=dict)
    cache_from: tuple[Cache, ...] = ()
    cache_to: tuple[Cache, ...] = ()
    ulimits: Mapping[str, str] = field(default_factory=dict)
    contexts: Mapping[str, Path | str] = field(default_factory=dict)
    secrets: Mapping[str, Callable[[], bytes]] = field(default_factory=dict, repr=False)
    agents: Mapping[str, Agent] = field(default_factory=dict)
    builder: str = AUTO
    node: str = field(default="", repr=False)
    label: str = ""
    image: str = ""
    output: Output = IMAGE
    memory: Memory | None = None
    publish: bool = True
    release: bool = True
    strategy: str = "ROLLING"
    definition: Mapping[str, object] = field(default_factory=dict)
    port: int | None = None
    host: str = "host"

    def recipe(self, dockerfile: str, name: str) -> Recipe:
        """What of it concerns the build; `name` is what the image will be called."""
        return Recipe(
            dockerfile,
            dict(self.build_args),
            self.directory.target,
            self.no_cache,
            dict(self.labels),
            self.platforms,
            self.network,
            dict(self.hosts),
            self.cache_from,
            self.cache_to,
            dict(self.ulimits),
            dict(self.contexts),
            dict(self.secrets),
            dict(self.agents),
            self.output,
            self.builder,
            self.node,
            name,
        )

    @property
    def circumstances(self) -> Circumstances:
        """What of it decides about the cache, besides the context."""
        platforms = ",".join(self.platforms)
        return Circumstances(platforms, self.build_args, self.no_cache, self.node)

    def named(self, registry: str, app: str) -> tuple[str, str]:
        """Repository and tag of the image."""
        if self.image:
            repository, _, tag = self.image.rpartition(":")
            return repository, tag
        return f"{registry}/{app}", self.label or f"deployment-{ulid()}"


@dataclass(frozen=True, slots=True)
class Deployed:
    """What came of it; None for the stages that the order left out."""

    app: str
    built: Built | None = None
    exported: Exported | None = None
    loaded: Loaded | None = None
    pushed: Pushed | None = None
    released: Released | None = None
    answered: Answered | None = None


async def deploy(order: Order, world: World, emit: Emit) -> Deployed:
    """Carry out an order; raises the failure of the first stage that fails, with all tidied up."""
    context = await perform(Pack(), order.directory, emit)
    authorize = Authorize(world.platform, order.create_app, order.organization)
    app = (await perform(authorize, order.app, emit)).app
    limits = world.limits
    provision = Provision(world.platform, limits.provision_s)
    builder = (await perform(provision, app, emit, limit_s=limits.provision_s)).builder
    # The tunnel outlives the build: the release is asked through it.
    async with AsyncExitStack() as closing:
        async with recorded(world.platform, app, builder, emit) as record:
            reach = Reach(world, app, closing, order.host)
            limit_s = limits.handshake_s + limits.resolver_s + limits.engine_s
            reached = await perform(reach, builder, record.emit, limit_s=limit_s)
            patience = Patience(limits.build_s, limits.stall_s)

            room = Room(record.emit)

            async def work(engine: Engine) -> Deployed:
                return await make(order, world, engine, context, app, record, patience)

            async def with_room(engine: Engine) -> Deployed:
                return await room.within(engine, work)

            way = Return(world, app, builder, reached.tunnel, record.emit)
            made = await persist(reached.engine, with_room, way, record.emit)
        built, pushed = made.built, made.pushed
        if not order.release or built is None or pushed is None:
            return made
        port = order.port or min(built.ports, default=DEFAULT_PORT)
        publish = Publish(
            world.platform,
            app,
            record.build,
            completed(order.definition, port),
            order.strategy,
            limits.release_s,
            world.pause,
        )
        released = await perform(publish, pushed, emit, limit_s=limits.release_s)
        verify = Verify(reached.tunnel.dial, limits.answer_s, world.pause)
        try:
            answered = await perform(verify, Address(f"{app.name}.internal", port), emit)
        except BaseException:
            # The platform found it well, so it has taken the place of the one before.
            version = released.release.version
            emit(Warned("release-stays", f"v{version} is complete and serves; it was not verified"))
            raise
    return replace(made, released=released, answered=answered)


async def make(
    order: Order,
    world: World,
    engine: Engine,
    context: Context,
    app: App,
    record: "Record",
    patience: Patience,
) -> Deployed:
    """From the context to wherever the result was wanted, short of a release."""
    repository, label = order.named(world.registry, app.name)
    recipe = order.recipe(context.dockerfile_name, f"{repository}:{label}")
    async with (
        remembering(order.memory, context, order.circumstances, record.emit) as kept,
        building(engine, context, recipe, kept.emit, world.login, patience) as under_way,
    ):
        await perform(Send(), under_way, kept.emit)
        built = await perform(BuildStage(), under_way, kept.emit)
        await kept.built(record.machine_id)
    if isinstance(built, Exported):
        return Deployed(app.name, exported=built)
    record.image = (built.image_id, label, built.size_bytes)
    made = Deployed(app.name, built)
    if order.output.form is Form.DOCKER:
        load = Load(engine, repository, label, order.output.place, world.here)
        made = replace(made, loaded=await perform(load, built, record.emit))
    if order.publish:
        login = partial(world.login, registry_of(repository))
        push = Push(engine, repository, label, login, world.pause, world.limits.stall_s)
        pushed = await perform(push, built, record.emit)
        record.image = (pushed.image_id, pushed.tag, pushed.size_bytes)
        made = replace(made, pushed=pushed)
    return made


@dataclass(slots=True)
class Record:
    """The platform's record of one build, while it is open."""

    build: Build
    outside: Emit
    machine_id: str = ""
    image: tuple[str, str, int] | None = None
    timings_ms: dict[str, float] = field(default_factory=dict)

    def emit(self, event: Event) -> None:
        """Pass an event on, and note how long the phases of the build took."""
        if isinstance(event, PhaseFinished):
            name = _TIMINGS.get(event.phase, event.phase)
            self.timings_ms[name] = event.elapsed_s * 1000
        self.outside(event)


@asynccontextmanager
async def recorded(
    platform: Platform, app: App, builder: Builder, emit: Emit
) -> AsyncGenerator[Record]:
    """Open the record of a build; it is finished with whatever the block ends with."""
    build = await platform.create_build(app, machine_id=builder.machine_id, strategies=STRATEGIES)
    record = Record(build, emit, builder.machine_id)
    status, logs = "failed", ""
    try:
        yield record
        status = "completed"
    except asyncio.CancelledError:
        status, logs = "cancelled", "the command was interrupted"
        raise
    except Exception as error:
        logs = str(error)
        raise
    finally:
        finish = platform.finish_build(
            app,
            build,
            status=status,
            image=record.image if status == "completed" else None,
            logs=logs,
            timings_ms=record.timings_ms,
        )
        await settle(f"recording the build as {status}", finish, emit)


def completed(definition: Mapping[str, object], port: int) -> Mapping[str, object]:
    """The app's definition, which always says where it listens."""
    if {"http_service", "services"} & definition.keys():
        return definition
    return {**definition, "http_service": {"internal_port": port}}


def ulid() -> str:
    """26 characters that sort by time: 48 bits of milliseconds, 80 of chance."""
    number = (time.time_ns() // 1_000_000) << 80 | randbits(80)
    return "".join(CROCKFORD[number >> shift & 31] for shift in range(125, -1, -5))

"""`fly-build deploy`: from flags and files to an order, then carry it out and print what came."""

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace

import click

from builder_orch.cli.ingredients import find_agents, own_node, read_secrets
from builder_orch.cli.options import Flags, build_flags, build_only_flag
from builder_orch.cli.places import brought
from builder_orch.cli.progress import open_display
from builder_orch.cli.render import Renderer
from builder_orch.cli.results import read_caches, read_contexts, read_dest, read_tag
from builder_orch.errors import (
    BuilderOrchError,
    Exit,
    Interrupted,
    Terminated,
    TimedOut,
    UsageFailure,
)
from builder_orch.events import (
    Emit,
    Event,
    Finished,
    PhaseReason,
    PhaseStarted,
    Retry,
    Step,
    Warned,
)
from builder_orch.pipeline.bare import Daemon, build_bare, check_order
from builder_orch.pipeline.context import WARN_OCTETS, Directory
from builder_orch.pipeline.deploy import Deployed, Order, ulid
from builder_orch.pipeline.deploy import deploy as carry_out
from builder_orch.pipeline.engine import Engine
from builder_orch.pipeline.history import Memory
from builder_orch.pipeline.liveness import Patience
from builder_orch.pipeline.load import engine_here
from builder_orch.pipeline.logins import DockerConfig
from builder_orch.pipeline.output import IMAGE, Form, Output
from builder_orch.pipeline.outside import World
from builder_orch.settings import Environment, PlatformSettings, Project, find_project

AGAIN = "Run the command again; what was built so far is cached."


@click.command()
@build_only_flag
@build_flags
def deploy(ctx: click.Context, flags: Flags) -> None:
    """Build a directory and release it.

    PATH is the build context, and where the search for fly.toml begins.
    """
    ctx.exit(run(flags, "deploy", release=not flags.build_only))


def run(flags: Flags, command: str, *, release: bool) -> int:
    """One run of the pipeline with all its output; the exit code."""
    return told(flags, command, lambda emit: values(_run(flags, release, emit)))


def told(flags: Flags, command: str, work: Callable[[Emit], dict[str, object]]) -> int:
    """Do some work with all its output, of which what it returns is the result; the exit code."""
    name = ulid()
    variables = Environment.current().variables
    shown = "none" if flags.mode == "ndjson" else flags.progress
    display = open_display(shown, sys.stderr, variables)
    renderer = Renderer(flags.mode, name, sys.stdout, sys.stderr, display=display)
    renderer.start(command)
    began = time.monotonic()
    try:
        made = work(renderer)
    except (BuilderOrchError, KeyboardInterrupt) as error:
        # Ctrl-C comes as an exception only before the event loop runs, so nothing had begun.
        failure = error if isinstance(error, BuilderOrchError) else interrupted()
        elapsed_s = time.monotonic() - began
        renderer(Finished(False, int(failure.code), elapsed_s, error=failure))
        return int(failure.code)
    except Exception:
        # A defect of ours: its traceback follows, but a reader of events gets a last one.
        renderer(Finished(False, int(Exit.UNCLASSIFIED), time.monotonic() - began))
        raise
    finally:
        # Whatever ends us, the terminal gets its cursor back.
        display.close()
    renderer(Finished(True, int(Exit.OK), time.monotonic() - began, made))
    return int(Exit.OK)


def _run(flags: Flags, release: bool, emit: Emit) -> Deployed:
    if release and flags.push is False:
        raise UsageFailure(
            "a release needs its image in the registry",
            hint="Take --no-push away, or add --build-only.",
        )
    environment = Environment.current()
    with brought(flags, sys.stdin.buffer, environment.variables, emit) as flags:
        return _with_files(flags, release, environment, emit)


def _with_files(flags: Flags, release: bool, environment: Environment, emit: Emit) -> Deployed:
    if not flags.path.is_dir():
        # Before what is looked for in it is missed.
        raise UsageFailure(f"{flags.path} is not a directory", hint="Name the directory to build.")
    project = find_project(flags.path, flags.config)
    wanted = order(flags, project, environment, release=release)
    if flags.buildkit_host:
        check_order(wanted)
        return asyncio.run(_guarded(wanted, None, flags, emit))
    chosen = environment.platform(flags.api_url)
    if chosen is None or chosen.selfhost:
        chosen = start_selfhost(environment, emit)
    if flags.capture is not None and flags.capture.exists():
        raise UsageFailure(
            f"{flags.capture} is there already", hint="Name a new file with --capture."
        )
    return asyncio.run(_guarded(wanted, chosen, flags, emit))


def order(flags: Flags, project: Project, environment: Environment, *, release: bool) -> Order:
    """What is asked for: flags (and their variables) first, then the project file."""
    directory = directory_of(flags, project)
    output, image, publish = results(flags)
    return Order(
        directory=directory,
        app="" if flags.buildkit_host else environment.app(flags.app, project),
        create_app=flags.create_app,
        organization=flags.org or environment.first("FLY_ORG")[0] or None,
        build_args={**project.build_args, **dict(flags.build_arg)},
        no_cache=flags.no_cache,
        labels=dict(flags.label),
        platforms=tuple(one for text in flags.platform for one in text.split(",") if one),
        network=flags.network,
        hosts=dict(flags.add_host),
        cache_from=read_caches(flags.cache_from, "--cache-from"),
        cache_to=read_caches(flags.cache_to, "--cache-to"),
        ulimits=dict(flags.ulimit),
        contexts=read_contexts(flags.build_context),
        secrets=read_secrets(flags.secret, environment.variables),
        agents=find_agents(flags.ssh, environment.variables),
        builder=flags.builder,
        node=own_node(environment.state_folder().parent / "node"),
        memory=memory_of(environment),
        label=flags.image_label,
        image=image,
        output=output,
        publish=publish,
        release=release,
        definition=project.definition,
        port=project.port,
        host=socket.gethostname(),
    )


def memory_of(environment: Environment) -> Memory:
    """Where the last good build of each context is kept."""
    return Memory(environment.state_folder().parent / "history")


def directory_of(flags: Flags, project: Project) -> Directory:
    """What is built, and what is allowed of it."""
    return Directory(
        root=flags.path,
        dockerfile=flags.dockerfile or project.dockerfile,
        ignorefile=flags.ignorefile or project.ignorefile,
        target=flags.target or project.target,
        dockerfile_from=flags.dockerfile_from,
        warn_octets=WARN_OCTETS if flags.context_warn is None else flags.context_warn,
        limit_octets=flags.context_limit,
        check=flags.check_context,
    )


def results(flags: Flags) -> tuple[Output, str, bool]:
    """What comes here, what the image is called, and whether it is pushed."""
    if flags.load and flags.dest:
        raise UsageFailure(
            "--load and --dest both say what becomes of the result", hint="Take one of them."
        )
    if flags.load:
        output, image, push = Output(Form.DOCKER), "", False
    elif flags.dest:
        output, image, push = read_dest(flags.dest)
    else:
        output, image, push = IMAGE, "", True
    if flags.push and output.exported:
        raise UsageFailure(
            f"--dest type={output.form.value} makes no image that could be pushed",
            hint="Take --push away, or build twice: what was built is cached.",
        )
    if flags.tag:
        image = read_tag(flags.tag)
    return output, image, push if flags.push is None else flags.push


def start_selfhost(environment: Environment, emit: Emit) -> PlatformSettings:
    """The embedded platform, started if it does not run; it says so, because it stays running."""
    from builder_orch.selfhost.home import Home
    from builder_orch.selfhost.launch import ensure_selfhost

    def report(reason: str) -> None:
        emit(Warned("selfhost", f"no platform is configured: {reason}"))

    record = ensure_selfhost(Home(environment.state_folder()), report=report)
    return PlatformSettings(
        record.api_url,
        record.token,
        record.registry,
        "selfhost",
        selfhost=True,
        websocket_port=record.websocket_port,
        websocket_pin=record.websocket_pin,
    )


@asynccontextmanager
async def open_world(chosen: PlatformSettings, emit: Emit, flags: Flags) -> AsyncGenerator[World]:
    """The real platform, tunnel and registry; a process for the tunnel starts at once."""
    from builder_orch.agent.place import Place
    from builder_orch.api.keyring import Keyring
    from builder_orch.api.models import Secret
    from builder_orch.cli.shared import SharedPeers, reaching
    from builder_orch.pipeline.engine import Login
    from builder_orch.tunnel.carrier.choice import Choice
    from builder_orch.tunnel.carrier.proxy import Outside

    token = Secret(chosen.token)
    environment = Environment.current()
    outside = Outside.of(environment.variables)
    choice = Choice(
        flags.carrier,
        chosen.websocket_port,
        bytes.fromhex(chosen.websocket_pin) or None,
        outside,
        environment.state_folder().parent / "carriers.json",
    )

    async def credentials() -> Login:
        return Login("x", token)

    here = await _here(flags, environment)
    keyring = Keyring(environment.state_folder().parent / "peers")
    named = identity(environment, chosen)
    place = Place(environment.agent_folder())
    async with AsyncExitStack() as closing:
        sharing = await closing.enter_async_context(reaching(place, choice, flags, emit))
        # Large: the other process begins while this is imported.
        from builder_orch.api.client import IDEMPOTENT, IDEMPOTENT_SELFHOST, Platform

        idempotent = IDEMPOTENT_SELFHOST if chosen.selfhost else IDEMPOTENT
        platform = await closing.enter_async_context(
            Platform(chosen.api_url, token, idempotent=idempotent, outside=outside, emit=emit)
        )
        way = sharing(SharedPeers(platform, keyring, named))
        yield World(
            platform,
            way.open_tunnel,
            chosen.registry,
            credentials,
            shared_peer=way.shared_peer,
            keyring=keyring,
            identity=named,
            logins=DockerConfig(environment.docker_config(), environment.variables).login,
            here=here,
        )


def identity(environment: Environment, chosen: PlatformSettings) -> str:
    """What a platform is called where its peers are written down."""
    return str(environment.state_folder()) if chosen.selfhost else chosen.api_url


async def by_daemon(wanted: Order, flags: Flags, emit: Emit) -> Deployed:
    """By a buildkitd that the user named."""
    environment = Environment.current()
    daemon = Daemon.at(flags.buildkit_host, flags.buildkit_certs)
    logins = DockerConfig(environment.docker_config(), environment.variables).login
    patience = Patience(flags.build_timeout, flags.stall_timeout)
    return await build_bare(wanted, daemon, logins, await _here(flags, environment), patience, emit)


async def _here(flags: Flags, environment: Environment) -> Engine | None:
    loading = results(flags)[0] == Output(Form.DOCKER)
    return await engine_here(environment.first("DOCKER_HOST")[0]) if loading else None


async def _guarded(
    wanted: Order, chosen: PlatformSettings | None, flags: Flags, emit: Emit
) -> Deployed:
    """Carry an order out; a signal cancels it once, and the tidying up is waited for."""
    latest = Latest(emit)
    with Stop.listening(emit) as stop:
        limit = asyncio.timeout(flags.timeout)
        try:
            if chosen is None:
                async with limit:
                    return await by_daemon(wanted, flags, latest)
            async with limit, open_world(chosen, latest, flags) as world:
                return await carry_out(wanted, limited(world, flags), latest)
        except TimeoutError:
            if not limit.expired():
                raise
            raise TimedOut(
                f"the run took longer than {flags.timeout:g} s, and was at {latest.doing}",
                hint="Give it more time with --timeout; what was built so far is cached.",
            ) from None
        except asyncio.CancelledError:
            raise stop.failure() from None


def limited(world: World, flags: Flags) -> World:
    """The world with the limits that were asked for."""
    limits = world.limits
    return replace(
        world,
        limits=replace(
            limits,
            handshake_s=flags.tunnel_timeout or limits.handshake_s,
            build_s=flags.build_timeout or limits.build_s,
            stall_s=flags.stall_timeout or limits.stall_s,
        ),
    )


@dataclass(slots=True)
class Latest:
    """Passes events on and remembers what a run is at, for when its time is up."""

    emit: Emit
    doing: str = "its beginning"

    def __call__(self, event: Event) -> None:
        """Take one event."""
        match event:
            case PhaseStarted(phase):
                self.doing = phase
            case PhaseReason(phase, reason):
                self.doing = f"{phase}: {reason}"
            case Retry(phase, _, cause):
                self.doing = f"{phase}: {cause}"
            case Step(number, total, name):
                self.doing = f"step {number}/{total} ({name[:200]})"
            case _:
                pass
        self.emit(event)


@dataclass(slots=True)
class Stop:
    """Turns the first Ctrl-C, SIGTERM or SIGHUP into a cancellation; the second ends us at once."""

    task: asyncio.Task[object]
    emit: Emit
    hint: str
    began: float = field(default_factory=time.monotonic)
    received: signal.Signals | None = None

    @classmethod
    @contextmanager
    def listening(cls, emit: Emit, hint: str = AGAIN) -> Iterator["Stop"]:
        """For the task that runs now; outside the block signals do what they did. `hint` is what
        an interrupted user may do next."""
        task = asyncio.current_task()
        assert task is not None
        stop = cls(task, emit, hint)
        loop = asyncio.get_running_loop()
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            # The terminal was closed, and nohup did not ask us to go on without.
            numbers.append(signal.SIGHUP)
        for number in numbers:
            loop.add_signal_handler(number, stop, number)
        try:
            yield stop
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def __call__(self, number: signal.Signals) -> None:
        if self.received is not None:
            self._leave(number)
        self.received = number
        self.task.cancel()

    def _leave(self, number: signal.Signals) -> None:
        kind = Interrupted if number is signal.SIGINT else Terminated
        failure = kind("ended at once; what had begun was left as it was", hint=_LEFT)
        elapsed_s = time.monotonic() - self.began
        try:
            self.emit(Finished(False, int(failure.code), elapsed_s, error=failure))
        finally:
            os._exit(int(failure.code))

    def failure(self) -> BuilderOrchError:
        """What the run ends with."""
        if self.received in {signal.SIGTERM, signal.SIGHUP}:
            return Terminated("terminated; what had begun was ended", hint=self.hint)
        return interrupted(self.hint)


def interrupted(hint: str = AGAIN) -> Interrupted:
    """What Ctrl-C is to a user."""
    return Interrupted("interrupted; what had begun was ended", hint=hint)


_LEFT = "Run the command again; the platform lets go of what nobody asks for any more."


def values(deployed: Deployed) -> dict[str, object]:
    """What a run made, in JSON types; `lines` is the same for people."""
    built, pushed = deployed.built, deployed.pushed
    made: dict[str, object] = {"app": deployed.app} if deployed.app else {}
    lines: list[str] = []
    if (exported := deployed.exported) is not None:
        made |= {
            "dest": str(exported.place),
            "type": exported.form.value,
            "size_bytes": exported.size_bytes,
        }
        if exported.digest:
            made["digest"] = exported.digest
        lines.append(f"{exported.form.value}: {exported.place}")
    if (loaded := deployed.loaded) is not None:
        made |= {"loaded": loaded.name, "loaded_into": loaded.where}
        lines.append(f"loaded: {loaded.name} into {loaded.where}")
    if built is None:
        return {**made, "lines": lines}
    made |= {"image_id": built.image_id, "size_bytes": built.size_bytes}
    if pushed is None and not deployed.app:
        lines.append("built: nothing was pushed, the daemon keeps its cache")
    elif pushed is None:
        lines.append(f"image: {built.image_id} (on the builder, not pushed)")
    else:
        made |= {"image": pushed.reference, "digest": pushed.digest, "tag": pushed.tag}
        lines.append(f"image: {pushed.reference}")
    if deployed.released is not None:
        release = deployed.released.release
        made |= {"release": release.version, "release_id": release.id}
        lines.append(f"release: v{release.version}")
        if deployed.answered is not None:
            answered = deployed.answered
            made |= {
                "url": answered.url,
                "status": answered.status,
                "answer_bytes": answered.octets,
                "answer_ms": round(answered.elapsed_s * 1000),
            }
            lines.append(f"{deployed.app} v{release.version} {answered}")
    return {**made, "lines": lines}

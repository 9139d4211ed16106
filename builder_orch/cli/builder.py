"""`fly-build builder`: the machine that builds, and lending it to Docker's own clients."""

import asyncio
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from builder_orch.cli.answer import AGAIN
from builder_orch.cli.contexts import USUAL_NAME, Contexts
from builder_orch.cli.deploy import Stop, interrupted, limited, open_world
from builder_orch.cli.options import Flags
from builder_orch.cli.render import Renderer
from builder_orch.cli.upkeep import platform_of, prune, reaching, status
from builder_orch.errors import BuilderOrchError, Exit, UsageFailure
from builder_orch.events import Emit, Finished, PhaseFinished, PhaseStarted, Warned
from builder_orch.pipeline.connect import Wanted, Way, connect
from builder_orch.pipeline.deploy import ulid
from builder_orch.settings import Environment, PlatformSettings, find_project

PHASE = "connect"
LONGEST_FOLDER = 80
"""Octets of a folder's path that leave room for a socket in it (107 in all, unix(7))."""
SHORT = "/tmp"  # noqa: S108 (what is made there is a directory that only we can enter)
TLS = ("DOCKER_CONTEXT", "DOCKER_TLS", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH")
"""Variables that would lead a client elsewhere, or have it speak TLS to our socket."""
SIGNALLED = 128
"""Added to the number of the signal that ended a program, as shells do."""


@click.group()
def builder() -> None:
    """Look after the machine that builds, and use it from docker."""


builder.add_command(status)
builder.add_command(prune)


@dataclass(frozen=True, slots=True)
class Connecting:
    """What stood on the command line."""

    port: int | None
    context: str | None
    use: bool
    command: tuple[str, ...]
    flags: Flags = field(repr=False)

    @property
    def name(self) -> str:
        """The Docker context to make; "" for none."""
        return self.context or (USUAL_NAME if self.use else "")


@builder.command("connect", context_settings={"allow_interspersed_args": False})
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    help="Listen at this port of 127.0.0.1 (0: a free one), and not at a Unix socket.",
)
@click.option("--context", help="Make a Docker context of this name, while connected.")
@click.option(
    "--use", is_flag=True, help=f"Have Docker's clients use it; {USUAL_NAME} without --context."
)
@reaching
@click.pass_context
def connect_command(
    ctx: click.Context,
    /,
    *,
    command: tuple[str, ...],
    port: int | None,
    context: str | None,
    use: bool,
    **given: Any,  # noqa: ANN401 - click's own types
) -> None:
    """Lead Docker's own clients to the builder.

    Until Ctrl-C, or until COMMAND has ended: it is run with DOCKER_HOST set, and its exit code is
    ours.
    """
    ctx.exit(run(Connecting(port, context, use, command, Flags(Path(), **given))))


def run(asked: Connecting) -> int:
    """One connection from its beginning to its end, with all its output; the exit code."""
    renderer = Renderer(asked.flags.output, ulid(), sys.stdout, sys.stderr)
    renderer.start("builder connect")
    began = time.monotonic()
    try:
        code = _run(asked, renderer)
    except (BuilderOrchError, KeyboardInterrupt) as error:
        failure = error if isinstance(error, BuilderOrchError) else interrupted(AGAIN)
        elapsed_s = time.monotonic() - began
        renderer(Finished(False, int(failure.code), elapsed_s, error=failure))
        return int(failure.code)
    if asked.flags.output == "ndjson":
        renderer(Finished(code == 0, code, time.monotonic() - began))
    return code


def _run(asked: Connecting, emit: Emit) -> int:
    if asked.command and asked.flags.output != "text":
        raise UsageFailure(
            f"--output {asked.flags.output} and a command would both write to stdout",
            hint="Take one of them away.",
        )
    environment = Environment.current()
    if asked.command and shutil.which(asked.command[0]) is None:
        raise UsageFailure(
            f"there is no program {asked.command[0]} to run", hint="Check its name and PATH."
        )
    wanted = Wanted(
        environment.app(asked.flags.app, find_project(Path())),
        _folder(environment.variables),
        asked.port,
        socket.gethostname(),
    )
    if asked.name:
        Contexts.of(environment.variables).check(asked.name)
    chosen = platform_of(environment, asked.flags, emit)
    return asyncio.run(_connected(asked, wanted, chosen, environment.variables, emit))


async def _connected(
    asked: Connecting,
    wanted: Wanted,
    chosen: PlatformSettings,
    variables: Mapping[str, str],
    emit: Emit,
) -> int:
    up = False
    with Stop.listening(emit, AGAIN) as stop:
        try:
            async with AsyncExitStack() as stack:
                began = time.monotonic()
                world = await stack.enter_async_context(open_world(chosen, emit, asked.flags))
                way = await stack.enter_async_context(
                    connect(wanted, limited(world, asked.flags), emit)
                )
                if asked.name:
                    # The last thing that is made and the first that is undone, whoever hurries.
                    contexts = Contexts.of(variables)
                    stack.enter_context(contexts.added(asked.name, way.url, use=asked.use))
                    _warn_of_host(asked, variables, emit)
                up = True
                emit(PhaseStarted(PHASE))
                emit(PhaseFinished(PHASE, time.monotonic() - began, way.url))
                announce(asked, way)
                if asked.command:
                    return await _accompany(asked.command, way.url, variables, stop)
                await way.over()
        except asyncio.CancelledError:
            if not up:
                raise stop.failure() from None
    return int(Exit.OK)


def announce(asked: Connecting, way: Way) -> None:
    """Say where it is, to whoever reads stdout."""
    if asked.command or asked.flags.output == "ndjson":
        return
    if asked.flags.output == "json":
        click.echo(json.dumps({"docker_host": way.url, "context": asked.name or None}))
        return
    click.echo(f"DOCKER_HOST={way.url}")
    if asked.name:
        click.echo(f"docker --context {asked.name}")


def _warn_of_host(asked: Connecting, variables: Mapping[str, str], emit: Emit) -> None:
    for name in ("DOCKER_HOST", "DOCKER_CONTEXT"):
        if asked.use and variables.get(name):
            emit(Warned("docker-host", f"{name} is set, which Docker's clients put before --use"))


async def _accompany(
    command: Sequence[str], url: str, variables: Mapping[str, str], stop: Stop
) -> int:
    """Run a command with our streams; signals are its own business until it has ended."""
    given = {name: value for name, value in variables.items() if name not in TLS}
    try:
        process = await asyncio.create_subprocess_exec(*command, env={**given, "DOCKER_HOST": url})
    except OSError as error:
        raise UsageFailure(
            f"{command[0]} cannot be run: {error.strerror}", hint="Check its permissions."
        ) from None
    loop = asyncio.get_running_loop()

    def pass_on(number: signal.Signals) -> None:
        # Ctrl-C at a terminal reaches all of its processes by itself.
        if process.returncode is None and not (number is signal.SIGINT and sys.stdin.isatty()):
            process.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, pass_on, number)
    try:
        code = await process.wait()
    finally:
        for number in numbers:
            loop.add_signal_handler(number, stop, number)
    return SIGNALLED - code if code < 0 else code


def _folder(variables: Mapping[str, str]) -> Path:
    """Where sockets are put: the user's own runtime directory, if there is one."""
    for name in (variables.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir()):
        if name and len(os.fsencode(name)) <= LONGEST_FOLDER and os.access(name, os.W_OK | os.X_OK):
            return Path(name)
    return Path(SHORT)

"""`fly-build builder status` and `prune`: what lies on a builder's disk, and making room there."""

import asyncio
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import click

from builder_orch.cli.answer import AGAIN
from builder_orch.cli.deploy import Stop, interrupted, limited, open_world, start_selfhost
from builder_orch.cli.form import output_option
from builder_orch.cli.options import APP, CARRIERS, Duration, Flags
from builder_orch.cli.render import Renderer
from builder_orch.errors import BuilderLost, BuilderOrchError, Exit
from builder_orch.events import Emit, Finished
from builder_orch.pipeline.amount import readable
from builder_orch.pipeline.connect import reached
from builder_orch.pipeline.deploy import ulid
from builder_orch.pipeline.engine import Engine, Refused
from builder_orch.settings import Environment, PlatformSettings, find_project

Values = dict[str, object]
Work = Callable[[Engine], Awaitable[Values]]


def option(name: str, *more: str, **how: Any) -> Callable[[Any], Any]:  # noqa: ANN401 - click's
    """An option with its variable: FLY_BUILD_ and its long name."""
    variable = "FLY_BUILD_" + name.lstrip("-").replace("-", "_").upper()
    return click.option(name, *more, envvar=variable, show_envvar=True, **how)


_REACHING = (
    option(
        "--app",
        "-a",
        type=APP,
        default="",
        metavar="NAME",
        help="The app; else FLY_APP, else fly.toml's.",
    ),
    option("--api-url", default="", help="The platform's GraphQL endpoint."),
    option("--tunnel-timeout", type=Duration(), default=None, help="For the handshake; else 2m."),
    option(
        "--carrier",
        type=click.Choice(CARRIERS),
        default="auto",
        help="The way to the gateway; auto tries UDP, then WebSocket (HTTPS).",
    ),
    output_option,
)


def reaching(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command what it takes to find a builder and to get there, as `Flags` takes it."""
    for one in reversed(_REACHING):
        command = one(command)
    return command


@click.command()
@reaching
@click.pass_context
def status(ctx: click.Context, /, **given: Any) -> None:  # noqa: ANN401 - click's own types
    """Show that the builder answers, and what lies on its disk."""

    async def work(engine: Engine) -> Values:
        found = await engine.usage()
        lines = [
            f"Docker {found.version}, {found.processors} processors, {readable(found.memory)}",
            f"{found.images} images, {readable(found.layers)}",
            f"build cache {readable(found.cache)}",
        ]
        return {
            "engine": found.version,
            "processors": found.processors,
            "memory_bytes": found.memory,
            "images": found.images,
            "layers_bytes": found.layers,
            "cache_bytes": found.cache,
            "lines": lines,
        }

    ctx.exit(at_builder("builder status", Flags(Path(), **given), work))


@click.command()
@click.option("--all", "images", is_flag=True, help="Also all images that no container uses.")
@reaching
@click.pass_context
def prune(ctx: click.Context, /, images: bool, **given: Any) -> None:  # noqa: ANN401 - click's
    """Throw away what builds have cached on the builder.

    Images without a name go as well, and the next build of everybody who builds there begins from
    nothing.
    """

    async def work(engine: Engine) -> Values:
        freed = await engine.prune(images=images)
        return {"freed_bytes": freed, "lines": [f"{readable(freed)} freed"]}

    ctx.exit(at_builder("builder prune", Flags(Path(), **given), work))


def at_builder(command: str, flags: Flags, work: Work) -> int:
    """Have something done at an app's builder, with all output; the exit code."""
    renderer = Renderer(flags.output, ulid(), sys.stdout, sys.stderr)
    renderer.start(command)
    began = time.monotonic()
    try:
        made = _at_builder(flags, work, renderer)
    except (BuilderOrchError, KeyboardInterrupt) as error:
        failure = error if isinstance(error, BuilderOrchError) else interrupted(AGAIN)
        renderer(Finished(False, int(failure.code), time.monotonic() - began, error=failure))
        return int(failure.code)
    renderer(Finished(True, int(Exit.OK), time.monotonic() - began, made))
    return int(Exit.OK)


def _at_builder(flags: Flags, work: Work, emit: Emit) -> Values:
    environment = Environment.current()
    app = environment.app(flags.app, find_project(Path()))
    return asyncio.run(_worked(app, platform_of(environment, flags, emit), flags, work, emit))


def platform_of(environment: Environment, flags: Flags, emit: Emit) -> PlatformSettings:
    """The platform that is meant; the embedded one is started if need be."""
    chosen = environment.platform(flags.api_url)
    return start_selfhost(environment, emit) if chosen is None or chosen.selfhost else chosen


async def _worked(
    app: str, chosen: PlatformSettings, flags: Flags, work: Work, emit: Emit
) -> Values:
    with Stop.listening(emit, AGAIN) as stop:
        try:
            async with (
                open_world(chosen, emit, flags) as world,
                reached(app, limited(world, flags), emit, socket.gethostname()) as there,
            ):
                return await work(there.engine)
        except Refused as error:
            raise BuilderLost(
                f"the builder does not do that: {error}",
                hint="Run it again; if it stays so, look at the builder's own log.",
            ) from None
        except asyncio.CancelledError:
            raise stop.failure() from None

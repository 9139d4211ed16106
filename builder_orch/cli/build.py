"""`fly-build build`: a deploy that ends before the release."""

import sys

import click

from builder_orch.cli.deploy import run, told
from builder_orch.cli.options import Flags, build_flags, look_flags, result_flags
from builder_orch.cli.places import brought
from builder_orch.events import Emit
from builder_orch.settings import Environment


@click.command()
@look_flags
@result_flags
@build_flags
def build(ctx: click.Context, flags: Flags) -> None:
    """Build and push without a release.

    PATH is the build context, and where the search for fly.toml begins. With --no-push the image
    stays on the builder. With --load or --dest the result comes here and is not pushed, unless
    --push says so.
    """
    if flags.explain or flags.lock_context or flags.explain_context is not None:
        ctx.exit(told(flags, "build", lambda emit: _look(flags, emit)))
    ctx.exit(run(flags, "build", release=False))


def _look(flags: Flags, emit: Emit) -> dict[str, object]:
    from builder_orch.cli.look import look

    with brought(flags, sys.stdin.buffer, Environment.current().variables, emit) as given:
        return look(given, emit)

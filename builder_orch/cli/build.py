"""`fly-build build`: a deploy that ends before the release."""

import click

from builder_orch.cli.deploy import run
from builder_orch.cli.options import Flags, build_flags


@click.command()
@build_flags
def build(ctx: click.Context, flags: Flags) -> None:
    """Build and push without a release.

    PATH is the build context, and where the search for fly.toml begins. With --no-push the image
    stays on the builder.
    """
    ctx.exit(run(flags, "build", release=False))

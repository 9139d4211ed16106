"""`fly-build version`."""

import platform

import click

from builder_orch import __version__
from builder_orch.cli.form import output_option


@click.command()
@output_option
@click.pass_context
def version(context: click.Context, output: str) -> None:
    """Show the version of this tool and of the Python that runs it."""
    if output == "text":
        click.echo(f"fly-build {__version__}")
        return
    from builder_orch.cli.answer import tell

    facts: dict[str, object] = {
        "version": __version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
    }
    context.exit(tell(output, "version", lambda _: facts))

"""`fly-build version`."""

import json
import platform

import click

from builder_orch import __version__


@click.command()
@click.option(
    "--output", type=click.Choice(["text", "json"]), default="text", help="Form of the answer."
)
def version(output: str) -> None:
    """Show the version of this tool and of the Python that runs it."""
    if output == "json":
        facts = {
            "version": __version__,
            "python": platform.python_version(),
            "system": platform.system(),
            "machine": platform.machine(),
        }
        click.echo(json.dumps(facts))
    else:
        click.echo(f"fly-build {__version__}")

"""How commands that are no run of the pipeline say what came of it, and any why it failed."""

import os
import sys
import time
from collections.abc import Callable

import click

from builder_orch.cli.render import Renderer
from builder_orch.errors import BuilderOrchError, Exit, Interrupted, UsageFailure
from builder_orch.events import Emit, Finished

Facts = dict[str, object]
AGAIN = "Run the command again."
"""After Ctrl-C in a command of which nothing is kept."""


def tell(output: str, command: str, work: Callable[[Emit], Facts]) -> int:
    """Do the work of a command and print what came of it; the exit code.

    Of what it returns `lines` are the text, and `exit_code` is the command's, if that is not 0.
    """
    renderer = Renderer(output, os.urandom(8).hex(), sys.stdout, sys.stderr)
    renderer.start(command)
    began = time.monotonic()
    try:
        facts = work(renderer)
    except (BuilderOrchError, KeyboardInterrupt) as error:
        failure = error if isinstance(error, BuilderOrchError) else interrupted()
        renderer(Finished(False, int(failure.code), time.monotonic() - began, error=failure))
        return int(failure.code)
    code = facts.pop("exit_code", Exit.OK)
    assert isinstance(code, int)
    renderer(Finished(True, int(code), time.monotonic() - began, facts))
    return int(code)


def show(error: BuilderOrchError, output: str) -> int:
    """Print a failure that no command has told, in the form of those that were; the exit code."""
    renderer = Renderer(output, "", sys.stdout, sys.stderr)
    renderer.start("")
    renderer(Finished(False, int(error.code), 0.0, error=error))
    return int(error.code)


def interrupted() -> Interrupted:
    """Ctrl-C in a command that leaves nothing behind."""
    return Interrupted("interrupted; what had begun was ended", hint=AGAIN)


def misused(error: click.ClickException) -> UsageFailure:
    """What click found wrong with a command line, as a failure like all others."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        said = "no command was given"
    else:
        said = error.format_message().strip().removesuffix(".")
    if context is None:
        hint = "Add --help to the command to see what it takes."
    elif isinstance(context.command, click.Group):
        names = ", ".join(context.command.list_commands(context))
        hint = f"Take one of: {names}. {context.command_path} --help says more."
    else:
        hint = f"{context.command_path} --help shows what it takes."
    return UsageFailure(said[:1].lower() + said[1:], hint=hint)

"""The command `fly-build`: a table of commands that are imported when they are used.

`fly-build --help` must stay quick, so nothing here imports more than click and the errors.
"""

import importlib
import signal
import sys
from collections.abc import Sequence
from typing import NamedTuple

import click

from builder_orch import __version__
from builder_orch.cli.streams import leave, open_missing
from builder_orch.errors import NO_ROOM, BuilderOrchError, Exit, LocalDiskFull

EXAMPLES = """\
fly-build deploy examples/hello --create-app
fly-build deploy . --app shop --build-arg REVISION=42
fly-build build . --target test --output json
fly-build selfhost status
"""


class Entry(NamedTuple):
    """Where a command lives and the line that stands for it until it is imported."""

    module: str
    attribute: str
    summary: str


COMMANDS = {
    "deploy": Entry("builder_orch.cli.deploy", "deploy", "Build a directory and release it."),
    "build": Entry("builder_orch.cli.build", "build", "Build and push without a release."),
    "builder": Entry(
        "builder_orch.cli.builder",
        "builder",
        "Look after the machine that builds, and use it from docker.",
    ),
    "agent": Entry(
        "builder_orch.cli.agent", "agent", "Hold tunnels for all commands of this user."
    ),
    "selfhost": Entry(
        "builder_orch.cli.selfhost", "selfhost", "Run a platform of your own on this machine."
    ),
    "wireguard": Entry(
        "builder_orch.cli.wireguard", "wireguard", "Look after WireGuard peers, and test them."
    ),
    "version": Entry("builder_orch.cli.version", "version", "Show the version of this tool."),
}


class LazyGroup(click.Group):
    """A group that knows its commands by `COMMANDS` and imports one only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(
        self,
        ctx: click.Context,  # noqa: ARG002
        cmd_name: str,
    ) -> click.Command | None:
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        command = getattr(importlib.import_module(entry.module), entry.attribute)
        assert isinstance(command, click.Command)
        return command

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Examples first: they answer most questions that bring somebody here."""
        self.format_usage(ctx, formatter)
        with formatter.section("Examples"):
            for line in EXAMPLES.splitlines():
                formatter.write_text(line)
        self.format_help_text(ctx, formatter)
        self.format_options(ctx, formatter)

    def format_commands(
        self,
        ctx: click.Context,  # noqa: ARG002
        formatter: click.HelpFormatter,
    ) -> None:
        """From the table: asking each command for its help would import all of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in COMMANDS.items()])


@click.group(
    cls=LazyGroup,
    help="Remote Docker builds over user-mode WireGuard, from a machine without Docker or root.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="fly-build")
def fly_build() -> None:
    """The root of all commands; it has no work of its own."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; what failed is told in the form that was asked for.

    Anything else that comes out is a defect of this program and keeps its traceback.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return carried_out(words)
    except BrokenPipeError:
        # The reader of our output left.
        return int(Exit.UNCLASSIFIED)
    except OSError as error:
        # Where a file was meant that has been said already; this is the output itself, most likely.
        if error.errno not in NO_ROOM:
            raise
        failure = LocalDiskFull(
            f"the output cannot be written: {error.strerror}",
            hint="Send it elsewhere. What was to be done before it was written is done.",
        )
        return told(failure, ())


def carried_out(words: Sequence[str]) -> int:
    """The exit code of a command, whose failure has been told."""
    try:
        code = fly_build.main(args=words, prog_name="fly-build", standalone_mode=False)
    except (click.ClickException, BuilderOrchError, KeyboardInterrupt, click.Abort) as error:
        return told(error, words)
    return code if isinstance(code, int) else int(Exit.OK)


def told(
    error: click.ClickException | BuilderOrchError | KeyboardInterrupt | click.Abort,
    words: Sequence[str],
) -> int:
    """Say why a command ended that has not said so itself; the exit code."""
    from builder_orch.cli.answer import interrupted, misused, show
    from builder_orch.cli.form import wished
    from builder_orch.settings import Environment

    output = wished(words, Environment.current().variables)
    match error:
        case click.exceptions.NoArgsIsHelpError() if output == "text":
            error.show()
            return int(Exit.USAGE)
        case click.ClickException():
            return show(misused(error), output)
        case BuilderOrchError():
            return show(error, output)
        case _ if output == "text":
            click.echo("interrupted", err=True)
            return int(Exit.INTERRUPTED)
        case _:
            return show(interrupted(), output)


def run() -> None:
    """The entry point of the console script."""
    open_missing()
    # Until a command has something better to do about it: leave, but by way of what tidies up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(Exit.TERMINATED))
    code = main()
    leave()
    sys.exit(code)

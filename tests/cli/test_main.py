"""The root command: quick help, exit codes, and what a failure looks like."""

import importlib
import json
import os
import subprocess
import sys

import click
import pytest

from builder_orch.cli import main as cli
from builder_orch.errors import AppUnknown, BuilderOrchError, Exit, TunnelNotUp

HEAVY = {"docker", "scapy", "gql", "graphql", "aiohttp", "rich", "sqlalchemy", "cryptography"}


@click.command()
@click.argument("what")
def failing(what: str) -> None:
    """Fail in the way that was asked for."""
    match what:
        case "app":
            raise AppUnknown("there is no app shop", hint="create it with --create-app")
        case "tunnel":
            raise TunnelNotUp("no answer in 30 s", hint="run it again")
        case "interrupt":
            raise KeyboardInterrupt
        case "abort":
            raise click.Abort
        case "exit":
            click.get_current_context().exit(7)
        case "file":
            raise click.FileError("fly.toml", "unreadable")
        case _:
            raise ZeroDivisionError


@pytest.fixture(autouse=True)
def _failing_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.COMMANDS, "failing", cli.Entry(__name__, "failing", "Fail."))


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["version"]])
def test_what_needs_no_network_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import json, sys\n"
        "from builder_orch.cli.main import main\n"
        f"code = main({arguments!r})\n"
        "roots = sorted({name.partition('.')[0] for name in sys.modules})\n"
        "print(json.dumps([code, roots]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    code, roots = json.loads(done.stdout.splitlines()[-1])
    assert code == 0
    assert "click" in roots
    assert HEAVY.isdisjoint(roots)


def test_help_shows_examples_before_anything_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == Exit.OK
    shown = capsys.readouterr().out
    assert shown.index("Examples:") < shown.index("Options:") < shown.index("Commands:")
    assert all(name in shown and entry.summary in shown for name, entry in cli.COMMANDS.items())


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "failing"])
def test_every_command_of_the_table_is_there_and_says_the_same_of_itself(name: str) -> None:
    entry = cli.COMMANDS[name]
    command = getattr(importlib.import_module(entry.module), entry.attribute)
    assert isinstance(command, click.Command)
    assert command.get_short_help_str(200).startswith(entry.summary.removesuffix("."))


def test_every_example_of_the_help_is_a_command_with_those_options() -> None:
    for line in cli.EXAMPLES.splitlines():
        words = line.split()
        assert words[0] == "fly-build"
        command: click.Command | None = cli.fly_build
        arguments = words[1:]
        while isinstance(command, click.Group) and arguments:
            command = command.get_command(click.Context(command), arguments.pop(0))
        assert command is not None, line
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in arguments if word.startswith("--")} <= known, line


@pytest.mark.parametrize(
    ("what", "error"),
    [("app", AppUnknown), ("tunnel", TunnelNotUp)],
)
def test_a_failure_becomes_a_card_with_cause_class_and_next_step(
    what: str, error: type[BuilderOrchError], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["failing", what]) == error.code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert error.kind in shown.err
    assert "Traceback" not in shown.err
    assert ("create it with --create-app" if what == "app" else "run it again") in shown.err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["failing", "interrupt"], Exit.INTERRUPTED),
        (["failing", "abort"], Exit.INTERRUPTED),
        (["failing", "exit"], 7),
        (["failing", "file"], Exit.USAGE),
        (["failing"], Exit.USAGE),
        (["failing", "--no-such-option"], Exit.USAGE),
        (["no-such-command"], Exit.USAGE),
        (["version", "--output", "yaml"], Exit.USAGE),
        ([], Exit.USAGE),
        (["version"], Exit.OK),
    ],
)
def test_every_way_out_has_its_code(arguments: list[str], code: int) -> None:
    assert cli.main(arguments) == code


def test_a_defect_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        cli.main(["failing", "defect"])


def test_the_code_reaches_the_shell() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "builder_orch", "no-such-command"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == Exit.USAGE
    assert "no-such-command" in done.stderr
    assert done.stdout == ""


def test_a_reader_that_leaves_early_is_no_defect() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "builder_orch", "--help"],
            stdout=write_end,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(write_end)
    assert done.returncode == Exit.UNCLASSIFIED
    assert done.stderr == ""


def test_version_as_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version", "--output", "json"]) == Exit.OK
    facts = json.loads(capsys.readouterr().out)
    assert set(facts) == {"version", "python", "system", "machine"}

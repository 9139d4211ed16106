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


MISUSES = [
    (["failing", "--no-such-option"], "no such option '--no-such-option'", "failing --help"),
    (["failing"], "missing argument 'WHAT'", "fly-build failing --help"),
    (["no-such-command"], "no such command 'no-such-command'", "deploy, build"),
    (["builder"], "no command was given", "connect, prune, status"),
    (["selfhost", "start", "--port", "x"], "'x' is not a valid integer range", "start --help"),
    (["failing", "file"], "could not open file 'fly.toml': unreadable", "Add --help"),
    (["failing", "--timeout"], "no such option '--timeout'", "fly-build failing --help"),
    (["deploy", "--timeout"], "option '--timeout' requires an argument", "Add --help to the"),
    (["deploy", ".", "--timeout", "soon"], "'soon' is not a duration", "fly-build deploy --help"),
]


@pytest.mark.parametrize(("words", "said", "hint"), MISUSES)
def test_what_click_refuses_looks_like_every_other_failure(
    words: list[str],
    said: str,
    hint: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FLY_BUILD_OUTPUT", "json")
    assert cli.main(words) == Exit.USAGE
    shown = capsys.readouterr()
    assert said in json.loads(shown.out)["error"]["message"]
    error, cause, after, kind = shown.err.splitlines()
    assert error.startswith("error: ")
    assert said in error
    assert cause == "cause: what was given (yours to correct)"
    assert after.startswith("next:  ")
    assert hint in after
    assert kind == "id:    RB-USAGE, exit code 2"


@pytest.mark.parametrize("words", [["nope"], ["failing"], ["failing", "tunnel"], [], ["builder"]])
@pytest.mark.parametrize("form", ["json", "ndjson"])
def test_a_failure_that_no_command_has_told_is_one_object_where_that_was_asked_for(
    words: list[str], form: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLY_BUILD_OUTPUT", form)
    code = cli.main(words)
    shown = capsys.readouterr()
    objects = [json.loads(line) for line in shown.out.splitlines()]
    result = objects[-1]
    assert (result["ok"], result["exit_code"], result["error"]["exit_code"]) == (False, code, code)
    assert result["error"]["hint"]
    if form == "ndjson":
        assert [one["t"] for one in objects] == ["run.start", "error", "result"]
        assert shown.err == ""
    else:
        assert len(objects) == 1
        assert result["error"]["id"] in shown.err


def test_ctrl_c_in_a_command_that_does_not_look_is_an_object_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["failing", "interrupt"]) == Exit.INTERRUPTED
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("FLY_BUILD_OUTPUT", "json")
    assert cli.main(["failing", "interrupt"]) == Exit.INTERRUPTED
    assert json.loads(capsys.readouterr().out)["error"]["id"] == "RB-INTERRUPTED"


def test_a_group_alone_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["builder"]) == Exit.USAGE
    shown = capsys.readouterr()
    assert (shown.out, "Commands:" in shown.err) == ("", True)


def commands(
    command: click.Command = cli.fly_build, path: str = "fly-build"
) -> list[tuple[str, click.Command]]:
    """All commands that do something, with what is typed for them."""
    if not isinstance(command, click.Group):
        return [(path, command)]
    context = click.Context(command, info_name=path)
    inner = [(name, command.get_command(context, name)) for name in command.list_commands(context)]
    return [one for name, each in inner if each for one in commands(each, f"{path} {name}")]


def test_every_command_says_in_a_short_line_what_it_does() -> None:
    for path, command in commands():
        short = command.get_short_help_str(65)
        assert short.endswith("."), path
        assert not short.endswith("..."), path


def test_every_command_with_an_answer_gives_it_in_all_forms() -> None:
    for path, command in commands():
        if path.endswith((" logs", " failing")):
            continue
        options = {option.name: option for option in command.params if option.name}
        form = options["output"].type
        assert isinstance(form, click.Choice), path
        assert list(form.choices) == ["text", "json", "ndjson"], path


def test_the_variable_for_json_counts_for_every_command_with_an_answer() -> None:
    for path, command in commands():
        if path.endswith((" logs", " failing")):
            continue
        short = next(option for option in command.params if option.name == "json")
        assert short.envvar == "FLY_BUILD_JSON", path


def test_every_option_says_what_it_is_for() -> None:
    for path, command in commands():
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden:
                assert option.help, f"{path} {option.name}"


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


@pytest.mark.parametrize("words", [["--help"], ["version", "--json"], ["nope", "--json"]])
def test_output_that_has_no_room_is_told_and_no_defect(words: list[str]) -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device
        done = subprocess.run(
            [sys.executable, "-m", "builder_orch", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == Exit.BUILDER_LOST
    assert "error: the output cannot be written: No space left on device" in done.stderr
    assert "RB-LOCAL-DISK, exit code 12" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("shell", ["exec {} 2>/dev/full", "exec {} 2>&-", "exec {} 2>&- <&-"])
def test_a_failure_is_answered_where_nothing_can_be_said_beside_it(shell: str) -> None:
    command = f"{sys.executable} -m builder_orch nope --json"
    done = subprocess.run(
        ["/bin/sh", "-c", shell.format(command)], capture_output=True, text=True, check=False
    )
    assert done.returncode == Exit.USAGE
    assert json.loads(done.stdout)["error"]["id"] == "RB-USAGE"


def test_a_closed_stdout_gets_nothing_and_lends_its_number_to_nobody() -> None:
    program = (
        "import os\n"
        "from builder_orch.cli.streams import open_missing\n"
        "open_missing()\n"
        "print('to nobody', flush=True)\n"
        "assert os.fstat(1).st_rdev == os.stat(os.devnull).st_rdev\n"
        "assert os.get_inheritable(1)\n"
    )
    done = subprocess.run(
        ["/bin/sh", "-c", 'exec "$0" -c "$1" >&-', sys.executable, program],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_version_as_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version", "--output", "json"]) == Exit.OK
    facts = json.loads(capsys.readouterr().out)
    assert {"version", "python", "system", "machine"} <= set(facts)

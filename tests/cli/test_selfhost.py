"""`fly-build selfhost`, with a stand-in for the platform where it has to run."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from builder_orch.cli import selfhost as command
from builder_orch.cli.main import main
from builder_orch.errors import Exit
from builder_orch.selfhost.home import Home
from builder_orch.selfhost.launch import stop_selfhost
from builder_orch.selfhost.store import Store
from tests.selfhost.test_launch import STAND_IN, reap

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a selfhost command in this process: exit code, stdout, stderr."""

    def once(*words: str) -> tuple[int, str, str]:
        code = main(["selfhost", *words])
        shown = capfd.readouterr()
        return code, shown.out, shown.err

    return once


@pytest.fixture
def own(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """A home whose platform is the stand-in."""
    own = Home(home / "selfhost")
    stand_in = (sys.executable, str(STAND_IN), str(own.root), "up")
    monkeypatch.setattr(command, "FOREGROUND", stand_in)
    yield own
    stopped = stop_selfhost(own, limit_s=0)
    if stopped is not None:
        reap(stopped)


def test_start_status_start_stop_status(own: Home, run: Run) -> None:
    code, out, err = run("status", "--output", "json")
    assert code == Exit.UNCLASSIFIED
    assert json.loads(out)["state"] == "stopped"

    code, out, err = run("start")
    assert code == Exit.OK
    record = own.record()
    assert record is not None
    assert str(record.pid) in out
    assert record.api_url in out
    assert str(own.root) in err

    code, out, err = run("start")
    assert (code, out) == (Exit.LOCKED, "")
    assert f"pid {record.pid}" in err

    code, out, err = run("status", "--output", "json")
    assert code == Exit.OK
    facts = json.loads(out)
    assert facts["state"] == "running"
    assert (facts["pid"], facts["api_url"]) == (record.pid, record.api_url)
    assert "token" not in facts
    code, text, err = run("status")
    assert code == Exit.OK
    assert record.api_url in text
    assert record.token not in text.split()

    code, out, err = run("start", "--json")
    assert (code, json.loads(out)["error"]["id"]) == (Exit.LOCKED, "RB-LOCKED")
    code, out, err = run("stop", "--output", "ndjson")
    assert (code, err) == (Exit.OK, "")
    last = json.loads(out.splitlines()[-1])
    assert (last["t"], last["state"], last["pid"]) == ("result", "stopped", record.pid)
    with suppress(ChildProcessError):
        os.waitpid(record.pid, 0)
    assert run("stop")[0] == Exit.OK
    assert run("status")[0] == Exit.UNCLASSIFIED


def test_a_platform_that_holds_the_lock_and_does_not_answer_is_not_called_running(
    own: Home, run: Run
) -> None:
    own.prepare()
    with own.hold():
        code, out, _ = run("status", "--output", "json")
    assert code == Exit.UNCLASSIFIED
    assert json.loads(out)["state"] == "not answering"


def test_stop_can_leave_alone_what_another_checkout_started(own: Home, run: Run) -> None:
    assert run("start")[0] == Exit.OK
    true = own.lock.read_text()
    own.lock.write_text(json.dumps({**json.loads(true), "prefix": "/elsewhere/.venv"}))
    code, out, _ = run("stop", "--started-here")
    assert code == Exit.OK
    assert "/elsewhere/.venv" in out
    assert own.holder() is not None

    own.lock.write_text(true)
    assert run("stop", "--started-here")[0] == Exit.OK
    assert own.holder() is None


def test_a_port_in_use_is_told_by_the_command_that_waits_for_the_start(
    home: Path, run: Run
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, out, err = run("start", "--port", str(port))
    assert (code, out) == (Exit.USAGE, "")
    assert "RB-PORT-IN-USE" in err
    assert str(port) in err
    assert "Traceback" not in err
    assert Home(home / "selfhost").holder() is None


@pytest.mark.parametrize(
    "words",
    [
        ("start", "--listen", "0.0.0.0"),
        ("start", "--listen", "my-machine"),
        ("start", "--port", "70000"),
        ("start", "--install-delay", "-1"),
        ("logs",),
        ("logs", "-n", "-1"),
        ("token",),
        ("token", "--expires", "soon"),
        ("token", "--expires", "0s"),
        ("restart",),
    ],
)
def test_what_cannot_be_is_a_usage_error(home: Path, run: Run, words: tuple[str, ...]) -> None:
    code, out, err = run(*words)
    assert (code, out) == (Exit.USAGE, "")
    assert "Traceback" not in err
    assert len(err.splitlines()) > 1


def test_a_home_that_cannot_be_made_is_a_usage_error(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLY_BUILD_HOME", "/dev/null/home")
    code, _, err = run("start")
    assert code == Exit.USAGE
    assert "FLY_BUILD_HOME" in err


@pytest.mark.parametrize("word", ["token", "logs", "status", "stop"])
def test_a_platform_that_is_closed_to_this_user_is_told_as_such(own: Home, word: str) -> None:
    own.prepare()
    own.root.chmod(0)
    # Root has to be told to respect permissions.
    rights = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")
    as_others = rights if os.geteuid() == 0 else ()
    words = [*as_others, sys.executable, "-m", "builder_orch", "selfhost", word]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    finally:
        own.root.chmod(0o700)
    assert (done.returncode, done.stdout) == (Exit.USAGE, "")
    assert f"{own.root} cannot be used: Permission denied" in done.stderr
    assert "set FLY_BUILD_HOME" in done.stderr


def test_logs_shows_the_end_and_no_escapes(own: Home, run: Run) -> None:
    own.prepare()
    own.log.write_text("".join(f"line {n}\n" for n in range(100)) + "\x1b[2Jred \x1b[31mhat\n")
    code, out, _ = run("logs", "-n", "3")
    assert code == Exit.OK
    assert out.splitlines()[:2] == ["line 98", "line 99"]
    assert "\x1b" not in out
    assert "hat" in out
    assert len(run("logs")[1].splitlines()) == 50


def test_following_a_log_goes_on_and_notices_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "FOLLOW_POLL_S", 0)
    log = tmp_path / "log"
    log.write_text("one\ntwo\n")
    lines = command.last_lines(log, 1, following=True)
    assert next(lines) == "two"
    with log.open("a") as file:
        file.write("three\n")
        file.flush()
        assert next(lines) == "three"
    log.write_text("new\n")
    assert next(lines) == "new"
    log.rename(tmp_path / "old")
    log.write_text("another\n")
    assert next(lines) == "another"


def test_a_token_needs_a_database_that_is_one(own: Home, run: Run) -> None:
    own.prepare()
    own.store.write_bytes(b"this is no database" * 1000)
    code, out, err = run("token")
    assert (code, out) == (Exit.USAGE, "")
    assert "state.db cannot be used" in err
    assert "Traceback" not in err


def test_a_token_is_shown_once_and_only_its_hash_is_kept(own: Home, run: Run) -> None:
    own.prepare()
    store = Store(f"sqlite:///{own.store}")
    code, out, err = run("token", "--expires", "10m", "--owner", "ci")
    assert (code, err) == (Exit.OK, "")
    token = out.strip()
    row = store.authenticate(token)
    assert row.owner == "ci"
    assert row.expires_at - row.created_at == 600
    store.close()
    secret = token.split("_", 2)[2].encode()
    assert not any(secret in file.read_bytes() for file in own.root.iterdir())

    _, out, _ = run("token", "--output", "json")
    made = json.loads(out)
    assert made["expires_in_s"] == 3600
    assert made["token"] != token

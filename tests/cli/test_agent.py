"""`fly-build agent`, and what `--agent` means for a deploy."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from builder_orch.agent import call as calls
from builder_orch.agent.call import end_agent
from builder_orch.agent.place import Place
from builder_orch.agent.spawn import ensure_agent
from builder_orch.cli.main import main
from builder_orch.cli.shared import find
from builder_orch.errors import Exit, UsageFailure
from builder_orch.events import Event, Warned

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def place(home: Path) -> Iterator[Place]:
    place = Place(home / "agent")
    yield place
    end_agent(place, now=True)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run an agent command in this process: exit code, stdout, stderr."""

    def once(*words: str) -> tuple[int, str, str]:
        code = main(["agent", *words])
        shown = capfd.readouterr()
        return code, shown.out, shown.err

    return once


def test_start_status_restart_stop(place: Place, run: Run) -> None:
    code, out, _ = run("status")
    assert code == Exit.UNCLASSIFIED
    assert out.startswith("state: stopped\n")

    code, out, err = run("start", "--output", "json")
    assert code == Exit.OK
    pid = json.loads(out)["pid"]
    assert "starting the agent" in err
    code, out, err = run("start")
    assert (code, err) == (Exit.OK, "")
    assert f"pid {pid}" in out

    code, out, err = run("status", "--output", "json")
    facts = json.loads(out)
    assert (code, err) == (Exit.OK, "")
    assert (facts["state"], facts["pid"], facts["tunnels"]) == ("running", pid, [])
    assert facts["socket"] == str(place.socket)
    code, out, _ = run("status")
    assert f"pid: {pid}" in out

    code, out, _ = run("restart", "--output", "ndjson")
    events = [json.loads(line) for line in out.splitlines()]
    assert [event["t"] for event in events if event["t"] != "phase.reason"] == [
        "run.start",
        "result",
    ]
    assert events[-1]["before"] == pid
    assert events[-1]["pid"] != pid

    code, out, _ = run("stop", "--output", "json")
    assert code == Exit.OK
    assert json.loads(out)["pid"] == events[-1]["pid"]
    code, out, _ = run("stop")
    assert (code, out) == (Exit.OK, "the agent: stopped\n")
    assert run("status")[0] == Exit.UNCLASSIFIED


def test_run_is_the_agent_until_a_signal_and_there_is_only_one(place: Place, run: Run) -> None:
    words = [sys.executable, "-m", "builder_orch", "agent", "run", "--output", "json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stderr is not None
        assert b"listening" in running.stderr.readline()
        code, out, err = run("run", "--output", "json")
        assert code == Exit.LOCKED
        assert json.loads(out)["error"]["id"] == "RB-LOCKED"
        assert "runs already" in err
        running.send_signal(signal.SIGINT)
        out_octets, _ = running.communicate(timeout=30)
    assert running.returncode == 0
    assert json.loads(out_octets)["state"] == "ended"


def test_an_agent_ends_by_itself(place: Place) -> None:
    words = [sys.executable, "-m", "builder_orch", "agent", "run", "--idle", "0.1"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (0, "the agent: ended\n")
    assert not place.socket.exists()


def test_a_home_that_cannot_be_used_is_said(
    run: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLY_BUILD_HOME", str(home / ("x" * 100)))
    code, _, err = run("start")
    assert code == Exit.USAGE
    assert "too long" in err
    assert "FLY_BUILD_HOME" in err


# --agent


async def test_auto_uses_an_agent_that_runs_and_starts_none(place: Place) -> None:
    said: list[Event] = []
    assert await find("auto", place, None, said.append) is None
    assert not place.folder.exists()
    ensure_agent(place).close()
    assert await find("off", place, None, said.append) is None
    call = await find("auto", place, None, said.append)
    assert call is not None
    call.close()
    assert said == []


async def test_on_starts_one(place: Place) -> None:
    call = await find("on", place, None, lambda _: None)
    assert call is not None
    assert call.greeting.pid != os.getpid()
    call.close()


async def test_a_capture_is_of_a_tunnel_of_ones_own(place: Place, home: Path) -> None:
    ensure_agent(place).close()
    assert await find("auto", place, home / "a.pcap", lambda _: None) is None
    with pytest.raises(UsageFailure, match="not captured"):
        await find("on", place, home / "a.pcap", lambda _: None)


async def test_auto_goes_without_an_agent_that_hangs(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ensure_agent(place)
    call.close()
    os.kill(call.greeting.pid, signal.SIGSTOP)
    monkeypatch.setattr(calls, "ANSWER_LIMIT_S", 0.2)
    monkeypatch.setattr(calls, "END_LIMIT_S", 0.2)
    said: list[Event] = []
    assert await find("auto", place, None, said.append) is None
    (warned,) = said
    assert isinstance(warned, Warned)
    assert f"pid {call.greeting.pid}" in warned.message

"""Agents as processes: who comes first starts one, and none that died is in anybody's way."""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from builder_orch.agent import call as calls
from builder_orch.agent.call import Greeting, end_agent, greet
from builder_orch.agent.place import Place
from builder_orch.agent.spawn import LOG_LINES, ensure_agent, find_agent
from builder_orch.errors import AgentFailed

LIMIT_S = 60.0
OTHER = """
import asyncio, sys
from pathlib import Path
from builder_orch.agent.place import Place
from builder_orch.agent.server import Terms, serve
folder, version, first, last = sys.argv[1:]
terms = Terms(idle_s=60, tick_s=0.02, version=version, protocols=(int(first), int(last)))
asyncio.run(serve(Place(Path(folder)), terms))
"""
HOLD = """
import sys
from pathlib import Path
from builder_orch.agent.place import locked
print(*[locked(Path(path), 0.0) for path in sys.argv[1:]], flush=True)
sys.stdin.read()
"""


@pytest.fixture
def place(home: Path) -> Iterator[Place]:
    """The place of `fly-build agent`; what runs there is ended."""
    place = Place(home / "agent")
    yield place
    end_agent(place, now=True)


def start(place: Place, **how: object) -> Greeting:
    """Find or start an agent, and hang up."""
    call = ensure_agent(place, **how)  # type: ignore[arg-type]
    call.close()
    return call.greeting


def kill(pid: int) -> None:
    """kill -9, and wait until it is gone."""
    process = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(process, signal.SIGKILL)
        assert select.select([process], [], [], LIMIT_S)[0]
    finally:
        os.close(process)


def began(place: Place) -> int:
    return place.log.read_text().count("event='listening'")


@pytest.mark.parametrize("count", [6, pytest.param(50, marks=pytest.mark.long)])
def test_commands_that_start_together_have_one_agent(place: Place, count: int) -> None:
    words = [sys.executable, "-m", "builder_orch", "agent", "start", "--output", "json"]
    commands = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    said = [command.communicate(timeout=LIMIT_S)[0] for command in commands]
    assert [command.returncode for command in commands] == [0] * count
    assert len({json.loads(text)["pid"] for text in said}) == 1
    assert began(place) == 1


@pytest.mark.parametrize("rounds", [2, pytest.param(20, marks=pytest.mark.long)])
def test_after_kill_9_the_next_command_has_an_agent(place: Place, rounds: int) -> None:
    pids = []
    for _ in range(rounds):
        pids.append(start(place).pid)
        kill(pids[-1])
        assert place.socket.exists()
        assert greet(place) is None
    assert len(set(pids)) == rounds
    assert start(place).pid not in pids
    assert began(place) == rounds + 1


def test_locks_end_with_the_process_that_has_them(place: Place) -> None:
    place.prepare()
    words = [sys.executable, "-c", HOLD, str(place.lock), str(place.start_lock)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert b"None" not in holder.stdout.readline()
        with pytest.raises(AgentFailed, match=r"is not there after 0\.1 s"):
            start(place, limit_s=0.1)
        holder.kill()
    assert start(place).pid


def test_an_agent_that_does_not_start_leaves_its_last_words(place: Place) -> None:
    lines = f"for n in range({LOG_LINES + 5}): print('line', n, flush=True)"
    noisy = f"{lines}\nraise SystemExit('no luck')"
    with pytest.raises(AgentFailed, match="ended with status 1") as caught:
        start(place, command=(sys.executable, "-c", noisy))
    said = str(caught.value).splitlines()[1:]
    assert len(said) == LOG_LINES
    assert said[-1] == "no luck"
    assert str(place.log) in caught.value.hint


def test_an_agent_that_never_listens_is_given_up_and_ended(place: Place, home: Path) -> None:
    note = home / "pid"
    silent = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    with pytest.raises(AgentFailed, match="is not there after 1 s"):
        start(place, command=(sys.executable, "-c", silent), limit_s=1.0)
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


def test_an_agent_is_given_no_token(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FLY_BUILD_TOKEN", "FLY_API_TOKEN", "SECRET"):
        monkeypatch.setenv(name, "canary")
    pid = start(place).pid
    given = Path(f"/proc/{pid}/environ").read_bytes() + Path(f"/proc/{pid}/cmdline").read_bytes()
    assert b"canary" not in given
    assert b"FLY_BUILD_HOME" in given


# Of another release


@contextmanager
def other(place: Place, version: str, protocols: tuple[int, int]) -> Iterator[int]:
    """An agent of another release runs; yields its pid."""
    words = [str(place.folder), version, *map(str, protocols)]
    with subprocess.Popen([sys.executable, "-c", OTHER, *words]) as process:
        try:
            while (call := greet(place)) is None:
                assert process.poll() is None
            call.close()
            yield process.pid
            process.wait(LIMIT_S)
        finally:
            process.kill()


@pytest.mark.parametrize(("version", "protocols"), [("0.0.9", (1, 1)), ("0.0.9", (0, 0))])
def test_an_agent_of_an_earlier_release_makes_way(
    place: Place, version: str, protocols: tuple[int, int]
) -> None:
    said: list[str] = []
    with other(place, version, protocols) as before:
        now = start(place, report=said.append)
    assert now.pid != before
    assert said == [f"agent {version} (pid {before}) is asked to leave", "starting the agent"]
    assert start(place) == now


def test_a_later_agent_is_used_while_it_speaks_with_us(place: Place) -> None:
    with other(place, "9.0.0", (1, 4)) as pid:
        assert start(place).pid == pid
        found = find_agent(place)
        assert found is not None
        found.close()
        end_agent(place, now=False)


def test_a_later_agent_that_does_not_speak_with_us_is_left_alone(place: Place) -> None:
    with other(place, "9.0.0", (3, 4)) as pid:
        with pytest.raises(AgentFailed, match=rf"pid {pid}.*9\.0\.0") as caught:
            start(place)
        assert "--agent off" in caught.value.hint
        assert find_agent(place) is None
        end_agent(place, now=False)


# One that hangs


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Stop waiting for answers soon."""

    def hurry() -> None:
        monkeypatch.setattr(calls, "ANSWER_LIMIT_S", 0.2)
        monkeypatch.setattr(calls, "END_LIMIT_S", 0.2)

    return hurry


def test_an_agent_that_hangs_is_named_and_can_be_ended(
    place: Place, impatient: Callable[[], None]
) -> None:
    pid = start(place).pid
    os.kill(pid, signal.SIGSTOP)
    impatient()
    for asking in (greet, find_agent, ensure_agent, lambda where: end_agent(where, now=False)):
        with pytest.raises(AgentFailed, match=f"pid {pid}.* does not answer") as caught:
            asking(place)
        assert "agent stop --now" in caught.value.hint
    ending = end_agent(place, now=True)
    assert ending is not None
    assert ending.pid == pid
    assert greet(place) is None


def test_a_stranger_on_the_socket_is_no_agent(place: Place) -> None:
    tenure = place.take()
    try:
        script = (
            "import socket, sys; s = socket.socket(fileno=int(sys.argv[1])); s.setblocking(True);"
            "c, _ = s.accept(); c.send(b'HTTP/1.1 400 Bad Request\\r\\n\\r\\n'); c.recv(9999)"
        )
        words = [sys.executable, "-c", script, str(tenure.listener.fileno())]
        with (
            subprocess.Popen(words, pass_fds=[tenure.listener.fileno()]),
            pytest.raises(AgentFailed, match="is no agent"),
        ):
            greet(place)
    finally:
        tenure.end()

"""The agent below real deploys: shared, killed, restarted, refused to others."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from builder_orch.errors import Exit
from tests.system.conftest import SERVE
from tests.system.embedded import LIMIT_S, PEER, Embedded, app, in_phase

pytestmark = pytest.mark.system

ROOT = Path(__file__).parent.parent.parent
ECHO = (
    'CMD ["/bin/busybox", "sh", "-c",'
    ' "/bin/busybox nc -ll -p 7 -e /bin/busybox cat & exec /bin/busybox httpd -f -p 8080"]'
)
STRANGER = """
import socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.settimeout(10)
try:
    sock.connect(sys.argv[1])
    sock.sendall(bytes.fromhex(sys.argv[2]))
    print("heard", sock.recv(100))
except OSError as error:
    print(type(error).__name__)
"""


@pytest.fixture
def shared(embedded: Embedded) -> Iterator[Embedded]:
    """The platform, and no agent before and after."""
    embedded.run("agent", "stop", "--now")
    yield embedded
    embedded.run("agent", "stop", "--now")


@pytest.fixture(scope="module")
def echo(embedded: Embedded, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of an app whose port 7 says what it hears."""
    folder = app(tmp_path_factory.mktemp("echo"), "STOPSIGNAL SIGKILL", ECHO, name="echo")
    deployed = embedded.run("deploy", folder, "--create-app", "--agent", "off")
    assert deployed.code == 0, deployed.said
    return "echo.internal"


def agent(platform: Embedded) -> dict[str, object]:
    """What `agent status` tells."""
    found = json.loads(platform.run("agent", "status", "--output", "json").out)
    assert isinstance(found, dict)
    return found


@pytest.mark.long
def test_deploys_share_the_agents_tunnel(shared: Embedded, tmp_path: Path) -> None:
    folder = app(tmp_path / "app", "STOPSIGNAL SIGKILL", SERVE, name="shared")
    first = shared.run("deploy", folder, "--create-app", "--agent", "on", "--json")
    assert first.code == 0, first.said
    # Whoever does not say otherwise uses the one that runs.
    second = shared.run("deploy", folder, "--json")
    assert second.code == 0, second.said
    assert json.loads(second.out)["status"] == 404
    found = agent(shared)
    assert f"asking the agent (pid {found['pid']})" in second.err
    tunnels = found["tunnels"]
    assert isinstance(tunnels, list)
    assert len(tunnels) == 1
    made = PEER.findall(first.said)
    assert tunnels[0]["file"].endswith(f"{made[0]}.peer")
    assert not PEER.search(second.said)
    alone = shared.run("build", folder, "--no-push", FLY_BUILD_AGENT="off")
    assert alone.code == 0, alone.said
    assert PEER.search(alone.said)
    assert not shared.peers(alone)


@pytest.mark.parametrize("rounds", [1, pytest.param(20, marks=pytest.mark.long)])
def test_kill_9_of_the_agent_fails_the_upload_and_nothing_after_it(
    shared: Embedded, tmp_path: Path, rounds: int
) -> None:
    large = app(tmp_path / "large", "COPY large /large", name=f"killed-{rounds}")
    (large / "large").write_bytes(os.urandom(10_000_000) * 15)
    small = app(tmp_path / "small", name=f"killed-{rounds}")
    pids = set()
    for _ in range(rounds):
        with shared.running(
            "deploy", large, "--create-app", "--build-only", "--no-push", "--agent", "on"
        ) as running:
            asking = running.until(lambda event: "asking the agent" in event.get("reason", ""))
            pid = int(re.findall(r"pid (\d+)", asking["reason"])[0])
            running.until(in_phase("context", "progress"))
            os.kill(pid, signal.SIGKILL)
        pids.add(pid)
        lost = shared.ended[-1]
        assert lost.code == Exit.BUILDER_LOST, lost.said
        assert not lost.events[-1]["ok"]
        assert lost.error["retryable"]
        again = shared.run(
            "deploy", small, "--build-only", "--no-push", "--agent", "on", "--timeout", "60"
        )
        assert again.code == 0, again.said
    assert len(pids) == rounds
    assert shared.builds(f"killed-{rounds}") == ["failed", "completed"] * rounds


@pytest.mark.long
@pytest.mark.parametrize(
    ("mode", "talks"),
    [
        ("on", ["short", "bulk"]),
        pytest.param("on", ["short", "short", "bulk"], marks=pytest.mark.long),
        pytest.param("off", ["short", "short", "bulk"], marks=pytest.mark.long),
    ],
)
def test_two_sessions_a_transfer_and_a_deploy_at_once(
    shared: Embedded, echo: str, tmp_path: Path, mode: str, talks: list[str]
) -> None:
    folder = app(tmp_path / "fourth", "STOPSIGNAL SIGKILL", SERVE, name="fourth")
    words = [sys.executable, "-m", "tests.system.talker", mode, echo, "7"]
    with ExitStack() as stack:
        talkers = [
            stack.enter_context(
                subprocess.Popen(
                    [*words, how],
                    cwd=ROOT,
                    env=shared.environment(),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for how in talks
        ]
        for talker in talkers:
            stack.callback(talker.kill)
            assert talker.stdout is not None
            assert talker.stdout.readline() == "ready\n", talker.communicate()[1]
        if mode == "on":
            found = agent(shared)
            assert (found["clients"], found["connections"]) == (len(talks), len(talks))
        deployed = shared.run("deploy", folder, "--create-app", "--json", "--agent", mode)
        said = [talker.communicate(timeout=LIMIT_S) for talker in talkers]
    assert deployed.code == 0, deployed.said
    assert [talker.returncode for talker in talkers] == [0] * len(talks), said
    assert min(int(out) for out, _ in said) > 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_another_user_gets_nothing_even_if_the_directory_lets_him(shared: Embedded) -> None:
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    if python is None:
        pytest.skip("there is no Python that another user can run")
    assert shared.run("agent", "start").code == 0
    path = str(agent(shared)["socket"])
    words = [python, "-I", "-c", STRANGER, path, "00000002" + b"{}".hex()]

    def ask() -> str:
        done = subprocess.run(
            words,
            user=65534,
            group=65534,
            extra_groups=[],
            cwd="/",
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=True,
        )
        return done.stdout.strip()

    assert ask() == "PermissionError"
    opened = [shared.home, Path(path).parent, Path(path)]
    before = [folder.stat().st_mode for folder in opened]
    try:
        for folder in opened:
            folder.chmod(0o777)
        assert ask() in {"heard b''", "ConnectionResetError", "BrokenPipeError"}
    finally:
        for folder, mode in zip(opened, before, strict=True):
            folder.chmod(mode)
    assert "another user was turned away" in Path(str(agent(shared)["log"])).read_text()
    # No token and no key of anybody is in what the agent wrote down.
    log = Path(str(agent(shared)["log"])).read_text()
    for peer in (shared.home / "peers").glob("*.peer"):
        config = json.loads(peer.read_text())["config"]
        for line in config.splitlines():
            if line.startswith("PrivateKey"):
                assert line.partition("=")[2].strip() not in log
    assert shared.record["token"] not in log

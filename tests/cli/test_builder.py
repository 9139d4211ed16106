"""`fly-build builder connect` as a process would use it, with a platform and an engine of ours."""

import json
import os
import signal
import stat
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from builder_orch.cli import builder as command
from builder_orch.cli.options import Flags
from builder_orch.errors import Exit
from builder_orch.events import Emit
from builder_orch.pipeline.connect import Way
from builder_orch.pipeline.outside import World
from builder_orch.settings import PlatformSettings
from tests.pipeline.fake_world import REGISTRY, FakeWorld, fake_world

ENVIRONMENT = {
    "FLY_BUILD_API_URL": "http://127.0.0.1:9/graphql",
    "FLY_BUILD_TOKEN": "planted-token",
    "FLY_BUILD_REGISTRY": REGISTRY,
    "FLY_APP": "hello",
}
ASKING = """
import json, os, socket, stat, sys
kind, _, where = os.environ["DOCKER_HOST"].partition("://")
if kind == "unix":
    modes = [stat.S_IMODE(os.stat(path).st_mode) for path in (where, os.path.dirname(where))]
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(where)
else:
    modes = []
    host, _, port = where.rpartition(":")
    sock = socket.create_connection((host, int(port)))
sock.sendall(b"GET /version HTTP/1.1\\r\\nHost: d\\r\\n\\r\\n")
answer = b""
while octets := sock.recv(65536):
    answer += octets
names = [name for name in os.environ if name.startswith("DOCKER_")]
with open(sys.argv[1], "w") as file:
    json.dump({"answer": answer.decode(), "modes": modes, "where": where, "names": names}, file)
sys.exit(int(sys.argv[2]))
"""


class Used:
    """The world that the command was given, after it ended."""

    world: FakeWorld | None = None
    tunnel_failure = ""


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Used:
    made = Used()

    @asynccontextmanager
    async def open_world(
        chosen: PlatformSettings, emit: Emit, flags: Flags
    ) -> AsyncGenerator[World]:
        async with fake_world() as world:
            made.world = world
            world.tunnel.failure = made.tunnel_failure
            yield world.world

    monkeypatch.setattr(command, "open_world", open_world)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    return made


def run(*words: str, **env: str) -> Result:
    return CliRunner().invoke(command.builder, ["connect", *words], env={**ENVIRONMENT, **env})


def ask(folder: Path, *words: str, code: int = 0, **env: str) -> tuple[Result, dict[str, object]]:
    file = folder / "told.json"
    result = run(*words, "--", sys.executable, "-c", ASKING, str(file), str(code), **env)
    told = json.loads(file.read_text()) if file.exists() else {}
    return result, told


def test_a_command_reaches_the_engine_and_its_code_is_ours(used: Used, tmp_path: Path) -> None:
    result, told = ask(tmp_path, code=7, DOCKER_TLS_VERIFY="1", DOCKER_CONTEXT="other")
    assert result.exit_code == 7
    assert "ApiVersion" in str(told["answer"])
    assert told["modes"] == [0o600, 0o700]
    assert told["names"] == ["DOCKER_HOST"]
    assert result.stdout == ""
    assert not Path(str(told["where"])).parent.exists()
    assert used.world is not None
    assert used.world.leaves_nothing()


def test_it_can_be_a_port(used: Used, tmp_path: Path) -> None:
    result, told = ask(tmp_path, "--port", "0")
    assert result.exit_code == 0
    assert "ApiVersion" in str(told["answer"])
    assert str(told["where"]).startswith("127.0.0.1:")


@pytest.mark.parametrize(
    ("program", "code"), [("import os; os.kill(os.getpid(), 9)", 137), ("raise SystemExit(3)", 3)]
)
def test_a_command_that_a_signal_ends_has_the_code_that_shells_give_it(
    used: Used, program: str, code: int
) -> None:
    assert run("--", sys.executable, "-c", program).exit_code == code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_passed_on_to_the_command_which_decides(
    used: Used, number: signal.Signals
) -> None:
    program = (
        "import os, signal, sys\n"
        f"signal.signal({int(number)}, lambda *_: sys.exit(9))\n"
        f"os.kill({os.getpid()}, {int(number)})\n"
        "while True: signal.pause()"
    )
    assert run("--", sys.executable, "-c", program).exit_code == 9
    assert used.world is not None
    assert used.world.leaves_nothing()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("output", ["text", "json", "ndjson"])
def test_without_a_command_a_signal_is_its_good_end(
    used: Used,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    output: str,
    number: signal.Signals,
) -> None:
    announced = command.announce

    def announce(asked: command.Connecting, way: Way) -> None:
        announced(asked, way)
        assert Path(way.url.removeprefix("unix://")).is_socket()
        meta = list((tmp_path / ".docker").glob("contexts/meta/*/meta.json"))
        assert len(meta) == 1
        os.kill(os.getpid(), number)

    monkeypatch.setattr(command, "announce", announce)
    result = run("--use", "--output", output)
    assert result.exit_code == 0
    match output:
        case "text":
            first, second = result.stdout.splitlines()
            assert first.startswith("DOCKER_HOST=unix://")
            assert second == "docker --context fly-build"
        case "json":
            made = json.loads(result.stdout)
            assert made["context"] == "fly-build"
        case _:
            events = [json.loads(line) for line in result.stdout.splitlines()]
            (end,) = [event for event in events if event.get("phase") == "connect"][1:]
            assert end["outcome"].startswith("unix://")
            assert events[-1]["t"] == "result"
            assert events[-1]["ok"]
    assert json.loads((tmp_path / ".docker" / "config.json").read_text()) == {}
    assert not list((tmp_path / ".docker").glob("contexts/meta/*"))
    assert used.world is not None
    assert used.world.leaves_nothing()


def test_a_tunnel_that_ends_is_said(used: Used) -> None:
    used.tunnel_failure = "moved"
    result = run()
    assert result.exit_code == Exit.TUNNEL_NOT_UP
    assert "the tunnel to the builder has ended" in result.stderr
    assert used.world is not None
    assert used.world.leaves_nothing()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--app", "nosuch"], Exit.NOT_ALLOWED, "there is no app nosuch"),
        (["--", "/no/such/program"], Exit.USAGE, "there is no program"),
        (["--output", "json", "--", "true"], Exit.USAGE, "would both write to stdout"),
        (["--context", "default"], Exit.USAGE, "cannot be the name"),
    ],
)
def test_what_cannot_be_is_said_before_anybody_is_led_anywhere(
    used: Used, words: list[str], code: Exit, said: str
) -> None:
    result = run(*words)
    assert result.exit_code == code
    assert said in result.stderr
    assert "Traceback" not in result.output
    assert used.world is None or used.world.leaves_nothing()


def test_a_port_that_is_taken_is_the_users_to_change(used: Used) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run("--port", str(taken.getsockname()[1]))
    assert result.exit_code == Exit.USAGE
    assert "belongs to another program" in result.stderr
    assert used.world is not None
    assert used.world.leaves_nothing()


def test_the_folder_of_the_socket_may_be_the_users_own(used: Used, home: Path) -> None:
    home.chmod(stat.S_IRWXU)
    result, told = ask(home, XDG_RUNTIME_DIR=str(home))
    assert result.exit_code == 0
    assert Path(str(told["where"])).parent.parent == home

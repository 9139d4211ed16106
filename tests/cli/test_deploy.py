"""The command as its users meet it: flags, streams, exit codes, Ctrl-C."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from builder_orch.cli import deploy as command
from builder_orch.cli.build import build
from builder_orch.errors import Exit
from builder_orch.events import Emit
from builder_orch.pipeline.outside import World
from builder_orch.settings import PlatformSettings
from tests.pipeline.fake_engine import Act, built, image_id, message, pushed
from tests.pipeline.fake_world import REGISTRY, FakeWorld, fake_world

DIGEST = image_id("manifest")
ENVIRONMENT = {
    "FLY_BUILD_API_URL": "http://127.0.0.1:9/graphql",
    "FLY_BUILD_TOKEN": "planted-token",
    "FLY_BUILD_REGISTRY": REGISTRY,
}
Spoil = Callable[[FakeWorld], None]


class Used:
    """The world that the command was given, after it ended."""

    world: FakeWorld | None = None
    settings: PlatformSettings | None = None


@pytest.fixture
def used() -> Used:
    return Used()


@pytest.fixture
def spoil() -> list[Spoil]:
    """What a test wants to be different in the world."""
    return []


@pytest.fixture(autouse=True)
def _world(monkeypatch: pytest.MonkeyPatch, used: Used, spoil: list[Spoil]) -> None:
    @asynccontextmanager
    async def open_world(
        chosen: PlatformSettings, emit: Emit, capture: Path | None
    ) -> AsyncGenerator[World]:
        async with fake_world() as made:
            made.engine.pushes = [pushed(DIGEST)]
            made.engine.digests = [f"{REGISTRY}/hello@{DIGEST}"]
            for change in spoil:
                change(made)
            used.world, used.settings = made, chosen
            yield made.world

    monkeypatch.setattr(command, "open_world", open_world)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "Dockerfile").write_text("FROM scratch AS one\nCOPY . /\n")
    (tmp_path / "fly.toml").write_text('app = "hello"\n[build.args]\nA = "file"\nB = "file"\n')
    return tmp_path


def run(root: Path, *words: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(
        command.deploy, [str(root), *words], env={**ENVIRONMENT, **(env or {})}
    )


def query(used: Used) -> dict[str, list[str]]:
    assert used.world is not None
    (request,) = used.world.engine.asked("POST /build")
    return request.query


def test_a_deploy_prints_its_result_on_stdout_and_its_story_on_stderr(
    root: Path, used: Used
) -> None:
    result = run(root)
    assert result.exit_code == 0
    image, release, answer = result.stdout.splitlines()
    assert image == f"image: {REGISTRY}/hello@{DIGEST}"
    assert release == "release: v1"
    assert answer.startswith("hello v1 answered 200 in ")
    assert answer.endswith(" ms at http://hello.internal:8080/ through the tunnel")
    assert "build      step 2/2 COPY . /" in result.stderr
    assert "planted" not in result.output
    assert used.world is not None
    assert used.world.leaves_nothing()


def test_json_is_all_that_stdout_gets(root: Path) -> None:
    result = run(root, "--json")
    made = json.loads(result.stdout)
    assert made["ok"] is True
    assert made["image"] == f"{REGISTRY}/hello@{DIGEST}"
    assert (made["release"], made["status"], made["exit_code"]) == (1, 200, 0)


def test_ndjson_begins_with_the_run_and_ends_with_the_result(root: Path) -> None:
    result = run(root, "--output", "ndjson")
    events = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.stderr == ""
    assert events[0]["t"] == "run.start"
    assert events[-1]["t"] == "result"
    assert events[-1]["digest"] == DIGEST
    assert len({event["run"] for event in events}) == 1
    phases = [event["phase"] for event in events if event["t"] == "phase.end"]
    assert phases == [
        "preflight", "auth", "provision", "tunnel", "context", "build", "push", "release", "verify"
    ]  # fmt: skip


def test_flags_reach_the_engine_and_beat_the_file(root: Path, used: Used) -> None:
    words = ["--build-arg", "A=flag", "--build-arg", "C=a=b", "--target", "one", "--no-cache"]
    result = run(root, *words, "--label", "l=1", "--image-label", "v7")
    assert result.exit_code == 0
    asked = query(used)
    assert json.loads(asked["buildargs"][0]) == {"A": "flag", "B": "file", "C": "a=b"}
    assert json.loads(asked["labels"][0]) == {"l": "1"}
    assert asked["target"] == ["one"]
    assert used.world is not None
    assert f"{REGISTRY}/hello:v7" in used.world.engine.tags


def test_every_flag_is_a_variable_and_an_empty_one_is_unset(root: Path, used: Used) -> None:
    env = {
        "FLY_BUILD_TARGET": "one", "FLY_BUILD_NO_CACHE": "", "FLY_BUILD_BUILD_ARG": "A=1 B=2",
        "FLY_BUILD_IMAGE_LABEL": "", "FLY_BUILD_OUTPUT": "json", "FLY_BUILD_TIMEOUT": "10m",
        "FLY_BUILD_DOCKERFILE": "", "FLY_BUILD_CONFIG": "", "FLY_BUILD_ORG": "",
    }  # fmt: skip
    result = run(root, env=env)
    assert result.exit_code == 0, result.output
    assert json.loads(query(used)["buildargs"][0]) == {"A": "1", "B": "2"}
    assert query(used)["target"] == ["one"]
    assert query(used)["nocache"] == ["False"]
    assert json.loads(result.stdout)["ok"] is True


def test_paths_in_flags_count_from_here_and_those_in_the_file_from_the_file(
    root: Path, used: Used, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "sub").mkdir()
    (root / "sub" / "Web").write_text("FROM scratch\nCOPY . /\n")
    (root / "fly.toml").write_text('app = "hello"\n[build]\ndockerfile = "sub/Web"\n')
    assert run(root).exit_code == 0
    assert query(used)["dockerfile"] == ["sub/Web"]
    monkeypatch.chdir(root / "sub")
    assert run(root, "-f", "../Dockerfile").exit_code == 0
    assert query(used)["dockerfile"] == ["Dockerfile"]


@pytest.mark.parametrize("words", [["--build-only"], ["--build-only", "--no-push"]])
def test_build_only_makes_no_release(root: Path, used: Used, words: list[str]) -> None:
    result = run(root, *words)
    assert result.exit_code == 0
    assert result.stdout.startswith("image: ")
    assert ("not pushed" in result.stdout) is ("--no-push" in words)
    assert used.world is not None
    assert used.world.platform.releases == {}


def test_build_is_a_deploy_that_ends_before_the_release(root: Path, used: Used) -> None:
    result = CliRunner().invoke(build, [str(root)], env=ENVIRONMENT)
    assert result.exit_code == 0
    assert result.stdout == f"image: {REGISTRY}/hello@{DIGEST}\n"
    assert used.world is not None
    assert used.world.platform.releases == {}


def break_token(world: FakeWorld) -> None:
    from builder_orch.errors import NotLoggedIn

    world.platform.failures["app"] = NotLoggedIn("the token expired", hint="Log in again.")


def break_step(world: FakeWorld) -> None:
    world.engine.build = [
        message(stream="Step 1/1 : RUN x\n\x1b[31mboom\x1b[0m\n"),
        message(errorDetail={"message": "x", "code": 3}),
    ]


def break_push(world: FakeWorld) -> None:
    world.engine.pushes = [[message(error="denied: not yours")]]


def break_registry(world: FakeWorld) -> None:
    world.engine.pushes = [[message(error="dial tcp: connection refused")]] * 3


def break_release(world: FakeWorld) -> None:
    world.platform.turns = [("failed", False, "it never listened")]


def break_handshake(world: FakeWorld) -> None:
    world.tunnel.failure = "ready"


def fill_disk(world: FakeWorld) -> None:
    world.engine.build = [message(error="write: no space left on device")]


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (break_token, Exit.NOT_LOGGED_IN, "the token expired"),
        (break_handshake, Exit.TUNNEL_NOT_UP, "did not answer"),
        (break_step, Exit.BUILD_FAILED, "exit code 3"),
        (fill_disk, Exit.BUILDER_LOST, "disk is full"),
        (break_push, Exit.PUSH_DENIED, "not yours"),
        (break_registry, Exit.PUSH_TRANSPORT, "connection refused"),
        (break_release, Exit.RELEASE_FAILED, "it never listened"),
    ],
)
def test_a_failure_has_its_exit_code_and_a_card_and_no_traceback(
    root: Path, used: Used, spoil: list[Spoil], change: Spoil, code: Exit, said: str
) -> None:
    spoil.append(change)
    result = run(root, "--tunnel-timeout", "1s")
    assert result.exit_code == code
    assert result.stdout == ""
    for word in ("error: ", said, "cause: ", "next:  ", f"exit code {int(code)}"):
        assert word in result.stderr
    assert "Traceback" not in result.output
    assert "\x1b" not in result.output
    assert used.world is not None
    assert used.world.leaves_nothing()


def no_dockerfile(root: Path) -> list[str]:
    (root / "Dockerfile").unlink()
    return []


def broken_dockerfile(root: Path) -> list[str]:
    (root / "Dockerfile").write_text("FRM x\n")
    return []


def missing_source(root: Path) -> list[str]:
    (root / "Dockerfile").write_text("FROM scratch\nCOPY gone /\n")
    return []


def pipe(root: Path) -> list[str]:
    os.mkfifo(root / "pipe")
    return []


def broken_toml(root: Path) -> list[str]:
    (root / "fly.toml").write_text("app = \n")
    return []


def no_app(root: Path) -> list[str]:
    (root / "fly.toml").unlink()
    return []


def unknown_app(root: Path) -> list[str]:
    return ["--app", "other"]


def words(*given: str) -> Callable[[Path], list[str]]:
    return lambda root: list(given)


@pytest.mark.parametrize(
    ("prepare", "code", "said"),
    [
        (no_dockerfile, 20, "there is no Dockerfile"),
        (broken_dockerfile, 20, "unknown instruction FRM"),
        (missing_source, 20, "there is no gone"),
        (words("--target", "nope"), 20, "no stage 'nope'"),
        (words("-f", "nope"), 20, "there is no Dockerfile nope"),
        (pipe, 22, "pipe is a pipe"),
        (broken_toml, 2, "fly.toml:1"),
        (no_app, 2, "no app was named"),
        (unknown_app, 4, "there is no app other"),
        (words("--config", "nope.toml"), 2, "there is no file nope.toml"),
        (words("--app", "UPPER CASE"), 2, "is no app name"),
        (words("--build-arg", "novalue"), 2, "is not NAME=VALUE"),
        (words("--image-label", "a b"), 2, "is no image label"),
        (words("--timeout", "soon"), 2, "is not a duration"),
        (words("--timeout", "0"), 2, "longer than nothing"),
        (words("--output", "xml"), 2, "xml"),
        (words("--no-push"), 2, "a release needs its image"),
        (words("--api-url", "nonsense"), 2, "is not a URL"),
        (words("--no-such-flag"), 2, "no-such-flag"),
    ],
)
def test_bad_input_has_its_exit_code_and_provisions_nothing(
    root: Path, used: Used, prepare: Callable[[Path], list[str]], code: int, said: str
) -> None:
    result = run(root, *prepare(root))
    assert result.exit_code == code, result.output
    assert said in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.output
    if used.world is not None:
        assert used.world.platform.calls in ([], ["app"])


def test_a_directory_that_is_not_there_is_told(tmp_path: Path) -> None:
    for words in ([], ["--app", "hello"]):
        result = run(tmp_path / "gone", *words)
        assert result.exit_code == 2
        assert "is not a directory" in result.stderr


def test_without_a_token_nobody_is_asked(root: Path, used: Used) -> None:
    result = run(root, env={"FLY_BUILD_TOKEN": ""})
    assert result.exit_code == Exit.NOT_LOGGED_IN
    assert used.world is None


def test_the_embedded_platform_is_started_when_none_is_configured(
    root: Path, used: Used, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = PlatformSettings("http://127.0.0.1:8/graphql", "t", REGISTRY, "selfhost", True)
    monkeypatch.setattr(command, "start_selfhost", lambda environment, emit: started)
    result = run(root, env=dict.fromkeys(ENVIRONMENT, ""))
    assert result.exit_code == 0
    assert used.settings == started


def test_a_run_that_takes_too_long_is_ended_and_tidied_up(
    root: Path, used: Used, spoil: list[Spoil]
) -> None:
    spoil.append(lambda world: world.platform.held.add("ensure_builder"))
    result = run(root, "--timeout", "0.05")
    assert result.exit_code == Exit.TIMEOUT
    assert "--timeout" in result.stderr
    assert used.world is not None
    assert used.world.leaves_nothing()


@pytest.mark.parametrize(
    ("flag", "steps", "said"),
    [
        ("--build-timeout", 4, "took longer than 0.2 s, and was at step 2/2 (COPY . /)"),
        ("--stall-timeout", 2, "stood still for 0.2 s at step 1/2 (FROM scratch)"),
    ],
)
def test_a_build_has_limits_of_its_own(
    root: Path, used: Used, spoil: list[Spoil], flag: str, steps: int, said: str
) -> None:
    def hang(world: FakeWorld) -> None:
        world.engine.build = [*built()[:steps], Act.HANG]

    spoil.append(hang)
    result = run(root, flag, "0.2")
    assert result.exit_code == Exit.BUILD_TIMEOUT
    assert said in result.stderr
    assert flag in result.stderr
    assert used.world is not None
    assert used.world.leaves_nothing()
    assert used.world.engine.gone.is_set()


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, Exit.INTERRUPTED),
        (signal.SIGTERM, Exit.TERMINATED),
        (signal.SIGHUP, Exit.TERMINATED),
    ],
)
def test_a_signal_ends_the_run_with_a_result_and_nothing_left(
    root: Path, used: Used, spoil: list[Spoil], number: signal.Signals, code: Exit
) -> None:
    tasks: list[asyncio.Task[None]] = []

    async def kill(arrived: asyncio.Event) -> None:
        await arrived.wait()
        os.kill(os.getpid(), number)

    def change(world: FakeWorld) -> None:
        world.tunnel.hold = "ready"
        tasks.append(asyncio.get_running_loop().create_task(kill(world.tunnel.arrived)))

    spoil.append(change)
    result = run(root, "--output", "ndjson")
    assert result.exit_code == code
    last = json.loads(result.stdout.splitlines()[-1])
    assert (last["t"], last["ok"], last["exit_code"]) == ("result", False, code)
    assert used.world is not None
    assert used.world.leaves_nothing()
    assert [one["status"] for one in used.world.platform.builds.values()] == ["cancelled"]


def ran(program: str) -> "subprocess.CompletedProcess[str]":
    """A program of its own: signals go to whole processes."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_a_second_ctrl_c_ends_at_once() -> None:
    program = """
        import asyncio, os, signal
        from builder_orch.cli.deploy import Stop

        async def main():
            with Stop.listening(lambda event: print(type(event).__name__, flush=True)):
                asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGINT)
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    print("tidying up", flush=True)
                    os.kill(os.getpid(), signal.SIGINT)
                    await asyncio.Event().wait()

        asyncio.run(main())
    """
    done = ran(program)
    assert (done.returncode, done.stdout) == (130, "tidying up\nFinished\n")


def test_nohup_keeps_a_run_going() -> None:
    program = """
        import asyncio, os, signal
        from builder_orch.cli.deploy import Stop

        async def main():
            with Stop.listening(print) as stop:
                os.kill(os.getpid(), signal.SIGHUP)
                os.kill(os.getpid(), signal.SIGTERM)
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    print(stop.received.name)

        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        asyncio.run(main())
    """
    done = ran(program)
    assert (done.returncode, done.stdout) == (0, "SIGTERM\n"), done.stderr


def test_a_defect_shows_its_traceback_and_ends_the_events(root: Path, spoil: list[Spoil]) -> None:
    spoil.append(lambda world: world.platform.failures.update(app=ZeroDivisionError("a bug")))
    result = run(root, "--output", "ndjson")
    assert isinstance(result.exception, ZeroDivisionError)
    assert json.loads(result.stdout.splitlines()[-1])["exit_code"] == 1


def test_durations_are_written_as_people_do() -> None:
    from builder_orch.cli.options import Duration

    texts = ["90", "90s", "10m", "1h30m", "1.5s", "1h1m1s"]
    assert [Duration().convert(text, None, None) for text in texts] == [
        90, 90, 600, 5400, 1.5, 3661
    ]  # fmt: skip


def test_help_does_not_import_the_heavy_ones() -> None:
    program = (
        "import sys; from click.testing import CliRunner; from builder_orch.cli.main import main;"
        "main(['--help']); print([n for n in sys.modules if n in"
        " {'docker', 'scapy', 'gql', 'aiohttp', 'rich', 'requests'}])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"

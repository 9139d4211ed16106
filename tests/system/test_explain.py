"""What users are told of real builds: which file broke which step, on a terminal and in lines."""

import json
import os
import subprocess
from ipaddress import IPv6Address
from pathlib import Path

import pytest

from builder_orch.events import Event, Rebuilt
from builder_orch.pipeline.build import Build, building
from builder_orch.pipeline.context import Directory, scan
from builder_orch.pipeline.engine import BUILDKIT, CLASSIC, Engine, Recipe, wait_for_engine
from builder_orch.pipeline.history import Memory
from builder_orch.pipeline.remember import Circumstances, remembering
from builder_orch.pipeline.stage import perform
from tests.cli.terminal import Seen, pty
from tests.system.embedded import LIMIT_S, Embedded, app, command
from tests.system.test_buildkit import Counted

pytestmark = pytest.mark.system

LINES = (
    'SHELL ["/bin/busybox", "sh", "-c"]',
    "COPY lock /lock",
    "RUN echo install",
    "COPY src /src",
    "RUN echo compile; /bin/busybox cat /src/deep/b",
)


def project(folder: Path, name: str) -> Path:
    root = app(folder / name, *LINES, name=name)
    (root / "src" / "deep").mkdir(parents=True)
    for path, text in (("lock", "1"), ("src/a", "1"), ("src/deep/b", "1"), ("unused", "1")):
        (root / path).write_text(f"{name} {text}\n")
    return root


async def built(socket: Path, folder: Path, root: Path, recipe: Recipe) -> list[Rebuilt]:
    """What a build says of the cache."""
    events: list[Event] = []
    dialled = Counted(socket)
    engine = Engine(IPv6Address("fdaa::2"), dialled.dial)
    engine = await wait_for_engine(engine, lambda reason: None, limit_s=30)
    context = scan(Directory(root), events.append)
    async with (
        remembering(Memory(folder), context, Circumstances(), events.append) as kept,
        building(engine, context, recipe, kept.emit) as under_way,
    ):
        await perform(Build(), under_way, kept.emit)
        await kept.built("m1")
    await dialled.over()
    return [event for event in events if isinstance(event, Rebuilt)]


@pytest.mark.parametrize("builder", [BUILDKIT, CLASSIC])
async def test_the_file_that_changed_is_named_with_the_step_that_it_broke(
    engine_socket: Path, tmp_path: Path, builder: str
) -> None:
    root = project(tmp_path, f"explained-{os.urandom(4).hex()}")
    recipe = Recipe("Dockerfile", builder=builder, node="tests")
    assert await built(engine_socket, tmp_path / "history", root, recipe) == []
    (root / "unused").write_text("changed")
    assert await built(engine_socket, tmp_path / "history", root, recipe) == []
    (root / "src" / "deep" / "b").write_text("changed")
    (told,) = await built(engine_socket, tmp_path / "history", root, recipe)
    assert (told.step.name, told.cause) == ("COPY src /src", "changed")
    assert told.paths == ("src/deep/b",)
    assert told.cost_s > 0


@pytest.mark.long
@pytest.mark.parametrize("builder", ["buildkit", "classic"])
def test_the_command_names_one_changed_file_and_its_step(
    embedded: Embedded, tmp_path: Path, builder: str
) -> None:
    root = project(tmp_path, f"explained-{builder}")
    more = {"FLY_BUILD_BUILDER": builder}
    words = ("build", root, "--create-app", "--no-push", "--output", "ndjson")

    def build() -> list[dict[str, object]]:
        made = embedded.run(*words, **more)
        assert made.code == 0, made.said
        events = [json.loads(line) for line in made.out.splitlines()]
        return [event for event in events if event["t"] == "cache.miss"]

    assert build() == []
    assert build() == []
    (root / "unused").write_text("changed")
    assert build() == []
    (root / "src" / "deep" / "b").write_text("changed")
    told = embedded.run("build", root, "--explain", **more)
    assert told.code == 0
    assert told.out.startswith("content  src/deep/b\nstep ")
    assert "COPY src /src will be built anew: changed: src/deep/b" in told.out
    (miss,) = build()
    assert (miss["name"], miss["cause"], miss["paths"]) == (
        "COPY src /src", "changed", ["src/deep/b"]
    )  # fmt: skip
    cost_ms = miss["cost_ms"]
    assert isinstance(cost_ms, int)
    assert cost_ms > 0
    assert build() == []


def test_a_failing_build_on_a_terminal_ends_with_the_lines_of_its_step(
    embedded: Embedded, tmp_path: Path
) -> None:
    root = project(tmp_path, "drawn")
    with (root / "Dockerfile").open("a") as file:
        file.write("RUN printf '\\033[2Jboom\\n'; exit 3\n")
    words = command("build", root, "--create-app", "--no-push")
    environment = embedded.environment(TERM="xterm", FLY_BUILD_BUILDER="buildkit")
    with pty(columns=100, rows=30) as terminal:
        done = subprocess.run(
            words,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=terminal.end,
            timeout=LIMIT_S,
            check=False,
        )
        seen = Seen(100).feed(terminal.written())
    lines = seen.lines()
    assert done.returncode == 20
    assert done.stdout == b""
    assert seen.cursor
    assert any(line.startswith("✓ tunnel     up, handshake") for line in lines)
    assert any("COPY src /src" in line for line in lines)
    headline = next(at for at, line in enumerate(lines) if line.startswith("error: "))
    assert lines[headline].startswith("error: Dockerfile:8: step 6/6 (RUN printf ")
    tail = [line.strip() for line in lines[headline + 1 :]]
    assert "| boom" in tail
    assert lines[-1].startswith("id:    RB-BUILD-STEP, exit code 20")


@pytest.mark.long
def test_rawjson_is_the_engines_own_stream_and_nothing_else(
    embedded: Embedded, tmp_path: Path
) -> None:
    root = project(tmp_path, "raw")
    more = {"FLY_BUILD_BUILDER": "buildkit"}
    made = embedded.run("build", root, "--create-app", "--progress", "rawjson", **more)
    assert made.code == 0
    objects = [json.loads(line) for line in made.err.splitlines()]
    vertexes = [one for each in objects for one in each.get("vertexes", [])]
    assert any(one["name"].endswith("COPY src /src") for one in vertexes)
    assert all(one["digest"].startswith("sha256:") for one in vertexes)
    assert made.out.startswith("image: ")


@pytest.mark.long
def test_a_dockerfile_from_the_standard_input_is_built(embedded: Embedded, tmp_path: Path) -> None:
    root = project(tmp_path, "piped")
    (root / "Dockerfile").write_text("this is not one\n")
    text = "FROM scratch\nCOPY busybox /bin/busybox\nCOPY lock /lock\n"
    for builder in ("buildkit", "classic"):
        done = subprocess.run(
            command("build", root, "--create-app", "--no-push", "--file", "-"),
            env=embedded.environment(FLY_BUILD_BUILDER=builder),
            input=text.encode(),
            capture_output=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert b"COPY lock /lock" in done.stderr

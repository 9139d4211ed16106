"""`fly-build builder status` and `prune`, with a platform and an engine of ours."""

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from builder_orch.cli import upkeep
from builder_orch.cli.builder import builder
from builder_orch.cli.options import Flags
from builder_orch.errors import Exit
from builder_orch.events import Emit
from builder_orch.pipeline.outside import World
from builder_orch.settings import PlatformSettings
from tests.pipeline.fake_world import REGISTRY, FakeWorld, fake_world

ENVIRONMENT = {
    "FLY_BUILD_API_URL": "http://127.0.0.1:9/graphql",
    "FLY_BUILD_TOKEN": "planted-token",
    "FLY_BUILD_REGISTRY": REGISTRY,
    "FLY_APP": "hello",
}
Spoil = Callable[[FakeWorld], None]


class Used:
    """The world that the command was given, after it ended."""

    world: FakeWorld | None = None
    spoil: Spoil = staticmethod(lambda _: None)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Used:
    made = Used()

    @asynccontextmanager
    async def open_world(
        chosen: PlatformSettings, emit: Emit, flags: Flags
    ) -> AsyncGenerator[World]:
        async with fake_world() as world:
            made.world = world
            made.spoil(world)
            yield world.world

    monkeypatch.setattr(upkeep, "open_world", open_world)
    monkeypatch.chdir(tmp_path)
    return made


def run(*words: str) -> Result:
    return CliRunner().invoke(builder, list(words), env=ENVIRONMENT)


def asked(used: Used, pattern: str) -> list[dict[str, list[str]]]:
    assert used.world is not None
    assert used.world.leaves_nothing()
    return [one.query for one in used.world.engine.asked(pattern)]


def test_status_says_what_the_builder_holds(used: Used) -> None:
    result = run("status")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "Docker 20.10.24, 2 processors, 4.0 GB",
        "2 images, 7.0 MB",
        "build cache 3.0 MB",
    ]
    made = json.loads(run("status", "--output", "json").stdout)
    assert (made["layers_bytes"], made["cache_bytes"], made["images"]) == (7_000_000, 3_000_000, 2)


@pytest.mark.parametrize(("words", "dangling"), [([], "true"), (["--all"], "false")])
def test_prune_throws_caches_away_and_images_as_far_as_asked(
    used: Used, words: list[str], dangling: str
) -> None:
    result = run("prune", *words)
    assert result.exit_code == 0
    assert result.stdout == "3.0 MB freed\n"
    (images,) = asked(used, "POST /images/prune")
    assert dangling in str(images["filters"]).lower()
    (builds,) = asked(used, "POST /build/prune")
    assert builds["all"] == ["True"]


def nonsense(world: FakeWorld) -> None:
    world.engine.info = {"ServerVersion": 7}
    world.engine.freed = {"message": "?"}


def silent(world: FakeWorld) -> None:
    world.engine.held = []


@pytest.mark.parametrize(
    ("words", "spoil"), [(["status"], nonsense), (["prune"], nonsense), (["status"], silent)]
)
def test_an_engine_that_says_something_else_is_not_believed(
    used: Used, words: list[str], spoil: Spoil
) -> None:
    used.spoil = spoil
    result = run(*words)
    assert result.exit_code == Exit.BUILDER_LOST
    assert "it answered with something else" in result.stderr
    assert "Traceback" not in result.output


def test_without_a_builder_it_is_said_who_has_none(used: Used) -> None:
    def gone(world: FakeWorld) -> None:
        world.tunnel.failure = "resolve"

    used.spoil = gone
    assert run("status").exit_code == Exit.TUNNEL_NOT_UP
    assert run("status", "--app", "other").exit_code == Exit.NOT_ALLOWED

"""BuildKit with a registry that asks for a login: images to build from, and caches in them."""

import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import docker
import pytest

from builder_orch.api.models import Secret
from builder_orch.buildkit.messages import Cache
from builder_orch.errors import BuildFailed
from builder_orch.events import Event, Log, Step, Warned
from builder_orch.pipeline.build import Build, Built, Send, building
from builder_orch.pipeline.context import Directory, scan
from builder_orch.pipeline.engine import BUILDKIT, Engine, Login, Recipe
from builder_orch.pipeline.outside import Logins
from builder_orch.pipeline.push import Push, Pushed
from builder_orch.pipeline.stage import perform
from tests.system.test_engine import own_engine
from tests.system.test_registry import pytestmark as registry_marks
from tests.system.test_registry import registry_of
from tests.system.test_results import connect

pytestmark = [*registry_marks, pytest.mark.long]


@dataclass
class Place:
    """An engine, a registry beside it, and who asked for a login."""

    engine: Engine
    repository: str
    raw: docker.APIClient
    asked: list[str]

    def logins(self, password: str) -> Logins:
        async def login(host: str) -> Login | None:
            self.asked.append(host)
            return Login("x", Secret(password))

        return login

    def forget(self, name: str) -> None:
        """The engine has neither the image nor any step of a build any more."""
        self.raw.remove_image(name, force=True)
        self.raw.prune_images(filters={"dangling": False})
        self.raw.prune_builds(all=True)
        assert self.raw.images() == []

    async def build(self, root: Path, recipe: Recipe, password: str, events: list[Event]) -> Built:
        context = scan(Directory(root), events.append)
        logins = self.logins(password)
        async with building(self.engine, context, recipe, events.append, logins) as under_way:
            await perform(Send(), under_way, events.append)
            built = await perform(Build(), under_way, events.append)
        assert isinstance(built, Built)
        return built

    async def push(self, built: Built, label: str) -> Pushed:
        async def login() -> Login:
            return Login("x", Secret("good"))

        async def pause(seconds: float) -> None:
            raise AssertionError

        return await Push(self.engine, self.repository, label, login, pause).run(built, print)


@pytest.fixture
async def place(home: Path) -> AsyncIterator[Place]:
    async with own_engine(home) as engine, registry_of(engine, home) as registry:
        client = docker.APIClient(base_url=f"unix://{engine.docker_host}", version="auto")
        with closing(client):
            connected = await connect(engine.docker_host)
            yield Place(connected, f"{registry.address}/hello", client, [])


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    def write(*lines: str) -> Path:
        (tmp_path / "id").write_text(os.urandom(16).hex())
        (tmp_path / "Dockerfile").write_text("\n".join([*lines, ""]))
        return tmp_path

    return write


def steps(events: Sequence[Event]) -> dict[str, bool]:
    """By name: was it taken over?"""
    found: dict[str, bool] = {}
    for event in events:
        if isinstance(event, Step):
            found[event.name] = event.cached
    return found


async def test_a_cache_in_an_image_is_used_by_an_engine_that_has_forgotten_all(
    place: Place, written: Callable[..., Path]
) -> None:
    root = written("FROM scratch", "COPY id /one", "COPY id /two")
    name = f"{place.repository}:cached"
    recipe = Recipe(
        "Dockerfile", builder=BUILDKIT, name=name, cache_to=(Cache("inline"),), node="tests"
    )
    built = await place.build(root, recipe, "good", [])
    pushed = await place.push(built, "cached")
    assert pushed.reference.startswith(place.repository)
    place.forget(name)
    again = replace(recipe, cache_from=(Cache("registry", {"ref": name}),))
    events: list[Event] = []
    await place.build(root, again, "good", events)
    assert steps(events) == {"COPY id /one": True, "COPY id /two": True}
    assert set(place.asked) == {place.repository.partition("/")[0]}
    # A cache that may not be read is no reason to fail; nothing is taken over.
    place.forget(name)
    events = []
    await place.build(root, again, "bad", events)
    assert not any(steps(events).values())


async def test_a_private_image_is_built_from_with_a_login_and_only_where_it_is_named(
    place: Place, written: Callable[..., Path]
) -> None:
    root = written("FROM scratch", "COPY id /one")
    recipe = Recipe("Dockerfile", builder=BUILDKIT, name=f"{place.repository}:base", node="tests")
    await place.push(await place.build(root, recipe, "good", []), "base")
    place.forget(recipe.name)
    root = written(f"FROM {recipe.name}", "COPY id /two")
    other = replace(recipe, name="app.test/other:1")
    with pytest.raises(BuildFailed, match=r"authoriz|denied|401|403"):
        await place.build(root, other, "bad", [])
    place.asked.clear()
    events: list[Event] = []
    await place.build(root, other, "good", events)
    assert set(place.asked) == {place.repository.partition("/")[0]}
    assert not [one for one in events if isinstance(one, Warned)]
    assert "good" not in repr([one for one in events if isinstance(one, Log)])

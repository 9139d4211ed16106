"""Where an image goes besides the app's repository: another registry, with the user's own login."""

import json
from base64 import urlsafe_b64decode
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from builder_orch.api.models import Secret
from builder_orch.errors import BuilderLost, UsageFailure
from builder_orch.events import Event
from builder_orch.pipeline.build import Built
from builder_orch.pipeline.context import Directory
from builder_orch.pipeline.deploy import Order, deploy
from builder_orch.pipeline.engine import Login
from builder_orch.pipeline.load import engine_here
from tests.pipeline.fake_engine import image_id, pushed
from tests.pipeline.fake_world import REGISTRY, TOKEN, FakeWorld, fake_world

DIGEST = image_id("manifest")
OTHER = "other.test:5000"


@pytest.fixture
async def outside() -> AsyncIterator[FakeWorld]:
    async with fake_world() as made:
        made.engine.pushes = [pushed(DIGEST)]
        made.engine.digests = [f"{OTHER}/team/app@{DIGEST}", f"{REGISTRY}/hello@{DIGEST}"]
        yield made


@pytest.fixture
def order(tmp_path: Path) -> Order:
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    return Order(Directory(tmp_path), "hello", release=False)


def login_used(outside: FakeWorld) -> dict[str, str]:
    (request,) = outside.engine.asked(r"POST .*/push")
    headers = {name.lower(): value for name, value in request.headers.items()}
    found = json.loads(urlsafe_b64decode(headers["x-registry-auth"]))
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    ("login", "expected"),
    [
        (
            Login("me", Secret("planted")),
            {"username": "me", "password": "planted", "serveraddress": OTHER},
        ),
        (Login("", Secret("planted")), {"identitytoken": "planted", "serveraddress": OTHER}),
        (None, {}),
    ],
)
async def test_another_registry_gets_the_login_that_is_kept_for_it(
    order: Order, outside: FakeWorld, login: Login | None, expected: dict[str, str]
) -> None:
    asked: list[str] = []

    async def logins(host: str) -> Login | None:
        asked.append(host)
        return login

    events: list[Event] = []
    world = replace(outside.world, logins=logins)
    made = await deploy(replace(order, image=f"{OTHER}/team/app:1"), world, events.append)
    assert made.pushed is not None
    assert made.pushed.reference == f"{OTHER}/team/app@{DIGEST}"
    assert made.pushed.tag == f"{OTHER}/team/app:1"
    assert set(asked) == {OTHER}
    assert login_used(outside) == expected
    assert "planted" not in repr(events) + repr(made)
    assert TOKEN not in repr(outside.engine.requests)


async def test_the_platforms_registry_gets_the_platforms_token(
    order: Order, outside: FakeWorld
) -> None:
    async def logins(host: str) -> Login | None:
        raise AssertionError(host)

    await deploy(order, replace(outside.world, logins=logins), lambda _: None)
    assert login_used(outside)["password"] == TOKEN


async def test_an_archive_that_is_not_whole_is_not_kept(
    order: Order, outside: FakeWorld, tmp_path: Path
) -> None:
    from builder_orch.pipeline.load import Load

    class Cut:
        async def tag(self, image: str, repository: str, tag: str) -> None:
            return

        async def save(self, image: str, take: object) -> None:
            assert callable(take)
            take(b"the beginning of an archive")

    place = tmp_path / "new" / "image.tar"
    load = Load(Cut(), "r.test/a", "1", place, None)  # type: ignore[arg-type]
    with pytest.raises(BuilderLost, match="no whole archive"):
        await load.run(Built(image_id("image"), 1), lambda _: None)
    assert list(place.parent.iterdir()) == []
    load = replace(load, place=tmp_path / "Dockerfile" / "image.tar")
    with pytest.raises(UsageFailure, match="cannot be written"):
        await load.run(Built(image_id("image"), 1), lambda _: None)


async def test_an_engine_here_that_answers_is_taken(outside: FakeWorld) -> None:
    engine = await engine_here(f"tcp://127.0.0.1:{outside.engine.port}")
    assert engine.version == "1.41"

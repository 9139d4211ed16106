"""The engine over HTTP: success by evidence only, and every broken upload is reset."""

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator
from ipaddress import IPv6Address
from pathlib import Path

import pytest

from builder_orch.api.models import Secret
from builder_orch.errors import (
    BuilderLost,
    BuilderNotProvisioned,
    BuilderOrchError,
    BuildFailed,
    ContextRefused,
    DockerfileInvalid,
    NotAllowed,
    PushDenied,
    PushFailed,
)
from builder_orch.events import Event, Log, PhaseFinished, Retry, Step, Warned
from builder_orch.pipeline.build import Build, Built, Send, building
from builder_orch.pipeline.context import Directory, scan
from builder_orch.pipeline.engine import Engine, Login, Recipe, wait_for_engine
from builder_orch.pipeline.pack import CHUNK
from builder_orch.pipeline.push import TRIES, Push, Pushed
from builder_orch.pipeline.stage import perform
from tests.pipeline.fake_engine import (
    Act,
    End,
    FakeEngine,
    Script,
    built,
    image_id,
    message,
    pushed,
    running,
)

DIGEST = image_id("manifest")
REPOSITORY = "registry.test:5000/app"


@pytest.fixture
async def fake() -> AsyncIterator[FakeEngine]:
    async with running(FakeEngine()) as engine:
        yield engine


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "Dockerfile").write_text("FROM scratch AS t\nCOPY . /\n")
    (tmp_path / "data").write_bytes(os.urandom(100_000))
    return tmp_path


async def at_once(seconds: float) -> None:
    await asyncio.sleep(0)


async def never(seconds: float) -> None:
    await asyncio.Event().wait()


def engine_of(fake: FakeEngine) -> Engine:
    return Engine(IPv6Address("fdaa::2"), fake.dial, "1.41", pause=never)


async def build(
    fake: FakeEngine, root: Path, events: list[Event] | None = None, recipe: Recipe | None = None
) -> Built:
    emit = (events if events is not None else []).append
    context = scan(Directory(root), emit)
    recipe = recipe or Recipe(context.dockerfile_name)
    async with building(engine_of(fake), context, recipe, emit) as under_way:
        await perform(Send(), under_way, emit)
        built = await perform(Build(), under_way, emit)
        assert isinstance(built, Built)
        return built


# --- building


async def test_an_image_that_was_read_back_is_a_success(fake: FakeEngine, root: Path) -> None:
    events: list[Event] = []
    recipe = Recipe("Dockerfile", {"A": "1"}, "t", True, {"l": "2"})
    fake.ports = {"8081/tcp": {}, "53/udp": {}}
    made = await build(fake, root, events, recipe)
    assert made == Built(image_id("image"), 4096, (8081,))
    (request,) = fake.asked("POST /build")
    assert request.end is End.WHOLE
    assert request.body.endswith(bytes(1024))
    sent = {name: values[0] for name, values in request.query.items()}
    assert json.loads(sent.pop("buildargs")) == {"A": "1"}
    assert json.loads(sent.pop("labels")) == {"l": "2"}
    assert sent.pop("dockerfile") == "Dockerfile"
    assert sent.pop("target") == "t"
    assert {name for name, value in sent.items() if value in {"True", "1"}} == {
        "nocache", "rm", "forcerm"
    }  # fmt: skip
    phases = [event.phase for event in events if isinstance(event, PhaseFinished)]
    assert phases == ["context", "build"]
    assert Step(2, 2, "COPY . /") in events


async def test_the_users_registry_passwords_stay_at_home(
    fake: FakeEngine, root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "docker"
    folder.mkdir()
    config = {"auths": {"https://index.docker.io/v1/": {"auth": "dXNlcjpwbGFudGVk"}}}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setenv("DOCKER_CONFIG", str(folder))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9/")
    await build(fake, root)
    assert all("x-registry-config" not in request.headers for request in fake.requests)


@pytest.mark.parametrize(
    ("script", "kind", "said"),
    [
        ([*built()[:4]], BuilderLost, "step 2/2 (COPY . /) without an image"),
        ([], BuilderLost, "without an image"),
        ([*built()[:3], Act.RESET], BuilderLost, "connection reset"),
        ([*built()[:3], Act.CUT], BuilderLost, "in the middle of an answer"),
        ([b"<html>\n" * 5, b"\x00\xff"], BuilderLost, "without an image"),
        (built("another"), BuilderLost, "has no such image"),
        (
            [*built()[:2], message(errorDetail={"message": "The command 'x' returned a non-zero "
             "code: 9", "code": 9}), *built()[2:]],
            BuildFailed, "failed with exit code 9",
        ),
        ([message(error="COPY failed: stat a: file does not exist")], BuildFailed, "stat a"),
    ],
)  # fmt: skip
async def test_nothing_less_than_an_image_that_is_there_is_a_success(
    fake: FakeEngine, root: Path, script: Script, kind: type[BuilderOrchError], said: str
) -> None:
    fake.build = script
    with pytest.raises(kind) as caught:
        await build(fake, root)
    assert type(caught.value) is kind
    assert said in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("status", "text", "kind"),
    [
        (400, "dockerfile parse error line 1: x", DockerfileInvalid),
        (500, "panic", BuilderLost),
        (403, "not on my machine", NotAllowed),
    ],
)
async def test_an_http_error_is_told_in_the_engines_words(
    fake: FakeEngine, root: Path, status: int, text: str, kind: type[BuilderOrchError]
) -> None:
    fake.build, fake.build_status = [message(message=text)], status
    with pytest.raises((kind, BuildFailed)) as caught:
        await build(fake, root)
    assert text in str(caught.value)


async def test_garbage_between_messages_is_warned_of(fake: FakeEngine, root: Path) -> None:
    fake.build = [b"what?\n", b"[1]\n", *built()]
    events: list[Event] = []
    await build(fake, root, events)
    assert [event.message for event in events if isinstance(event, Warned)] == [
        "2 messages were not understood"
    ]


async def test_a_flood_of_output_arrives_in_order(fake: FakeEngine, root: Path) -> None:
    lines = [f"line {number}" for number in range(5000)]
    fake.build = [message(stream="\n".join(lines) + "\n"), *built()]
    events: list[Event] = []
    await build(fake, root, events)
    assert [event.text for event in events if isinstance(event, Log)][: len(lines)] == lines


# --- an upload that does not come to its end


@pytest.fixture
def big(root: Path) -> Path:
    path = root / "a-big-one"
    with path.open("wb") as file:
        file.truncate(128 * CHUNK)
    return path


async def test_a_file_that_changes_resets_the_upload(
    fake: FakeEngine, root: Path, big: Path
) -> None:
    fake.reading.clear()
    context = scan(Directory(root), lambda _: None)
    async with building(engine_of(fake), context, Recipe("Dockerfile"), lambda _: None) as one:
        await fake.building.wait()
        with big.open("r+b") as file:
            file.truncate(CHUNK)
        fake.reading.set()
        with pytest.raises(ContextRefused, match="a-big-one shrank"):
            await perform(Send(), one, lambda _: None)
    await fake.gone.wait()
    assert [one.end for one in fake.asked("POST /build")] == [End.RESET]


async def test_giving_up_in_the_middle_resets_the_upload(
    fake: FakeEngine, root: Path, big: Path
) -> None:
    fake.reading.clear()
    task = asyncio.create_task(build(fake, root))
    await fake.building.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    fake.reading.set()
    await fake.gone.wait()
    assert [one.end for one in fake.asked("POST /build")] == [End.RESET]


async def test_giving_up_while_it_builds_breaks_the_connection(
    fake: FakeEngine, root: Path
) -> None:
    fake.build = [*built()[:4], Act.HANG]
    context = scan(Directory(root), lambda _: None)
    begun = asyncio.Event()

    def emit(event: Event) -> None:
        if event == Step(2, 2, "COPY . /"):
            begun.set()

    async with building(engine_of(fake), context, Recipe("Dockerfile"), emit) as under_way:
        await begun.wait()
        assert not under_way.built.done()
    await fake.gone.wait()


async def test_an_engine_that_falls_silent_is_lost_after_some_pings(
    fake: FakeEngine, root: Path
) -> None:
    fake.build = [Act.HANG]
    context = scan(Directory(root), lambda _: None)
    calm = asyncio.Event()

    async def pause(seconds: float) -> None:
        await calm.wait()

    engine = Engine(IPv6Address("fdaa::2"), fake.dial, "1.41", pause=pause)
    async with building(engine, context, Recipe("Dockerfile"), lambda _: None) as one:
        await perform(Send(), one, lambda _: None)
        fake.refuse = 100
        calm.set()
        with pytest.raises(BuilderLost, match="no sign of life"):
            await perform(Build(), one, lambda _: None)


# --- readiness


async def test_an_engine_that_boots_is_waited_for_and_the_reason_shown(fake: FakeEngine) -> None:
    fake.refuse = 3
    said: list[str] = []
    engine = Engine(IPv6Address("fdaa::2"), fake.dial, pause=at_once)
    ready = await wait_for_engine(engine, said.append, limit_s=60)
    assert ready.version == "1.41"
    assert len(said) == 3
    assert all("connection refused" in reason for reason in said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"refuse": 10**9}, "connection refused"),
        ({"version": {"no": "engine"}}, "no Docker engine answers there"),
        ({"version": []}, "no Docker engine answers there"),
        ({"told": [Act.RESET]}, "connection reset"),
    ],
)
async def test_an_engine_that_never_is_ready_is_given_up_with_the_reason(
    fake: FakeEngine, changes: dict[str, object], said: str
) -> None:
    for name, value in changes.items():
        setattr(fake, name, value)
    engine = Engine(IPv6Address("fdaa::2"), fake.dial, pause=at_once)
    with pytest.raises(BuilderNotProvisioned, match=said):
        await wait_for_engine(engine, lambda _: None, limit_s=0.05)


async def test_a_dial_that_hangs_can_be_cancelled(fake: FakeEngine) -> None:
    async def dial(host: str, port: int) -> socket.socket:
        raise await asyncio.Event().wait()  # type: ignore[misc]

    task = asyncio.create_task(Engine(IPv6Address("fdaa::2"), dial).ping())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# --- pushing


async def push(
    fake: FakeEngine, events: list[Event] | None = None, stall_s: float | None = None
) -> Pushed:
    logins = 0

    async def credentials() -> Login:
        nonlocal logins
        logins += 1
        return Login("x", Secret(f"planted-{logins}"))

    emit = (events if events is not None else []).append
    stage = Push(engine_of(fake), REPOSITORY, "v1", credentials, at_once, stall_s)
    return await perform(stage, Built(image_id("image"), 4096), emit)


async def test_a_push_is_proved_by_two_equal_digests(fake: FakeEngine) -> None:
    fake.pushes, fake.digests = [pushed(DIGEST)], [f"other@{DIGEST}", f"{REPOSITORY}@{DIGEST}"]
    events: list[Event] = []
    made = await push(fake, events)
    assert made.reference == f"{REPOSITORY}@{DIGEST}"
    assert made.tag == f"{REPOSITORY}:v1"
    (request,) = fake.asked("push")
    assert request.path == f"/images/{REPOSITORY}/push"
    assert request.query["tag"] == ["v1"]
    assert "x-registry-auth" in request.headers
    assert "planted" not in repr(events) + repr(made) + repr(request.query)


async def test_a_push_to_a_registry_that_does_not_answer_has_an_end(fake: FakeEngine) -> None:
    fake.pushes = [[message(status="The push refers to repository [r/app]"), Act.HANG]]
    with pytest.raises(PushFailed, match="stood still") as caught:
        await push(fake, stall_s=0.1)
    assert "--stall-timeout" in caught.value.hint
    assert len(fake.asked("push")) == 1


async def test_a_push_that_breaks_off_is_repeated_with_fresh_credentials(fake: FakeEngine) -> None:
    broken = [message(errorDetail={"message": "received unexpected HTTP status: 503 Service"})]
    fake.pushes = [broken, [message(error="dial tcp: connection refused")], pushed(DIGEST)]
    fake.digests = [f"{REPOSITORY}@{DIGEST}"]
    events: list[Event] = []
    assert (await push(fake, events)).digest == DIGEST
    assert [event.attempt for event in events if isinstance(event, Retry)] == [1, 2]
    headers = [request.headers["x-registry-auth"] for request in fake.asked("push")]
    assert len(set(headers)) == 3


@pytest.mark.parametrize(
    ("scripts", "digests", "kind", "said"),
    [
        (
            [[message(error="denied: requested access to the resource is denied")]],
            [], PushDenied, "denied",
        ),
        ([[message(error="unauthorized: authentication required")]], [], PushDenied, "unauth"),
        ([[message(error="manifest invalid: x")]], [], PushFailed, "manifest invalid"),
        ([[message(error="unexpected EOF")]] * TRIES, [], PushFailed, "unexpected EOF"),
        ([pushed("nothing")] * TRIES, [], PushFailed, "without the registry's digest"),
        ([pushed(DIGEST)], [f"{REPOSITORY}@{image_id('x')}"], PushFailed, image_id("x")),
        ([pushed(DIGEST)], [f"other@{DIGEST}"], PushFailed, "other"),
        ([pushed(DIGEST)], [], PushFailed, "nothing"),
        ([[message(status="x"), Act.RESET]], [], BuilderLost, "connection reset"),
    ],
)  # fmt: skip
async def test_a_push_without_proof_fails_and_only_transport_is_repeated(
    fake: FakeEngine,
    scripts: list[Script],
    digests: list[str],
    kind: type[BuilderOrchError],
    said: str,
) -> None:
    fake.pushes, fake.digests = list(scripts), digests
    with pytest.raises(kind) as caught:
        await push(fake)
    assert said in str(caught.value)
    assert caught.value.code == kind.code
    assert fake.pushes == []
    assert "planted" not in str(caught.value) + repr(caught.value.__dict__)


async def test_a_tag_that_was_taken_away_meanwhile_is_noticed(fake: FakeEngine) -> None:
    fake.pushes, fake.digests = [pushed(DIGEST)], [f"{REPOSITORY}@{DIGEST}"]
    fake.images.add(image_id("other"))
    fake.stolen[f"{REPOSITORY}:v1"] = image_id("other")
    with pytest.raises(PushFailed, match="another image"):
        await push(fake)


async def test_a_name_that_the_engine_refuses_is_told(fake: FakeEngine) -> None:
    fake.tag_status = 400
    with pytest.raises(PushFailed, match="no such tag"):
        await push(fake)

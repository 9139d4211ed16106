"""A build by the engine's BuildKit: chosen and said so, judged like any other, never half done."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from ipaddress import IPv6Address
from pathlib import Path

import pytest

from builder_orch.api.models import Secret
from builder_orch.buildkit.grpc import Code, Failed
from builder_orch.buildkit.messages import Cache
from builder_orch.buildkit.sshagent import SocketAgent
from builder_orch.buildkit.wire import bytes_field, fields, text_field
from builder_orch.errors import (
    BuilderLost,
    BuilderOrchError,
    BuildFailed,
    ContextRefused,
    DockerfileInvalid,
    UsageFailure,
)
from builder_orch.events import Event, PhaseFinished, PhaseReason, Retry, Step, Warned
from builder_orch.pipeline.build import Build, Built, Send, building
from builder_orch.pipeline.context import Directory, scan
from builder_orch.pipeline.engine import BUILDKIT, CLASSIC, Engine, Login, Recipe
from builder_orch.pipeline.kit import shared_key
from builder_orch.pipeline.output import Exported, Form, Output
from builder_orch.pipeline.stage import perform
from tests.buildkit.fake_daemon import IMAGE, FakeDaemon, Session, log, vertex, whole_context
from tests.pipeline.fake_engine import End, FakeEngine, image_id, running

RECIPE = Recipe("Dockerfile", name="registry.test/app:1", node="me")


@pytest.fixture
def daemon() -> FakeDaemon:
    return FakeDaemon()


@pytest.fixture
async def fake(daemon: FakeDaemon) -> AsyncIterator[FakeEngine]:
    async with running(FakeEngine(kit=daemon.serve, images={IMAGE, image_id("image")})) as made:
        yield made


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    (tmp_path / "kept").write_text("kept")
    (tmp_path / ".env").write_text("planted-secret")
    (tmp_path / ".dockerignore").write_text(".env\n")
    return tmp_path


async def never(seconds: float) -> None:
    await asyncio.Event().wait()


async def logins(host: str) -> Login | None:
    return Login("x", Secret("planted-token")) if host == "registry.test" else None


async def build(
    fake: FakeEngine, root: Path, recipe: Recipe = RECIPE, events: list[Event] | None = None
) -> Built:
    emit = (events if events is not None else []).append
    context = scan(Directory(root, ignorefile=None), emit)
    engine = Engine(IPv6Address("fdaa::2"), fake.dial, "1.41", pause=never)
    async with building(engine, context, recipe, emit, logins) as under_way:
        await perform(Send(), under_way, emit)
        built = await perform(Build(), under_way, emit)
        assert isinstance(built, Built)
        return built


async def test_buildkit_is_taken_where_it_is_and_its_image_read_back(
    fake: FakeEngine, daemon: FakeDaemon, root: Path
) -> None:
    events: list[Event] = []
    assert await build(fake, root, events=events) == Built(IMAGE, 4096)
    (reason,) = [event for event in events if isinstance(event, PhaseReason)]
    assert reason.reason.startswith("BuildKit with Docker's own store")
    assert [one.phase for one in events if isinstance(one, PhaseFinished)] == ["context", "build"]
    assert Step(2, 2, "COPY . /") in events
    assert set(daemon.context) == {".dockerignore", "Dockerfile", "kept"}
    assert daemon.attributes() == {"filename": "Dockerfile"}
    assert fake.asked("POST /build") == []


async def test_what_is_ignored_never_leaves_and_the_rules_travel(
    fake: FakeEngine, daemon: FakeDaemon, root: Path
) -> None:
    async def script(session: Session, daemon: FakeDaemon) -> None:
        daemon.dockerfile = await session.sync("dockerfile")
        # An engine that asks for everything, whatever the rules are, still gets only the rest.
        daemon.context = await session.sync("context", followpaths=["."])

    daemon.script = script
    await build(fake, root)
    assert daemon.dockerfile["Dockerfile.dockerignore"][1].splitlines()[-1] == b".env"
    assert b"planted-secret" not in repr((daemon.context, daemon.dockerfile)).encode()


async def test_an_image_that_is_not_there_is_no_success(
    fake: FakeEngine, daemon: FakeDaemon, root: Path
) -> None:
    daemon.response = {"containerimage.digest": image_id("gone")}
    with pytest.raises(BuilderLost, match="no such image"):
        await build(fake, root)
    daemon.response = {}
    with pytest.raises(BuilderLost, match="without an image"):
        await build(fake, root)


@pytest.mark.parametrize(
    ("name", "error", "kind", "said"),
    [
        ("[2/3] RUN false", "executor failed running [false]: exit code: 7", BuildFailed,
         "step 2/3 (RUN false) failed with exit code 7\n  | last words"),
        ("[2/3] COPY gone /", 'failed to compute cache key: "/gone" not found: not found',
         BuildFailed, "step 2/3 (COPY gone /): failed to compute cache key"),
        ("[internal] load metadata for x", "pull access denied", BuildFailed, "load metadata"),
        ("", "failed to solve with frontend dockerfile.v0: failed to create LLB definition: "
         "dockerfile parse error line 2: unknown instruction: X", DockerfileInvalid,
         "does not accept the Dockerfile: dockerfile parse error line 2"),
        ("[2/3] RUN x", "write /x: no space left on device", BuilderOrchError, "disk is full"),
    ],
)  # fmt: skip
async def test_a_failure_is_told_in_its_own_words(
    fake: FakeEngine,
    daemon: FakeDaemon,
    root: Path,
    name: str,
    error: str,
    kind: type[BuilderOrchError],
    said: str,
) -> None:
    async def script(session: Session, daemon: FakeDaemon) -> None:
        if name:
            await daemon.say(vertex(name, completed=False), log(name, b"last words\n", 2))
            await daemon.say(vertex(name, error=error))
        raise Failed(Code.UNKNOWN, error)

    daemon.script = script
    with pytest.raises(kind) as caught:
        await build(fake, root)
    assert said in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        ("target stage two could not be found", "--target"),
        ("dockerfile parse error line 2: unknown instruction: X", "at the line named above"),
        ("the Dockerfile (D) cannot be empty", "Correct the Dockerfile."),
    ],
)
async def test_what_to_do_about_a_dockerfile_names_no_line_where_none_is_known(
    fake: FakeEngine, daemon: FakeDaemon, root: Path, error: str, hint: str
) -> None:
    async def script(session: Session, daemon: FakeDaemon) -> None:
        raise Failed(Code.UNKNOWN, error)

    daemon.script = script
    with pytest.raises(DockerfileInvalid) as caught:
        await build(fake, root)
    assert hint in caught.value.hint
    assert ("line" in caught.value.hint) == ("line" in error)


async def test_a_session_that_the_engine_lost_is_replaced_once(
    fake: FakeEngine, daemon: FakeDaemon, root: Path
) -> None:
    async def script(session: Session, daemon: FakeDaemon) -> None:
        if len(daemon.requests) == 1:
            raise Failed(Code.UNKNOWN, "no active session for abc: context deadline exceeded")
        await whole_context(session, daemon)

    daemon.script = script
    events: list[Event] = []
    await build(fake, root, events=events)
    assert any(isinstance(event, Retry) for event in events)
    assert len(set(daemon.session_ids)) == 2


@pytest.mark.parametrize(
    "said",
    [
        "session healthcheck failed fatally",
        "context canceled",
        "grpc: the client connection is closing",
    ],
)
async def test_what_was_sent_to_a_session_that_is_lost_is_not_sent_again(
    fake: FakeEngine, daemon: FakeDaemon, root: Path, said: str
) -> None:
    async def script(session: Session, daemon: FakeDaemon) -> None:
        await whole_context(session, daemon)
        if len(daemon.requests) == 1:
            await daemon.say(vertex("[3/3] RUN make", error=said))
            raise Failed(Code.UNKNOWN, said)

    daemon.script = script
    await build(fake, root)
    assert len(daemon.requests) == 2
    assert daemon.asked == ["Dockerfile", ".dockerignore", "Dockerfile", "kept"]


async def test_an_engine_that_loses_every_session_is_lost_itself(
    fake: FakeEngine, daemon: FakeDaemon, root: Path
) -> None:
    async def script(session: Session, daemon: FakeDaemon) -> None:
        raise Failed(Code.UNKNOWN, "context canceled")

    daemon.script = script
    with pytest.raises(BuilderLost, match="lost sight of our session twice"):
        await build(fake, root)
    assert len(daemon.requests) == 2


async def test_an_engine_that_leaves_in_the_middle_is_lost(
    fake: FakeEngine, daemon: FakeDaemon, root: Path
) -> None:
    async def script(session: Session, daemon: FakeDaemon) -> None:
        await whole_context(session, daemon)
        daemon.leave()
        await asyncio.Event().wait()

    daemon.script = script
    with pytest.raises(BuilderLost, match="during the build"):
        await build(fake, root)


async def test_a_vanished_file_is_the_users(
    fake: FakeEngine, daemon: FakeDaemon, root: Path
) -> None:
    async def script(session: Session, daemon: FakeDaemon) -> None:
        (root / "kept").unlink()
        await session.sync("context")

    daemon.script = script
    with pytest.raises(ContextRefused, match="kept vanished"):
        await build(fake, root)


async def test_the_platforms_registry_is_the_only_one_with_a_login(
    fake: FakeEngine, daemon: FakeDaemon, root: Path
) -> None:
    got: list[dict[int, int | bytes]] = []

    async def script(session: Session, daemon: FakeDaemon) -> None:
        for host in ("registry.test", "other.test"):
            method = "/moby.filesync.v1.Auth/Credentials"
            got.append(dict(fields(await session.ask(method, text_field(1, host)))))

    daemon.script = script
    await build(fake, root)
    assert got == [{1: b"x", 2: b"planted-token"}, {}]


async def test_classic_is_taken_when_it_is_asked_for_or_all_there_is(
    fake: FakeEngine, daemon: FakeDaemon, root: Path
) -> None:
    for recipe, why in ((replace(RECIPE, builder=CLASSIC), "--builder"), (RECIPE, "404")):
        events: list[Event] = []
        assert (await build(fake, root, recipe, events)).image_id == image_id("image")
        (reason,) = [event for event in events if isinstance(event, PhaseReason)]
        assert reason.reason.startswith("classic builder")
        assert why in reason.reason
        fake.kit = None
    assert [one.end for one in fake.asked("POST /build")] == [End.WHOLE] * 2


@pytest.mark.parametrize(
    ("step", "recipe", "kind", "said"),
    [
        (
            "RUN --mount=type=cache,target=/x true",
            RECIPE,
            DockerfileInvalid,
            "Dockerfile:3: RUN --m",
        ),
        ("COPY --link a b", RECIPE, DockerfileInvalid, "Dockerfile:3: COPY --link"),
        ("RUN <<EOF\ntrue\nEOF", RECIPE, DockerfileInvalid, "here-document"),
        ("", replace(RECIPE, secrets={"a": bytes}), UsageFailure, "--secret needs BuildKit"),
        (
            "",
            replace(RECIPE, agents={"a": SocketAgent(Path("/x"))}),
            UsageFailure,
            "--ssh needs BuildKit",
        ),
        ("", replace(RECIPE, builder=BUILDKIT), UsageFailure, "has no BuildKit: it answers"),
    ],
)
async def test_what_classic_cannot_do_is_refused_before_anything_is_sent(
    fake: FakeEngine,
    root: Path,
    step: str,
    recipe: Recipe,
    kind: type[BuilderOrchError],
    said: str,
) -> None:
    fake.kit = None
    (root / "a").touch()
    (root / "Dockerfile").write_text(f"FROM scratch\nCOPY . /\n{step}\n")
    with pytest.raises(kind) as caught:
        await build(fake, root, recipe)
    assert said in str(caught.value)
    assert fake.asked("POST /build") == []


def test_a_directory_of_a_user_has_one_key(tmp_path: Path) -> None:
    assert shared_key("me", tmp_path) == shared_key("me", tmp_path / "." / "x" / "..")
    assert shared_key("me", tmp_path) != shared_key("you", tmp_path)
    assert shared_key("me", tmp_path) != shared_key("me", tmp_path / "x")


ASK = "/moby.filesync.v1.Auth/Credentials"


async def test_a_login_is_given_for_what_the_build_names_and_for_nothing_else(
    fake: FakeEngine, daemon: FakeDaemon, root: Path
) -> None:
    got: dict[str, bytes] = {}

    async def script(session: Session, daemon: FakeDaemon) -> None:
        for host in ("registry.test", "other.test"):
            got[host] = await session.ask(ASK, text_field(1, host))

    daemon.script = script
    events: list[Event] = []
    await build(fake, root, events=events)
    assert dict(fields(got["registry.test"])) == {1: b"x", 2: b"planted-token"}
    assert dict(fields(got["other.test"])) == {}
    (warned,) = [one for one in events if isinstance(one, Warned)]
    assert "other.test" in warned.message
    assert "planted" not in repr(events)


async def test_a_login_that_cannot_be_had_is_why_the_build_failed(
    fake: FakeEngine, daemon: FakeDaemon, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def locked(host: str) -> Login | None:
        raise UsageFailure("the keychain is locked", hint="Unlock it.")

    async def script(session: Session, daemon: FakeDaemon) -> None:
        await session.ask(ASK, text_field(1, "registry.test"))

    daemon.script = script
    monkeypatch.setattr("tests.pipeline.test_kit.logins", locked)
    with pytest.raises(UsageFailure, match="the keychain is locked"):
        await build(fake, root)


async def test_a_result_comes_here_when_all_went_well(
    fake: FakeEngine, daemon: FakeDaemon, root: Path, tmp_path: Path
) -> None:
    place = tmp_path / "out.tar"
    recipe = replace(RECIPE, output=Output(Form.TAR, place))

    async def script(session: Session, daemon: FakeDaemon) -> None:
        call = session.channel.call("/moby.filesync.v1.FileSend/DiffCopy")
        await call.send(bytes_field(1, b"archive"), end=True)
        assert await call.receive() is None
        if len(daemon.requests) == 1:
            raise Failed(Code.UNKNOWN, "no active session for abc: context deadline exceeded")

    daemon.script = script
    context = scan(Directory(root), lambda _: None)
    engine = Engine(IPv6Address("fdaa::2"), fake.dial, "1.41", pause=never)
    async with building(engine, context, recipe, lambda _: None, logins) as under_way:
        made = await perform(Build(), under_way, lambda _: None)
    assert made == Exported(Form.TAR, place, 7, IMAGE)
    assert place.read_bytes() == b"archive"
    assert daemon.requests[-1][3] == [b"tar"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"cache_to": (Cache("inline"),)}, "--cache-to needs BuildKit"),
        ({"ulimits": {"nofile": "1:1"}}, "--ulimit needs BuildKit"),
        ({"contexts": {"a": Path("/")}}, "--build-context needs BuildKit"),
        ({"platforms": ("linux/amd64", "linux/arm64")}, "more than one --platform needs"),
        ({"output": Output(Form.LOCAL, Path("/nonexistent"))}, "--dest type=local needs"),
    ],
)
async def test_the_classic_builder_is_not_asked_for_what_it_would_ignore(
    fake: FakeEngine, root: Path, more: dict[str, object], said: str
) -> None:
    recipe = replace(RECIPE, builder=CLASSIC, **more)  # type: ignore[arg-type]
    with pytest.raises(UsageFailure, match=said):
        await build(fake, root, recipe)
    assert fake.asked("POST /build") == []

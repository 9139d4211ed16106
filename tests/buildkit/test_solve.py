"""Whole builds against an engine that keeps what it is sent: what travels, and how it may end."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from builder_orch.buildkit.control import Unavailable, connected
from builder_orch.buildkit.filesync import FileSync, Synced
from builder_orch.buildkit.grpc import Code, Failed
from builder_orch.buildkit.http2 import Lost
from builder_orch.buildkit.messages import Cache
from builder_orch.buildkit.progress import Watching
from builder_orch.buildkit.session import LARGEST_SECRET, Offer
from builder_orch.buildkit.solve import Options, Result, solve
from builder_orch.buildkit.sshagent import SocketAgent
from builder_orch.buildkit.tree import Member, Tree
from builder_orch.buildkit.wire import bytes_field, fields, raw, text_field
from builder_orch.errors import ContextRefused
from builder_orch.events import Event, Log, Step, Warned
from builder_orch.pipeline.ignore import Ignore
from tests.buildkit.fake_daemon import (
    IMAGE,
    FakeDaemon,
    Session,
    log,
    running,
    vertex,
    whole_context,
)


@pytest.fixture
async def daemon() -> AsyncIterator[FakeDaemon]:
    async with running(FakeDaemon()) as made:
        yield made


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "small").write_text("small")
    (tmp_path / "d" / "big").write_bytes(os.urandom(3_000_000))
    (tmp_path / "empty").touch()
    (tmp_path / "link").symlink_to("d/small")
    return tmp_path


def tree(root: Path) -> Tree:
    members = [Member(path.relative_to(root).as_posix(), path) for path in root.rglob("*")]
    return Tree(members, lambda patterns: Ignore.of(patterns).matcher(), root)


def offer(
    root: Path, *, moved: list[int] | None = None, synced: list[Synced] | None = None
) -> Offer:
    trees = {"context": tree(root), "dockerfile": tree(root)}
    files = FileSync(
        trees,
        lambda name, octets: (moved if moved is not None else []).append(octets),
        (synced if synced is not None else []).append,
    )
    return Offer(files, "a key")


async def build(
    daemon: FakeDaemon,
    given: Offer,
    options: Options | None = None,
    events: list[Event] | None = None,
    watching: Watching | None = None,
) -> dict[str, str]:
    emit = (events if events is not None else []).append
    result = Result("moby", {"name": "n"})
    watching = watching or Watching()
    async with connected(await daemon.dial(), "1.41") as control:
        return await solve(
            control, given, options or Options(), emit, watching=watching, result=result
        )


async def test_a_context_arrives_as_it_is(daemon: FakeDaemon, root: Path) -> None:
    events: list[Event] = []
    assert await build(daemon, offer(root), events=events) == {"containerimage.digest": IMAGE}
    paths = ["Dockerfile", "d", "d/big", "d/small", "empty", "link"]
    assert list(daemon.context) == paths
    assert set(daemon.dockerfile) == {"Dockerfile"}
    for path in ("Dockerfile", "d/small", "d/big", "empty"):
        assert daemon.context[path][1] == (root / path).read_bytes()
    assert Step(2, 2, "COPY . /") in events
    request = daemon.requests[0]
    assert request[3] == [b"moby"]
    assert request[13] == [text_field(1, "moby") + raw_map({"name": "n"})]


def raw_map(entries: dict[str, str]) -> bytes:
    made = b""
    for key, value in entries.items():
        made += bytes_field(2, text_field(1, key) + text_field(2, value))
    return made


async def test_a_second_build_sends_what_changed_and_nothing_else(
    daemon: FakeDaemon, root: Path
) -> None:
    first: list[int] = []
    await build(daemon, offer(root, moved=first))
    assert sum(first) > 3_000_000
    (root / "d" / "small").write_text("other")
    daemon.asked.clear()
    moved: list[int] = []
    await build(daemon, offer(root, moved=moved))
    assert daemon.asked == ["d/small"]
    assert sum(moved) == 5
    assert daemon.context["d/small"][1] == b"other"
    assert len(set(daemon.session_ids)) == 2
    await build(daemon, replace(offer(root), shared_key="another key"))
    assert "d/big" in daemon.asked


async def test_options_reach_the_frontend_in_its_words(daemon: FakeDaemon, root: Path) -> None:
    options = Options(
        filename="D",
        build_args={"A": "1"},
        labels={"l": "2"},
        target="t",
        platforms=["linux/amd64", "linux/arm64"],
        network="none",
        hosts={"h": "::1"},
        no_cache=True,
        cache_from=[Cache("registry", {"ref": "r/i:c"})],
        cache_to=[Cache("inline"), Cache("registry", {"ref": "r/i:c", "mode": "max"})],
        ulimits={"nofile": "1:2", "nproc": "3:3"},
        contexts={"a": "local:named-a", "b": "docker-image://busybox"},
    )
    await build(daemon, offer(root), options)
    assert daemon.attributes() == {
        "filename": "D",
        "build-arg:A": "1",
        "label:l": "2",
        "target": "t",
        "platform": "linux/amd64,linux/arm64",
        "force-network-mode": "none",
        "add-hosts": "h=::1",
        "no-cache": "",
        "cache-imports": '[{"Type": "registry", "Attrs": {"ref": "r/i:c"}}]',
        "ulimit": "nofile=1:2,nproc=3:3",
        "context:a": "local:named-a",
        "context:b": "docker-image://busybox",
        "frontend.caps": "moby.buildkit.frontend.contexts+forward",
    }
    ((number, entry), (_, other)) = fields(daemon.requests[0][8][0])
    assert (number, dict(fields(raw(entry)))) == (4, {1: b"inline"})
    assert dict(fields(raw(other)))[1] == b"registry"


async def test_a_failing_step_is_known_with_its_last_lines(daemon: FakeDaemon, root: Path) -> None:
    async def script(session: Session, daemon: FakeDaemon) -> None:
        await whole_context(session, daemon)
        name = "[3/3] RUN false"
        await daemon.say(vertex(name, completed=False), log(name, "first\nlä".encode()[:-1]))
        await daemon.say(log(name, "ä".encode()[-1:] + b"st"), log("else", b"unrelated\n"))
        await daemon.say(vertex("[x 1/1] RUN sleep", error="context canceled"))
        await daemon.say(vertex(name, error="process did not complete: exit code: 7"))
        raise Failed(Code.UNKNOWN, "failed to solve: exit code: 7")

    daemon.script = script
    watching = Watching()
    events: list[Event] = []
    with pytest.raises(Failed, match="exit code: 7"):
        await build(daemon, offer(root), events=events, watching=watching)
    work = watching.failed
    assert work is not None
    assert work.step == Step(3, 3, "RUN false")
    assert list(work.tail) == ["first", "läst"]
    assert Log("läst") in events


@pytest.mark.parametrize("how", ["vanish", "grow", "link"])
async def test_a_file_that_is_not_what_was_listed_fails_the_build(
    daemon: FakeDaemon, root: Path, how: str
) -> None:
    async def script(session: Session, daemon: FakeDaemon) -> None:
        await session.sync("context")
        raise AssertionError("the engine had to be told")

    daemon.script = script
    big = root / "d" / "big"

    def spoil(octets: int) -> None:
        match how:
            case "vanish":
                big.unlink(missing_ok=True)
            case "grow":
                with big.open("ab") as file:
                    file.write(b"more")
            case _:
                big.unlink(missing_ok=True)
                big.symlink_to("small")

    # Spoilt while another file is on its way, which comes before it in the order.
    (root / "aaa").write_bytes(bytes(300_000))
    given = offer(root)
    given.files.moved = lambda name, octets: spoil(octets)
    with pytest.raises(ContextRefused, match="d/big"):
        await build(daemon, given)


Ask = Callable[[Session], Awaitable[bytes]]


async def answer(daemon: FakeDaemon, given: Offer, ask: Ask) -> bytes:
    """What the engine gets when it asks for something during a build."""
    got: list[bytes] = []

    async def script(session: Session, daemon: FakeDaemon) -> None:
        got.append(await ask(session))

    daemon.script = script
    await build(daemon, given)
    return got[0]


async def test_secrets_are_given_by_name_only(daemon: FakeDaemon, root: Path) -> None:
    given = replace(offer(root), secrets={"a": lambda: b"planted\0secret"})
    method = "/moby.buildkit.secrets.v1.Secrets/GetSecret"
    got = await answer(daemon, given, lambda session: session.ask(method, text_field(1, "a")))
    assert dict(fields(got)) == {1: b"planted\0secret"}
    with pytest.raises(Failed, match="no secret b") as caught:
        await answer(daemon, given, lambda session: session.ask(method, text_field(1, "b")))
    assert caught.value.code == Code.NOT_FOUND


def missing() -> bytes:
    raise FileNotFoundError(2, "No such file or directory")


@pytest.mark.parametrize(
    ("get", "said"),
    [
        (missing, "cannot be read: No such file"),
        (lambda: bytes(LARGEST_SECRET + 1), "512001 bytes"),
    ],
)
async def test_a_secret_that_cannot_be_given_is_our_failure(
    daemon: FakeDaemon, root: Path, get: Callable[[], bytes], said: str
) -> None:
    given = replace(offer(root), secrets={"a": get})
    method = "/moby.buildkit.secrets.v1.Secrets/GetSecret"
    with pytest.raises(ContextRefused, match=said):
        await answer(daemon, given, lambda session: session.ask(method, text_field(1, "a")))


async def test_logins_are_asked_for_by_host(daemon: FakeDaemon, root: Path) -> None:
    async def credentials(host: str) -> tuple[str, str] | None:
        return ("x", "password") if host == "registry.test" else None

    given = replace(offer(root), credentials=credentials)
    method = "/moby.filesync.v1.Auth/Credentials"
    for host, expected in (("registry.test", {1: b"x", 2: b"password"}), ("other.test", {})):
        ask = partial(Session.ask, method=method, request=text_field(1, host))
        assert dict(fields(await answer(daemon, given, ask))) == expected


async def test_an_ssh_agent_is_spoken_to(daemon: FakeDaemon, root: Path, home: Path) -> None:
    async def agent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.readexactly(4)).upper())
        await reader.read()
        writer.close()

    async def ask(session: Session) -> bytes:
        assert await session.ask("/moby.sshforward.v1.SSH/CheckAgent", text_field(1, "k")) == b""
        call = session.channel.call(
            "/moby.sshforward.v1.SSH/ForwardAgent", [("buildkit.ssh.id", "k")]
        )
        await call.send(bytes_field(1, b"pi"), bytes_field(1, b"ng"))
        got = await call.receive()
        await call.send(end=True)
        assert await call.receive() is None
        return got or b""

    server = await asyncio.start_unix_server(agent, home / "agent")
    async with server:
        given = replace(offer(root), agents={"k": SocketAgent(home / "agent")})
        assert raw(dict(fields(await answer(daemon, given, ask)))[1]) == b"PING"
    with pytest.raises(Failed) as caught:
        await answer(daemon, offer(root), ask)
    assert caught.value.code == Code.UNIMPLEMENTED


async def test_what_nobody_offers_and_unknown_directories_are_refused(
    daemon: FakeDaemon, root: Path
) -> None:
    async def look(session: Session) -> bytes:
        assert "/grpc.health.v1.Health/Check" in session.methods
        assert await session.ask("/grpc.health.v1.Health/Check", b"") == b"\x08\x01"
        await session.sync("/etc")
        return b""

    with pytest.raises(Failed, match="no access to '/etc'") as caught:
        await answer(daemon, offer(root), look)
    assert caught.value.code == Code.NOT_FOUND


async def test_a_cancelled_build_is_cancelled_over_there(daemon: FakeDaemon, root: Path) -> None:
    async def script(session: Session, daemon: FakeDaemon) -> None:
        await asyncio.Event().wait()

    daemon.script = script
    task = asyncio.create_task(build(daemon, offer(root)))
    await daemon.solving.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(10):
        await daemon.cancelled.wait()


@pytest.mark.parametrize(
    ("upgrade", "said"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "404 Not Found"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "something else than HTTP"),
        (b"x" * 100_000, "something else than HTTP"),
    ],
)
async def test_an_engine_without_buildkit_says_so(
    daemon: FakeDaemon, upgrade: bytes, said: str
) -> None:
    daemon.upgrade = upgrade
    with pytest.raises(Unavailable, match=said):
        async with connected(await daemon.dial(), "1.41"):
            raise AssertionError


async def test_an_engine_older_than_buildkit_is_not_asked(daemon: FakeDaemon) -> None:
    with pytest.raises(Unavailable, match=r"1\.38"):
        async with connected(await daemon.dial(), "1.38"):
            raise AssertionError


async def test_what_comes_after_the_head_must_be_http2(daemon: FakeDaemon) -> None:
    daemon.upgrade = b"HTTP/1.1 101 UPGRADED\r\n\r\nHTTP/1.1 400 Bad Request\r\n\r\n"
    with pytest.raises(Lost, match=r"no HTTP/2|closed"):
        async with connected(await daemon.dial(), "1.41"):
            raise AssertionError


async def test_the_store_of_the_engine_is_seen(daemon: FakeDaemon) -> None:
    daemon.workers = ({"org.mobyproject.buildkit.worker.snapshotter": "overlayfs"},)
    async with connected(await daemon.dial(), "1.41") as control:
        assert control.containerd_store
    daemon.workers = ()
    with pytest.raises(Unavailable, match="no workers"):
        async with connected(await daemon.dial(), "1.41"):
            raise AssertionError


async def test_progress_that_is_none_is_warned_of(daemon: FakeDaemon, root: Path) -> None:
    async def script(session: Session, daemon: FakeDaemon) -> None:
        await daemon.say(b"\xff\xff")
        await session.sync("context")

    daemon.script = script
    events: list[Event] = []
    assert await build(daemon, offer(root), events=events) == {"containerimage.digest": IMAGE}
    assert any(isinstance(event, Warned) for event in events)

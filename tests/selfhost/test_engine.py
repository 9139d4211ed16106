"""The engine's client against an engine that lies, and what is decided before an engine starts."""

import asyncio
import json
import os
import sys
from base64 import urlsafe_b64decode
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from ipaddress import IPv4Network
from pathlib import Path
from socket import socket

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from builder_orch.errors import BuilderFull, BuilderLost, EngineMissing, UsageFailure
from builder_orch.selfhost import process
from builder_orch.selfhost.dockerd import configuration, lacking, reachable_resolvers
from builder_orch.selfhost.engine import (
    Container,
    Engine,
    EngineClient,
    EngineRefused,
    demultiplex,
)
from builder_orch.selfhost.netns import first_free, foreign_drops, networks_in
from builder_orch.selfhost.process import (
    CommandFailed,
    Program,
    ProgramFailed,
    State,
    printable,
    run,
    run_directory,
    tail,
)

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def engine_that(answer: Answer, folder: Path) -> AsyncGenerator[EngineClient]:
    """An engine at a unix socket whose every answer is given by a function."""
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    path = folder / "engine.sock"
    await web.UnixSite(runner, str(path)).start()
    try:
        async with EngineClient(path) as client:
            yield client
    finally:
        await runner.cleanup()


def always(status: int, body: object) -> Answer:
    async def answer(request: web.Request) -> web.StreamResponse:
        if isinstance(body, bytes):
            return web.Response(status=status, body=body)
        return web.json_response(body, status=status)

    return answer


async def test_a_pull_that_fails_in_its_stream_is_a_failure_though_the_status_is_200(
    home: Path,
) -> None:
    asked: list[web.Request] = []
    lines = [{"status": "Pulling"}, {"errorDetail": {"message": "denied"}, "error": "denied"}]

    async def answer(request: web.Request) -> web.StreamResponse:
        asked.append(request)
        return web.Response(body="\r\n".join(json.dumps(line) for line in lines))

    async with engine_that(answer, home) as client:
        with pytest.raises(EngineRefused, match=r"^denied$"):
            await client.pull("host:1/app@sha256:00", username="x", password="hush")
    assert asked[0].path == "/images/create"
    assert dict(asked[0].query) == {"fromImage": "host:1/app", "tag": "sha256:00"}
    auth = json.loads(urlsafe_b64decode(asked[0].headers["X-Registry-Auth"]))
    assert auth == {"username": "x", "password": "hush", "serveraddress": "host:1"}


async def test_a_stream_that_breaks_off_is_not_an_end(home: Path) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        await response.write(b'{"status": "Pulling"}\n')
        assert request.transport is not None
        request.transport.abort()
        return response

    async with engine_that(answer, home) as client:
        with pytest.raises(BuilderLost):
            await client.pull("app")


@pytest.mark.parametrize("body", [b"not json\n", b"[" * 200_000 + b"\n", b"x" * 2_000_000])
async def test_a_stream_of_nonsense_is_a_lost_engine(home: Path, body: bytes) -> None:
    async with engine_that(always(200, body), home) as client:
        with pytest.raises(BuilderLost):
            await client.pull("app")


async def test_a_full_disk_is_named_wherever_it_shows(home: Path) -> None:
    text = "write /x: no space left on device"
    async with engine_that(always(500, {"message": text}), home) as client:
        with pytest.raises(BuilderFull, match="no space"):
            await client.create("c", {})
    async with engine_that(always(200, {"error": text}), home) as client:
        with pytest.raises(BuilderFull):
            await client.pull("app")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"message": "No such container: c"}, "No such container: c"),
        (b"<html>\x1b[31mproxy", "<html>\N{REPLACEMENT CHARACTER}[31mproxy"),
        (b"", "HTTP status 404"),
        (b"[]", "[]"),
    ],
)
async def test_what_the_engine_refuses_is_told_in_its_words(
    home: Path, body: object, message: str
) -> None:
    async with engine_that(always(404, body), home) as client:
        with pytest.raises(EngineRefused) as caught:
            await client.inspect("c")
        assert (caught.value.status, str(caught.value)) == (404, message)
        await client.remove("c")
        assert not await client.ping()


async def test_no_engine_is_a_lost_one(home: Path) -> None:
    async with EngineClient(home / "nothing.sock") as client:
        assert not await client.ping()
        with pytest.raises(BuilderLost, match="GET /info"):
            await client.info()


async def test_the_answers_are_parsed_once(home: Path) -> None:
    found = {
        "Id": "c1",
        "RestartCount": 2,
        "State": {"Status": "running", "ExitCode": 0, "OOMKilled": False},
        "Config": {"Image": "i", "Labels": {"a": "b"}},
        "NetworkSettings": {"Networks": {"bridge": {"IPAddress": "10.1.2.3"}}},
    }
    async with engine_that(always(200, found), home) as client:
        container = await client.inspect("c1")
    assert container == Container("c1", "i", {"a": "b"}, "running", 0, 2, False, "10.1.2.3")
    assert container.running
    assert container.ended
    image = {"Id": "i1", "RepoDigests": ["a@sha256:1"], "Config": {"ExposedPorts": {"53/udp": {}}}}
    image["Config"] = {"ExposedPorts": {"53/udp": {}, "8080/tcp": {}, "99": {}, "x/tcp": {}}}
    async with engine_that(always(200, image), home) as client:
        assert (await client.image("i")).ports == (8080, 99)
        assert (await client.image("i")).digests == ("a@sha256:1",)


leaf = st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.lists(st.none())
keys = st.sampled_from(["State", "Config", "NetworkSettings", "Networks", "Labels", "Status", "Id"])
inner = st.dictionaries(keys, leaf | st.dictionaries(keys, leaf, max_size=3), max_size=3)


@given(st.dictionaries(keys, leaf | inner, max_size=5))
def test_any_object_is_some_container(found: dict[str, object]) -> None:
    assert isinstance(Container.parse(found).running, bool)


@given(st.lists(st.tuples(st.sampled_from([1, 2]), st.binary(max_size=40))))
def test_frames_of_a_log_are_joined(frames: list[tuple[int, bytes]]) -> None:
    octets = b"".join(
        bytes([stream, 0, 0, 0]) + len(text).to_bytes(4) + text for stream, text in frames
    )
    assert demultiplex(octets) == b"".join(text for _, text in frames)


@given(st.binary(max_size=200))
def test_any_log_is_readable(octets: bytes) -> None:
    assert len(demultiplex(octets)) <= len(octets)


def test_a_log_without_frames_stays() -> None:
    assert demultiplex(b"plain text\n") == b"plain text\n"


async def test_without_any_engine_one_line_says_what_to_do(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(EngineMissing) as caught:
        await Engine(home, report=print, existing=f"unix://{home}/none.sock").__aenter__()
    assert "needs root" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "docker.io" in caught.value.hint
    assert "docker-registry" in caught.value.hint


def test_what_is_missing_is_named_by_its_package(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builder_orch.selfhost.dockerd.find_program", lambda name: None)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert lacking(home).startswith("not installed: docker.io, iproute2, iptables")
    monkeypatch.setattr("builder_orch.selfhost.dockerd.find_program", lambda name: f"/bin/{name}")
    assert lacking(home) == ""
    assert "/run" in lacking(Path("/run/user/0/fly-build"))


async def pong(stream: socket) -> bytes:
    """Ping an engine over a connection of ours and close it."""
    reader, writer = await asyncio.open_connection(sock=stream)
    writer.write(b"GET /_ping HTTP/1.0\r\n\r\n")
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer.rpartition(b"\r\n")[2]


async def test_the_engine_that_is_there_is_used_and_left_running(home: Path) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path == "/_ping":
            return web.Response(text="OK")
        assert (request.method, request.path) == ("GET", "/info")
        return web.json_response({"ID": "theirs"})

    async with engine_that(answer, home) as client:
        async with Engine(
            home, report=print, existing=f"unix://{client.path}", may_own=False
        ) as engine:
            assert not engine.own
            assert str(client.path) in engine.why
            assert await engine.state() is State.STARTED
            assert await pong(await engine.connect()) == b"OK"
            with await engine.listen(0) as listener:
                address, port = listener.getsockname()
                assert address == "127.0.0.1"
                (await engine.connect_container(address, port)).close()
        assert await client.ping()


def test_our_daemon_is_told_to_stay_by_itself(home: Path) -> None:
    settings = configuration(
        data=home / "data",
        socket=home / "d.sock",
        bridge=IPv4Network("10.213.1.0/24"),
        mtu=1400,
        driver="vfs",
        group="fly-build-1",
        isolated=True,
    )
    assert settings["hosts"] == [f"unix://{home}/d.sock"]
    assert settings["data-root"] == str(home / "data")
    assert settings["bip"] == "10.213.1.1/24"
    assert settings["icc"] is False
    assert settings["features"] == {"buildkit": True}
    assert settings["storage-driver"] == "vfs"
    # Another engine's docker0 was removed by one that was started with bridge none.
    assert "bridge" not in settings


def test_resolvers_on_the_loopback_are_of_no_use_inside() -> None:
    stub = "# local\nnameserver 127.0.0.53\nnameserver ::1\noptions edns0\n"
    real = "nameserver 192.0.2.1\nnameserver fe80::1%eth0\nnameserver\nnameserver junk\n"
    assert reachable_resolvers([stub, real]) == ["192.0.2.1", "fe80::1%eth0"]
    assert reachable_resolvers([real, stub]) == ["192.0.2.1", "fe80::1%eth0"]
    assert reachable_resolvers([stub]) == []


def test_a_network_that_nobody_has_is_chosen() -> None:
    routes = '[{"dst":"default"},{"dst":"10.213.0.0/17"},{"dst":"10.0.0.5"}]'
    addresses = '[{"addr_info":[{"family":"inet","local":"10.213.128.9","prefixlen":24}]}]'
    taken = list(networks_in(routes, addresses))
    assert first_free(taken, 30) == IPv4Network("10.213.129.0/30")
    assert first_free([IPv4Network("10.0.0.0/8")], 24) == IPv4Network("172.29.0.0/24")
    with pytest.raises(CommandFailed):
        first_free([IPv4Network("0.0.0.0/0")], 24)
    assert list(networks_in("", "")) == []


def test_a_firewall_that_drops_what_is_forwarded_is_named() -> None:
    def chain(table: str, **more: str) -> dict[str, object]:
        return {"chain": {"family": "ip", "table": table, "name": "c", **more}}

    ruleset = {
        "nftables": [
            {"metainfo": {}},
            chain("filter", hook="forward", policy="drop"),
            chain("open", hook="forward", policy="accept"),
            chain("nat", hook="postrouting", policy="drop"),
            chain("own", hook="forward", policy="drop"),
            chain("six", hook="forward", policy="drop", family="ip6"),
            chain("plain"),
        ]
    }
    assert foreign_drops(json.dumps(ruleset), "own") == ["filter"]


def program(
    home: Path, script: str, said: list[str], *, ready: str = "ready", limit_s: float = 30.0
) -> Program:
    async def is_ready() -> bool:
        return (home / ready).exists()

    return Program(
        "thing",
        [sys.executable, "-c", script],
        log=home / "thing.log",
        ready=is_ready,
        report=said.append,
        start_limit_s=limit_s,
        stop_limit_s=5.0,
    )


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 (it happens in other processes)
            await asyncio.sleep(0.01)


async def test_a_program_that_dies_is_started_once_more_and_then_given_up(home: Path) -> None:
    said: list[str] = []
    script = (
        f"import pathlib, time; home = pathlib.Path({str(home)!r})\n"
        "(home / 'ready').touch()\n"
        "while not (home / 'die').exists(): time.sleep(0.01)\n"
        "(home / 'die').unlink(); (home / 'ready').unlink()\n"
        "print('out of luck', flush=True); raise SystemExit(7)\n"
    )
    thing = program(home, script, said)
    await thing.start()
    assert thing.state is State.STARTED
    (home / "die").touch()
    await until(lambda: any("started again" in line for line in said))
    assert "status 7" in said[0]
    assert "out of luck" in said[0]
    assert (thing.state, thing.starts) == (State.STARTED, 2)
    (home / "die").touch()
    await until(lambda: thing.state is State.FAILED)
    await thing.stop()
    assert (thing.state, thing.starts, thing.pid) == (State.FAILED, 2, None)


async def test_a_program_that_does_not_come_up_says_why_and_is_gone(home: Path) -> None:
    thing = program(home, "raise SystemExit('no such table')", [])
    with pytest.raises(ProgramFailed, match="no such table"):
        await thing.start()
    assert (thing.state, thing.pid) == (State.FAILED, None)
    slow = program(home, "import time; print('busy', flush=True); time.sleep(99)", [], limit_s=0.0)
    with pytest.raises(ProgramFailed, match="not ready"):
        await slow.start()
    assert slow.pid is None


async def test_a_stop_ends_the_whole_group_also_what_ignores_it(home: Path) -> None:
    said: list[str] = []
    script = (
        "import os, pathlib, signal, subprocess, sys, time\n"
        f"home = pathlib.Path({str(home)!r})\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(999)'])\n"
        "(home / 'child').write_text(str(child.pid))\n"
        "(home / 'ready').touch(); time.sleep(999)\n"
    )
    thing = program(home, script, said)
    await thing.start()
    child = int((home / "child").read_text())
    await thing.stop()
    assert thing.state is State.STOPPED
    await until(lambda: not alive(child))
    assert said == []


def alive(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


async def test_a_start_that_is_broken_off_leaves_no_program(home: Path) -> None:
    script = (
        f"import os, pathlib, time; home = pathlib.Path({str(home)!r})\n"
        "(home / 'up').write_text(str(os.getpid())); time.sleep(999)\n"
    )
    thing = program(home, script, [])
    start = asyncio.create_task(thing.start())
    await until(lambda: (home / "up").exists() and (home / "up").read_text())
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert not alive(int((home / "up").read_text()))
    assert thing.state is State.STOPPED


async def test_a_short_command_that_fails_says_so() -> None:
    assert await run(sys.executable, "-c", "print(input())", octets=b"hello\n") == "hello\n"
    with pytest.raises(CommandFailed, match="went wrong"):
        await run(sys.executable, "-c", "raise SystemExit('went wrong')")
    with pytest.raises(CommandFailed, match="did not end within"):
        await run(sys.executable, "-c", "import time; time.sleep(99)", limit_s=0.05)
    with pytest.raises(CommandFailed, match="not installed"):
        await run("no-such-program-anywhere")


def test_sockets_lie_where_their_paths_are_short_and_theirs_alone(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_directory(home) == home.resolve() / "run"
    assert (home / "run").stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(process, "SHORT", home)
    deep = home / ("d" * 80)
    short = run_directory(deep)
    assert short.parent == home
    assert run_directory(deep) == short
    short.rmdir()
    (home / "elsewhere").mkdir()
    short.symlink_to(home / "elsewhere")
    with pytest.raises(UsageFailure, match="not a directory of ours"):
        run_directory(deep)


def test_the_end_of_a_log_is_short_and_harmless(home: Path) -> None:
    log = home / "a.log"
    assert tail(log) == ""
    log.write_bytes(
        b"".join(b"line %d\n" % number for number in range(100_000)) + b"\x1b[2Jend\xff"
    )
    shown = tail(log, 2).splitlines()
    assert shown == ["line 99999", "\N{REPLACEMENT CHARACTER}[2Jend\N{REPLACEMENT CHARACTER}"]


@given(st.text())
def test_printable_text_has_no_controls(text: str) -> None:
    assert all(c.isprintable() or c in "\n\t" for c in printable(text))

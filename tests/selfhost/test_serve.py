"""The platform as a whole: what keeps it from starting, what is left then, and one that is up."""

import asyncio
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import aiohttp
import pytest

from builder_orch.errors import (
    AlreadyRunning,
    BuilderOrchError,
    EngineMissing,
    PortInUse,
    UsageFailure,
)
from builder_orch.selfhost.dockerd import lacking
from builder_orch.selfhost.home import Home
from builder_orch.selfhost.launch import answers, ensure_selfhost, stop_selfhost
from builder_orch.selfhost.process import find_program
from builder_orch.selfhost.serve import Options, open_selfhost, sweep
from builder_orch.selfhost.store import Store
from builder_orch.tunnel.config import PublicKey

NOWHERE = "/nonexistent/docker.sock"


@pytest.fixture
def without_engine(home: Path) -> Options:
    return Options(Home(home / "selfhost"), may_own_engine=False, existing=NOWHERE)


async def opened(options: Options) -> None:
    async with open_selfhost(options):
        pass


def assert_nothing_is_left(own: Home) -> None:
    assert own.holder() is None
    assert not own.platform.exists()
    with own.hold():
        pass


async def test_without_an_engine_it_says_so_and_leaves_nothing(without_engine: Options) -> None:
    with pytest.raises(EngineMissing, match=NOWHERE) as caught:
        await opened(without_engine)
    assert "docker.io" in caught.value.hint
    assert_nothing_is_left(without_engine.home)


async def test_a_port_in_use_is_known_before_anything_slow_begins(without_engine: Options) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortInUse, match=str(port)):
            await opened(replace(without_engine, port=port))
    assert_nothing_is_left(without_engine.home)


@pytest.mark.parametrize("listen", ["0.0.0.0", "::", "localhost", "192.0.2.1", ""])
async def test_it_listens_only_where_clients_can_find_it(
    without_engine: Options, listen: str
) -> None:
    with pytest.raises(UsageFailure):
        await opened(replace(without_engine, listen=listen))
    assert_nothing_is_left(without_engine.home)


async def test_a_second_one_is_told_of_the_first(without_engine: Options) -> None:
    own = without_engine.home
    own.prepare()
    with own.hold(), pytest.raises(AlreadyRunning, match=f"pid {os.getpid()}"):
        await opened(without_engine)


async def test_what_a_killed_one_left_for_clients_is_taken_away(without_engine: Options) -> None:
    own = without_engine.home
    own.prepare()
    own.platform.write_text("{}")
    with pytest.raises(EngineMissing):
        await opened(without_engine)
    assert_nothing_is_left(own)


async def test_a_database_that_is_none_is_named(without_engine: Options) -> None:
    own = without_engine.home
    own.prepare()
    own.store.write_bytes(b"this is no database" * 1000)
    with pytest.raises(BuilderOrchError, match=r"state\.db"):
        await opened(without_engine)
    assert_nothing_is_left(own)


async def test_a_token_of_a_start_that_failed_is_worth_nothing(without_engine: Options) -> None:
    with pytest.raises(EngineMissing):
        await opened(without_engine)
    with closing(sqlite3.connect(without_engine.home.store)) as database:
        rows = database.execute("select expires_at from tokens").fetchall()
    assert [expires_at <= time.time() for (expires_at,) in rows] == [True]


# The sweep


@dataclass
class Ears:
    """A gateway that heard from its peers this many seconds ago."""

    heard: dict[PublicKey, float] = field(default_factory=dict)
    removed: list[PublicKey] = field(default_factory=list)

    def last_heard(self) -> dict[PublicKey, float]:
        return self.heard

    async def remove(self, public_key: PublicKey) -> None:
        self.removed.append(public_key)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(f"sqlite:///{tmp_path}/state.db", clock=lambda: 1000.0)
    yield store
    store.close()


async def test_only_ephemeral_peers_that_are_silent_for_long_are_removed(store: Store) -> None:
    organization = store.ensure_organization("personal", personal=True)
    token = store.authenticate(store.issue_token("someone", lifetime_s=60))
    keys = {
        name: PublicKey(bytes([n + 1]) * 32) for n, name in enumerate(["gone", "talks", "kept"])
    }
    for name, key in keys.items():
        store.add_peer(token, organization, name, key, ephemeral=name != "kept")
    ears = Ears({keys["talks"]: 5.0, keys["gone"]: 101.0})

    assert await sweep(store, ears, 100.0, now=1100.0) == []
    assert await sweep(store, ears, 100.0, now=1101.0) == ["gone"]
    assert ears.removed == [keys["gone"]]
    assert {peer.name for peer in store.peers()} == {"talks", "kept"}
    # A peer that nothing was ever heard of counts from its last installation.
    ears.heard.clear()
    assert await sweep(store, ears, 100.0, now=1101.0) == ["talks"]


# The real one


def missing() -> str:
    """Why the whole platform, with an engine of its own, cannot run here."""
    if reason := lacking(Path.cwd()):
        return reason
    probe = ["unshare", "--net", "--mount", "--pid", "--fork", "true"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        return "this machine does not let us make namespaces"
    return "" if find_program("docker-registry") else "docker-registry is not installed"


system = pytest.mark.system
runs_here = pytest.mark.skipif(bool(missing()), reason=missing() or "runs here")


@system
@runs_here
async def test_all_of_it_comes_up_answers_and_goes(home: Path) -> None:
    own = Home(home / "selfhost")
    async with open_selfhost(Options(own)) as record:
        assert own.record() == record
        assert record.pid == os.getpid()
        assert await asyncio.to_thread(answers, record)
        async with aiohttp.ClientSession() as session:
            question = {"query": "{ organizations { nodes { slug } } }"}
            bearer = {"Authorization": f"Bearer {record.token}"}
            async with session.post(record.api_url, json=question, headers=bearer) as answer:
                body = await answer.json()
            assert body == {"data": {"organizations": {"nodes": [{"slug": "personal"}]}}}
            async with session.post(record.api_url, json=question) as answer:
                assert (await answer.json())["errors"][0]["extensions"]["code"] == "UNAUTHORIZED"
        with pytest.raises(AlreadyRunning):
            await opened(Options(own))
        assert await asyncio.to_thread(answers, record)
    assert not await asyncio.to_thread(answers, record)
    assert_nothing_is_left(own)


SIGNALS = [
    (signal.SIGTERM, "event='up'"),
    (signal.SIGINT, "event='up'"),
    (signal.SIGHUP, "event='up'"),
    (signal.SIGTERM, "part='engine'"),
    (signal.SIGTERM, "part='registry'"),
]
SIGNAL_NAMES = [f"{number.name} at {when}" for number, when in SIGNALS]


def signalled(home: Path, number: signal.Signals, when: str) -> tuple[int, list[str]]:
    """Start the platform, signal it when it has said so; its exit code and all that it said."""
    Home(home / "selfhost").prepare()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FLY_")}
    command = [sys.executable, "-m", "builder_orch", "selfhost", "start", "--foreground"]
    said, sent = [], False
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**kept, "FLY_BUILD_HOME": str(home)}
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if when in line and not sent:
                process.send_signal(number)
                sent = True
        # asyncio's, when a child ends just while its transport is being closed.
        said = [line for line in said if not line.startswith("Unknown child process")]
        return process.wait(), said


Stops = dict[str, tuple[Path, "Future[tuple[int, list[str]]]"]]


@pytest.fixture(scope="module")
def stops() -> Iterator[Stops]:
    """Platforms that are signalled, each with a home of its own, all at the same time."""
    with ExitStack() as folders, ThreadPoolExecutor() as pool:
        begun: Stops = {}
        for name, (number, when) in zip(SIGNAL_NAMES, SIGNALS, strict=True):
            home = Path(folders.enter_context(tempfile.TemporaryDirectory(prefix="fly-")))
            begun[name] = home, pool.submit(signalled, home, number, when)
        yield begun


@system
@runs_here
@pytest.mark.parametrize("name", SIGNAL_NAMES)
def test_a_signal_stops_it_in_order(stops: Stops, name: str) -> None:
    home, stopped = stops[name]
    code, said = stopped.result()
    own = Home(home / "selfhost")
    assert code == 0
    assert "event='stopped'" in said[-1]
    assert not any("Traceback" in line for line in said)
    assert own.log.read_text() == "".join(said)
    assert_nothing_is_left(own)
    assert namespaces_of(own) == []


@system
@runs_here
def test_after_a_kill_the_next_one_starts_and_nothing_of_the_first_is_left(home: Path) -> None:
    own = Home(home / "selfhost")
    first = ensure_selfhost(own)
    os.kill(first.pid, signal.SIGKILL)
    os.waitpid(first.pid, 0)
    assert own.record() is None
    second = ensure_selfhost(own)
    assert second.pid != first.pid
    assert second.registry == first.registry
    stopped = stop_selfhost(own)
    assert stopped is not None
    os.waitpid(second.pid, 0)
    assert_nothing_is_left(own)
    assert namespaces_of(own) == []


def namespaces_of(own: Home) -> list[str]:
    from builder_orch.selfhost.process import identity

    listed = subprocess.run(
        ["ip", "-j", "netns", "list"], capture_output=True, text=True, check=True
    )
    names = [entry["name"] for entry in json.loads(listed.stdout or "[]")]
    return [name for name in names if identity(own.root) in name]

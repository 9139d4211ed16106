"""The embedded platform as its users meet it: `fly-build` as a process, read from outside."""

import json
import os
import queue
import re
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker

from builder_orch.selfhost.process import run_directory

LIMIT_S = 120.0
"""No wait here is meant to last; this is when a test gives up."""

KEPT = {"PATH", "LANG", "PYTHONPATH"}
"""Variables that a command is given of this process's own."""

PEER = re.compile(r"asking for a WireGuard peer (fly-build-[a-z0-9-]+)")
"""How a command says which peer it takes."""

Event = dict[str, Any]
Condition = Callable[[Event], bool]


@dataclass(frozen=True)
class Ended:
    """What a command left behind: its exit code, both streams and, of NDJSON, its events."""

    code: int
    out: str
    err: str
    events: tuple[Event, ...] = ()

    @property
    def said(self) -> str:
        """All that anybody could have read."""
        return self.out + self.err

    @property
    def error(self) -> Event:
        """The failure in an NDJSON stream or a JSON result."""
        result = self.events[-1] if self.events else json.loads(self.out)
        found = result["error"]
        assert isinstance(found, dict)
        return found


class Running:
    """A command that prints NDJSON, followed while it runs."""

    def __init__(self, words: list[str], environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            words,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.events: list[Event] = []
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._said: list[str] = []
        self._complaints: list[str] = []
        self._readers = [
            threading.Thread(target=self._read),
            threading.Thread(target=self._read_complaints),
        ]
        for reader in self._readers:
            reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._said.append(line)
            self._lines.put(line)
        self._lines.put(None)

    def _read_complaints(self) -> None:
        assert self.process.stderr is not None
        self._complaints.extend(self.process.stderr)

    def until(self, reached: Condition) -> Event:
        """The first event from now on that is meant; what the command said, if it ends before."""
        while (line := self._lines.get(timeout=LIMIT_S)) is not None:
            event: Event = json.loads(line)
            self.events.append(event)
            if reached(event):
                return event
        raise AssertionError(f"it ended before that: {''.join(self._said + self._complaints)}")

    def signal(self, number: signal.Signals) -> None:
        """As a terminal or a supervisor would, to the command alone."""
        self.process.send_signal(number)

    def end(self) -> Ended:
        """Wait for the end."""
        try:
            code = self.process.wait(LIMIT_S)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
            for reader in self._readers:
                reader.join()
            for stream in (self.process.stdout, self.process.stderr):
                assert stream is not None
                stream.close()
        while (line := self._lines.get(timeout=LIMIT_S)) is not None:
            self.events.append(json.loads(line))
        return Ended(code, "".join(self._said), "".join(self._complaints), tuple(self.events))


@dataclass
class Embedded:
    """One FLY_BUILD_HOME and the commands that use it."""

    home: Path
    ended: list[Ended] = field(default_factory=list)
    """What every command here has printed, for those who look for secrets."""

    @property
    def root(self) -> Path:
        """The state directory."""
        return self.home / "selfhost"

    @property
    def record(self) -> dict[str, Any]:
        """What the platform says of itself."""
        found = json.loads((self.root / "platform.json").read_text())
        assert isinstance(found, dict)
        return found

    def environment(self, **more: str) -> dict[str, str]:
        """For a command."""
        # By name: threads ask for this while the environment changes between two tests.
        kept = {name: os.environ[name] for name in KEPT if name in os.environ}
        # The classic builder announces every line of the Dockerfile as a step of its own.
        builder = {"FLY_BUILD_BUILDER": "classic"}
        return {**kept, **builder, "HOME": str(self.home), "FLY_BUILD_HOME": str(self.home), **more}

    def elsewhere(self, token: str) -> dict[str, str]:
        """The variables of somebody who has this platform's URL and a token of it, and no more."""
        return {
            "FLY_BUILD_HOME": str(self.home / "elsewhere"),
            "FLY_BUILD_API_URL": self.record["api_url"],
            "FLY_BUILD_REGISTRY": self.record["registry"],
            "FLY_BUILD_TOKEN": token,
        }

    def run(self, *words: object, **more: str) -> Ended:
        """One command to its end; `more` are variables."""
        return self.run_by((), *words, **more)

    def run_by(self, prefix: Sequence[str], *words: object, **more: str) -> Ended:
        """One command to its end, run by another one that stands before it."""
        done = subprocess.run(
            [*prefix, *command(*words)],
            env=self.environment(**more),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        made = Ended(done.returncode, done.stdout, done.stderr)
        self.ended.append(made)
        return made

    def begin(self, *words: object, **more: str) -> Running:
        """One command with `--output ndjson`, that whoever began it has to end."""
        return Running(command(*words, "--output", "ndjson"), self.environment(**more))

    @contextmanager
    def running(self, *words: object, **more: str) -> Iterator[Running]:
        """One command with `--output ndjson`, ended with the block."""
        started = self.begin(*words, **more)
        try:
            yield started
        finally:
            self.ended.append(started.end())

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """What the platform's database holds."""
        with closing(sqlite3.connect(f"file:{self.root}/state.db?mode=ro", uri=True)) as store:
            return store.execute(query, values).fetchall()

    def builds(self, app: str) -> list[str]:
        """How the app's builds ended."""
        query = "select status from builds where app_id = (select id from apps where name = ?)"
        return [str(status) for (status,) in self.rows(query, app)]

    def peers(self, *commands: Ended) -> set[str]:
        """The WireGuard peers of these commands that are still let in."""
        asked = {name for ended in commands for name in PEER.findall(ended.said)}
        return asked & {str(name) for (name,) in self.rows("select name from peers")}

    def releases(self, app: str) -> list[tuple[Any, ...]]:
        """Version and status of the app's releases."""
        query = (
            "select version, status from releases"
            " where app_id = (select id from apps where name = ?) order by version"
        )
        return self.rows(query, app)

    def program(self, name: str) -> int:
        """The pid of a program that the platform started, found among its descendants."""
        parents: dict[int, list[int]] = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal() and (found := _parent(folder)) is not None:
                parents.setdefault(found, []).append(int(folder.name))
        todo = [self.record["pid"]]
        while todo:
            for pid in parents.get(todo.pop(), []):
                if Path(f"/proc/{pid}/comm").read_text().strip() == name[:15]:
                    return pid
                todo.append(pid)
        raise AssertionError(f"the platform runs no {name}")

    def kill(self, name: str) -> None:
        """End a program of the platform's as a crash would, and wait until it is gone."""
        _kill(self.program(name))

    def kill_platform(self) -> None:
        """End the platform itself likewise."""
        _kill(self.record["pid"])

    @contextmanager
    def engine(self) -> Iterator[Any]:
        """Its Docker engine, past the tunnel."""
        path = run_directory(self.root) / "docker.sock"
        client = docker.APIClient(base_url=f"unix://{path}", version="auto")
        with closing(client):
            yield client


def in_phase(phase: str, kind: str = "phase.start") -> Condition:
    """The first event of a kind in a phase."""
    return lambda event: event["t"] == kind and event.get("phase") == phase


def step(number: int) -> Condition:
    """The beginning of a step of the Dockerfile."""
    return lambda event: event["t"] == "step" and event["number"] == number


def _kill(pid: int) -> None:
    process = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(process, signal.SIGKILL)
        assert select.select([process], [], [], LIMIT_S)[0]
    finally:
        os.close(process)


def _parent(folder: Path) -> int | None:
    try:
        stat = (folder / "stat").read_text(errors="replace")
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[1])


def command(*words: object) -> list[str]:
    """`fly-build` as a process of this environment."""
    return [sys.executable, "-m", "builder_orch", *map(str, words)]


def app(folder: Path, *lines: str, name: str = "hello", toml: str = "") -> Path:
    """A directory to deploy: busybox, a fly.toml and a Dockerfile of these lines below FROM."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(os.path.realpath(shutil.which("busybox") or ""), folder / "busybox")
    (folder / "fly.toml").write_text(f'app = "{name}"\n{toml}')
    text = ["FROM scratch", "COPY busybox /bin/busybox", *lines, ""]
    (folder / "Dockerfile").write_text("\n".join(text))
    return folder

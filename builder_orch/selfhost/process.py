"""Programs that we start: a process group each, a log, a watch, one restart, and a certain end."""

import asyncio
import hashlib
import os
import shutil
import signal
import stat
from asyncio import subprocess
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Final

from builder_orch.errors import UsageFailure

Report = Callable[[str], None]
"""Takes a line (or few) for people about something that happened beside the requests."""

SEARCH_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SOCKET_PATH_OCTETS: Final = 107
"""The longest path of a unix socket: sun_path without its closing zero (unix(7))."""
LONGEST_SOCKET_NAME: Final = 16
"""Room kept for names in the run directory."""
LOG_OCTETS: Final = 8 << 20
"""A log larger than this is put aside, once, when its program starts."""
SHORT: Final = Path("/tmp")  # noqa: S108 (what is made there must be ours and closed to others)
POLL_S: Final = 0.1
AGAIN_S: Final = 0.3
STEADY_S: Final = 600.0
"""A program that ran this long has earned a new restart."""


class State(StrEnum):
    """What a program of ours is doing, in the words that a machine's state has."""

    CREATED = "created"
    STARTING = "starting"
    STARTED = "started"
    STOPPED = "stopped"
    FAILED = "failed"


class CommandFailed(OSError):
    """A short command ended with a status other than zero; the text is what it said."""


class ProgramFailed(Exception):
    """A program did not come up; the text says what it said last."""


def find_program(name: str) -> str | None:
    """Return the path of a program, also where the search path of a plain user lacks sbin."""
    return shutil.which(name, path=f"{os.defpath}:{SEARCH_PATH}") or shutil.which(name)


def dying_with_us(signal_name: str) -> list[str]:
    """Return the words that go before a command so that the kernel signals it when we are gone."""
    setpriv = find_program("setpriv")
    return [setpriv, "--pdeathsig", signal_name, "--"] if setpriv else []


async def run(*arguments: str, octets: bytes = b"", limit_s: float = 20.0) -> str:
    """Run a short command to its end and return what it wrote; `CommandFailed` if it failed."""
    program = find_program(arguments[0])
    if program is None:
        raise CommandFailed(f"{arguments[0]} is not installed")
    process = await subprocess.create_subprocess_exec(
        program,
        *arguments[1:],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(limit_s):
            written, complaint = await process.communicate(octets)
    except TimeoutError:
        raise CommandFailed(f"{arguments[0]} did not end within {limit_s:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        said = printable(complaint.decode(errors="replace")) or f"status {process.returncode}"
        raise CommandFailed(f"{' '.join(arguments[:4])}: {said}")
    return written.decode(errors="replace")


def printable(text: str) -> str:
    """Return text of others with its control characters (but line ends and tabs) made visible."""
    cleaned = "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
    return cleaned.strip()


def tail(log: Path, lines: int = 10) -> str:
    """Return the last lines of a log, at most 8 KiB; empty when there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    return printable("\n".join(text.splitlines()[-lines:]))


def identity(state: Path) -> str:
    """Return the eight hexadecimal digits that name what belongs to one state directory."""
    return hashlib.sha256(str(state.resolve()).encode()).hexdigest()[:8]


def run_directory(state: Path) -> Path:
    """Make and return a directory, ours alone, whose path is short enough for unix sockets.

    It is `run` in the state directory, or where that is too deep a name of its own in /tmp
    (where an engine of ours sees it too). `UsageFailure` if another user holds that name.
    """
    near = state.resolve() / "run"
    if len(os.fsencode(near)) + 1 + LONGEST_SOCKET_NAME <= SOCKET_PATH_OCTETS:
        return private_directory(near)
    return private_directory(SHORT / f"fly-build-{identity(state)}")


def private_directory(path: Path) -> Path:
    """Make a directory of mode 0700, or make sure that the one there is a directory and ours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise UsageFailure(
            f"{path} is not a directory of ours", hint=f"remove {path} and start again"
        )
    path.chmod(0o700)
    return path


def remove_if_empty(folder: Path) -> None:
    """Remove a directory unless somebody has begun to use it."""
    with suppress(OSError):
        folder.rmdir()


class Program:
    """One long-running child in a session of its own, watched until it is stopped.

    `ready` is asked again and again after a start until it says True. A child that ends by itself
    is reported with the end of its log and started once more; if it ends again before it ran
    `STEADY_S`, the state is FAILED until somebody needs it and calls `ensure`.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        *,
        log: Path,
        ready: Callable[[], Awaitable[bool]],
        report: Report,
        environment: Mapping[str, str] | None = None,
        start_limit_s: float = 60.0,
        stop_limit_s: float = 10.0,
    ) -> None:
        self.name = name
        self.log = log
        self.state = State.CREATED
        self.starts = 0
        self._arguments = list(arguments)
        self._ready = ready
        self._report = report
        self._environment = {"PATH": SEARCH_PATH, "LANG": "C.UTF-8", **(environment or {})}
        self._start_limit_s = start_limit_s
        self._stop_limit_s = stop_limit_s
        self._process: subprocess.Process | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._settled = asyncio.Event()
        self._ensuring = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        """The process that we started, which leads its group, while it lives."""
        process = self._process
        return process.pid if process and process.returncode is None else None

    async def start(self) -> None:
        """Start the program and wait until it is ready; `ProgramFailed` leaves nothing behind."""
        await self._start_once()
        self._watcher = asyncio.create_task(self._watch(), name=f"watch {self.name}")

    async def ensure(self) -> None:
        """Wait for a start under way, or begin one if it was given up; `ProgramFailed` if it fails.

        For whoever needs it now: many may call this at once, and it is started once.
        """
        async with self._ensuring:
            await self._settled.wait()
            if self.state is State.FAILED:
                self._report(f"{self.name} is needed and started again")
                await self.start()

    async def stop(self) -> None:
        """End the program and its group: SIGTERM, a while to comply, SIGKILL."""
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher.cancel()
            await asyncio.wait([watcher])
        await self._end()
        if self.state is not State.FAILED:
            self.state = State.STOPPED
        self._settled.set()

    async def _start_once(self) -> None:
        self.state = State.STARTING
        self._settled.clear()
        try:
            await self._spawn()
            await self._wait_ready()
        except (OSError, ProgramFailed) as error:
            await self._end()
            self.state = State.FAILED
            raise ProgramFailed(str(error)) from error
        except asyncio.CancelledError:
            await self._end()
            self.state = State.STOPPED
            raise
        else:
            self.state = State.STARTED
        finally:
            self._settled.set()

    async def _spawn(self) -> None:
        with suppress(FileNotFoundError):
            if self.log.stat().st_size > LOG_OCTETS:
                self.log.replace(self.log.with_suffix(".old.log"))
        file = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            self._process = await subprocess.create_subprocess_exec(
                *self._arguments,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=self._environment,
                start_new_session=True,
            )
        finally:
            os.close(file)
        self.starts += 1

    async def _wait_ready(self) -> None:
        assert self._process is not None
        loop = asyncio.get_running_loop()
        until = loop.time() + self._start_limit_s
        while True:
            if self._process.returncode is not None:
                raise ProgramFailed(f"{self.name} ended at once: {self._last_words()}")
            if await self._ready():
                return
            if loop.time() > until:
                limit = f"{self._start_limit_s:g} s"
                raise ProgramFailed(f"{self.name} is not ready after {limit}: {self._last_words()}")
            await asyncio.sleep(POLL_S)

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        spent = False
        while True:
            assert self._process is not None
            began = loop.time()
            status = await self._process.wait()
            self._settled.clear()
            if loop.time() - began >= STEADY_S:
                spent = False
            self._report(
                f"{self.name} ended by itself (status {status}); it said last:\n{tail(self.log)}"
            )
            # What the child left in its group would hold the sockets and files that the next needs.
            await self._end()
            if spent:
                self.state = State.FAILED
                self._settled.set()
                self._report(f"{self.name} ended a second time and is not started again")
                return
            spent = True
            try:
                await self._start_once()
            except ProgramFailed as error:
                self._report(f"{self.name} could not be started again: {error}")
                return
            self._report(f"{self.name} was started again")

    async def _end(self) -> None:
        process = self._process
        if process is None:
            return
        # The first process of a process namespace does not get a signal that it has no handler for
        # yet: one that is still starting is told again and again.
        every_s = AGAIN_S if self.state is State.STARTING else self._stop_limit_s
        try:
            async with asyncio.timeout(self._stop_limit_s):
                while process.returncode is None:
                    self._signal(process, signal.SIGTERM)
                    with suppress(TimeoutError):
                        await asyncio.wait_for(process.wait(), every_s)
        except TimeoutError:
            self._report(f"{self.name} did not end within {self._stop_limit_s:g} s and is killed")
        finally:
            # The leader may be gone while others of its group are not.
            self._signal(process, signal.SIGKILL)
        await process.wait()
        self._process = None

    def _signal(self, process: subprocess.Process, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)

    def _last_words(self) -> str:
        return tail(self.log, 1) or "(nothing in its log)"

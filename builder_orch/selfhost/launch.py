"""Starting the platform in the background, finding it, and ending it."""

import http.client
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Self
from urllib.parse import urlsplit

from builder_orch.errors import (
    AlreadyRunning,
    BuilderOrchError,
    PlatformUnavailable,
    UsageFailure,
)
from builder_orch.selfhost.home import Holder, Home, Record, disk_failures, start_time
from builder_orch.selfhost.process import LOG_OCTETS, tail

START_LIMIT_S = 180.0
"""A first start makes a Docker engine's directories, which a slow disk may take a minute for."""
STOP_LIMIT_S = 60.0
POLL_S = 0.05
LOG_TAIL = 15
FOREGROUND = (sys.executable, "-m", "builder_orch", "selfhost", "start", "--foreground")
"""What runs in the background; it is told with --report-to where to say why it could not start."""

Report = Callable[[str], None]


class Launch:
    """A platform that was started in the background and is not up yet.

    The child tells why it could not start through a pipe of its own, so that two starts at the
    same time cannot take each other's reason.
    """

    def __init__(self, process: subprocess.Popen[bytes], reasons: int, log: Path) -> None:
        self._process = process
        self._reasons = reasons
        self._log = log

    @classmethod
    def begin(cls, home: Home, command: Sequence[str]) -> Self:
        """Start the child, detached from this terminal and its signals."""
        home.prepare()
        reasons, write_end = os.pipe()
        os.set_blocking(reasons, False)
        try:
            with open_log(home) as log:
                process = subprocess.Popen(  # noqa: S603 - our own interpreter, no shell
                    [*command, "--report-to", str(write_end)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[write_end],
                    start_new_session=True,
                )
        except BaseException:
            os.close(reasons)
            raise
        finally:
            os.close(write_end)
        return cls(process, reasons, home.log)

    @property
    def pid(self) -> int:
        """The child's."""
        return self._process.pid

    def failure(self) -> BuilderOrchError | None:
        """Why the child ended; None while it lives."""
        if self._process.poll() is None:
            return None
        with suppress(OSError, ValueError, KeyError, TypeError):
            return failure_from(json.loads(os.read(self._reasons, 65536)))
        said = tail(self._log, LOG_TAIL)
        return PlatformUnavailable(
            f"the platform ended with status {self._process.returncode} while it started:\n{said}",
            hint=f"the whole log is in {self._log}",
        )

    def abandon(self) -> None:
        """End a child that is not up in time; it takes down what it had started."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def close(self) -> None:
        """Let go of the child, which lives on if it is up."""
        os.close(self._reasons)
        # It is to outlive us; Popen would warn that it does.
        self._process.returncode = self._process.poll() or 0


def open_log(home: Home) -> BinaryIO:
    """The platform's log, to append to; a large one is put aside first."""
    with disk_failures(home.root):
        with suppress(FileNotFoundError):
            if home.log.stat().st_size > LOG_OCTETS and home.holder() is None:
                home.log.replace(home.log.with_suffix(".old.log"))
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        return os.fdopen(os.open(home.log, flags, 0o600), "ab")


def failure_from(card: dict[str, str]) -> BuilderOrchError:
    """The failure that another process of ours described by kind, message and hint."""
    leaves = {leaf.kind: leaf for leaf in BuilderOrchError.__subclasses__()}
    leaf = leaves.get(card["kind"], PlatformUnavailable)
    return leaf(card["message"], hint=card["hint"])


def ensure_selfhost(
    home: Home,
    *,
    report: Report = lambda _: None,
    command: Sequence[str] = FOREGROUND,
    join: bool = True,
    limit_s: float = START_LIMIT_S,
) -> Record:
    """The platform of this home, answering; it is started when it does not run.

    Commands that come here at the same time end up with one platform: the lock lets one child
    through, and who started the other waits for that one. With `join` False it must be ours, else
    AlreadyRunning. `report` is told what is waited for. Raises what kept the platform from
    starting.
    """
    until = time.monotonic() + limit_s
    launch: Launch | None = None
    up = False
    try:
        while True:
            holder, record = home.holder(), home.record()
            if not join and holder is not None and (launch is None or holder.pid != launch.pid):
                raise home.taken(holder)
            if record is not None and answers(record):
                up = True
                return record
            if launch is not None:
                failure = launch.failure()
                if failure is not None:
                    if not join or not isinstance(failure, AlreadyRunning):
                        raise failure
                    launch.close()
                    launch = None
            elif holder is None:
                report(f"starting the platform in {home.root}")
                launch = Launch.begin(home, command)
            else:
                report("waiting for the platform, which another command is starting")
            if time.monotonic() >= until:
                raise PlatformUnavailable(
                    f"the platform in {home.root} is not up after {limit_s:.0f} s",
                    hint=f"look at its log in {home.log}; fly-build selfhost stop ends it",
                )
            time.sleep(POLL_S)
    finally:
        if launch is not None:
            if not up:
                launch.abandon()
            launch.close()


def answers(record: Record) -> bool:
    """Whether the API says that it is well."""
    url = urlsplit(record.api_url)
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=5)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def stop_selfhost(home: Home, *, limit_s: float = STOP_LIMIT_S) -> Holder | None:
    """End the platform and make sure that it is gone; None when none runs.

    A process that does not end by itself in `limit_s` is killed. The signals go through a process
    descriptor that is checked against the holder's start time, so they cannot hit a stranger.
    """
    holder = home.holder()
    if holder is None:
        return None
    try:
        process = os.pidfd_open(holder.pid)
    except ProcessLookupError:
        return holder
    try:
        if start_time(holder.pid) != holder.started:
            return holder
        for number, patience_s in ((signal.SIGTERM, limit_s), (signal.SIGKILL, 10.0)):
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, number)
            # A process descriptor is readable when its process has ended.
            if select.select([process], [], [], patience_s)[0]:
                break
        else:
            raise PlatformUnavailable(
                f"the platform (pid {holder.pid}) cannot be ended, not even by SIGKILL",
                hint="it hangs in the kernel, most likely on a disk; look at dmesg",
            )
    except PermissionError:
        raise UsageFailure(
            f"the platform (pid {holder.pid}) belongs to another user",
            hint="stop it as that user",
        ) from None
    finally:
        os.close(process)
    return holder

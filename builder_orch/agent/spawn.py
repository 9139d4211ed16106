"""The agent, started by whoever comes first; all others find that one."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from builder_orch import __version__
from builder_orch.agent import PROTOCOLS
from builder_orch.agent.call import Call, Gone, Greeting, greet
from builder_orch.agent.place import Place, disk_failure, locked
from builder_orch.errors import AgentFailed, Exit

START_LIMIT_S = 15.0
POLL_S = 0.02
LONGEST_POLL_S = 0.2
LOG_LINES = 20
LOG_OCTETS = 1 << 20
COMMAND = (sys.executable, "-m", "builder_orch", "agent", "run")
KEPT = frozenset({"FLY_BUILD_HOME", "HOME", "LANG", "PATH", "PYTHONPATH", "TZ", "XDG_RUNTIME_DIR"})
"""What an agent is given of this environment: it outlives this command and needs no token."""

Report = Callable[[str], None]


def ensure_agent(
    place: Place,
    *,
    command: Sequence[str] = COMMAND,
    version: str = __version__,
    protocols: tuple[int, int] = PROTOCOLS,
    report: Report = lambda _: None,
    limit_s: float = START_LIMIT_S,
) -> Call:
    """A call to the agent of this place, which is started if there is none.

    An agent of an earlier release is asked to leave: it serves what it has until that ends, and a
    new one is started beside it. AgentFailed when there is none in the end, with its last words.
    """
    place.prepare()
    until = time.monotonic() + limit_s
    started: subprocess.Popen[bytes] | None = None
    with ExitStack() as closing:
        starting, pause_s = False, POLL_S
        while True:
            call = greet(place, version=version, protocols=protocols)
            if call is not None and (started is not None or suits(call, version, protocols)):
                if started is not None:
                    # It is to outlive us; Popen would warn that it does.
                    started.returncode = started.poll() or 0
                return call
            if call is not None:
                report(f"agent {call.greeting.version} (pid {call.greeting.pid}) is asked to leave")
                _ask_to_leave(call)
            elif started is not None and started.poll() is not None:
                if started.returncode != Exit.LOCKED:
                    raise _failed(place, f"ended with status {started.returncode}")
                started = None
            elif started is None and not starting:
                # One at a time: fifty interpreters that lose a race are slower than one that wins.
                lock = locked(place.start_lock, 0.0)
                if lock is not None:
                    closing.callback(os.close, lock)
                    starting = True
                    continue
            elif started is None:
                report("starting the agent")
                started = _start(place, command)
            if time.monotonic() >= until:
                if started is not None:
                    started.kill()
                    started.wait()
                raise _failed(place, f"is not there after {limit_s:g} s")
            time.sleep(pause_s)
            # Many who wait for one must not take the processor away from it.
            pause_s = POLL_S if starting else min(2 * pause_s, LONGEST_POLL_S)


def find_agent(
    place: Place, *, version: str = __version__, protocols: tuple[int, int] = PROTOCOLS
) -> Call | None:
    """A call to an agent that runs and speaks what we speak; None without one. Starts nothing."""
    if not place.has_socket():
        return None
    call = greet(place, version=version, protocols=protocols)
    if call is not None and not call.greeting.shares(protocols):
        call.close()
        return None
    return call


def suits(call: Call, version: str, protocols: tuple[int, int]) -> bool:
    """Whether to go on with this agent; False for one to be replaced, AgentFailed for a later one
    that does not speak our protocol any more."""
    greeting = call.greeting
    if _ordered(greeting.version) < _ordered(version):
        return False
    if greeting.shares(protocols):
        return True
    if greeting.protocols[1] < protocols[0]:
        return False
    call.close()
    raise _too_late(greeting)


def _ordered(version: str) -> list[int]:
    """A release's numbers; what is no number counts for nothing."""
    return [int(number) for number in re.findall(r"[0-9]{1,9}", version)]


def _ask_to_leave(call: Call) -> None:
    try:
        call.ask({"do": "retire", "now": False})
    except Gone:
        return
    finally:
        call.close()


def _start(place: Place, command: Sequence[str]) -> "subprocess.Popen[bytes]":
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        if place.log.exists() and place.log.stat().st_size > LOG_OCTETS:
            place.log.replace(place.log.with_suffix(".old.log"))
        log = os.open(place.log, flags, 0o600)
    except OSError as error:
        raise disk_failure(place.log, error) from None
    try:
        return subprocess.Popen(  # noqa: S603 - our own interpreter, no shell
            [*command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            env=_environment(os.environ),
            start_new_session=True,
        )
    finally:
        os.close(log)


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value for name, value in variables.items() if name in KEPT or name.startswith("LC_")
    }


def _failed(place: Place, how: str) -> AgentFailed:
    said = last_words(place.log)
    return AgentFailed(
        f"the agent {how}{':' if said else ''}\n{said}".rstrip(),
        hint=f"Its log is {place.log}; with --agent off no agent is needed.",
    )


def last_words(log: Path) -> str:
    """The end of the agent's log; "" when there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 8192))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-LOG_LINES:])


def _too_late(greeting: Greeting) -> AgentFailed:
    return AgentFailed(
        f"the agent that runs (pid {greeting.pid}) is of a later release, {greeting.version}, and "
        "does not speak with this one",
        hint="Use that release, or --agent off.",
    )

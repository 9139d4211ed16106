"""`fly-build selfhost`: start, stop and look at the platform embedded in this machine."""

import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

import click

from builder_orch.cli.answer import Facts, tell
from builder_orch.cli.form import output_option
from builder_orch.cli.log import write_log
from builder_orch.cli.options import Duration
from builder_orch.cli.text import plain
from builder_orch.errors import BuilderOrchError, Exit, UsageFailure
from builder_orch.events import Emit, PhaseReason
from builder_orch.selfhost.home import Home, disk_failures
from builder_orch.selfhost.launch import (
    FOREGROUND,
    answers,
    ensure_selfhost,
    open_log,
    stop_selfhost,
)
from builder_orch.settings import Environment

__all__ = ["ensure_selfhost", "own_home", "selfhost"]

FOLLOW_POLL_S = 0.2
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
"""What an engine of ours is given of this environment."""


def own_home() -> Home:
    """Where this user's platform is."""
    return Home(Environment.current().state_folder())


def last_lines(path: Path, count: int, *, following: bool = False) -> Iterator[str]:
    """The end of a log, without control characters; if asked, what is appended to it for ever.

    A log that was cut short, or put aside for a new one, is read from its beginning again.
    """
    with ExitStack() as opened:
        file = opened.enter_context(path.open(encoding="utf-8", errors="replace"))
        # Of one open file, so that no line is lost between its end and what comes next.
        yield from map(plain, deque(file, count))
        pending = ""
        while following:
            pending += file.readline()
            if pending.endswith("\n"):
                yield plain(pending)
                pending = ""
                continue
            time.sleep(FOLLOW_POLL_S)
            with suppress(FileNotFoundError):
                now, own = path.stat(), os.fstat(file.fileno())
                if not os.path.samestat(now, own):
                    opened.close()
                    file = opened.enter_context(path.open(encoding="utf-8", errors="replace"))
                elif now.st_size < file.tell():
                    file.seek(0)


@click.group()
def selfhost() -> None:
    """Run a platform of your own on this machine.

    API, WireGuard gateway, builder, registry and release runner in one process. State is kept in
    the user's data directory, or in $FLY_BUILD_HOME/selfhost.
    """


@selfhost.command()
@click.option("--foreground", is_flag=True, help="Stay here until Ctrl-C, with the log on stderr.")
@click.option("--listen", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="API port; 0: a free one.")
@click.option(
    "--install-delay",
    type=click.FloatRange(0, 600),
    default=0.0,
    metavar="S",
    help="Let the gateway know peers this many seconds later; for demonstrations.",
)
@click.option("--report-to", type=int, hidden=True)
@output_option
@click.pass_context
def start(
    context: click.Context,
    foreground: bool,
    listen: str,
    port: int,
    install_delay: float,
    report_to: int | None,
    output: str,
) -> None:
    """Start the platform; in the background unless told otherwise."""
    home = own_home()
    if foreground:
        run_foreground(home, listen, port, install_delay, report_to)
        return
    words = ["--listen", listen, "--port", str(port), "--install-delay", str(install_delay)]
    command = (*FOREGROUND, *words)
    context.exit(tell(output, "selfhost start", lambda emit: _started(home, command, emit)))


def _started(home: Home, command: Sequence[str], emit: Emit) -> Facts:
    said: set[str] = set()

    def report(reason: str) -> None:
        if reason not in said:
            said.add(reason)
            emit(PhaseReason("selfhost", reason))

    record = ensure_selfhost(home, report=report, command=command, join=False)
    lines = [f"the platform is up (pid {record.pid})", f"  API:      {record.api_url}"]
    return {"state": "running", "pid": record.pid, "api_url": record.api_url, "lines": lines}


def run_foreground(
    home: Home, listen: str, port: int, install_delay: float, report_to: int | None
) -> None:
    """Be the platform. With `report_to`, a failure to start goes into that descriptor as well."""
    from builder_orch.selfhost.serve import Options, serve

    if report_to is not None:
        # The programs that we start must not keep the pipe open.
        os.set_inheritable(report_to, False)
        os.chdir("/")
    given = Environment.current()
    existing = given.first("DOCKER_HOST")[0]
    options = Options(
        home,
        listen=listen,
        port=port,
        install_delay_s=install_delay,
        existing=existing if existing.startswith("unix://") else None,
        environment={name: value for name in PROXIES if (value := given.first(name)[0])},
    )
    try:
        write_log(*open_logs(home, attached=report_to is None))
        serve(options)
    except BuilderOrchError as error:
        if report_to is not None:
            card = {"kind": error.kind, "message": str(error), "hint": error.hint}
            with suppress(OSError):
                os.write(report_to, json.dumps(card).encode()[:65536])
        raise


def open_logs(home: Home, *, attached: bool) -> list[TextIO]:
    """The platform's log, and the terminal too when there is one.

    In the background the file is standard error already, so that tracebacks end up in it.
    """
    home.prepare()
    if not attached:
        return [sys.stderr]
    return [TextIOWrapper(open_log(home), encoding="utf-8", line_buffering=True), sys.stderr]


@selfhost.command()
@click.option(
    "--started-here", is_flag=True, help="Leave a platform alone that another checkout started."
)
@output_option
@click.pass_context
def stop(context: click.Context, started_here: bool, output: str) -> None:
    """Stop the platform and everything that it started."""
    context.exit(tell(output, "selfhost stop", lambda _: _stopped(own_home(), started_here)))


def _stopped(home: Home, started_here: bool) -> Facts:
    holder = home.holder()
    if holder is not None and started_here and holder.prefix != sys.prefix:
        line = f"the platform (pid {holder.pid}) was started from {holder.prefix}; left"
        return {"state": "running", "pid": holder.pid, "lines": [line]}
    stopped = stop_selfhost(home)
    line = f"stopped (pid {stopped.pid})" if stopped else "the platform does not run"
    return {"state": "stopped", "pid": stopped.pid if stopped else None, "lines": [line]}


@selfhost.command()
@output_option
@click.pass_context
def status(context: click.Context, output: str) -> None:
    """Show whether the platform runs and where.

    The exit code is 1 when it does not.
    """
    context.exit(tell(output, "selfhost status", lambda _: _status(own_home())))


def _status(home: Home) -> Facts:
    holder, record = home.holder(), home.record()
    well = record is not None and answers(record)
    state = "running" if well else "stopped" if holder is None else "not answering"
    facts: Facts = {
        "state": state,
        "pid": holder.pid if holder else None,
        "api_url": record.api_url if record else None,
        "registry": record.registry if record else None,
        "organization": record.organization if record else None,
        "home": str(home.root),
        "log": str(home.log),
    }
    lines = [f"{name.replace('_', ' ')}: {value}" for name, value in facts.items() if value]
    return {**facts, "lines": lines, "exit_code": Exit.OK if well else Exit.UNCLASSIFIED}


@selfhost.command()
@click.option("-f", "--follow", "following", is_flag=True, help="Go on until Ctrl-C.")
@click.option(
    "-n", "--lines", type=click.IntRange(0), default=50, show_default=True, help="From the end."
)
def logs(following: bool, lines: int) -> None:
    """Show the end of the platform's log."""
    home = own_home()
    with disk_failures(home.root):
        if not home.log.exists():
            raise UsageFailure(
                f"there is no log in {home.root}", hint="fly-build selfhost start makes one"
            )
    for line in last_lines(home.log, lines, following=following):
        click.echo(line)


@selfhost.command()
@click.option(
    "--expires",
    "lifetime_s",
    type=Duration(),
    default="1h",
    show_default=True,
    help="How long it is good for.",
)
@click.option("--owner", default="token", help="A name for it in the platform's records.")
@output_option
@click.pass_context
def token(context: click.Context, lifetime_s: float, owner: str, output: str) -> None:
    """Make a token for another user or machine and print it.

    It is shown once: only its hash is kept.
    """
    context.exit(tell(output, "selfhost token", lambda _: _token(own_home(), owner, lifetime_s)))


def _token(home: Home, owner: str, lifetime_s: float) -> Facts:
    from builder_orch.selfhost.database import database_failures
    from builder_orch.selfhost.store import Store

    with disk_failures(home.root), database_failures(home.store):
        if not home.store.exists():
            raise UsageFailure(
                f"there is no platform in {home.root}", hint="start one: fly-build selfhost start"
            )
        store = Store(f"sqlite:///{home.store}")
        try:
            made = store.issue_token(owner, lifetime_s=lifetime_s)
        finally:
            store.close()
    return {"token": made, "expires_in_s": int(lifetime_s), "lines": [made]}

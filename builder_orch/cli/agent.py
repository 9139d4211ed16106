"""`fly-build agent`: the background process that holds tunnels for all commands of a user."""

import sys
from collections.abc import Callable
from typing import Any

import click

from builder_orch.agent.call import Gone, end_agent, greet
from builder_orch.agent.place import Place
from builder_orch.agent.spawn import COMMAND, ensure_agent
from builder_orch.cli.answer import Facts, tell
from builder_orch.cli.form import output_option
from builder_orch.cli.log import write_log
from builder_orch.cli.options import Duration
from builder_orch.errors import Exit
from builder_orch.events import Emit, PhaseReason
from builder_orch.settings import Environment

IDLE_S = 900.0


def own_place() -> Place:
    """Where this user's agent is."""
    return Place(Environment.current().agent_folder())


def _common(command: Callable[..., None]) -> Callable[..., None]:
    return output_option(click.pass_context(command))


_idle = click.option(
    "--idle",
    type=Duration(),
    default=f"{IDLE_S:g}",
    show_default="15m",
    envvar="FLY_BUILD_IDLE",
    help="It ends when nobody has used it for this long.",
)
_now = click.option(
    "--now", is_flag=True, help="Reset its connections instead of waiting for them."
)


def _tell(context: click.Context, output: str, name: str, work: Callable[[Emit], Facts]) -> None:
    """Do the work of one command and print what came of it; without an agent the exit code is 1."""

    def told(emit: Emit) -> Facts:
        facts = work(emit)
        none = facts["state"] == "stopped" and name != "stop"
        code = Exit.UNCLASSIFIED if none else Exit.OK
        return {"lines": [_line(facts)], **facts, "exit_code": code}

    context.exit(tell(output, f"agent {name}", told))


@click.group()
def agent() -> None:
    """Hold tunnels for all commands of this user, so that they share one session.

    No command needs it: without an agent each takes a peer of its own. Commands use one that runs,
    and start one if told so: --agent auto|on|off.
    """


@agent.command()
@_idle
@_common
def run(context: click.Context, idle: float, output: str) -> None:
    """Be the agent, here, with the log on stderr.

    Until it is idle, told to stop or interrupted.
    """

    def work(_: Emit) -> Facts:
        be_agent(own_place(), idle)
        return {"state": "ended"}

    _tell(context, output, "run", work)


def be_agent(place: Place, idle_s: float) -> None:
    """Serve until the end, with a log on stderr."""
    import asyncio
    import signal

    from builder_orch.agent.server import Agent, Terms, serve

    write_log(sys.stderr)

    def begun(agent: Agent) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, agent.stop)

    asyncio.run(serve(place, Terms(idle_s=idle_s), begun))


@agent.command()
@_idle
@_common
def start(context: click.Context, idle: float, output: str) -> None:
    """Start the agent if none runs."""
    _tell(context, output, "start", lambda emit: _start(idle, emit))


def _start(idle_s: float, emit: Emit) -> Facts:
    def report(reason: str) -> None:
        emit(PhaseReason("agent", reason))

    call = ensure_agent(own_place(), command=(*COMMAND, "--idle", f"{idle_s:g}"), report=report)
    call.close()
    return {"state": "running", "pid": call.greeting.pid, "version": call.greeting.version}


@agent.command()
@_now
@_common
def stop(context: click.Context, now: bool, output: str) -> None:
    """End the agent, when its last connection has ended."""
    _tell(context, output, "stop", lambda _: _stop(now))


def _stop(now: bool) -> Facts:
    ending = end_agent(own_place(), now=now)
    if ending is None:
        return {"state": "stopped"}
    if ending.connections:
        return {"state": "leaving", "pid": ending.pid, "connections": ending.connections}
    return {"state": "stopped", "pid": ending.pid}


@agent.command()
@_now
@_idle
@_common
def restart(context: click.Context, idle: float, now: bool, output: str) -> None:
    """Start a new agent in place of the one that runs.

    That one ends when its last connection has ended.
    """

    def work(emit: Emit) -> Facts:
        before = _stop(now)
        return {**_start(idle, emit), "before": before.get("pid")}

    _tell(context, output, "restart", work)


@agent.command()
@_common
def status(context: click.Context, output: str) -> None:
    """Show whether an agent runs and what it holds.

    The exit code is 1 when none does.
    """
    _tell(context, output, "status", lambda _: _status(own_place()))


def _status(place: Place) -> Facts:
    facts: Facts = {"state": "stopped"}
    try:
        if place.has_socket() and (call := greet(place)) is not None:
            answer = call.ask({"do": "status"})
            call.close()
            if isinstance(answer, dict):
                facts = {"state": "running", **answer}
    except Gone:
        facts = {"state": "stopped"}
    facts |= {"socket": str(place.socket), "log": str(place.log)}
    return {**facts, "lines": list(_described(facts))}


def _line(facts: Facts) -> str:
    rest = [f"{name} {value}" for name, value in facts.items() if name != "state" and value]
    return f"the agent: {facts['state']}" + (f" ({', '.join(rest)})" if rest else "")


def _described(facts: dict[str, Any]) -> list[str]:
    lines = [
        f"{name.replace('_', ' ')}: {facts[name]}"
        for name in ("state", "pid", "version", "socket", "log")
        if name in facts
    ]
    if facts["state"] == "running":
        lines.append(f"uptime: {facts['uptime_s']:.0f} s; ends after {facts['idle_exit_s']:g} idle")
        lines.append(f"clients: {facts['clients']}, connections: {facts['connections']}")
        lines += [f"tunnel: {_tunnel(tunnel)}" for tunnel in facts["tunnels"]]
    return lines


def _tunnel(tunnel: dict[str, Any]) -> str:
    age_s = tunnel["handshake_age_s"]
    handshake = "no handshake yet" if age_s is None else f"handshake {age_s:.0f} s ago"
    moved = f"{tunnel['sent_bytes']} bytes out, {tunnel['received_bytes']} in"
    open_now = f"{tunnel['clients']} clients, {tunnel['connections']} connections"
    return f"{tunnel['address']}, {handshake}, {moved}, {open_now}, {tunnel['file']}"

"""`fly-build wireguard`: peers, at the platform and in files, and whether they work."""

import asyncio
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

import click

from builder_orch.api.client import IDEMPOTENT, IDEMPOTENT_SELFHOST, Platform
from builder_orch.api.keyring import Entry, Keyring, Purpose
from builder_orch.api.models import Granted, Organization, Secret
from builder_orch.cli.answer import AGAIN
from builder_orch.cli.deploy import Stop, identity, told
from builder_orch.cli.form import output_option
from builder_orch.cli.options import CARRIERS, Duration, Flags
from builder_orch.errors import BuilderOrchError, PeerUnknown, UsageFailure
from builder_orch.events import Emit, Warned
from builder_orch.pipeline.kept import Kept, exported
from builder_orch.pipeline.outside import Limits
from builder_orch.pipeline.peer import AddPeer, peer_name
from builder_orch.pipeline.probe import GetConfig, Probe, Probed
from builder_orch.pipeline.roster import Line, survey
from builder_orch.pipeline.stage import perform
from builder_orch.settings import Environment, PlatformSettings
from builder_orch.tunnel.carrier.choice import Choice
from builder_orch.tunnel.carrier.proxy import Outside
from builder_orch.tunnel.config import TunnelConfig
from builder_orch.tunnel.driver import open_tunnel
from builder_orch.tunnel.stamps import Stamps

Values = dict[str, object]

STDOUT = Path("-")


@dataclass(frozen=True, slots=True)
class Desk:
    """What each command here works with."""

    flags: Flags
    environment: Environment
    chosen: PlatformSettings
    platform: Platform
    kept: Kept
    emit: Emit

    @property
    def keyring(self) -> Keyring:
        """The files of this user."""
        return self.kept.keyring

    async def organization(self) -> Organization:
        """That of --org or FLY_ORG, else the token's own."""
        slug = self.flags.org or self.environment.first("FLY_ORG")[0] or None
        return await self.platform.organization(slug)

    def choice(self) -> Choice:
        """How the gateway is reached."""
        return Choice(
            self.flags.carrier,
            self.chosen.websocket_port,
            bytes.fromhex(self.chosen.websocket_pin) or None,
            Outside.of(self.environment.variables),
            self.environment.state_folder().parent / "carriers.json",
        )

    def limits(self) -> Limits:
        """How long is waited."""
        limits = Limits()
        if self.flags.tunnel_timeout is None:
            return limits
        return replace(limits, handshake_s=self.flags.tunnel_timeout)


Work = Callable[[Desk], Awaitable[Values]]

_SHARED = (
    click.option(
        "--org", "-o", envvar="FLY_BUILD_ORG", show_envvar=True, help="Whose network; else yours."
    ),
    click.option(
        "--api-url",
        default="",
        envvar="FLY_BUILD_API_URL",
        show_envvar=True,
        help="The platform's GraphQL endpoint.",
    ),
    output_option,
)


def shared(command: Callable[..., int]) -> Callable[..., None]:
    """Give a command the flags that all have, as one value, and leave with its exit code."""

    @click.pass_context
    @wraps(command)
    def collected(
        ctx: click.Context,
        /,
        *,
        org: str | None,
        api_url: str,
        output: str,
        **given: Any,  # noqa: ANN401 - click's own types
    ) -> None:
        flags = Flags(Path(), org=org, api_url=api_url, output=output)
        ctx.exit(command(flags, **given))

    made: Callable[..., None] = collected
    for option in reversed(_SHARED):
        made = option(made)
    return made


def carry_out(flags: Flags, command: str, work: Work) -> int:
    """Do the work of one command with all its output; the exit code."""
    return told(flags, f"wireguard {command}", lambda emit: asyncio.run(_work(flags, work, emit)))


async def _work(flags: Flags, work: Work, emit: Emit) -> Values:
    with Stop.listening(emit, AGAIN) as stop:
        try:
            async with _desk(flags, emit) as desk:
                return await work(desk)
        except asyncio.CancelledError:
            raise stop.failure() from None


@asynccontextmanager
async def _desk(flags: Flags, emit: Emit) -> AsyncGenerator[Desk]:
    environment = Environment.current()
    chosen = environment.platform(flags.api_url)
    if chosen is None:
        raise UsageFailure(
            "no platform is configured and none runs here",
            hint="Set FLY_BUILD_API_URL and FLY_BUILD_TOKEN, or: fly-build selfhost start.",
        )
    keyring = Keyring(environment.state_folder().parent / "peers")
    idempotent = IDEMPOTENT_SELFHOST if chosen.selfhost else IDEMPOTENT
    token = Secret(chosen.token)
    outside = Outside.of(environment.variables)
    async with Platform(
        chosen.api_url, token, idempotent=idempotent, outside=outside, emit=emit
    ) as platform:
        kept = Kept(platform, keyring, identity(environment, chosen), emit)
        yield Desk(flags, environment, chosen, platform, kept, emit)


@click.group()
def wireguard() -> None:
    """Look after WireGuard peers, and test them.

    A deploy takes a peer of its own and removes it. Peers that are made here stay, each in a file
    that only you can read, below $FLY_BUILD_HOME/peers or the user's data directory. One process at
    a time can use one.
    """


# --- list


@wireguard.command("list")
@shared
def list_peers(flags: Flags) -> int:
    """List the peers of the network and those in files here."""

    async def work(desk: Desk) -> Values:
        lines = await _survey(desk)
        now = time.time()
        shown = [line.values(desk.keyring, now) for line in lines]
        return {"peers": shown, "lines": list(_table(shown))}

    return carry_out(flags, "list", work)


async def _survey(desk: Desk) -> list[Line]:
    """All peers; without an answer of the platform, those in files."""
    entries = await asyncio.to_thread(desk.keyring.entries)
    mine = [entry for entry in entries if _is_of(desk, entry)]
    granted: list[Granted] | None = None
    try:
        organization = await desk.organization()
        granted = await desk.platform.peers(organization)
    except BuilderOrchError as error:
        desk.emit(Warned("platform", f"only what is in files here is shown: {error}"))
        return survey(None, mine)
    inside = [
        entry
        for entry in mine
        if entry.record is None or entry.record.organization.id == organization.id
    ]
    return survey(granted, inside)


def _is_of(desk: Desk, entry: Entry) -> bool:
    return entry.record is None or entry.record.platform == desk.kept.identity


def _table(shown: list[Values]) -> list[str]:
    if not shown:
        return ["there are no peers"]
    rows = [("NAME", "ADDRESS", "PLATFORM", "HERE", "")]
    for one in shown:
        known = {True: "knows it", False: "unknown", None: "?"}[one["known_to_platform"]]  # type: ignore[index]
        here = str(one["kind"] or "-" if one["file"] else "-")
        if one["used_by_pid"] is not None:
            here += f", used by {one['used_by_pid'] or 'a process'}"
        remarks = one["remarks"]
        assert isinstance(remarks, list)
        address = str(one["address"] or "-")
        rows.append((str(one["name"]), address, known, here, "; ".join(remarks)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]).rstrip()
        for row in rows
    ]


# --- create, reset, remove


@wireguard.command()
@click.argument("name", required=False)
@click.option("--region", default=None, help="Where; else what the platform finds nearest.")
@click.option("--ephemeral", is_flag=True, help="Let the platform remove it when idle for long.")
@click.option(
    "--file",
    type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
    help="Write a wg-quick file for another program, and keep no key here; - for stdout.",
)
@click.option("--force", is_flag=True, help="Write over a file that is there.")
@shared
def create(
    flags: Flags,
    name: str | None,
    region: str | None,
    ephemeral: bool,
    file: Path | None,
    force: bool,
) -> int:
    """Make a peer that stays, named NAME or by this machine."""

    async def work(desk: Desk) -> Values:
        chosen = name or peer_name(socket.gethostname())
        record, config = await desk.kept.create(
            await desk.organization(),
            chosen,
            region=region,
            ephemeral=ephemeral,
            export=file is not None,
            file=None if file == STDOUT else file,
            force=force,
        )
        path = file or desk.keyring.path(record.name)
        made: Values = {"name": record.name, "address": str(config.address), "file": str(path)}
        if file == STDOUT:
            # What was asked for is the text itself, with the key in it.
            return {**made, "config": exported(config), "lines": exported(config).splitlines()}
        return {**made, "lines": [f"peer {record.name} at {config.address}, in {path}"]}

    return carry_out(flags, "create", work)


@wireguard.command()
@click.argument("name", required=False)
@shared
def reset(flags: Flags, name: str | None) -> int:
    """Replace a peer by one with a new key.

    Without NAME the only one that is kept here. The new one has another name, and the old one is
    removed everywhere.
    """

    async def work(desk: Desk) -> Values:
        old = name or (await _only_one(desk))
        made, said = await _replace(desk, old)
        return {**made, "lines": [said]}

    return carry_out(flags, "reset", work)


async def _replace(desk: Desk, name: str) -> tuple[Values, str]:
    record, config = await desk.kept.reset(name)
    path = desk.keyring.path(record.name)
    said = f"peer {record.name} at {config.address}, in {path}, in place of {name}"
    made = {"name": record.name, "replaced": name, "address": str(config.address)}
    return {**made, "file": str(path)}, said


async def _only_one(desk: Desk) -> str:
    entries = await asyncio.to_thread(desk.keyring.entries)
    names = [
        entry.record.name
        for entry in entries
        if entry.record is not None and entry.record.purpose is Purpose.KEPT and _is_of(desk, entry)
    ]
    if len(names) != 1:
        raise UsageFailure(
            f"{len(names) or 'no'} peers are kept here",
            hint="Name one of fly-build wireguard list.",
        )
    return names[0]


@wireguard.command()
@click.argument("name")
@shared
def remove(flags: Flags, name: str) -> int:
    """Shut a peer out of the network and remove its file."""

    async def work(desk: Desk) -> Values:
        organization = await desk.organization() if flags.org else None
        had_file = await desk.kept.remove(organization, name)
        await desk.kept.tidy()
        where = "and its file here" if had_file else "(it had no file here)"
        return {"name": name, "had_file": had_file, "lines": [f"removed the peer {name} {where}"]}

    return carry_out(flags, "remove", work)


# --- status


@wireguard.command()
@click.argument("name", required=False)
@click.option(
    "--carrier",
    type=click.Choice(CARRIERS),
    default="auto",
    envvar="FLY_BUILD_CARRIER",
    show_envvar=True,
    help="The way to the gateway; auto tries UDP, then WebSocket (HTTPS).",
)
@click.option(
    "--tunnel-timeout",
    type=Duration(),
    default=None,
    envvar="FLY_BUILD_TUNNEL_TIMEOUT",
    show_envvar=True,
    help="For the handshake; else 2m.",
)
@click.option(
    "--watch",
    "watch_s",
    type=Duration(),
    default=None,
    help="Keep the tunnel so long, and tell changes of carrier and twins of the key.",
)
@shared
def status(
    flags: Flags,
    name: str | None,
    carrier: str,
    tunnel_timeout: float | None,
    watch_s: float | None,
) -> int:
    """Bring a tunnel up and tell by which carrier and how quickly.

    With NAME by that peer, which no other process may use meanwhile; else by a peer of this
    command's own, which is removed again. A peer whose key turns out to be in use on another
    machine while it is watched is replaced.
    """
    flags = replace(flags, carrier=carrier, tunnel_timeout=tunnel_timeout)

    async def work(desk: Desk) -> Values:
        peer, lines = await _facts(desk, name)
        try:
            if name is None:
                probed = await _probe_anew(desk, watch_s or 0.0)
            else:
                probed = await _probe_kept(desk, name, watch_s or 0.0)
        except BuilderOrchError:
            for line in lines if name is not None else ():
                desk.emit(Warned("peer", line))
            raise
        lines += _tested(probed)
        made: Values = {"peer": peer, "test": probed.values(), "twin": probed.twin}
        if probed.twin and name is not None:
            said = f"another machine uses the key of {name}: it is replaced"
            desk.emit(Warned("twin", said))
            made["new_peer"], said = await _replace(desk, name)
            lines.append(said)
        return {**made, "lines": lines}

    return carry_out(flags, "status", work)


async def _facts(desk: Desk, name: str | None) -> tuple[Values | None, list[str]]:
    """What there is to say of a peer before it is tried, for programs and for people."""
    if name is None:
        return None, ["peer: one of this command's own"]
    record = desk.keyring.find(name)
    entry = Entry(desk.keyring.path(name), record, desk.keyring.user(record))
    disowned = [one.name for one in await desk.kept.invalid([record])]
    if disowned and record.purpose is Purpose.KEPT:
        raise PeerUnknown(
            f"the platform does not know the peer {name} any more",
            hint=f"Make another in its place: fly-build wireguard reset {name}.",
        )
    (line,) = survey(None, [entry], disowned)
    now = time.time()
    values = replace(line, known=not disowned).values(desk.keyring, now)
    remarks = values["remarks"]
    assert isinstance(remarks, list)
    hours = round(max(0.0, now - record.made_at) / 3600, 1)
    lines = [
        f"peer: {name} at {record.address}",
        f"file: {entry.path}, {hours} hours old",
        f"platform: {'does not know it' if disowned else 'knows it'}",
        *(f"remark: {remark}" for remark in remarks),
    ]
    return values, lines


def _tested(probed: Probed) -> list[str]:
    route = probed.route
    trip = "" if probed.round_trip_s is None else f", ping {probed.round_trip_s * 1000:.1f} ms"
    return [
        f"carrier: {route.kind} {route.endpoint}" + (f" ({route.why})" if route.why else ""),
        f"handshake: {probed.handshake_s * 1000:.0f} ms{trip}",
    ]


async def _probe_anew(desk: Desk, watch_s: float) -> Probed:
    organization = await desk.organization()

    async def config(closing: AsyncExitStack, emit: Emit) -> TunnelConfig:
        host = socket.gethostname()
        add = AddPeer(desk.platform, closing, host, desk.keyring, desk.kept.identity)
        return await add.run(organization, emit)

    return await _probe(desk, config, None, watch_s)


async def _probe_kept(desk: Desk, name: str, watch_s: float) -> Probed:
    with desk.keyring.hold(name) as held:

        async def config(_: AsyncExitStack, __: Emit) -> TunnelConfig:
            return held.config

        return await _probe(desk, config, Stamps(held.stamps), watch_s)


async def _probe(desk: Desk, config: GetConfig, stamps: Stamps | None, watch_s: float) -> Probed:
    limits = desk.limits()
    opening = partial(open_tunnel, choice=desk.choice(), stamps=stamps)
    stage = Probe(opening, desk.platform, limits, watch_s)
    limit_s = limits.handshake_s + limits.resolver_s + watch_s
    return await perform(stage, config, desk.emit, limit_s=limit_s)

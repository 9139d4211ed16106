"""The platform as one process: which parts it is made of, their order, and how they stop.

Each part is opened when those that it stands on are there, and closed before them. A client finds
the platform (`platform.json`) only when all of it is up.
"""

import asyncio
import errno
import signal
import socket
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    suppress,
)
from dataclasses import dataclass, field
from ipaddress import ip_address
from os import getpid, strerror
from pathlib import Path
from typing import Final, Protocol, TypeVar

import structlog
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from sqlalchemy.exc import DBAPIError

from builder_orch.errors import PortInUse, UsageFailure
from builder_orch.selfhost import names
from builder_orch.selfhost.api import application
from builder_orch.selfhost.builder import DOCKER_PORT, BuilderMachine
from builder_orch.selfhost.database import database_failures
from builder_orch.selfhost.engine import Engine
from builder_orch.selfhost.gateway import Gateway, open_gateway
from builder_orch.selfhost.home import Home, Record, disk_failures, write_private
from builder_orch.selfhost.process import identity
from builder_orch.selfhost.registry import Registry
from builder_orch.selfhost.releases import Runner
from builder_orch.selfhost.rows import OrganizationRow
from builder_orch.selfhost.seams import Admission, Releases, Routes
from builder_orch.selfhost.store import Store
from builder_orch.tunnel.config import PrivateKey, PublicKey

ORGANIZATION: Final = "personal"
LOCAL_OWNER: Final = "local"
"""Who the token in `platform.json` belongs to."""
LOCAL_TOKEN_S: Final = 365 * 86400.0
IDLE_PEER_S: Final = 2 * 3600.0
"""A peer's handshake is renewed while it sends; a build may be silent for longer than a session."""
SWEEP_S: Final = 60.0
BACKLOG: Final = 128

Part = TypeVar("Part")


class Peers(Protocol):
    """What the sweep needs of the gateway."""

    def last_heard(self) -> dict[PublicKey, float]: ...
    async def remove(self, public_key: PublicKey) -> None: ...


_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Options:
    """How to run. `port` is the API's (0: a free one); `listen` is for it and for the gateway.

    With `install_delay_s` the gateway knows a peer only that much later. `existing` names the unix
    socket of an engine to use where `may_own_engine` is False or ours cannot be; `environment` is
    for our engine, which may need proxies.
    """

    home: Home
    listen: str = "127.0.0.1"
    port: int = 0
    install_delay_s: float = 0.0
    idle_peer_s: float = IDLE_PEER_S
    may_own_engine: bool = True
    existing: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


def serve(options: Options) -> None:
    """Be the platform until SIGINT, SIGTERM or SIGHUP; raises what keeps it from starting."""
    asyncio.run(_until_signalled(options))


async def _until_signalled(options: Options) -> None:
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    told: list[str] = []

    def stop(name: str) -> None:
        # Once: a second cancellation would break off the orderly stop that the first began.
        if not told:
            _log.info("stopping", signal=name)
            task.cancel()
        told.append(name)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop, number.name)
    try:
        async with open_selfhost(options):
            await loop.create_future()
    except asyncio.CancelledError:
        if not told:
            raise
    _log.info("stopped")


@asynccontextmanager
async def open_selfhost(options: Options) -> AsyncGenerator[Record]:
    """The whole platform; what is yielded is what clients find in `platform.json`.

    Raises AlreadyRunning, PortInUse, EngineMissing, LocalDiskFull or UsageFailure, and nothing is
    left running then.
    """
    home = options.home
    home.prepare()
    async with AsyncExitStack() as stack:
        with disk_failures(home.root), database_failures(home.store):
            stack.enter_context(home.hold())
            home.withdraw()
            record = await _open_parts(options, stack)
            home.publish(record)
            stack.callback(home.withdraw)
        _log.info("up", api_url=record.api_url, registry=record.registry)
        yield record


async def _open_parts(options: Options, stack: AsyncExitStack) -> Record:
    home = options.home
    # Bound before the slow parts start: a port that is taken should be known at once.
    listener = _listen(options.listen, options.port)
    stack.callback(listener.close)
    store = Store(f"sqlite:///{home.store}")
    stack.callback(store.close)
    organization = store.ensure_organization(ORGANIZATION, name="Personal", personal=True)
    token = store.issue_token(LOCAL_OWNER, lifetime_s=LOCAL_TOKEN_S)
    stack.callback(store.revoke_token, store.authenticate(token).id)

    engine = await _open_engine(options, stack)
    admission = Admission(store)
    door = Registry(
        home.root, listen=engine.listen, authorize=admission.allows, report=_reporter("registry")
    )
    registry = await _open(stack, "registry", door)
    gateway = await _open_gateway(options, stack, store, organization)
    builder = BuilderMachine(
        engine, machine_id=f"builder-{organization.number}", address=organization.plan.builder(1)
    )
    gateway.expose(builder.address, DOCKER_PORT, builder.connect)

    routes = Routes(store, gateway, admission)
    runner = Runner(
        engine.client,
        owner=identity(home.root),
        registry=registry.address,
        ledger=store,
        surroundings=routes,
        connect=engine.connect_container,
        report=_reporter("release runner"),
        now=time.monotonic,
    )
    routes.lead_to(runner.connect)
    releases = Releases(store, await _open(stack, "release runner", runner))
    await releases.take_up(organization)

    api = application(store, gateway=gateway, builder=builder, runner=releases)
    await _open(stack, "API", _serving(listener, api))
    await _open(stack, "sweep", _sweeping(store, gateway, options.idle_peer_s))
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/graphql"
    called = gateway.websocket
    return Record(
        url,
        token,
        registry.address,
        getpid(),
        organization.slug,
        websocket_port=called.port if called else 0,
        websocket_pin=called.pin.hex() if called else "",
    )


async def _open_engine(options: Options, stack: AsyncExitStack) -> Engine:
    chosen = Engine(
        options.home.root,
        report=_reporter("engine"),
        existing=options.existing,
        may_own=options.may_own_engine,
        environment=options.environment,
    )
    engine = await _open(stack, "engine", chosen)
    _log.info("engine chosen", own=engine.own, why=engine.why)
    return engine


async def _open_gateway(
    options: Options, stack: AsyncExitStack, store: Store, organization: OrganizationRow
) -> Gateway:
    """The gateway with its peers and its name server, at the UDP port it had before if it can."""
    key = PrivateKey(store.authority("gateway", _new_key))
    address = organization.plan.gateway
    root = options.home.root
    kept, kept_websocket = root / "gateway.port", root / "wgtcpd.port"
    port, websocket_port = _number(kept), _number(kept_websocket)

    def at(port: int) -> AbstractAsyncContextManager[Gateway]:
        return open_gateway(
            key,
            address,
            listen=options.listen,
            port=port,
            install_delay_s=options.install_delay_s,
            certificate=root / "wgtcpd.pem",
            websocket_port=websocket_port,
        )

    try:
        gateway = await _open(stack, "gateway", at(port))
    except PortInUse:
        if not port:
            raise
        _log.warning("the gateway's port is taken; clients that are connected lose it", port=port)
        gateway = await _open(stack, "gateway", at(0))
    write_private(kept, str(gateway.endpoint[1]))
    if gateway.websocket is not None:
        write_private(kept_websocket, str(gateway.websocket.port))

    def answer(query: bytes, stream: bool) -> bytes:
        return names.answer(query, store.zone(organization), stream=stream)

    gateway.name_with(answer, address)
    for peer in store.peers():
        await gateway.install(peer.public_key, peer.address)
    return gateway


def _number(kept: Path) -> int:
    """A port that was written down; 0 when none was."""
    with suppress(OSError, ValueError):
        return int(kept.read_text(encoding="ascii"))
    return 0


@asynccontextmanager
async def _serving(listener: socket.socket, api: web.Application) -> AsyncGenerator[None]:
    runner = web.AppRunner(api, access_log=None, shutdown_timeout=2.0)
    await runner.setup()
    try:
        await web.SockSite(runner, listener).start()
        yield
    finally:
        await runner.cleanup()


@asynccontextmanager
async def _sweeping(store: Store, gateway: Peers, idle_s: float) -> AsyncGenerator[None]:
    async def sweep_for_ever() -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                await sweep(store, gateway, idle_s, time.time())
            except DBAPIError as error:
                # The next round may be luckier; the platform can do without this one.
                _log.warning("idle peers could not be looked for", cause=str(error))

    task = asyncio.create_task(sweep_for_ever(), name="sweep")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def sweep(store: Store, gateway: Peers, idle_s: float, now: float) -> list[str]:
    """Remove ephemeral peers that nothing was heard of for `idle_s`; return their names.

    `now` is Unix seconds, as in the store.
    """
    removed = []
    heard = gateway.last_heard()
    for peer in store.peers():
        silent_s = min(now - peer.seen_at, heard.get(peer.public_key, float("inf")))
        if peer.ephemeral and silent_s > idle_s:
            # The gateway first: should the store fail, the peer can be removed again.
            await gateway.remove(peer.public_key)
            store.remove_peer(peer.id)
            removed.append(peer.name)
            _log.info("idle peer removed", peer=peer.name, silent_s=round(silent_s))
    return removed


async def _open(stack: AsyncExitStack, name: str, part: AbstractAsyncContextManager[Part]) -> Part:
    """Open a part and say so; the same at its end."""
    began = time.monotonic()
    _log.info("starting", part=name)
    # Registered before the part, so that it is said when the part has closed.
    stack.callback(_log.info, "ended", part=name)
    made = await stack.enter_async_context(part)
    _log.info("started", part=name, took_s=round(time.monotonic() - began, 3))
    return made


def _reporter(part: str) -> Callable[[str], None]:
    def report(line: str) -> None:
        _log.warning(line, part=part)

    return report


def _new_key() -> bytes:
    return X25519PrivateKey.generate().private_bytes_raw()


def _listen(host: str, port: int) -> socket.socket:
    """The API's socket; PortInUse when another program has the port."""
    try:
        address = ip_address(host)
    except ValueError:
        raise UsageFailure(
            f"--listen takes an IP address, not {host!r}", hint="127.0.0.1 is the default"
        ) from None
    if address.is_unspecified:
        raise UsageFailure(
            f"--listen {host} does not say where clients find the gateway",
            hint="give the address of this machine that clients reach",
        )
    if not address.is_loopback:
        _log.warning("the API is plain HTTP: others on the way can read tokens", listen=host)
    try:
        return socket.create_server(
            (host, port),
            family=socket.AF_INET6 if address.version == 6 else socket.AF_INET,
            backlog=BACKLOG,
        )
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(
                f"the API cannot listen on {host}:{port}: another program does",
                hint="leave --port out to get a free one, or end that program",
            ) from None
        raise UsageFailure(
            f"the API cannot listen on {host}:{port}: {strerror(error.errno or 0)}",
            hint="choose an address of this machine and a port that you may use",
        ) from None

"""Where the parts of the platform meet: what one of them asks for, made of what others can do."""

import hmac
import secrets
import socket
from collections.abc import Awaitable, Callable, Iterable
from ipaddress import IPv6Address
from typing import Protocol

from builder_orch.selfhost.database import Refused
from builder_orch.selfhost.registry import Action
from builder_orch.selfhost.releases import Kept, Machine, Release
from builder_orch.selfhost.rows import AppRow, OrganizationRow, ReleaseRow
from builder_orch.selfhost.store import Store

ConnectMachine = Callable[[Machine, int], Awaitable[socket.socket]]


class Exposes(Protocol):
    """What `Routes` needs of the gateway."""

    def expose(
        self,
        address: IPv6Address,
        port: int | None,
        connect: Callable[[int], Awaitable[socket.socket]],
    ) -> None: ...
    def withdraw(self, address: IPv6Address) -> None: ...


class Runs(Protocol):
    """What `Releases` needs of the runner."""

    def begin(self, app: str, release: Release) -> None: ...
    async def adopt(self, kept: Iterable[Kept]) -> None: ...


class Admission:
    """Who may do what in the registry: tokens of the platform, in the repositories of their apps.

    A repository's name is its app's. The runner pulls with a password that only this process has.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.runner_password = secrets.token_urlsafe(32)

    def allows(self, password: str, repository: str, action: Action) -> bool:
        """Whether this password may; the repository "" asks only whether it is known."""
        if hmac.compare_digest(password.encode(), self.runner_password.encode()):
            return action is Action.PULL
        try:
            token = self._store.authenticate(password)
            if not repository:
                return True
            app = self._store.app(repository)
        except Refused:
            return False
        if app.name != repository or token.organization_id not in {None, app.organization_id}:
            return False
        return action is Action.PULL or "build" in token.scopes


class Routes:
    """What the release runner asks of the rest: addresses, a password, ways in from the tunnel."""

    def __init__(self, store: Store, gateway: Exposes, admission: Admission) -> None:
        self._store = store
        self._gateway = gateway
        self._admission = admission
        self._connect: ConnectMachine = _nowhere

    def lead_to(self, connect: ConnectMachine) -> None:
        """How a machine is reached; known once the runner is there."""
        self._connect = connect

    def allot(self, app: str) -> tuple[str, IPv6Address]:
        """Give a new machine its id and private address."""
        return self._store.allot(app)

    def password(self, app: str) -> str:
        """A password that may pull; the same for every app."""
        del app
        return self._admission.runner_password

    async def routed(self, app: str, machine: Machine) -> None:
        """Let peers reach every port of a machine at its address."""
        del app

        async def connect(port: int) -> socket.socket:
            return await self._connect(machine, port)

        self._gateway.expose(machine.address, None, connect)

    async def withdrawn(self, app: str, machine: Machine) -> None:
        """Refuse new connections to a machine."""
        del app
        self._gateway.withdraw(machine.address)


async def _nowhere(machine: Machine, port: int) -> socket.socket:
    raise ConnectionRefusedError(f"{machine.app} is not up yet (port {port})")


class Releases:
    """The release runner as the API sees it, and what it takes up again after a restart."""

    def __init__(self, store: Store, runner: Runs) -> None:
        self._store = store
        self._runner = runner

    def begin(self, app: AppRow, release: ReleaseRow) -> None:
        """Carry a release out; how it goes is written to the store."""
        self._runner.begin(app.name, _release(release))

    async def take_up(self, organization: OrganizationRow) -> None:
        """Serve what served before; a release that was broken off has failed."""
        self._store.abandon_builds("the platform ended before the build did")
        for row in self._store.open_releases():
            self._store.update_release(
                row.id, status="failed", reason="the platform ended before the release did"
            )
        kept = []
        for app in self._store.apps(organization):
            releases = self._store.releases(app) if not app.role else []
            for machine in self._store.machines(app) if releases else []:
                served = next(
                    (
                        row
                        for row in releases
                        if row.image == machine.image and row.status == "complete"
                    ),
                    None,
                )
                if served is None:
                    self._store.machine_retired(app.name, machine.id)
                else:
                    kept.append(Kept(machine.id, app.name, machine.address, _release(served)))
        await self._runner.adopt(kept)


def _release(row: ReleaseRow) -> Release:
    return Release(row.version, row.image, row.definition)

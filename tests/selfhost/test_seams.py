"""Where the platform's parts meet: who may push, what a restart takes up, which way leads in."""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from pathlib import Path

import pytest

from builder_orch.selfhost.registry import Action
from builder_orch.selfhost.releases import Kept, Machine, Release
from builder_orch.selfhost.rows import AppRow, OrganizationRow
from builder_orch.selfhost.seams import Admission, Releases, Routes
from builder_orch.selfhost.store import Store

IMAGE = "127.0.0.1:5000/hello@sha256:"
FIRST, SECOND = IMAGE + "a" * 64, IMAGE + "b" * 64


@dataclass
class Bench:
    store: Store
    organization: OrganizationRow
    app: AppRow
    now: list[float]

    def release(self, image: str, status: str) -> int:
        row, _ = self.store.create_release(
            self.app, image=image, strategy="ROLLING", definition={"env": {"A": "1"}}
        )
        if status != "pending":
            self.store.update_release(row.id, status=status)
        return row.version


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    now = [1000.0]
    store = Store(f"sqlite:///{tmp_path}/state.db", clock=lambda: now[0])
    organization = store.ensure_organization("personal", personal=True)
    yield Bench(store, organization, store.create_app(organization, "hello"), now)
    store.close()


# The registry's door


def test_a_token_that_may_build_pushes_and_pulls_its_own_apps(bench: Bench) -> None:
    admission = Admission(bench.store)
    token = bench.store.issue_token("someone", lifetime_s=60)
    assert admission.allows(token, "", Action.PULL)
    assert admission.allows(token, "hello", Action.PUSH)
    assert admission.allows(token, "hello", Action.PULL)
    assert not admission.allows(token, "other", Action.PULL)
    bench.now[0] += 61
    assert not admission.allows(token, "hello", Action.PULL)


def test_an_app_is_known_to_the_registry_by_its_name_only(bench: Bench) -> None:
    admission = Admission(bench.store)
    token = bench.store.issue_token("someone", lifetime_s=60)
    assert not admission.allows(token, bench.app.id, Action.PULL)
    assert not admission.allows(token, "hello/hello", Action.PUSH)


def test_scope_and_organization_bound_a_token(bench: Bench) -> None:
    admission = Admission(bench.store)
    reader = bench.store.issue_token("reader", lifetime_s=60, scopes={"app"})
    assert admission.allows(reader, "hello", Action.PULL)
    assert not admission.allows(reader, "hello", Action.PUSH)
    elsewhere = bench.store.ensure_organization("elsewhere")
    stranger = bench.store.issue_token("stranger", lifetime_s=60, organization=elsewhere)
    assert admission.allows(stranger, "", Action.PULL)
    assert not admission.allows(stranger, "hello", Action.PULL)


@pytest.mark.parametrize("password", ["", "x", "é", "fbt_0123456789abcdef_" + "A" * 43])
def test_what_is_no_token_opens_nothing(bench: Bench, password: str) -> None:
    assert not Admission(bench.store).allows(password, "", Action.PULL)


def test_the_runner_pulls_everything_and_pushes_nothing(bench: Bench) -> None:
    admission = Admission(bench.store)
    assert admission.allows(admission.runner_password, "hello", Action.PULL)
    assert not admission.allows(admission.runner_password, "hello", Action.PUSH)
    assert Admission(bench.store).runner_password != admission.runner_password


# Routes


@dataclass
class Doors:
    open: dict[IPv6Address, tuple[int | None, Callable[[int], Awaitable[socket.socket]]]] = field(
        default_factory=dict
    )

    def expose(
        self,
        address: IPv6Address,
        port: int | None,
        connect: Callable[[int], Awaitable[socket.socket]],
    ) -> None:
        self.open[address] = (port, connect)

    def withdraw(self, address: IPv6Address) -> None:
        del self.open[address]


async def test_every_port_of_a_machine_leads_to_it_until_it_is_withdrawn(bench: Bench) -> None:
    doors = Doors()
    routes = Routes(bench.store, doors, Admission(bench.store))
    machine_id, address = routes.allot("hello")
    assert address in bench.organization.plan.network
    machine = Machine(machine_id, "hello", 1, address, "container", FIRST, 8080)
    await routes.routed("hello", machine)
    port, connect = doors.open[address]
    assert port is None
    with pytest.raises(ConnectionRefusedError):
        await connect(8080)

    asked: list[tuple[Machine, int]] = []
    near, far = socket.socketpair()

    async def reach(machine: Machine, port: int) -> socket.socket:
        asked.append((machine, port))
        return near

    routes.lead_to(reach)
    with near, far:
        assert await connect(9090) is near
    assert asked == [(machine, 9090)]
    await routes.withdrawn("hello", machine)
    assert not doors.open


def test_no_two_machines_get_the_same_address(bench: Bench) -> None:
    routes = Routes(bench.store, Doors(), Admission(bench.store))
    assert len({routes.allot("hello") for _ in range(20)}) == 20


# Releases


@dataclass
class Taken:
    begun: list[tuple[str, Release]] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)

    def begin(self, app: str, release: Release) -> None:
        self.begun.append((app, release))

    async def adopt(self, kept: Iterable[Kept]) -> None:
        self.kept += kept


def test_a_release_goes_to_the_runner_as_it_was_written_down(bench: Bench) -> None:
    taken = Taken()
    row, _ = bench.store.create_release(
        bench.app, image=FIRST, strategy="ROLLING", definition={"env": {"A": "1"}}
    )
    Releases(bench.store, taken).begin(bench.app, row)
    assert taken.begun == [("hello", Release(1, FIRST, {"env": {"A": "1"}}))]


async def test_after_a_restart_what_served_serves_and_what_was_open_has_failed(
    bench: Bench,
) -> None:
    bench.release(FIRST, "complete")
    bench.release(SECOND, "complete")
    bench.release(SECOND, "running")
    machine_id, address = bench.store.allot("hello")
    bench.store.machine_started("hello", machine_id, address, "container", SECOND)
    builder = bench.store.ensure_builder_app(bench.organization)
    bench.store.put_machine(
        builder, "builder-1", bench.organization.plan.builder(1), state="started"
    )
    taken = Taken()
    await Releases(bench.store, taken).take_up(bench.organization)
    assert [(one.app, one.machine_id, one.address) for one in taken.kept] == [
        ("hello", machine_id, address)
    ]
    assert taken.kept[0].release.image == SECOND
    statuses = {row.version: row.status for row in bench.store.releases(bench.app)}
    assert statuses == {1: "complete", 2: "complete", 3: "failed"}
    assert {row.id for row in bench.store.machines(builder)} == {"builder-1"}


async def test_a_machine_of_no_known_release_is_forgotten(bench: Bench) -> None:
    bench.release(FIRST, "complete")
    machine_id, address = bench.store.allot("hello")
    bench.store.machine_started("hello", machine_id, address, "container", SECOND)
    taken = Taken()
    await asyncio.wait_for(Releases(bench.store, taken).take_up(bench.organization), 10)
    assert not taken.kept
    assert not bench.store.machines(bench.app)

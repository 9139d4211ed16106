"""Releases on a real engine: by digest, rolled back when broken, taken up again after a restart."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from ipaddress import IPv6Address
from pathlib import Path

import pytest

from builder_orch.selfhost.engine import Engine, EngineRefused
from builder_orch.selfhost.registry import Registry
from builder_orch.selfhost.releases import Kept, Machine, Release, Runner
from tests.system.test_engine import DOCKERFILE, SERVE, build, own_engine, traces
from tests.system.test_registry import digest_in, push, registry_of, without

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(bool(without), reason=f"no releases: {without}"),
]

ADDRESS = IPv6Address("fdaa:0:1:a::2")
GOOD = "STOPSIGNAL SIGKILL\n" + SERVE
BROKEN = 'CMD ["/bin/busybox", "sh", "-c", "echo no such file; exit 3"]\n'


class Book:
    """Ledger and surroundings of one app, as a list of what was said."""

    def __init__(self) -> None:
        self.statuses: dict[int, list[str]] = {}
        self.reasons: dict[int, str] = {}
        self.kept: dict[str, tuple[IPv6Address, str]] = {}
        self.route: Machine | None = None
        self._machines = 0

    def is_wanted(self, app: str, version: int) -> bool:
        return True

    def release_status(self, app: str, version: int, status: str, reason: str | None) -> None:
        self.statuses.setdefault(version, []).append(status)
        self.reasons[version] = reason or ""

    def machine_started(
        self, app: str, machine_id: str, address: IPv6Address, container: str, image: str
    ) -> None:
        self.kept[machine_id] = (address, image)

    def machine_retired(self, app: str, machine_id: str) -> None:
        self.kept.pop(machine_id, None)

    def allot(self, app: str) -> tuple[str, IPv6Address]:
        self._machines += 1
        return f"m{self._machines}", ADDRESS + self._machines

    def password(self, app: str) -> str:
        return "reader"

    async def routed(self, app: str, machine: Machine) -> None:
        self.route = machine

    async def withdrawn(self, app: str, machine: Machine) -> None:
        return

    def serving(self) -> Machine:
        assert self.route is not None
        return self.route

    async def last(self, version: int) -> str:
        """Wait for the end of a release and return its status."""
        async with asyncio.timeout(60):
            while self.statuses.get(version, ["pending"])[-1] in {"pending", "running"}:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        return self.statuses[version][-1]


@asynccontextmanager
async def runner_of(engine: Engine, registry: Registry, book: Book) -> AsyncGenerator[Runner]:
    async with Runner(
        engine.client,
        owner="test",
        registry=registry.address,
        ledger=book,
        surroundings=book,
        connect=engine.connect_container,
        report=print,
        now=time.monotonic,
    ) as runner:
        yield runner


async def release(
    engine: Engine, registry: Registry, version: int, dockerfile: str, page: str
) -> Release:
    """Build and push an image; return the release of its digest."""
    repository = f"{registry.address}/hello"
    await build(engine, f"{repository}:{version}", dockerfile, page)
    digest = digest_in(await push(engine, repository, str(version), "good"))
    return Release(version, f"{repository}@{digest}", {"http_service": {"internal_port": 8080}})


async def page_of(runner: Runner, machine: Machine) -> str:
    stream = await runner.connect(machine, machine.port)
    reader, writer = await asyncio.open_connection(sock=stream)
    writer.write(b"GET / HTTP/1.0\r\n\r\n")
    answer = await reader.read()
    writer.close()
    return answer.decode().partition("\r\n\r\n")[2]


async def test_release_rollback_replacement_and_a_new_start(home: Path) -> None:
    book = Book()
    async with (
        own_engine(home) as engine,
        registry_of(engine, home) as registry,
        runner_of(engine, registry, book) as runner,
    ):
        first = await release(engine, registry, 1, DOCKERFILE + GOOD, "one")
        runner.begin("hello", first)
        assert await book.last(1) == "complete", book.reasons
        old = book.serving()
        assert await page_of(runner, old) == "one"

        runner.begin("hello", await release(engine, registry, 2, DOCKERFILE + BROKEN, ""))
        assert await book.last(2) == "failed"
        assert "exit code 3" in book.reasons[2]
        assert "no such file" in book.reasons[2]
        assert await page_of(runner, old) == "one"
        assert len(await engine.client.containers("fly-build=test")) == 1

        third = await release(engine, registry, 3, DOCKERFILE + GOOD, "three")
        runner.begin("hello", third)
        assert await book.last(3) == "complete", book.reasons
        assert await page_of(runner, book.serving()) == "three"
        with pytest.raises(ConnectionRefusedError):
            await runner.connect(old, old.port)
        assert list(book.kept) == ["m3"]
    assert traces(home) == []

    kept = [Kept("m3", "hello", book.kept["m3"][0], third)]
    book.route = None
    async with (
        own_engine(home) as engine,
        registry_of(engine, home) as registry,
        runner_of(engine, registry, book) as runner,
    ):
        stray = await engine.client.create(
            "stray", {"Image": third.image, "Labels": {"fly-build": "test"}}
        )
        await runner.adopt(kept)
        assert await page_of(runner, book.serving()) == "three"
        with pytest.raises(EngineRefused):
            await engine.client.inspect(stray)
        # Its container is gone behind our back: it is made again, from the digest.
        await engine.client.remove(book.serving().container)
        await runner.adopt(kept)
        book.statuses.clear()
        assert await book.last(3) == "complete", book.reasons
        assert await page_of(runner, book.serving()) == "three"
    assert traces(home) == []

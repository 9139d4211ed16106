"""The registry with a real engine in front of it: who may push, and what a full disk looks like."""

import hashlib
import json
import os
import signal
import socket
import subprocess
from base64 import urlsafe_b64encode
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import pytest
from yarl import URL

from builder_orch.errors import PortInUse
from builder_orch.selfhost.engine import Engine, EngineRefused
from builder_orch.selfhost.process import State, find_program
from builder_orch.selfhost.registry import Action, Registry
from tests.system.test_engine import (
    DOCKERFILE,
    build,
    command,
    own_engine,
    post,
    traces,
    until,
    why_no_engine,
)

without = why_no_engine() or (
    "" if find_program("docker-registry") else "docker-registry is not installed"
)
pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(bool(without), reason=f"no registry: {without}"),
]

GRANTS = {
    ("good", "hello", Action.PUSH),
    ("good", "hello", Action.PULL),
    ("reader", "hello", Action.PULL),
}

GOOD = {"Authorization": aiohttp.encode_basic_auth("x", "good")}


def authorize(password: str, repository: str, action: Action) -> bool:
    """Good may do all with hello, reader may pull it; every other token is unknown."""
    if not repository:
        return password in {"good", "reader"}
    return (password, repository, action) in GRANTS


@asynccontextmanager
async def registry_of(engine: Engine, state: Path) -> AsyncGenerator[Registry]:
    async with Registry(state, listen=engine.listen, authorize=authorize, report=print) as registry:
        yield registry


async def push(engine: Engine, repository: str, tag: str, password: str) -> str:
    """Push as a client does; return everything that the engine said."""
    auth = json.dumps({"username": "x", "password": password})
    headers = {"X-Registry-Auth": urlsafe_b64encode(auth.encode()).decode()}
    return await post(engine, f"/images/{repository}/push", {"tag": tag}, headers=headers)


def digest_in(said: str) -> str:
    """The digest that the registry gave the engine at the end of a push."""
    for line in said.splitlines():
        aux = json.loads(line).get("aux")
        if aux:
            return str(aux["Digest"])
    raise AssertionError(said)


async def test_push_and_pull_by_digest_with_the_right_token_only(home: Path) -> None:
    async with own_engine(home) as engine:
        async with registry_of(engine, home) as registry:
            repository = f"{registry.address}/hello"
            await build(engine, f"{repository}:1", DOCKERFILE)
            for password in ("bad", "reader"):
                said = await push(engine, repository, "1", password)
                assert "denied: requested access to the resource is denied" in said
                assert '"aux"' not in said
                # dockerd repeats what it takes for a passing fault, for 50 s.
                assert "Retrying" not in said
            digest = digest_in(await push(engine, repository, "1", "good"))
            reference = f"{repository}@{digest}"
            await post(engine, "/images/prune", {"filters": '{"dangling":["false"]}'})
            with pytest.raises(EngineRefused) as caught:
                await engine.client.image(reference)
            assert caught.value.status == 404
            with pytest.raises(EngineRefused):
                await engine.client.pull(reference, username="x", password="bad")
            await engine.client.pull(reference, username="x", password="reader")
            assert (await engine.client.image(reference)).digests == (reference,)
        # The address is in image names: the next one must have it again.
        async with registry_of(engine, home) as again:
            assert again.address == registry.address
            await engine.client.pull(reference, username="x", password="reader")
        with await engine.listen(registry.port), pytest.raises(PortInUse):
            await registry_of(engine, home).__aenter__()
    assert traces(home) == []


def registry_pid(state: Path) -> int:
    """The pid of the registry program of a state directory; 0 while there is none."""
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = process.read_bytes().split(b"\0")
            if words[0].endswith(b"docker-registry") and words[2].startswith(bytes(state)):
                return int(process.parent.name)
    return 0


async def test_the_registry_program_comes_back_once(home: Path) -> None:
    async with own_engine(home) as engine, registry_of(engine, home) as registry:
        assert await registry.ping()
        pid = registry_pid(home)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: registry_pid(home) not in {0, pid})
        await until(lambda: registry.state is State.STARTED)
        assert await registry.ping()
        os.kill(registry_pid(home), signal.SIGKILL)
        await until(lambda: registry.state is State.FAILED)
        assert not await registry.ping()


@pytest.fixture
def small_disk(home: Path) -> Iterator[Path]:
    """A disk of 3 MB where the registry keeps its images."""
    folder = home / "engine" / "registry"
    folder.mkdir(parents=True)
    command("mount", "-t", "tmpfs", "-o", "size=3m,mode=0700", "small", str(folder))
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


async def test_a_full_disk_is_named_and_not_retried_for_a_minute(
    home: Path, small_disk: Path
) -> None:
    async with own_engine(home) as engine, registry_of(engine, home) as registry:
        repository = f"{registry.address}/hello"
        (small_disk / "filler").write_bytes(bytes(2_500_000))
        await build(engine, f"{repository}:1", DOCKERFILE)
        said = await push(engine, repository, "1", "good")
        assert "no space left on device" in said
        assert "Retrying" not in said
        (small_disk / "filler").unlink()
        assert digest_in(await push(engine, repository, "1", "good"))


async def test_a_small_layer_that_a_full_disk_swallowed_is_told_of(
    home: Path, small_disk: Path
) -> None:
    """The registry's program says that it has it, and later that it never heard of it."""
    layer = b"small" * 30

    async def here(port: int) -> socket.socket:
        return socket.create_server(("127.0.0.1", port))

    async with (
        Registry(home, listen=here, authorize=authorize, report=print) as registry,
        aiohttp.ClientSession(f"http://{registry.address}", headers=GOOD) as client,
    ):
        async with client.post("/v2/hello/blobs/uploads/") as answer:
            assert answer.status == 202
            place = URL(answer.headers["Location"], encoded=True)
        with (small_disk / "filler").open("wb", buffering=0) as filler, suppress(OSError):
            while filler.write(bytes(4096)):
                pass
        async with client.patch(place, data=layer) as answer:
            assert answer.status == 202
            place = URL(answer.headers["Location"], encoded=True)
        digest = f"sha256:{hashlib.sha256(layer).hexdigest()}"
        async with client.put(place.extend_query(digest=digest)) as answer:
            assert answer.status == 413
            assert "no space left on device" in await answer.text()

"""Docker's own command line works with a builder that `fly-build builder connect` leads it to."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.system.conftest import SERVE
from tests.system.embedded import LIMIT_S, Embedded, Ended, Running, app, in_phase

pytestmark = pytest.mark.system

DOCKER = "/usr/bin/docker"
MARKED = "Successfully built|writing image sha256:"


@pytest.fixture(scope="module")
def connectable(embedded: Embedded, tmp_path_factory: pytest.TempPathFactory) -> Embedded:
    """A platform with an app, on a machine with Docker's command line."""
    if not Path(DOCKER).is_file():
        pytest.skip(f"there is no {DOCKER} to connect")
    folder = app(tmp_path_factory.mktemp("connect") / "app", SERVE, name="connect")
    built = embedded.run("build", folder, "--create-app")
    assert built.code == 0, built.said
    return embedded


def through(platform: Embedded, *words: object, flags: tuple[str, ...] = (), **more: str) -> Ended:
    """A docker command, run by ours."""
    command = ("builder", "connect", "--app", "connect", *flags, "--", DOCKER, *words)
    return platform.run(*command, **more)


def docker(platform: Embedded, *words: object, **more: str) -> "subprocess.CompletedProcess[str]":
    """A docker command beside ours."""
    return subprocess.run(
        [DOCKER, *map(str, words)],
        env=platform.environment(**more),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


@contextmanager
def connected(platform: Embedded, *flags: str, **more: str) -> Iterator[tuple[Running, str]]:
    """A connection beside which docker is used; yields it and what DOCKER_HOST should be."""
    words = ("builder", "connect", "--app", "connect", *flags)
    with platform.running(*words, **more) as running:
        event = running.until(in_phase("connect", "phase.end"))
        yield running, str(event["outcome"])
        running.process.terminate()


def closed(platform: Embedded, url: str) -> None:
    """Nothing is left of the connection that ended last."""
    ended = platform.ended[-1]
    assert ended.code == 0, ended.said
    assert ended.err == ""
    assert not platform.peers(ended)
    assert not Path(url.removeprefix("unix://")).parent.exists()


@pytest.mark.parametrize("buildkit", ["0", "1"])
def test_docker_build(connectable: Embedded, tmp_path: Path, buildkit: str) -> None:
    folder = app(tmp_path, 'RUN ["/bin/busybox", "touch", "/made"]', "COPY large /large")
    (folder / "large").write_bytes(os.urandom(3_000_000))
    ended = through(connectable, "build", folder, DOCKER_BUILDKIT=buildkit)
    assert ended.code == 0, ended.said
    assert re.search(MARKED, ended.said), ended.said


def test_a_docker_build_that_fails_fails(connectable: Embedded, tmp_path: Path) -> None:
    folder = app(tmp_path, 'RUN ["/bin/busybox", "sh", "-c", "exit 9"]')
    ended = through(connectable, "build", folder, DOCKER_BUILDKIT="1")
    assert ended.code == 1
    assert "exit code: 9" in ended.err.splitlines()[-1]
    assert not connectable.peers(ended)


def test_the_builder_tells_what_it_holds(connectable: Embedded) -> None:
    ended = connectable.run("builder", "status", "--app", "connect", "--output", "json")
    assert ended.code == 0, ended.said
    made = json.loads(ended.out)
    assert made["images"] >= 1
    assert made["layers_bytes"] > 0
    assert not connectable.peers(ended)


def test_a_hijacked_stream_is_half_closed(connectable: Embedded) -> None:
    """`docker run -i` ends its input and still hears the answer."""
    with connected(connectable) as (_, url):
        built = docker(connectable, "images", "--quiet", "--all", DOCKER_HOST=url)
        image = next(iter(built.stdout.split()))
        counting = subprocess.run(
            [DOCKER, "run", "--rm", "-i", image, "/bin/busybox", "wc", "-c"],
            env=connectable.environment(DOCKER_HOST=url),
            input="x" * 300_000,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    assert counting.stdout.strip() == "300000", counting.stderr
    closed(connectable, url)


def test_a_container_gets_no_rights_over_the_machine(connectable: Embedded) -> None:
    ended = through(connectable, "run", "--rm", "--privileged", "any")
    assert ended.code == 125
    assert "does not allow privileged" in ended.err


def test_docker_pulls_and_pushes(connectable: Embedded, tmp_path: Path) -> None:
    folder = app(tmp_path / "app", f"LABEL at={os.urandom(4).hex()}", name="connect")
    with connected(connectable) as (_, url):
        there = {
            "DOCKER_HOST": url, "DOCKER_CONFIG": str(tmp_path / "docker"), "DOCKER_BUILDKIT": "1"
        }  # fmt: skip
        record = connectable.record
        name = f"{record['registry']}/connect:by-docker"
        words = ["login", "--username", "x", "--password-stdin", record["registry"]]
        login = subprocess.run(
            [DOCKER, *words],
            env=connectable.environment(**there),
            input=record["token"],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert login.returncode == 0, login.stderr
        steps: list[list[object]] = [
            ["build", "--tag", name, folder],
            ["push", name],
            ["rmi", "--force", name],
            ["pull", name],
            ["image", "inspect", name],
        ]
        ended = [docker(connectable, *step, **there) for step in steps]
        assert all(one.returncode == 0 for one in ended), ended
        (image,) = json.loads(ended[-1].stdout)
    assert any(
        one.startswith(f"{record['registry']}/connect@sha256:") for one in image["RepoDigests"]
    )
    closed(connectable, url)


def contexts(platform: Embedded, **more: str) -> dict[str, dict[str, Any]]:
    """Docker's contexts by their names, as docker lists them."""
    listed = docker(platform, "context", "ls", "--format", "{{json .}}", **more)
    assert listed.returncode == 0, listed.stderr
    found = [json.loads(line) for line in listed.stdout.splitlines()]
    return {one["Name"]: one for one in found}


def test_docker_uses_the_context_while_it_is_there(connectable: Embedded, tmp_path: Path) -> None:
    own = {"DOCKER_CONFIG": str(tmp_path / "docker")}
    made = docker(
        connectable, "context", "create", "work", "--docker", "host=tcp://192.0.2.1:1", **own
    )
    assert made.returncode == 0, made.stderr
    assert docker(connectable, "context", "use", "work", **own).returncode == 0
    with connected(connectable, "--context", "remote", "--use", **own) as (_, url):
        found = contexts(connectable, **own)
        assert found["remote"]["Current"]
        assert found["remote"]["DockerEndpoint"] == url
        listed = docker(connectable, "ps", "--all", **own)
        assert listed.returncode == 0, listed.stderr
        assert "CONTAINER ID" in listed.stdout
    found = contexts(connectable, **own)
    assert set(found) == {"default", "work"}
    assert found["work"]["Current"]
    closed(connectable, url)


@pytest.mark.long
def test_two_connections_and_a_build_at_once(connectable: Embedded, tmp_path: Path) -> None:
    before = len(connectable.ended)
    with (
        connected(connectable, "--port", "0") as (_, first),
        connected(connectable, "--context", "second") as (_, second),
        ThreadPoolExecutor(3) as pool,
    ):
        assert first.startswith("tcp://127.0.0.1:")
        asked = [
            pool.submit(docker, connectable, "version", DOCKER_HOST=first),
            pool.submit(docker, connectable, "--context", "second", "version"),
        ]
        building = pool.submit(
            through, connectable, "build", app(tmp_path, "LABEL two=2"), DOCKER_BUILDKIT="1"
        )
        for one in asked:
            assert one.result().returncode == 0, one.result().stderr
            assert "Server:" in one.result().stdout
        assert building.result().code == 0
    assert set(contexts(connectable)) == {"default"}
    closed(connectable, second)
    # Not of those before: what the tests of the agent have shared stays.
    assert not connectable.peers(*connectable.ended[before:])

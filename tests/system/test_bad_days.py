"""Engine, registry or release break: who is told what, and that the next deploy works."""

import asyncio
import json
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from builder_orch.api.client import IDEMPOTENT_SELFHOST, Platform
from builder_orch.api.models import Secret
from builder_orch.errors import Exit
from builder_orch.pipeline.liveness import RETURNS
from builder_orch.pipeline.peer import AddPeer
from builder_orch.pipeline.verify import Address, Verify
from builder_orch.tunnel import open_tunnel
from tests.system.conftest import SERVE, Forsaken
from tests.system.embedded import Embedded, Ended, app, in_phase, step
from tests.system.test_bad_input import told

pytestmark = pytest.mark.system

KILLED = "STOPSIGNAL SIGKILL"
PAGE = [KILLED, SERVE]
CRASHING = 'CMD ["/bin/busybox", "sh", "-c", "echo no such table; exit 3"]'
DEAF = 'CMD ["/bin/busybox", "sleep", "600"]'
BROKEN = [
    "COPY index.cgi /www/cgi-bin/index.cgi",
    'CMD ["/bin/busybox", "httpd", "-f", "-p", "8080", "-h", "/www"]',
]


def deployed(ended: Ended) -> int:
    """The version of a deploy that worked: its release answered through the tunnel."""
    assert ended.code == 0, ended.said
    result = json.loads(ended.out)
    assert result["status"] == 404
    return int(result["release"])


def test_the_builders_disk_is_full(forsaken: Forsaken) -> None:
    by_step, by_context = forsaken.full
    lines = told(by_step, "RB-BUILDER-DISK", Exit.BUILDER_LOST)
    assert lines[0].startswith("error: the builder's disk is full: Dockerfile:3: step 3/3")
    lines = told(by_context, "RB-BUILDER-DISK", Exit.BUILDER_LOST)
    assert "no space left on device" in lines[0]
    # What is offered helps: others built there afterwards.
    assert all("fly-build builder prune" in ended.err for ended in forsaken.full)
    assert forsaken.pruned.code == 0, forsaken.pruned.said
    assert json.loads(forsaken.pruned.out)["freed_bytes"] > 0


def retries(ended: Ended) -> list[str]:
    """What was begun again, in the order in which it was."""
    return [event["phase"] for event in ended.events if event["t"] == "retry"]


def test_the_engine_dies_once_while_it_builds(embedded: Embedded, tmp_path: Path) -> None:
    folder = app(tmp_path, 'RUN ["/bin/busybox", "sleep", "3"]', *PAGE, name="revived")
    with embedded.running("deploy", folder, "--create-app") as running:
        running.until(step(3))
        embedded.kill("dockerd")
    ended = embedded.ended[-1]
    assert ended.code == 0, ended.said
    assert retries(ended) == ["build"]
    assert embedded.builds("revived") == ["completed"]
    assert embedded.releases("revived") == [(1, "complete")]
    assert not embedded.peers(ended)


@pytest.mark.long
def test_the_engine_dies_whenever_it_builds_and_between_deploys(
    embedded: Embedded, tmp_path: Path
) -> None:
    slow = app(tmp_path / "slow", 'RUN ["/bin/busybox", "sleep", "602"]', name="engine")
    with embedded.running("deploy", slow, "--create-app") as running:
        for _ in range(1 + RETURNS):
            running.until(step(3))
            embedded.kill("dockerd")
    lost = embedded.ended[-1]
    assert lost.code == Exit.BUILDER_LOST
    assert retries(lost) == ["build"] * RETURNS
    assert lost.error["id"] == "RB-BUILDER-LOST"
    assert lost.error["retryable"]
    assert embedded.builds("engine") == ["failed"]
    assert not embedded.peers(lost)
    good = app(tmp_path / "good", *PAGE, name="engine")
    assert deployed(embedded.run("deploy", good, "--json")) == 1
    # It ended a second time, and is not started by itself again, but for whoever needs it.
    embedded.kill("dockerd")
    assert deployed(embedded.run("deploy", good, "--json")) == 2


def test_an_engine_that_does_not_start_any_more(embedded: Embedded, tmp_path: Path) -> None:
    settings = embedded.root / "engine/daemon.json"
    good = settings.read_text()
    settings.write_text("no settings")
    try:
        embedded.kill("dockerd")
        folder = app(tmp_path / "app", *PAGE, name="noengine")
        ended = embedded.run("deploy", folder, "--create-app")
    finally:
        settings.write_text(good)
    told(ended, "RB-PROVISION", Exit.BUILDER_NOT_PROVISIONED)
    assert embedded.builds("noengine") == []
    assert deployed(embedded.run("deploy", folder, "--json")) == 1


def test_the_registry_dies_before_and_while_it_is_pushed_to(
    embedded: Embedded, tmp_path: Path
) -> None:
    folder = app(tmp_path / "app", "COPY large /large", *PAGE, name="registry")
    (folder / "large").write_bytes(os.urandom(20_000_000))
    embedded.kill("docker-registry")
    with embedded.running("deploy", folder, "--create-app") as running:
        running.until(in_phase("push", "progress"))
        embedded.kill("docker-registry")
    # Layers that were under way are pushed again, to a registry that was started again.
    assert embedded.ended[-1].code == 0, embedded.ended[-1].said
    assert embedded.releases("registry") == [(1, "complete")]


@pytest.mark.long
def test_a_registry_that_does_not_start_any_more(embedded: Embedded, tmp_path: Path) -> None:
    settings = embedded.root / "engine/registry.yml"
    good = settings.read_text()
    settings.write_text("no settings")
    folder = app(tmp_path / "app", *PAGE, "LABEL a=b", name="noregistry")
    try:
        embedded.kill("docker-registry")
        ended = embedded.run("deploy", folder, "--create-app")
    finally:
        settings.write_text(good)
    lines = told(ended, "RB-PUSH", Exit.PUSH_TRANSPORT)
    assert "the registry does not start" in lines[0]
    assert embedded.builds("noregistry") == ["failed"]
    assert embedded.releases("noregistry") == []
    assert deployed(embedded.run("deploy", folder, "--json")) == 1


BAD_RELEASES = {
    "crashes": ([CRASHING], ["exit code 3", "no such table"]),
    "nothing-to-run": (["LABEL no=command"], ["neither CMD nor ENTRYPOINT"]),
    "answers-500": ([*BROKEN], ["HTTP status 500"]),
    "never-answers": ([DEAF], ["no answer to GET / on port 8080"]),
}


def broken_release(embedded: Embedded, root: Path, name: str) -> Ended:
    """Deploy an app that serves, and then its bad release."""
    good = app(root / "good", *PAGE, name=name)
    assert deployed(embedded.run("deploy", good, "--create-app", "--json")) == 1
    lines, _ = BAD_RELEASES[name]
    bad = app(root / "bad", KILLED, *lines, name=name, toml='deploy.wait_timeout = "2s"\n')
    page = bad / "index.cgi"
    page.write_text('#!/bin/busybox sh\nprintf "HTTP/1.0 500 Oops\\r\\n\\r\\n"\n')
    page.chmod(0o755)
    return embedded.run("deploy", bad)


@pytest.fixture(scope="module")
def broken(
    embedded: Embedded, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, "Future[Ended]"]]:
    """A bad release of every kind, each of an app of its own, all at the same time."""
    root = tmp_path_factory.mktemp("broken")
    with ThreadPoolExecutor() as pool:
        yield {
            name: pool.submit(broken_release, embedded, root / name, name) for name in BAD_RELEASES
        }


@pytest.mark.parametrize("name", BAD_RELEASES)
def test_a_bad_release_is_rolled_back(
    embedded: Embedded, broken: dict[str, "Future[Ended]"], name: str
) -> None:
    ended = broken[name].result()
    told(ended, "RB-RELEASE", Exit.RELEASE_FAILED)
    for words in BAD_RELEASES[name][1]:
        assert words in ended.err
    first, *others = embedded.releases(name)
    assert first == (1, "complete")
    assert {status for _, status in others} == {"failed"}
    with embedded.engine() as engine:
        left = engine.containers(all=True, filters={"label": f"fly-build.app={name}"})
    assert [one["Labels"]["fly-build.version"] for one in left] == ["1"]
    assert not embedded.peers(ended)


async def test_what_served_before_still_answers(
    embedded: Embedded, broken: dict[str, "Future[Ended]"]
) -> None:
    name = next(iter(broken))
    broken[name].result()
    record = embedded.record
    token = Secret(record["token"])
    async with (
        Platform(record["api_url"], token, idempotent=IDEMPOTENT_SELFHOST) as platform,
        AsyncExitStack() as closing,
    ):
        organization = await platform.organization(None)
        config = await AddPeer(platform, closing, "test").run(organization, print)
        async with open_tunnel(config) as tunnel:
            verify = Verify(tunnel.dial, 10.0, asyncio.sleep)
            answered = await verify.run(Address(f"{name}.internal", 8080), print)
    assert answered.status == 404


@pytest.mark.long
def test_the_platform_is_killed_while_a_release_begins(embedded: Embedded, tmp_path: Path) -> None:
    folder = app(tmp_path / "app", KILLED, DEAF, name="killed")
    with embedded.running("deploy", folder, "--create-app") as running:
        running.until(
            lambda event: event["t"] == "phase.reason" and event["reason"] == "v1 is running"
        )
        embedded.kill_platform()
    ended = embedded.ended[-1]
    assert ended.code == Exit.BUILDER_NOT_PROVISIONED
    assert ended.error["id"] == "RB-API-UNAVAILABLE"
    assert ended.err == ""
    # The next deploy starts it again, and it takes up what it was about.
    good = app(tmp_path / "good", *PAGE, name="killed")
    assert deployed(embedded.run("deploy", good, "--json")) == 2
    assert embedded.releases("killed") == [(1, "failed"), (2, "complete")]

"""Ctrl-C and SIGTERM in every phase: what had begun is ended, recorded, and nothing is left."""

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker
import docker.errors
import pytest
import requests

from tests.system.conftest import SERVE
from tests.system.embedded import Condition, Embedded, Ended, app, in_phase, step

pytestmark = pytest.mark.system

DEAF = 'CMD ["/bin/busybox", "sleep", "600"]'
KILLED = "STOPSIGNAL SIGKILL"
HANGING_PAGE = [
    "COPY index.cgi /www/cgi-bin/index.cgi",
    "COPY busybox /www/well",
    KILLED,
    'CMD ["/bin/busybox", "httpd", "-f", "-p", "8080", "-h", "/www"]',
]
CHECKED = '[http_service]\ninternal_port = 8080\n[[http_service.checks]]\npath = "/well"\n'


@dataclass(frozen=True)
class Case:
    """Where a signal comes, what is deployed, and how build and release are recorded then."""

    reached: Condition
    lines: tuple[str, ...] = (KILLED, SERVE)
    toml: str = ""
    builds: tuple[str, ...] = ("cancelled",)
    releases: tuple[tuple[int, str], ...] = ()
    files: dict[str, str] = field(default_factory=dict)
    builder: str = "classic"


CASES = {
    "preflight": Case(in_phase("preflight"), builds=()),
    "auth": Case(in_phase("auth"), builds=()),
    "provision": Case(in_phase("provision"), builds=()),
    "tunnel": Case(in_phase("tunnel", "phase.reason")),
    "context": Case(in_phase("context"), ("COPY large /large", SERVE)),
    "build": Case(step(3), ('RUN ["/bin/busybox", "sleep", "600"]',)),
    # Of its own for each app: the engine takes equal steps of two builds for the same one.
    "kit": Case(
        step(2),
        ('RUN ["/bin/busybox", "env", "A=APP", "/bin/busybox", "sleep", "600"]',),
        builder="buildkit",
    ),
    "push": Case(in_phase("push", "progress"), ("COPY large /large", SERVE)),
    "release": Case(
        lambda event: event["t"] == "phase.reason" and event["reason"] == "v1 is running",
        (KILLED, DEAF),
        builds=("completed",),
        releases=((1, "interrupted"),),
    ),
    "verify": Case(
        in_phase("verify"),
        tuple(HANGING_PAGE),
        CHECKED,
        builds=("completed",),
        releases=((1, "complete"),),
        files={"index.cgi": "#!/bin/busybox sh\n/bin/busybox sleep 600\n"},
    ),
}
PHASES = {"kit": "build"}
"""What the phases are called that come twice."""
SIGNALS = {signal.SIGINT: (130, "RB-INTERRUPTED"), signal.SIGTERM: (143, "RB-TERMINATED")}
BOTH = [(phase, number) for phase in CASES for number in SIGNALS]
NAMES = [f"{phase}-{number.name}" for phase, number in BOTH]


def name_of(phase: str, number: signal.Signals) -> str:
    return f"{phase}-{number.name.lower()}"


def signalled(embedded: Embedded, folder: Path, phase: str, number: signal.Signals) -> Ended:
    case = CASES[phase]
    lines = [line.replace("APP", folder.name) for line in case.lines]
    app(folder, *lines, name=folder.name, toml=case.toml)
    (folder / "large").write_bytes(os.urandom(30_000_000) if "large" in case.lines[0] else b"")
    for file, text in case.files.items():
        (folder / file).write_text(text)
        (folder / file).chmod(0o755)
    running = embedded.begin("deploy", folder, "--create-app", FLY_BUILD_BUILDER=case.builder)
    try:
        running.until(case.reached)
        running.signal(number)
    finally:
        ended = running.end()
    embedded.ended.append(ended)
    return ended


Outcomes = dict[tuple[str, signal.Signals], "Future[Ended]"]


@pytest.fixture(scope="module")
def outcomes(embedded: Embedded, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcomes]:
    """Every signal in every phase, some at a time, each for an app of its own."""
    root = tmp_path_factory.mktemp("signals")
    with ThreadPoolExecutor(3) as pool:
        yield {
            (phase, number): pool.submit(
                signalled, embedded, root / name_of(phase, number), phase, number
            )
            for phase, number in BOTH
        }


@pytest.mark.parametrize(("phase", "number"), BOTH, ids=NAMES)
def test_a_signal_ends_what_had_begun(
    embedded: Embedded, outcomes: Outcomes, phase: str, number: signal.Signals
) -> None:
    ended = outcomes[phase, number].result()
    code, kind = SIGNALS[number]
    assert ended.err == ""
    assert ended.code == code
    assert ended.events[-1]["t"] == "result"
    assert ended.error["id"] == kind
    phases = [event for event in ended.events if event["t"] == "phase.end"]
    assert not phases[-1]["ok"]
    # The first phase is over in a moment, perhaps sooner than the signal arrives.
    assert PHASES.get(phase, phase) in {phases[-1]["phase"], "preflight"}
    warned = [event["id"] for event in ended.events if event["t"] == "warning"]
    assert warned == (["release-stays"] if phase == "verify" else [])
    name = name_of(phase, number)
    assert embedded.builds(name) == list(CASES[phase].builds)
    assert embedded.releases(name) == list(CASES[phase].releases)


@pytest.mark.long
def test_no_peer_container_or_tag_is_left(embedded: Embedded, outcomes: Outcomes) -> None:
    ended = [outcome.result() for outcome in outcomes.values()]
    assert any("asking for a WireGuard peer" in one.said for one in ended)
    assert not embedded.peers(*ended)
    kept = {name_of("verify", number) for number in SIGNALS} | {""}
    with embedded.engine() as engine:
        # Docker 20.10 never answers a wait that begins just when the container goes, so what counts
        # is the list.
        for _ in range(60):
            if not (left := strays(engine, kept)):
                break
            with suppress(docker.errors.NotFound, requests.exceptions.RequestException):
                engine.wait(left[0], timeout=1, condition="removed")
        assert not strays(engine, kept)
        tagged = {tag for image in engine.images() for tag in image["RepoTags"] or []}
    early = {"context", "build", "kit"}
    unbuilt = {name_of(phase, number) for phase, number in BOTH if phase in early}
    assert not {tag for tag in tagged if tag.rpartition("/")[2].partition(":")[0] in unbuilt}


def strays(engine: docker.APIClient, kept: set[str]) -> list[str]:
    """Containers that no release is served by."""
    return [one["Id"] for one in engine.containers(all=True) if not serves(one, kept)]


def serves(container: dict[str, Any], kept: set[str]) -> bool:
    """Whether it is the release of an app that was not interrupted before it was complete."""
    name = container["Labels"].get("fly-build.app")
    return name is not None and (name in kept or name not in {name_of(*one) for one in BOTH})


def test_the_next_deploy_works(embedded: Embedded, tmp_path: Path, outcomes: Outcomes) -> None:
    for phase in ("build", "release"):
        outcomes[phase, signal.SIGINT].result()
        name = name_of(phase, signal.SIGINT)
        ended = embedded.run("deploy", app(tmp_path / phase, KILLED, SERVE, name=name), "--json")
        assert ended.code == 0, ended.said
        assert json.loads(ended.out)["status"] == 404
        assert embedded.releases(name)[-1][1] == "complete"


def test_a_second_signal_ends_at_once_and_says_so(embedded: Embedded, tmp_path: Path) -> None:
    sleep = 'RUN ["/bin/busybox", "sleep", "601"]'
    folder = app(tmp_path / "app", KILLED, sleep, name="twice")
    platform = os.pidfd_open(embedded.record["pid"])
    try:
        with embedded.running("deploy", folder, "--create-app") as running:
            running.until(step(4))
            # While the platform does not answer, tidying up takes its time.
            signal.pidfd_send_signal(platform, signal.SIGSTOP)
            running.signal(signal.SIGINT)
            running.until(in_phase("build", "phase.end"))
            running.signal(signal.SIGINT)
    finally:
        signal.pidfd_send_signal(platform, signal.SIGCONT)
        os.close(platform)
    ended = embedded.ended[-1]
    assert (ended.code, ended.err) == (130, "")
    assert ended.events[-1]["t"] == "result"
    assert "at once" in ended.error["message"]
    # What was on its way to the platform by then is still carried out.
    assert embedded.builds("twice") in (["running"], ["cancelled"])

"""One embedded platform for all tests of bad days, and a second one that is given up on purpose."""

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import Endings
from tests.system.embedded import LIMIT_S, Embedded, Ended, app, in_phase

ROOM = 100_000_000
"""Octets on the small disk that two more builds need."""
SERVE = 'CMD ["/bin/busybox", "httpd", "-f", "-p", "8080"]'


@pytest.fixture(scope="session")
def embedded(request: pytest.FixtureRequest, endings: Endings) -> Iterator[Embedded]:
    """A platform that runs, started once."""
    _skip_without_engine()
    if any("forsaken" in vars(item).get("fixturenames", ()) for item in request.session.items):
        # Takes its time, most of which it waits.
        request.getfixturevalue("forsaking")
    folder = tempfile.TemporaryDirectory(prefix="fly-")
    platform = Embedded(Path(folder.name))

    def end() -> None:
        platform.run("selfhost", "stop")
        folder.cleanup()

    try:
        started = platform.run("selfhost", "start")
        assert started.code == 0, started.said
        yield platform
    finally:
        endings(end)


@dataclass
class Forsaken:
    """A platform whose engine has a small disk, killed while two deploys were at work on it.

    `full` is what two deploys said that filled it, by a step and by a context; then it was pruned.
    """

    platform: Embedded
    full: list[Ended]
    pruned: Ended
    building: "Future[Ended]"
    pushing: "Future[Ended]"


@pytest.fixture(scope="session")
def forsaking(
    tmp_path_factory: pytest.TempPathFactory, endings: Endings
) -> Iterator["Future[Forsaken]"]:
    """The same, begun."""
    _skip_without_engine()
    root = tmp_path_factory.mktemp("apps")
    platform, disk, leave = with_small_disk(200)
    pool = ThreadPoolExecutor(3)

    def end() -> None:
        pool.shutdown()
        leave()

    def begin() -> Forsaken:
        assert platform.run("selfhost", "start").code == 0
        write = 'RUN ["/bin/busybox", "dd", "if=/dev/zero", "of=/big", "bs=1M", "count=300"]'
        full = [platform.run("deploy", app(root / "full", write, name="full"), "--create-app")]
        wide = app(root / "wide", "COPY large /large", name="full")
        with (wide / "large").open("wb") as large:
            large.truncate(250_000_000)
        full.append(platform.run("deploy", wide, FLY_BUILD_BUILDER="buildkit"))
        pruned = platform.run("builder", "prune", "--app", "full", "--output", "json")
        await_room(disk, platform, ROOM)
        building, pushing = _forsake(platform, root, pool)
        return Forsaken(platform, full, pruned, building, pushing)

    yield pool.submit(begin)
    endings(end)


@pytest.fixture(scope="session")
def forsaken(forsaking: "Future[Forsaken]") -> Forsaken:
    """First its disk was full, then it was killed; who was building then notices late."""
    return forsaking.result()


def with_small_disk(megabytes: int) -> tuple[Embedded, Path, Callable[[], None]]:
    """A platform that was not started yet, the disk of its engine, and how all of it ends."""
    folder = tempfile.TemporaryDirectory(prefix="fly-")
    platform = Embedded(Path(folder.name))
    disk = platform.root / "engine"
    disk.mkdir(parents=True, mode=0o700)
    options = f"size={megabytes}m,mode=0700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "fly-build", str(disk)], check=True)

    def end() -> None:
        platform.run("selfhost", "stop")
        subprocess.run(["umount", str(disk)], check=True)
        folder.cleanup()

    return platform, disk, end


def await_room(disk: Path, platform: Embedded, octets: int) -> None:
    """Until the engine has let go of what a failed copy has written.

    BuildKit forgets to close that file, which is left to the engine's garbage collector; to be
    asked things lets this come round sooner.
    """
    until = time.monotonic() + LIMIT_S
    with platform.engine() as engine:
        while (found := os.statvfs(disk)).f_bavail * found.f_frsize < octets:
            assert time.monotonic() < until, "the disk stays full"
            engine.info()


def _forsake(
    platform: Embedded, root: Path, pool: ThreadPoolExecutor
) -> tuple["Future[Ended]", "Future[Ended]"]:
    sleep = 'RUN ["/bin/busybox", "sleep", "600"]'
    slow = app(root / "slow", "STOPSIGNAL SIGKILL", sleep, name="slow")
    large = app(root / "large", "COPY large /large", SERVE, name="large")
    (large / "large").write_bytes(os.urandom(30_000_000))
    building = platform.begin("deploy", slow, "--create-app")
    building.until(lambda event: event["t"] == "step" and event["number"] == 4)
    pushing = platform.begin("deploy", large, "--create-app")
    pushing.until(in_phase("push", "progress"))
    platform.kill_platform()
    return pool.submit(building.end), pool.submit(pushing.end)


def _skip_without_engine() -> None:
    from tests.system.test_registry import without

    if without:
        pytest.skip(f"no platform of our own: {without}")

"""One embedded platform for all tests of bad days, and a second one that is given up on purpose."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.system.embedded import Embedded, Ended, app, in_phase

SERVE = 'CMD ["/bin/busybox", "httpd", "-f", "-p", "8080"]'


@pytest.fixture(scope="session")
def embedded() -> Iterator[Embedded]:
    """A platform that runs, started once."""
    _skip_without_engine()
    with tempfile.TemporaryDirectory(prefix="fly-") as folder:
        platform = Embedded(Path(folder))
        try:
            started = platform.run("selfhost", "start")
            assert started.code == 0, started.said
            yield platform
        finally:
            platform.run("selfhost", "stop")


@dataclass
class Forsaken:
    """A platform whose engine has a small disk, killed while two deploys were at work on it."""

    platform: Embedded
    full: Ended
    building: "Future[Ended]"
    pushing: "Future[Ended]"


@pytest.fixture(scope="session")
def forsaken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forsaken]:
    """First its disk was full, then it was killed; who was building then notices late."""
    _skip_without_engine()
    root = tmp_path_factory.mktemp("apps")
    with tempfile.TemporaryDirectory(prefix="fly-") as folder, ThreadPoolExecutor(2) as pool:
        platform = Embedded(Path(folder))
        disk = platform.root / "engine"
        disk.mkdir(parents=True, mode=0o700)
        small = ["mount", "-t", "tmpfs", "-o", "size=200m,mode=0700", "fly-build", str(disk)]
        subprocess.run(small, check=True)
        try:
            assert platform.run("selfhost", "start").code == 0
            write = 'RUN ["/bin/busybox", "dd", "if=/dev/zero", "of=/big", "bs=1M", "count=300"]'
            full = platform.run("deploy", app(root / "full", write, name="full"), "--create-app")
            building, pushing = _forsake(platform, root, pool)
            yield Forsaken(platform, full, building, pushing)
        finally:
            platform.run("selfhost", "stop")
            subprocess.run(["umount", str(disk)], check=True)


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

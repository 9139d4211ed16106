"""The builder's disk is full, at one moment or the other: it is said, room is made, and it works.

The engine's disk is small, and a file of ours takes up of it what a test does not want to be free.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from builder_orch.errors import Exit
from tests.system.conftest import await_room, with_small_disk
from tests.system.embedded import Embedded, Ended, app, in_phase
from tests.system.test_registry import without

pytestmark = [
    pytest.mark.system,
    pytest.mark.long,
    pytest.mark.skipif(bool(without), reason=f"no platform of our own: {without}"),
]

SIZE = 300
MB = 1_000_000
CACHED = 'RUN --mount=type=cache,target=/c ["/bin/busybox", "dd", "if=/dev/zero", "of=/c/x", '
CACHED += '"bs=1M", "count=100"]'
STEP = 'RUN ["/bin/busybox", "dd", "if=/dev/zero", "of=/large", "bs=1M", "count=60"]'
KIT = {"FLY_BUILD_BUILDER": "buildkit"}


@dataclass
class Small:
    """A platform and the disk of its engine."""

    platform: Embedded
    disk: Path

    @property
    def free(self) -> int:
        found = os.statvfs(self.disk)
        return found.f_bavail * found.f_frsize

    @contextmanager
    def crowded(self, leave: int) -> Iterator[None]:
        """No more than so many octets are free when the block begins."""
        filler = self.disk / "filler"
        self.fill(leave)
        try:
            yield
        finally:
            filler.unlink()

    def fill(self, leave: int) -> None:
        """Take all but so many octets."""
        with (self.disk / "filler").open("ab") as file:
            while (octets := self.free - leave) > 0:
                file.write(bytes(min(octets, MB)))
                file.flush()

    def build(self, folder: Path) -> Ended:
        """A build with its push."""
        with self.platform.running("build", folder, "--create-app", **KIT):
            pass
        return self.platform.ended[-1]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Small]:
    platform, disk, end = with_small_disk(SIZE)
    try:
        started = platform.run("selfhost", "start")
        assert started.code == 0, started.said
        yield Small(platform, disk)
    finally:
        end()


@pytest.fixture
def cached(small: Small, tmp_path: Path) -> Small:
    """With a hundred megabytes on its disk that nobody needs."""
    pruned = small.platform.run("builder", "prune", "--all", "--app", "cached", "--json")
    assert pruned.code in {Exit.OK, Exit.NOT_ALLOWED}, pruned.said
    await_room(small.disk, small.platform, 200 * MB)
    ended = small.build(app(tmp_path / "cached", CACHED, name="cached"))
    assert ended.code == 0, ended.said
    return small


def context(folder: Path, name: str) -> Path:
    """Thirty megabytes to send, of which the engine makes a copy for itself."""
    made = app(folder, "COPY large /large", name=name)
    (made / "large").write_bytes(os.urandom(30 * MB))
    return made


def retried(ended: Ended) -> list[str]:
    return [event["cause"] for event in ended.events if event["t"] == "retry"]


@pytest.mark.parametrize(("moment", "leave"), [("before", 0), ("context", 10 * MB)])
def test_a_context_gets_the_room_of_the_caches(
    cached: Small, tmp_path: Path, moment: str, leave: int
) -> None:
    with cached.crowded(leave):
        ended = cached.build(context(tmp_path / "app", f"full-{moment}"))
    assert ended.code == 0, ended.said
    (cause,) = retried(ended)
    assert "disk is full" in cause
    assert "thrown away" in cause
    assert cached.platform.builds(f"full-{moment}") == ["completed"]


def test_a_step_gets_the_room_of_the_caches(cached: Small, tmp_path: Path) -> None:
    with cached.crowded(30 * MB):
        ended = cached.build(app(tmp_path / "app", STEP, name="full-step"))
    assert ended.code == 0, ended.said
    assert len(retried(ended)) == 1


def test_a_push_gets_the_room_of_the_caches(cached: Small, tmp_path: Path) -> None:
    folder = context(tmp_path / "app", "full-push")
    with (
        cached.crowded(120 * MB),
        cached.platform.running("build", folder, "--create-app", **KIT) as running,
    ):
        running.until(in_phase("push"))
        cached.fill(0)
    ended = cached.platform.ended[-1]
    assert ended.code == 0, ended.said
    (cause,) = retried(ended)
    assert "a disk is full" in cause


def test_a_disk_that_stays_full_is_the_builders_and_a_later_build_works(
    small: Small, tmp_path: Path
) -> None:
    folder = context(tmp_path / "app", "full-stays")
    with small.crowded(0):
        ended = small.build(folder)
    assert ended.code == Exit.BUILDER_LOST, ended.said
    assert ended.error["id"] == "RB-BUILDER-DISK"
    assert ended.error["blame"] == "builder"
    assert "fly-build builder prune" in json.dumps(ended.error)
    assert small.platform.builds("full-stays") == ["failed"]
    await_room(small.disk, small.platform, 100 * MB)
    assert small.build(folder).code == 0

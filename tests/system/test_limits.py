"""A build that reaches its limit stops on the engine as well, by either builder."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from builder_orch.errors import Exit
from tests.system.embedded import Embedded, app, step
from tests.system.test_buildkit import sleeping

pytestmark = pytest.mark.system

REACHES_S = 5.0
"""Within what the engine hears that nobody waits any more."""


def limited(embedded: Embedded, folder: Path, builder: str, marker: str) -> None:
    """A step that sleeps, and a build that is not given the time."""
    app(folder, f'RUN ["/bin/busybox", "sleep", "{marker}"]', name=folder.name)
    words = ("build", folder, "--create-app", "--build-timeout", "4s", "--no-cache")
    running = embedded.begin(*words, FLY_BUILD_BUILDER=builder)
    try:
        running.until(step(3 if builder == "classic" else 2))
    finally:
        ended = running.end()
    embedded.ended.append(ended)
    assert ended.code == Exit.BUILD_TIMEOUT, ended.said
    assert ended.error["id"] == "RB-BUILD-TIMEOUT"
    assert f'sleep","{marker}' in ended.error["message"].replace(" ", "")
    until = time.monotonic() + REACHES_S
    while sleeping(marker):
        assert time.monotonic() < until, "the step goes on"
        time.sleep(0.05)
    assert embedded.builds(folder.name) == ["failed"]
    assert not embedded.peers(ended)


@pytest.mark.long
def test_a_build_that_takes_too_long_stops_on_the_engine(
    embedded: Embedded, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(2) as pool:
        limits = [
            pool.submit(limited, embedded, tmp_path / name, name.partition("-")[0], marker)
            for name, marker in (("classic-limit", "7213"), ("buildkit-limit", "7214"))
        ]
    for one in limits:
        one.result()

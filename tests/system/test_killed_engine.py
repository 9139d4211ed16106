"""The engine is killed at ten moments of a build, from before the session to after the push.

Each time the platform has to start it again. The run goes back to it by itself and ends with the
image that an undisturbed one makes; that the engine is gone is noticed in time.
"""

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest

from builder_orch.pipeline.liveness import RETURNS
from tests.system.conftest import SERVE
from tests.system.embedded import Condition, Embedded, Ended, Event, app, in_phase, step

pytestmark = [pytest.mark.system, pytest.mark.long]

NOTICED_S = 30.0
SLEEP = 'RUN ["/bin/busybox", "sleep", "3"]'
MOMENTS: dict[str, Condition] = {
    "preflight": in_phase("preflight"),
    "auth": in_phase("auth"),
    "provision": in_phase("provision"),
    "tunnel": in_phase("tunnel", "phase.reason"),
    "before-session": in_phase("context"),
    "session": in_phase("context", "phase.reason"),
    "upload": in_phase("context", "progress"),
    "run": step(3),
    "push": in_phase("push"),
    "pushing": in_phase("push", "progress"),
    "after-push": in_phase("push", "phase.end"),
}
KIT = {"FLY_BUILD_BUILDER": "buildkit"}


def noticed_in_time(ended: Ended, killed: Event) -> bool:
    """Whether nothing was silent for longer than it may take to notice that an engine is gone."""
    times = [event["at_ms"] for event in ended.events if event["seq"] >= killed["seq"]]
    return max((after - before for before, after in pairwise(times)), default=0) <= NOTICED_S * 1000


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_build_outlives_the_engine(embedded: Embedded, tmp_path: Path, moment: str) -> None:
    name = f"killed-{moment}"
    folder = app(tmp_path / "app", "COPY large /large", SLEEP, SERVE, name=name)
    (folder / "large").write_bytes(os.urandom(60_000_000))
    with embedded.running("build", folder, "--create-app", **KIT) as running:
        killed = running.until(MOMENTS[moment])
        embedded.kill("dockerd")
    ended = embedded.ended[-1]
    assert ended.code == 0, ended.said
    assert noticed_in_time(ended, killed)
    retries = [event for event in ended.events if event["t"] == "retry"]
    assert len(retries) <= RETURNS
    assert not embedded.peers(ended)
    again = embedded.run("build", folder, "--json", **KIT)
    assert again.code == 0, again.said
    assert ended.events[-1]["digest"] == json.loads(again.out)["digest"]
    assert embedded.builds(name) == ["completed", "completed"]

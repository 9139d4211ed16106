"""Starting and ending a platform in the background, with a stand-in for the platform itself."""

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from builder_orch.errors import AlreadyRunning, EngineMissing, PlatformUnavailable
from builder_orch.selfhost.home import Holder, Home, Record
from builder_orch.selfhost.launch import answers, ensure_selfhost, failure_from, stop_selfhost

STAND_IN = Path(__file__).with_name("stand_in.py")


@pytest.fixture
def own(home: Path) -> Iterator[Home]:
    own = Home(home / "selfhost")
    own.prepare()
    yield own
    stopped = stop_selfhost(own, limit_s=0)
    if stopped is not None:
        reap(stopped)


def stand_in(own: Home, behaviour: str) -> tuple[str, ...]:
    return (sys.executable, str(STAND_IN), str(own.root), behaviour)


def reap(holder: Holder) -> None:
    """It is our child; elsewhere its parent is long gone."""
    with suppress(ChildProcessError):
        os.waitpid(holder.pid, 0)


def test_a_platform_is_started_once_then_found_then_stopped(own: Home) -> None:
    told: list[str] = []
    record = ensure_selfhost(own, report=told.append, command=stand_in(own, "up"))
    assert told == [f"starting the platform in {own.root}"]
    assert answers(record)
    again = ensure_selfhost(own, report=told.append, command=stand_in(own, "crashes"))
    assert again == record
    assert len(told) == 1

    stopped = stop_selfhost(own)
    assert stopped is not None
    assert stopped.pid == record.pid
    reap(stopped)
    assert own.holder() is None
    assert own.record() is None
    assert not answers(record)
    assert stop_selfhost(own) is None


def test_two_at_once_end_up_with_the_same_platform(own: Home) -> None:
    found: list[Record] = []
    together = threading.Barrier(2)

    def ensure() -> None:
        together.wait()
        found.append(ensure_selfhost(own, command=stand_in(own, "up")))

    threads = [threading.Thread(target=ensure) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert found[0] == found[1] == own.record()


def test_whoever_must_be_the_starter_is_told_who_was_before(own: Home) -> None:
    record = ensure_selfhost(own, command=stand_in(own, "up"))
    with pytest.raises(AlreadyRunning, match=f"pid {record.pid}"):
        ensure_selfhost(own, command=stand_in(own, "up"), join=False)
    assert answers(record)


def test_why_it_could_not_start_reaches_the_one_who_asked(own: Home) -> None:
    with pytest.raises(EngineMissing, match="there is no engine") as caught:
        ensure_selfhost(own, command=stand_in(own, "refuses"))
    assert caught.value.hint == "install docker.io"
    assert own.holder() is None


def test_an_end_without_a_reason_shows_what_it_said_last(own: Home) -> None:
    with pytest.raises(PlatformUnavailable, match="status 3") as caught:
        ensure_selfhost(own, command=stand_in(own, "crashes"))
    assert "the floor is" in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert str(own.log) in caught.value.hint


def test_what_does_not_come_up_in_time_is_ended(own: Home) -> None:
    with pytest.raises(PlatformUnavailable, match="not up"):
        ensure_selfhost(own, command=stand_in(own, "stuck"), limit_s=1)
    assert own.holder() is None


def test_waiting_for_what_another_starts_is_said_and_ends(own: Home) -> None:
    told: list[str] = []
    with own.hold(), pytest.raises(PlatformUnavailable):
        ensure_selfhost(own, report=told.append, command=stand_in(own, "up"), limit_s=0)
    assert told == ["waiting for the platform, which another command is starting"]


def test_one_that_is_deaf_is_killed(own: Home) -> None:
    record = ensure_selfhost(own, command=stand_in(own, "deaf"))
    stopped = stop_selfhost(own, limit_s=0.1)
    assert stopped is not None
    assert stopped.pid == record.pid
    reap(stopped)
    assert own.holder() is None


def test_a_stranger_with_the_same_pid_is_not_harmed(own: Home) -> None:
    record = ensure_selfhost(own, command=stand_in(own, "up"))
    true = own.lock.read_text()
    # The lock is held, but it names this process with a start time that is not ours.
    own.lock.write_text(json.dumps({**json.loads(true), "pid": os.getpid(), "started": 1}))
    harmed: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: harmed.append(number))
    try:
        stop_selfhost(own)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not harmed
    own.lock.write_text(true)
    assert answers(record)


def test_a_reason_of_an_unknown_kind_is_still_a_failure_with_a_hint() -> None:
    failure = failure_from({"kind": "RB-NEWER", "message": "what", "hint": "then"})
    assert isinstance(failure, PlatformUnavailable)
    assert (str(failure), failure.hint) == ("what", "then")

"""One owner of a state directory, and what others see of it."""

import errno
import json
import os
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder_orch.errors import AlreadyRunning, BuilderOrchError, LocalDiskFull, UsageFailure
from builder_orch.selfhost.home import (
    Home,
    Record,
    disk_failures,
    start_time,
    write_private,
)

RECORD = Record("http://127.0.0.1:1/graphql", "secret", "127.0.0.1:2", os.getpid(), "personal")


@pytest.fixture
def own(home: Path) -> Home:
    own = Home(home / "selfhost")
    own.prepare()
    return own


def test_the_directory_and_what_is_in_it_are_for_its_owner_alone(home: Path) -> None:
    (home / "selfhost").mkdir(mode=0o755)
    own = Home(home / "selfhost")
    own.prepare()
    with own.hold():
        own.publish(RECORD)
        assert own.root.stat().st_mode & 0o777 == 0o700
        assert {file.stat().st_mode & 0o077 for file in own.root.iterdir()} == {0}


def test_one_owner_at_a_time_and_the_second_is_told_who_it_is(own: Home) -> None:
    with (
        own.hold(),
        pytest.raises(AlreadyRunning, match=f"pid {os.getpid()}") as caught,
        own.hold(),
    ):
        pass
    assert "selfhost stop" in caught.value.hint
    with own.hold():
        pass


def test_the_holder_is_known_while_it_holds_and_not_after(own: Home) -> None:
    assert own.holder() is None
    with own.hold():
        holder = own.holder()
        assert holder is not None
        assert (holder.pid, holder.prefix) == (os.getpid(), sys.prefix)
        assert holder.is_alive()
    assert own.holder() is None


def test_those_who_look_do_not_keep_an_owner_out(own: Home) -> None:
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            own.holder()

    lookers = [threading.Thread(target=look) for _ in range(3)]
    for looker in lookers:
        looker.start()
    try:
        for _ in range(50):
            with own.hold():
                pass
    finally:
        done.set()
        for looker in lookers:
            looker.join()


def test_a_platform_is_found_while_its_owner_lives_and_no_longer(own: Home) -> None:
    with own.hold():
        own.publish(RECORD)
        assert own.record() == RECORD
    assert own.platform.exists()
    assert own.record() is None


def test_a_record_of_another_process_than_the_holder_is_not_believed(own: Home) -> None:
    with own.hold():
        own.publish(Record(**{**asdict(RECORD), "pid": 1}))
        assert own.record() is None


@given(
    st.one_of(
        st.binary(),
        st.recursive(
            st.none() | st.integers() | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        ).map(lambda value: json.dumps(value).encode()),
        st.integers().map(lambda n: json.dumps({"version": n, **asdict(RECORD)}).encode()),
    )
)
def test_garbage_is_no_platform(tmp_path_factory: pytest.TempPathFactory, octets: bytes) -> None:
    own = Home(tmp_path_factory.mktemp("home"))
    with own.hold():
        own.platform.write_bytes(octets)
        assert own.record() in {None, RECORD}
        own.lock.write_bytes(octets)
        assert own.holder() is None


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    own: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_private(own.platform, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LocalDiskFull) as caught:
        write_private(own.platform, "new")
    assert "FLY_BUILD_HOME" in caught.value.hint
    assert own.platform.read_text() == "old"
    assert list(own.root.iterdir()) == [own.platform]


def test_a_home_that_cannot_be_is_the_users_to_correct() -> None:
    with pytest.raises(UsageFailure, match="/dev/null"):
        Home(Path("/dev/null/selfhost")).prepare()


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(errno.EPERM, "setns")])
def test_what_is_no_failure_of_a_disk_passes_as_it_is(own: Home, error: OSError) -> None:
    with pytest.raises(OSError, check=lambda caught: caught is error), disk_failures(own.root):
        raise error


def test_failures_of_disks_are_failures_with_a_hint(own: Home) -> None:
    for code in (errno.ENOSPC, errno.EDQUOT):
        with pytest.raises(BuilderOrchError), disk_failures(own.root):
            raise OSError(code, os.strerror(code))


def test_a_process_that_is_gone_has_no_start_time() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert start_time(child) is None
    os.waitpid(child, 0)
    assert start_time(child) is None
    assert start_time(os.getpid()) == start_time(os.getpid())

"""The agent's directory: one agent, no stale socket in the way, nobody else let in."""

import multiprocessing
import os
import socket
import stat
from pathlib import Path

import pytest

from builder_orch.agent.place import Place, locked, stranger
from builder_orch.errors import AlreadyRunning, UsageFailure
from builder_orch.settings import Environment


def test_directory_and_socket_are_for_their_owner_alone(home: Path) -> None:
    place = Place(home / "agent")
    place.folder.mkdir(mode=0o777)
    tenure = place.take()
    try:
        assert stat.S_IMODE(place.folder.stat().st_mode) == 0o700
        assert stat.S_IMODE(place.socket.stat().st_mode) == 0o600
        assert stat.S_IMODE(place.lock.stat().st_mode) == 0o600
    finally:
        tenure.end()
    assert not place.socket.exists()


def test_there_is_one_agent_at_a_time(home: Path) -> None:
    place = Place(home / "agent")
    tenure = place.take()
    try:
        with pytest.raises(AlreadyRunning, match="runs already"):
            place.take()
    finally:
        tenure.end()
        tenure.end()
    place.take().end()


def hold_and_die(folder: Path) -> None:
    Place(folder).take()
    os.kill(os.getpid(), 9)


def test_what_a_killed_agent_leaves_is_in_nobodys_way(home: Path) -> None:
    place = Place(home / "agent")
    killed = multiprocessing.get_context("spawn").Process(target=hold_and_die, args=[place.folder])
    killed.start()
    killed.join()
    assert killed.exitcode == -9
    assert place.socket.exists()
    assert place.connect(1.0) is None
    tenure = place.take()
    try:
        with place.connect(1.0) or pytest.fail("nobody listens") as sock:
            assert stranger(sock) == (os.getpid(), os.geteuid())
    finally:
        tenure.end()


def test_a_lock_file_that_was_removed_meanwhile_is_no_lock(home: Path) -> None:
    path = home / "lock"
    first = locked(path, 0.0)
    path.unlink()
    second = locked(path, 0.0)
    assert first is not None
    assert second is not None
    assert locked(path, 0.0) is None
    os.close(first)
    assert locked(path, 0.0) is None
    os.close(second)


@pytest.mark.parametrize("what", ["link", "file", "parent"])
def test_a_place_that_is_no_directory_of_ours_is_refused(home: Path, what: str) -> None:
    place = Place(home / "agent")
    if what == "link":
        (home / "elsewhere").mkdir()
        place.folder.symlink_to(home / "elsewhere")
    elif what == "file":
        place.folder.touch()
    else:
        (home / "file").touch()
        place = Place(home / "file" / "agent")
    with pytest.raises(UsageFailure) as caught:
        place.prepare()
    assert str(place.folder) in str(caught.value)
    assert caught.value.hint


def test_a_path_that_no_socket_can_have_is_refused_before_anything_is_made(home: Path) -> None:
    place = Place(home / ("a" * 90))
    with pytest.raises(UsageFailure, match="too long"):
        place.prepare()
    assert not place.folder.exists()


def test_nobody_listens_where_there_is_nothing(home: Path) -> None:
    assert Place(home / "agent").connect(1.0) is None


def test_where_it_is(tmp_path: Path) -> None:
    def folder(**variables: str) -> Path:
        return Environment(variables).agent_folder()

    own = str(tmp_path)
    assert folder(FLY_BUILD_HOME="/h", XDG_RUNTIME_DIR=own) == Path("/h/agent")
    assert folder(XDG_RUNTIME_DIR=own) == tmp_path / "fly-build"
    # Another user's, or none: what sudo leaves in the environment.
    for foreign in ("", "/proc/self/nothing", *(["/proc/1/task"] if os.geteuid() else [])):
        assert folder(XDG_RUNTIME_DIR=foreign).name == "agent"


def test_who_is_there_is_told_by_the_kernel() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert stranger(ours) == (os.getpid(), os.geteuid())

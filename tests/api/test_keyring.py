"""Files of peers: the old or the new one whatever happens, and nobody's but their owner's."""

import errno
import json
import multiprocessing
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv6Address, IPv6Network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder_orch.api.keyring import (
    SIZE_LIMIT,
    Keyring,
    Purpose,
    Record,
    load,
    machine_id,
    write_export,
)
from builder_orch.api.models import Organization
from builder_orch.errors import AlreadyRunning, BuilderOrchError, LocalDiskFull, UsageFailure
from builder_orch.tunnel.config import PeerConfig, PrivateKey, PublicKey, TunnelConfig, encode_key
from tests.tunnel.joined import public

PRIVATE = PrivateKey(bytes(range(1, 33)))
CONFIG = TunnelConfig(
    PRIVATE,
    IPv6Address("fdaa:0:1:1::102"),
    (
        PeerConfig(
            PublicKey(bytes([7]) * 32), (IPv6Network("fdaa:0:1::/48"),), ("192.0.2.1", 51820)
        ),
    ),
    dns=IPv6Address("fdaa:0:1::3"),
)
OLD = Record(
    "laptop",
    "https://api.example/graphql",
    Organization("o1", "personal", "personal"),
    public(PRIVATE),
    Purpose.KEPT,
    1_800_000_000.0,
    "here",
    "ams",
    True,
    CONFIG.address,
    CONFIG,
)
NEW = replace(OLD, made_at=1_900_000_000.0, region="fra")


@pytest.fixture
def ring(tmp_path: Path) -> Keyring:
    (tmp_path / "locks").mkdir(mode=0o700)
    return Keyring(tmp_path / "peers", locks=tmp_path / "locks", machine="here")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_was_written_is_read_back(ring: Keyring) -> None:
    for record in (OLD, NEW, replace(OLD, purpose=Purpose.RUN, config=None, address=None)):
        ring.write(record)
        assert ring.find("laptop") == load(ring.path("laptop")) == record
    assert mode(ring.path("laptop")) == 0o600
    assert mode(ring.folder) == 0o700


def test_files_are_ours_alone_whatever_the_umask_and_the_file_before(ring: Keyring) -> None:
    before = os.umask(0)
    try:
        path = ring.write(OLD)
        assert mode(path) == 0o600
        path.chmod(0o644)
        ring.write(NEW)
        assert (mode(path), mode(ring.folder)) == (0o600, 0o700)
        path.chmod(0o644)
        with ring.hold("laptop"):
            assert mode(path) == 0o600
    finally:
        os.umask(before)


def test_a_record_shows_no_private_key(ring: Keyring) -> None:
    ring.write(OLD)
    with ring.hold("laptop") as held:
        assert encode_key(PRIVATE) not in repr(held) + repr(ring.entries())
        assert held.config == CONFIG


def test_what_is_marked_for_removal_has_no_key_any_more(ring: Keyring) -> None:
    path = ring.write(OLD)
    ring.mark_for_removal(OLD)
    assert encode_key(PRIVATE) not in path.read_text()
    assert ring.find("laptop").purpose is Purpose.RUN
    with pytest.raises(UsageFailure, match="not kept here"), ring.hold("laptop"):
        pass


# --- a crash at each step


class Crash(BaseException):
    """The process ends here."""


STEPS = [
    *(("open", number) for number in (1, 2, 3)),
    ("fchmod", 1),
    ("write", 1),
    *(("fsync", number) for number in (1, 2)),
    *(("close", number) for number in (1, 2)),
    ("replace", 1),
]
"""The lock, the new file and the directory are opened; the last to be closed is the lock, which the
end of a process does by itself."""


def fail_at(
    monkeypatch: pytest.MonkeyPatch, step: str, number: int, failure: BaseException
) -> None:
    """The `number`-th call of that function fails, after it was half done if it writes."""
    real: Callable[..., Any] = getattr(os, step)
    calls: list[object] = []

    def fake(*given: Any, **named: Any) -> Any:
        calls.append(given)
        if len(calls) != number:
            return real(*given, **named)
        if step == "write":
            real(given[0], given[1][: len(given[1]) // 2])
        raise failure

    monkeypatch.setattr(os, step, fake)


@pytest.mark.parametrize(("step", "number"), STEPS)
@pytest.mark.parametrize("kind", ["crash", "full"])
def test_a_failure_at_any_step_leaves_the_old_or_the_new_file(
    ring: Keyring, step: str, number: int, kind: str
) -> None:
    ring.write(OLD)
    failure = Crash() if kind == "crash" else OSError(errno.ENOSPC, "no space")
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, step, number, failure)
        try:
            ring.write(NEW)
        except (Crash, LocalDiskFull) as error:
            assert isinstance(error, Crash) is (kind == "crash")  # noqa: PT017
    assert ring.find("laptop") in (OLD, NEW)
    assert mode(ring.path("laptop")) == 0o600
    # And the next one is not in the way of what was left.
    ring.write(NEW)
    assert ring.find("laptop") == NEW
    assert {path.name for path in ring.folder.iterdir()} == {"laptop.peer", ".lock"}


def test_a_full_disk_is_said_and_a_folder_that_is_none(ring: Keyring, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, "fsync", 1, OSError(errno.ENOSPC, "no space"))
        with pytest.raises(LocalDiskFull, match="no room left"):
            ring.write(OLD)
    assert ring.entries() == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageFailure, match="cannot be used"):
        Keyring(tmp_path / "file").write(OLD)


def write_often(folder: Path, number: int) -> None:
    ring = Keyring(folder, machine="here")
    for turn in range(5):
        ring.write(replace(OLD, region=f"r{number}-{turn};" * 100))
        ring.write(replace(OLD, name=f"peer-{number}"))
        assert ring.find("laptop").region[:1] == "r"


def test_twenty_writers_at_once_mix_nothing_and_lose_nothing(ring: Keyring) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_often, args=(ring.folder, n)) for n in range(20)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 20
    *parts, last = ring.find("laptop").region.split(";")
    assert (len(parts), len(set(parts)), last) == (100, 1, "")
    names = {entry.record.name for entry in ring.entries() if entry.record is not None}
    assert names == {"laptop", *(f"peer-{number}" for number in range(20))}


# --- keys and processes


def test_a_key_is_held_once_also_by_a_copy_in_another_place(ring: Keyring, tmp_path: Path) -> None:
    ring.write(OLD)
    copy = Keyring(tmp_path / "copy", locks=tmp_path / "locks", machine="here")
    copy.write(replace(OLD, name="other-name"))
    with ring.hold("laptop") as held:
        assert held.config == CONFIG
        with pytest.raises(AlreadyRunning, match=f"in use by pid {os.getpid()}"):
            copy.hold("other-name").__enter__()
        (entry,) = ring.entries()
        assert entry.user is not None
        assert entry.user.pid == os.getpid()
    with copy.hold(copy.path("other-name")):
        pass
    assert ring.entries()[0].user is None
    assert list((tmp_path / "locks").iterdir()) == []


def hold_and_die(folder: Path, locks: Path, held: Any) -> None:
    with Keyring(folder, locks=locks).hold("laptop"):
        held.set()
        multiprocessing.Event().wait()


def test_a_lock_ends_with_its_process(ring: Keyring, tmp_path: Path) -> None:
    ring.write(OLD)
    context = multiprocessing.get_context("fork")
    held = context.Event()
    other = context.Process(target=hold_and_die, args=(ring.folder, tmp_path / "locks", held))
    other.start()
    assert held.wait(10)
    with pytest.raises(AlreadyRunning, match=f"pid {other.pid}"):
        ring.hold("laptop").__enter__()
    other.kill()
    other.join()
    with ring.hold("laptop"):
        assert ring.entries()[0].user is not None


def race_for_it(folder: Path, locks: Path, inside: Any, most: Any) -> None:
    ring = Keyring(folder, locks=locks)
    done = 0
    while done < 10:
        try:
            with ring.hold("laptop"):
                with inside.get_lock():
                    inside.value += 1
                    most.value = max(most.value, inside.value)
                with inside.get_lock():
                    inside.value -= 1
                done += 1
        except AlreadyRunning:
            continue


def test_of_many_that_want_a_key_one_has_it_at_a_time(ring: Keyring, tmp_path: Path) -> None:
    ring.write(OLD)
    context = multiprocessing.get_context("fork")
    inside, most = context.Value("i", 0), context.Value("i", 0)
    given_ = (ring.folder, tmp_path / "locks", inside, most)
    racers = [context.Process(target=race_for_it, args=given_) for _ in range(6)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert [racer.exitcode for racer in racers] == [0] * 6
    assert most.value == 1


def test_a_peer_of_another_machine_is_known_as_such(ring: Keyring) -> None:
    assert ring.is_ours(OLD)
    assert ring.is_ours(replace(OLD, machine=""))
    assert not ring.is_ours(replace(OLD, machine="elsewhere"))
    assert machine_id() == machine_id()


# --- what is no file of ours


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"version": 2}',
        OLD.dump().replace('"laptop"', '"../laptop"'),
        OLD.dump().replace('"kept"', '"loved"'),
        OLD.dump().replace("fdaa:0:1:1::102", "nowhere"),
        OLD.dump().replace("[Interface]", "[Elsewhere]"),
        OLD.dump() + " " * SIZE_LIMIT,
        "[" * 60_000,
    ],
    ids=range(11),
)
def test_a_file_that_is_none_of_ours_is_said_to_be(ring: Keyring, text: str) -> None:
    path = ring.write(OLD)
    path.write_text(text)
    with pytest.raises(UsageFailure, match="not what this version of fly-build writes"):
        ring.find("laptop")
    (entry,) = ring.entries()
    assert entry.record is None
    assert entry.trouble


@given(st.binary(max_size=300))
def test_garbage_is_no_record(octets: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        Record.parse(octets)


@given(st.integers(0, 3000), st.integers(0, 255))
def test_a_bit_that_flipped_is_found_or_makes_no_difference_in_form(at: int, value: int) -> None:
    octets = bytearray(OLD.dump().encode())
    octets[at % len(octets)] = value
    try:
        record = Record.parse(bytes(octets))
    except ValueError:
        return
    assert Record.parse(record.dump()) == record or record.made_at != record.made_at


def test_names_that_lead_elsewhere_are_refused(ring: Keyring) -> None:
    for name in ("", "..", "a/b", "-a", "a b", "x" * 201):
        with pytest.raises(UsageFailure, match="is no name for a peer"):
            ring.path(name)


def test_the_folder_of_another_user_is_not_used(
    ring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring.write(OLD)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(UsageFailure, match="belongs to another user"):
        ring.write(NEW)


def test_an_export_is_complete_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "wg0.conf"
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, "fsync", 1, OSError(errno.ENOSPC, "no space"))
        with pytest.raises(LocalDiskFull):
            write_export(path, CONFIG.dump(), force=False)
    assert list(tmp_path.iterdir()) == []
    write_export(path, CONFIG.dump(), force=False)
    assert mode(path) == 0o600
    with pytest.raises(BuilderOrchError, match="there already"):
        write_export(path, "other", force=False)
    assert TunnelConfig.parse(path.read_text()) == CONFIG


def test_a_file_is_plain_json_with_wg_quick_text_in_it(ring: Keyring) -> None:
    fields = json.loads(ring.write(OLD).read_text())
    assert TunnelConfig.parse(fields["config"]) == CONFIG

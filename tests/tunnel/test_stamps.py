"""A key is not locked out by a wall clock that was set back."""

import errno
import os
from pathlib import Path

import pytest

from builder_orch.tunnel.driver import open_tunnel
from builder_orch.tunnel.stamps import STEP_S, Stamps
from tests.tunnel.joined import GATEWAY, pair


def test_the_wall_clock_is_followed_unless_it_went_back(tmp_path: Path) -> None:
    stamps = Stamps(tmp_path / "keys" / "one")
    assert stamps.epoch(1000.0, 30.0) == 970.0
    stamps.keep(1000.0)
    assert stamps.epoch(2000.0, 30.0) == 1970.0
    assert stamps.epoch(400.0, 30.0) == 1000.0 + STEP_S - 30.0


def test_a_foreign_file_is_no_stamp(tmp_path: Path) -> None:
    path = tmp_path / "one"
    path.write_text("half of")
    assert Stamps(path).epoch(1000.0, 30.0) == 970.0


def test_a_crash_while_writing_leaves_the_old_stamp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamps = Stamps(tmp_path / "one")
    stamps.keep(1000.0)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        stamps.keep(2000.0)
    assert stamps.epoch(0.0, 0.0) == 1000.0 + STEP_S
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


async def test_a_later_process_is_answered_though_its_clock_is_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamps = Stamps(tmp_path / "one")
    # The second one begins sooner after the first than a gateway works on handshakes of one peer.
    monkeypatch.setattr("builder_orch.tunnel.wireguard.handshake.INITIATION_SPACING", 0.0)
    async with pair() as ends:
        async with open_tunnel(ends.config, stamps=stamps) as first:
            await first.ping(GATEWAY)
        monkeypatch.setattr("builder_orch.tunnel.driver.time.time", lambda: 1e9)
        async with open_tunnel(ends.config, stamps=stamps) as second:
            await second.ping(GATEWAY, timeout_s=20)

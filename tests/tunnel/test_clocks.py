"""Clocks that are set, and a key that is used twice: minutes and years on a jumping clock."""

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from builder_orch.tunnel.config import PeerConfig, PrivateKey, TunnelConfig
from builder_orch.tunnel.driver import Tunnel, open_tunnel
from builder_orch.tunnel.machine import Endpoint
from builder_orch.tunnel.stamps import Stamps
from builder_orch.tunnel.wireguard.twin import LOSSES, WINDOW_S, Twin
from tests.tunnel.joined import CLIENT, GATEWAY, NETWORK, public
from tests.virtual import Air, now, play

THERE: Endpoint = ("192.0.2.1", 51820)
HOUR, YEAR = 3600.0, 365.25 * 86400
TODAY = 1_800_000_000.0
RECONNECT_S = 6.0


@dataclass
class Wall:
    """The clock on the wall, which somebody sets."""

    time: float = TODAY

    def __call__(self) -> float:
        return self.time


@dataclass
class Scene:
    """One gateway that knows one key."""

    air: Air
    config: TunnelConfig
    gateway: Tunnel
    homes: int = 0

    @asynccontextmanager
    async def client(self, stamps: Stamps | None = None) -> AsyncGenerator[Tunnel]:
        """Somebody who has the key, each time from another address."""
        self.homes += 1
        carrier = self.air.carrier((f"198.51.100.{self.homes}", 1))
        async with open_tunnel(self.config, carrier=carrier, stamps=stamps) as tunnel:
            yield tunnel


@asynccontextmanager
async def scene() -> AsyncGenerator[Scene]:
    ours, theirs = PrivateKey(os.urandom(32)), PrivateKey(os.urandom(32))
    air = Air()
    peer = PeerConfig(public(theirs), (NETWORK,), THERE)
    config = TunnelConfig(ours, CLIENT, (peer,), dns=GATEWAY)
    server = TunnelConfig(theirs, GATEWAY, (PeerConfig(public(ours), (NETWORK,)),))
    async with open_tunnel(server, carrier=air.carrier(THERE)) as gateway:
        yield Scene(air, config, gateway)


async def chatter(tunnel: Tunnel) -> None:
    """An echo request every second, answered or not."""
    while True:
        try:
            await tunnel.ping(GATEWAY, timeout_s=1.0)
        except TimeoutError:
            continue
        await asyncio.sleep(1.0)


# --- K1: the wall clock


JUMPS = [HOUR, -HOUR, 10 * YEAR, -10 * YEAR, -HOUR, 0.0, 10 * YEAR, -20 * YEAR]


def test_a_restart_after_the_clock_was_set_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wall = Wall()
    monkeypatch.setattr("builder_orch.tunnel.driver.time.time", wall)
    stamps = Stamps(tmp_path / "laptop.stamp")

    async def story() -> None:
        async with scene() as made:
            for jump in [0.0, *JUMPS]:
                wall.time += jump
                async with made.client(stamps) as tunnel:
                    assert await tunnel.ready(timeout_s=60) <= RECONNECT_S
                    await tunnel.ping(GATEWAY)
            assert sum(made.gateway.drops().values()) == 0, made.gateway.drops()

    play(story(), monkeypatch)


def test_without_stamps_a_clock_that_was_set_back_locks_the_key_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the stamps are for: this is how WireGuard is."""
    wall = Wall()
    monkeypatch.setattr("builder_orch.tunnel.driver.time.time", wall)

    async def story() -> None:
        async with scene() as made:
            async with made.client() as tunnel:
                await tunnel.ready(timeout_s=60)
            wall.time -= HOUR
            async with made.client() as tunnel:
                with pytest.raises(Exception, match="did not answer"):
                    await tunnel.ready(timeout_s=60)

    play(story(), monkeypatch)


@pytest.mark.parametrize("jump", [HOUR, -HOUR, 10 * YEAR, -10 * YEAR])
@pytest.mark.parametrize("at_s", [0.01, 60.0, 120.5, 125.0])
def test_a_clock_that_is_set_between_and_during_handshakes_disturbs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float, at_s: float
) -> None:
    wall = Wall()
    monkeypatch.setattr("builder_orch.tunnel.driver.time.time", wall)
    stamps = Stamps(tmp_path / "laptop.stamp")

    async def story() -> None:
        async with scene() as made, made.client(stamps) as tunnel:
            asyncio.get_running_loop().call_later(at_s, setattr, wall, "time", wall.time + jump)
            until = now() + 300
            while now() < until:
                await tunnel.ping(GATEWAY, timeout_s=RECONNECT_S)
                await asyncio.sleep(1.0)

    play(story(), monkeypatch)


def test_stamps_only_grow_over_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wall = Wall()
    monkeypatch.setattr("builder_orch.tunnel.driver.time.time", wall)
    path = tmp_path / "laptop.stamp"
    kept: list[float] = []

    async def story() -> None:
        async with scene() as made:
            for jump in JUMPS:
                wall.time += jump
                async with made.client(Stamps(path)) as tunnel:
                    await tunnel.ready(timeout_s=60)
                    kept.append(float(path.read_text()))

    play(story(), monkeypatch)
    assert kept == sorted(set(kept))


# --- A3: a key that two machines use


def test_one_of_two_that_use_one_key_finds_out_within_a_minute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Though the other one keeps to WireGuard's timers, as any other program does."""

    async def story() -> None:
        async with scene() as made, made.client() as one:
            looking = asyncio.ensure_future(one.twin())
            await one.ping(GATEWAY)
            async with made.client() as other, asyncio.timeout(60):
                talking = asyncio.ensure_future(chatter(other))
                await looking
                talking.cancel()

    play(story(), monkeypatch)


def test_two_that_use_one_key_both_find_out_within_a_minute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def story() -> None:
        async with scene() as made, made.client() as one, made.client() as other:
            async with asyncio.timeout(60):
                await asyncio.gather(one.twin(), other.twin())

    play(story(), monkeypatch)


def test_one_that_uses_its_key_alone_is_no_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        async with scene() as made, made.client() as alone:
            talking = asyncio.ensure_future(chatter(alone))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(2 * HOUR):
                    await alone.twin()
            talking.cancel()

    play(story(), monkeypatch)


@pytest.mark.parametrize("away_s", [3.0, 8.0, 12.0, 30.0])
def test_a_network_that_comes_and_goes_is_no_twin(
    monkeypatch: pytest.MonkeyPatch, away_s: float
) -> None:
    async def story() -> None:
        async with scene() as made, made.client() as alone:
            talking = asyncio.ensure_future(chatter(alone))
            # Some seconds of nothing, then of all, for an hour.
            made.air.passes = lambda octets, to: now() % (2 * away_s) < away_s
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(HOUR):
                    await alone.twin()
            talking.cancel()

    play(story(), monkeypatch)


def test_what_counts_as_a_loss() -> None:
    twin = Twin()
    assert not any(twin.began(at, 1) for at in (0.0, 120.0, 240.0, 360.0, 480.0))
    assert [twin.began(480 + 15.0 * n, 1) for n in range(1, LOSSES + 1)] == [False, False, True]
    # Then it begins to count anew.
    assert not twin.began(600.0, 1)
    away = Twin()
    assert not any(away.began(15.0 * n, 2) for n in range(20))
    slow = Twin()
    step = WINDOW_S / (LOSSES - 1) + 1
    assert not any(slow.began(step * n, 1) for n in range(20))

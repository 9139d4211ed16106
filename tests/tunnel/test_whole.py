"""WireGuard and TCP together, as stories on a wire: new keys, late peers, clocks, moves, sleep."""

from collections.abc import Callable
from ipaddress import IPv6Address
from itertools import pairwise
from pathlib import Path

import pytest

from builder_orch.tunnel.ipv6.connection import Connection
from builder_orch.tunnel.ipv6.events import DatagramReceived
from builder_orch.tunnel.ipv6.state import State
from builder_orch.tunnel.stamps import Stamps
from builder_orch.tunnel.wireguard.session import Session
from tests.sim import Stream, Weather
from tests.tunnel.ipv6.world import LEFT, PORT, RIGHT, Flow, transfer
from tests.tunnel.whole import EPOCH, Host, Whole
from tests.tunnel.wireguard.test_weather import Watched

RTT_S = 0.02
FAIR = Weather(delay_s=RTT_S / 2)
ELSEWHERE = ("198.51.100.7", 4321)
HOUR, YEAR = 3600.0, 365 * 86400.0
RETRY_S = 5.4
"""The interval of initiations with its jitter, and a round trip."""


def renew(patch: pytest.MonkeyPatch, every_s: float) -> None:
    """New keys every so often."""
    patch.setattr("builder_orch.tunnel.wireguard.session.REKEY_AFTER_TIME", every_s)
    patch.setattr("builder_orch.tunnel.wireguard.peer.REKEY_TIMEOUT", every_s / 2)


class Longest:
    """The longest time in which nothing more of a stream was read."""

    def __init__(self, world: Whole) -> None:
        self.gap_s = 0.0
        self._world, self._act = world, world.actor
        self._got = 0
        self._at: float | None = None
        world.actor = self.act

    def act(self) -> None:
        self._act()
        now, got = self._world.now, sum(flow.got for flow in self._world.flows)
        if got != self._got:
            self.gap_s = max(self.gap_s, now - (self._at or now))
            self._got, self._at = got, now


def watched() -> type[Session]:
    """Sessions that refuse to use a key with the same nonce twice, all of them together."""
    return type("WatchedTogether", (Watched,), {"sealed": set()})


def reached(world: Whole, *, limit_s: float) -> Connection:
    """A connection that stands; AssertionError if it takes longer."""
    connection = world.connect()
    world.run(lambda: connection.state is State.ESTABLISHED, limit_s=limit_s)
    return connection


@pytest.mark.parametrize(("up", "down"), [(6_000_000, 0), (0, 6_000_000)], ids=["up", "down"])
def test_new_keys_each_two_seconds_cost_a_stream_next_to_nothing(
    monkeypatch: pytest.MonkeyPatch, up: int, down: int
) -> None:
    """The initiator sends, then the responder, with one datagram in a hundred lost."""
    weather = Weather(delay_s=RTT_S / 2, loss=0.01, rate=8e5, queue=1 << 16)
    calm = Whole(weather, seed=1)
    transfer(weather, world=calm, seed=1, up=up, down=down)
    renew(monkeypatch, 2.0)
    world = Whole(weather, seed=1, session=watched())
    longest = Longest(world)
    transfer(weather, world=world, seed=1, up=up, down=down)
    assert calm.near.sessions() == 1
    for end in (world.near, world.far):
        assert end.sessions() == pytest.approx(world.now / 2, abs=2)
    assert world.now <= calm.now / 0.9
    assert longest.gap_s < 0.25


@pytest.mark.parametrize("delay_s", [0, 5, 45, 95])
def test_a_peer_that_is_installed_late_is_reached_with_the_next_attempt(delay_s: float) -> None:
    world = Whole(FAIR, seed=2, known=delay_s == 0)
    connection = world.connect()
    world.run_for(delay_s)
    assert connection.state is not State.ESTABLISHED
    world.far.interface.add_peer(world.to_left, world.now)
    world.run(lambda: connection.state is State.ESTABLISHED, limit_s=RETRY_S + 2 * RTT_S)
    # The wait for the peer was not taken for the round trip of the network.
    connection.write(b"first")
    world.pump()
    assert connection.sender.rto_at is not None
    assert connection.sender.rto_at - world.now <= 1.0


@pytest.mark.parametrize("jump_s", [HOUR, -HOUR, 10 * YEAR, -10 * YEAR])
def test_a_clock_on_the_wall_that_jumps_locks_no_key_out(jump_s: float, tmp_path: Path) -> None:
    """It jumps during a handshake and between two processes; each one is answered."""
    stamps = Stamps(tmp_path / "key")
    world = Whole(FAIR, seed=3, session=watched())
    world.set_wall(EPOCH)
    sent: list[float] = []
    for process in range(4):
        epoch = stamps.epoch(world.wall, world.now)
        world.restart(epoch, seed=process)

        def stamped(now: float, epoch: float = epoch) -> None:
            sent.append(epoch + now)
            stamps.keep(epoch + now)

        world.near.stamped = stamped
        connection = world.connect()
        world.run_for(RTT_S / 4)
        world.set_wall(world.wall + (jump_s if process % 2 == 0 else 0.0))
        world.run(lambda to=connection: to.state is State.ESTABLISHED, limit_s=6.0)  # type: ignore[misc]
        world.run_for(0.1)
    assert all(earlier + 0.0168 <= later for earlier, later in pairwise(sent))
    assert not world.far.interface.drops


def test_nothing_is_sent_under_keys_of_before_a_long_sleep() -> None:
    world = Whole(FAIR, seed=4)
    stream, nothing = Stream("sleep", 4 << 20), Stream("", 0)
    ours, theirs = Flow(stream, nothing), Flow(nothing, stream)
    world.flows = [ours, theirs]
    ours.connection = world.connect()
    world.run(lambda: theirs.got > 100_000, limit_s=10)
    world.suspend(8 * HOUR)
    before = theirs.got
    world.run(lambda: theirs.got > before, limit_s=6.0)
    assert world.near.sessions() == 2
    # Whatever is sent under them would be counted there as one or the other.
    assert not {"session expired", "unknown index"} & set(world.far.interface.drops)
    world.run(lambda: theirs.is_done, limit_s=60)


@pytest.mark.parametrize("keepalive_s", [1.0, None])
def test_a_translator_that_forgets_after_two_seconds(keepalive_s: float | None) -> None:
    """With keepalives the way in stays open; without, the next packet out opens it again."""
    world = Whole(Weather(delay_s=RTT_S / 2, nat_s=2.0), back=FAIR, seed=5, keepalive_s=keepalive_s)
    for end in (world.near, world.far):
        end.stack.bind(PORT)
    world.established()

    def send(end: Host, to: IPv6Address, payload: bytes) -> None:
        end.stack.send_datagram(PORT, (to.packed, PORT), payload)
        world.run_for(RTT_S / 2 + 0.001)

    def heard() -> list[bytes]:
        return [one.payload for one in world.events if isinstance(one, DatagramReceived)]

    world.run_for(5)
    send(world.far, LEFT, b"in")
    assert heard() == ([b"in"] if keepalive_s else [])
    send(world.near, RIGHT, b"out")
    send(world.far, LEFT, b"in again")
    assert heard()[-2:] == [b"out", b"in again"]


def moving(up: int, down: int, tell: Callable[[Whole], None]) -> float:
    """The longest pause in a stream during which the client gets another address."""
    world = Whole(FAIR, seed=6)
    longest = Longest(world)
    there, back = Stream("up", up), Stream("down", down)
    ours, theirs = Flow(there, back), Flow(back, there)
    world.flows = [ours, theirs]
    ours.connection = world.connect()
    world.run(lambda: ours.got + theirs.got > 500_000, limit_s=10)
    world.roam(ELSEWHERE)
    tell(world)
    world.run(lambda: ours.is_done and theirs.is_done, limit_s=60)
    (status,) = world.far.interface.status(world.now)
    assert status.endpoint == ELSEWHERE
    assert world.near.sessions() == 1, "the session goes on"
    return longest.gap_s


def test_an_upload_survives_a_move_without_a_word() -> None:
    assert moving(4 << 20, 0, lambda world: None) <= RTT_S + 0.05


def test_a_download_survives_a_move_that_is_announced() -> None:
    gap_s = moving(0, 4 << 20, lambda world: world.near.interface.announce(world.now))
    assert gap_s <= 0.5


def test_who_announces_itself_sends_one_packet_to_each_peer_with_a_session() -> None:
    world = Whole(FAIR, seed=7)
    world.near.interface.announce(world.now)
    assert world.near.transmit(world.now) == [], "no session, nothing to say it on"
    reached(world, limit_s=1)
    world.run_for(1)
    world.near.interface.announce(world.now)
    ((only,),) = world.near.transmit(world.now)
    assert len(only) == 32
    assert world.near.sessions() == 1

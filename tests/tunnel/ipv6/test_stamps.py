"""Timestamps: taken up when offered, and old segments told from new ones."""

import pytest

from builder_orch.tunnel.ipv6 import segment
from builder_orch.tunnel.ipv6.segment import ACK, SYN
from builder_orch.tunnel.ipv6.stamps import PREFIX, Stamps
from tests.sim import Weather
from tests.tunnel.ipv6.script import Script
from tests.tunnel.ipv6.world import LEFT, PORT, RIGHT, World, stack, transfer


def option(value: int, echo: int = 0) -> bytes:
    return PREFIX + value.to_bytes(4, "big") + echo.to_bytes(4, "big")


def offered(value: int = 1000) -> Script:
    """A connection that a peer with timestamps opened."""
    script = Script()
    script.stack.listen(PORT)
    script.ports = (PORT, 40_000)
    options = segment.syn_options(1360, 7, True) + option(value)
    (answer,) = script.send(SYN, 0, options=options)
    assert answer.stamp is not None
    assert (answer.flags, answer.mss, answer.sack_permitted) == (SYN | ACK, 1360, True)
    script.send(ACK, 1, 1, options=option(value + 1))
    return script


def test_we_do_not_offer_them_unless_asked_to() -> None:
    script = Script()
    script.stack.connect((RIGHT.packed, PORT), script.now)
    assert script.out()[0].stamp is None
    wants = Script(stack(LEFT, timestamps=True))
    wants.stack.connect((RIGHT.packed, PORT), wants.now)
    assert wants.out()[0].stamp is not None


def test_an_offer_is_taken_up_in_every_packet() -> None:
    script = offered()
    (ack,) = script.send(ACK, 1, 1, bytes(2720), options=option(1002))
    assert ack.stamp is not None
    before = ack.stamp
    script.now += 0.5
    (ack,) = script.send(ACK, 2721, 1, bytes(2720), options=option(1003))
    assert ack.stamp == (before + 500) % (1 << 32)


def test_an_old_segment_is_answered_and_not_taken() -> None:
    script = offered()
    script.send(ACK, 1, 1, b"new", options=option(2000))
    script.now += 0.1
    script.out()
    (ack,) = script.send(ACK, 4, 1, b"old", options=option(1500))
    assert ack.ack == 4
    (ack,) = script.send(ACK, 4, 1, bytes(2720), options=option(2000))
    assert ack.ack == 2724


def test_a_segment_without_a_stamp_is_dropped() -> None:
    script = offered()
    assert script.send(ACK, 1, 1, b"bare") == []
    script.now += 1
    assert script.out() == []


@pytest.mark.parametrize("recent", [5, (1 << 32) - 5])
def test_stamps_compare_around_the_circle(recent: int) -> None:
    stamps = Stamps(0)
    assert not stamps.is_old(0, 0.0)
    stamps.came(recent, 0.0)
    assert not stamps.is_old((recent + 10) % (1 << 32), 1.0)
    assert stamps.is_old((recent - 10) % (1 << 32), 1.0)
    assert not stamps.is_old((recent - 10) % (1 << 32), 25 * 86400.0)


@pytest.mark.parametrize("sealed", [False, True])
def test_they_travel_with_full_trains_and_repairs(sealed: bool) -> None:
    client = stack(LEFT, seed=1, timestamps=True)
    weather = Weather(delay_s=0.005, loss=0.01, reorder=0.05)
    world = World(weather, seed=1, client=client, sealed=sealed)
    transfer(weather, world=world, seed=1, up=1 << 20, down=1 << 20)
    assert {connection.sender.mss for connection in world.connections} == {1348}

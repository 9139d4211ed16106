"""Over all losses and round trips the octets come out, and not slower than theory allows."""

from itertools import product

import pytest

from tests.sim import Weather
from tests.tunnel.ipv6.goodput import LOSSES, RATE, ROUND_TRIPS, mathis
from tests.tunnel.ipv6.world import transfer

FEW, MANY = 1 << 17, 1 << 20
ROUNDS = 30
"""How many round trips of the handshake and of slow start a small transfer is allowed on top."""
SHARES = {0.001: 0.6, 0.01: 0.6, 0.02: 0.6, 0.05: 0.4}
"""Of the Mathis bound, by loss; beyond that theory says nothing and coming out is enough."""


def size(loss: float, scale: int) -> int:
    """A quarter where it takes long."""
    return (FEW if loss >= 0.05 else 4 * FEW) * scale


@pytest.mark.parametrize("scale", [1, pytest.param(128, marks=pytest.mark.long)])
@pytest.mark.parametrize(("loss", "rtt"), list(product(LOSSES, ROUND_TRIPS)))
def test_both_ways_at_once(loss: float, rtt: float, scale: int) -> None:
    """64 MB each way, 16 MB from 5 % loss on, at the full scale."""
    weather = Weather(delay_s=rtt / 2, loss=loss, rate=RATE, queue=max(250_000, int(RATE * rtt)))
    octets = size(loss, scale)
    world = transfer(weather, seed=5, up=octets, down=octets, limit_s=20_000)
    bound = min(mathis(loss, rtt), RATE) if loss else RATE
    share = SHARES.get(loss, 0.6 if not loss else 0.0)
    if share:
        assert world.now - ROUNDS * rtt <= octets / (share * bound)

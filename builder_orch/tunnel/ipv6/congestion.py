"""Congestion control: how much may be in flight, and how fast.

The sender tells an algorithm what was delivered and lost; it answers with `cwnd` in octets and,
if it paces, `pacing_rate` in octets per second. Nothing else of the sender depends on which it is.

BBR was chosen over CUBIC (RFC 9438, HyStart++) on a simulated wire, `python -m
tests.tunnel.ipv6.contest`, MB/s, BBR first: 0.1 % loss at 40 ms 38 and 4.3; 1 % at 20 ms 30 and
1.4; 5 % at 1 ms 15 and 8.6; 5 % reordered by 1 to 30 ms 22 and 5.5 of 23 in order. A CUBIC flow
beside it on 100 Mbit/s with a queue of 20 ms keeps 40 to 54 %.
"""

from typing import NamedTuple, Protocol

from builder_orch.tunnel.ipv6.pacer import GRAIN

INITIAL_SEGMENTS = 10
"""RFC 6928."""


class Delivered(NamedTuple):
    """What one acknowledgement, or one train of them, told.

    `octets` were newly delivered, cumulatively or selectively; `in_flight` remain. `rate` is the
    delivery rate in octets per second, None without a valid sample; `app_limited` marks one
    that the application bounded. `limited` says that cwnd was what held the sender back.
    `delivered` and `losses` are sums over the connection. What the connection looked like when the
    newest of these octets were sent: `sent_delivered`, `sent_losses` and, with them, `sent_flight`.
    A train holds what the rate moves in `grain` seconds.
    """

    now: float
    octets: int
    in_flight: int
    rtt: float | None
    min_rtt: float | None
    rate: float | None
    app_limited: bool
    limited: bool
    delivered: int
    losses: int
    sent_delivered: int
    sent_losses: int
    sent_flight: int
    grain: float = GRAIN


class Congestion(Protocol):
    """One algorithm for one connection."""

    @property
    def cwnd(self) -> int:
        """How many octets may be in flight."""
        ...

    @property
    def pacing_rate(self) -> float | None:
        """Octets per second at which to send, None for as soon as possible."""
        ...

    def on_ack(self, delivered: Delivered, recovering: bool) -> None:
        """Something was delivered; `recovering` until the losses of one window are repaired."""
        ...

    def on_loss(self, in_flight: int, now: float) -> None:
        """A new window with losses; called once for each."""
        ...

    def on_spurious(self) -> None:
        """The losses told last were none."""
        ...

    def on_rto(self, in_flight: int, now: float) -> None:
        """The retransmission timer fired for the first time since the last progress."""
        ...

    def on_idle(self) -> None:
        """What was known about the path is stale: nothing was sent for an RTO."""
        ...

    def on_restart(self) -> None:
        """The path was away and is back: timeouts meanwhile were not about congestion."""
        ...

    def on_mss(self, mss: int) -> None:
        """Packets are of another size from now on."""
        ...

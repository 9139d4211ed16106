"""The pacer, proportional rate reduction, and BBR on an imagined path."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder_orch.tunnel.ipv6.bbr import Bbr, Phase
from builder_orch.tunnel.ipv6.congestion import Delivered
from builder_orch.tunnel.ipv6.pacer import PAUSE, SHARES, Pacer, grain
from builder_orch.tunnel.ipv6.prr import Reduction
from builder_orch.tunnel.machine import TRAIN_PACKETS
from tests.sim import Weather
from tests.tunnel.ipv6.contest import begin
from tests.tunnel.ipv6.world import World

MSS = 1000
TRAIN = 44 * MSS


@pytest.mark.parametrize("rate", [50e3, 5e6, 200e6])
@pytest.mark.parametrize("grain", [0.0, 1e-3])
def test_packets_leave_at_the_rate_however_late_the_timer(rate: float, grain: float) -> None:
    pacer = Pacer()
    now, sent = 1.0, 0
    while now < 3.0:
        octets = pacer.allowance(now, rate, MSS, TRAIN)
        if octets:
            pacer.sent(octets, now, rate, TRAIN)
            sent += octets
        now = max(now + 1e-5, pacer.next_at)
        if grain:
            now = (now // grain + 1) * grain
    # Far above a train in a millisecond, timers alone keep up as far as lateness is made up for.
    least = min(rate, 5 * TRAIN / 2e-3) if grain else rate
    assert 0.95 * least * 2 <= sent <= 1.01 * rate * 2 + 5 * TRAIN


def test_after_a_pause_only_a_little_is_made_up_for() -> None:
    pacer = Pacer()
    pacer.sent(pacer.allowance(1.0, 1e6, MSS, TRAIN), 1.0, 1e6, TRAIN)
    assert pacer.allowance(1.0 + 1e-4, 1e6, MSS, TRAIN) == 0
    assert pacer.allowance(10.0, 1e6, MSS, TRAIN) <= 2 * MSS + PAUSE * 1e6


def test_who_waited_for_the_rate_is_owed_the_lateness_of_the_timer() -> None:
    rate, late = 1e6, 0.02
    pacer = Pacer()
    pacer.sent(pacer.allowance(1.0, rate, MSS, TRAIN), 1.0, rate, TRAIN)
    pacer.called(waited=True)
    owed = pacer.allowance(pacer.next_at + late, rate, MSS, TRAIN)
    assert owed == pytest.approx(late * rate + 2 * MSS, abs=1)
    assert pacer.after(owed, pacer.next_at + late, rate, TRAIN) >= pacer.next_at + late


def test_a_busy_host_sends_what_it_can_and_not_ever_less() -> None:
    """Each train costs 5 ms, as where a busy thread has the interpreter."""
    turn_s = 0.005
    path = Weather(delay_s=0.0002, rate=300e6, queue=4 << 20)
    world = World(path, back=Weather(delay_s=0.0002))
    ours, theirs = begin(world)
    world.run_for(0.02)
    world.turn_s = turn_s
    world.run_for(3)
    before = theirs.got
    world.run_for(1)
    assert ours.connection is not None
    full = TRAIN_PACKETS * ours.connection.sender.mss / turn_s
    assert theirs.got - before > 0.6 * full


@given(st.integers(20, 200), st.floats(0.3, 0.9))
def test_a_reduction_is_spread_over_the_round_trip(segments: int, share: float) -> None:
    """Neither silent at first nor over the target at the end (RFC 6937bis)."""
    flight, window = segments * MSS, int(segments * share) * MSS
    reduction = Reduction()
    reduction.begin(flight)
    in_flight, sent, halfway = flight - MSS, 0, 0
    for number in range(segments - 1):
        in_flight -= MSS
        reduction.delivered(MSS)
        room = reduction.room(window, in_flight, MSS)
        while room >= MSS:
            reduction.sent(MSS)
            in_flight += MSS
            sent += MSS
            room = reduction.room(window, in_flight, MSS)
        if number == segments // 2:
            halfway = sent
    assert abs(in_flight - window) <= 2 * MSS
    assert halfway >= 0.3 * sent


def test_a_reduction_comes_back_without_a_burst() -> None:
    reduction = Reduction()
    reduction.begin(100 * MSS)
    reduction.delivered(MSS)
    assert reduction.room(100 * MSS, 10 * MSS, MSS) == 2 * MSS


class Path:
    """Acknowledges each round trip what was sent in the one before, as far as it can carry."""

    def __init__(self, rate: float, rtt: float) -> None:
        self.bbr = Bbr(MSS)
        self.rate, self.rtt = rate, rtt
        self.now, self.delivered, self.losses = 1.0, 0, 0
        self.seen: list[Phase] = []

    def round(self, lost: int = 0, steps: int = 10) -> None:
        """One round trip, in which so much got lost."""
        bbr = self.bbr
        flight = bbr.cwnd
        paced = flight if bbr.pacing_rate is None else bbr.pacing_rate * self.rtt
        octets = int(min(flight, paced, self.rate * self.rtt))
        queue = max(0.0, min(flight, paced) - self.rate * self.rtt) / self.rate
        sent, losses = self.delivered, self.losses
        self.losses += lost
        for _ in range(steps):
            self.now += (self.rtt + queue) / steps
            self.delivered += octets // steps
            bbr.on_ack(
                Delivered(
                    self.now,
                    octets // steps,
                    octets // 2,
                    self.rtt + queue,
                    self.rtt,
                    octets / self.rtt,
                    False,
                    True,
                    self.delivered,
                    self.losses,
                    sent,
                    losses,
                    flight,
                ),
                False,
            )
            if not self.seen or self.seen[-1] is not bbr.phase:
                self.seen.append(bbr.phase)


def test_it_finds_the_bandwidth_and_goes_round_the_states() -> None:
    path = Path(10e6, 0.05)
    for _ in range(400):
        path.round()
    assert path.bbr.bandwidth == pytest.approx(10e6, rel=0.05)
    assert path.bbr.min_rtt == pytest.approx(0.05, rel=0.01)
    assert path.seen[:3] == [Phase.STARTUP, Phase.DRAIN, Phase.DOWN]
    assert set(path.seen) == set(Phase)


def test_many_losses_while_probing_bound_what_is_in_flight() -> None:
    path = Path(10e6, 0.05)
    while path.bbr.phase is not Phase.UP:
        path.round()
    before = path.bbr.cwnd
    path.round(lost=before // 10)
    assert path.seen[-1] is not Phase.UP
    assert path.bbr.cwnd < before


def test_a_timeout_leaves_one_segment_and_the_model() -> None:
    path = Path(10e6, 0.05)
    for _ in range(60):
        path.round()
    bandwidth = path.bbr.bandwidth
    path.bbr.on_rto(0, path.now)
    assert path.bbr.cwnd == MSS
    assert path.bbr.bandwidth == bandwidth
    for _ in range(20):
        path.round()
    assert path.bbr.cwnd > 0.9 * 10e6 * 0.05


@pytest.mark.parametrize("streams", [1, 8, 100])
def test_of_many_streams_each_sends_more_at_a_time_and_less_often(streams: int) -> None:
    rate = 80e6 / streams
    pacer = Pacer()
    pacer.grain = grain(streams)
    now, sent, times = 1.0, 0, 0
    while now < 2.0:
        octets = pacer.allowance(now, rate, MSS, TRAIN)
        pacer.sent(octets, now, rate, TRAIN)
        sent, times = sent + octets, times + 1
        now = pacer.next_at
    assert sent == pytest.approx(rate, rel=0.1)
    # One alone could fill more than a train each millisecond; there is a longest wait.
    most = TRAIN if streams == 1 else 2 * TRAIN
    assert sent / times == pytest.approx(min(most, rate * 1e-3 * min(streams, SHARES)), rel=0.1)

"""Octets of any kind into every parser and into a stack at work."""

from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder_orch.tunnel.ipv6 import header, icmp, segment, udp
from builder_orch.tunnel.ipv6.segment import Template
from builder_orch.tunnel.ipv6.state import End
from builder_orch.tunnel.machine import Malformed, Rejected
from tests.sim import Stream, Weather
from tests.tunnel.ipv6.world import LEFT, PORT, RIGHT, Flow, World, stack

MANY = settings(max_examples=1000, deadline=None)
LOCAL, REMOTE = (LEFT.packed, PORT), (RIGHT.packed, 40_000)
INNER = st.sampled_from(
    [header.HOP_BY_HOP, header.TCP, header.UDP, header.ROUTING, header.FRAGMENT, header.ICMPV6, 60]
)


def packets() -> st.SearchStrategy[bytes]:
    """Any octets, or any octets behind a good IPv6 header to us."""
    wrapped = st.builds(
        lambda kind, rest: header.emit(RIGHT.packed, LEFT.packed, kind, rest),
        INNER,
        st.binary(max_size=120),
    )
    return st.one_of(st.binary(max_size=120), wrapped)


@MANY
@given(packets())
def test_parsers_only_say_malformed_or_rejected(packet: bytes) -> None:
    try:
        ip = header.parse(packet)
    except (Malformed, Rejected):
        return
    for parse in (udp.parse, icmp.parse):
        try:
            parse(packet, ip)
        except Malformed:
            continue


@MANY
@given(st.binary(max_size=120), st.integers(0, 80))
def test_the_segment_parser_only_says_malformed(packet: bytes, offset: int) -> None:
    try:
        got = segment.parse(packet, offset)
    except Malformed:
        return
    options = segment.sack_option(got.blocks)
    template = Template((LEFT.packed, got.source_port), (RIGHT.packed, got.destination_port))
    again = template.segment(got.seq, got.ack, got.flags, got.window, got.payload, options)
    assert segment.parse(again) == got._replace(mss=None, scale=None, sack_permitted=False)


@MANY
@given(st.lists(st.integers(0, 255), max_size=60).map(bytes))
def test_options_of_any_kind_do_no_harm(options: bytes) -> None:
    options += bytes(-len(options) % 4)
    if len(options) <= 40:
        packet = Template(LOCAL, REMOTE).segment(1, 2, 2, 3, b"data", options)
        assert segment.parse(packet).payload == b"data"


@settings(max_examples=200, deadline=None)
@given(st.lists(packets(), min_size=10, max_size=30), st.lists(st.floats(0, 100), max_size=3))
def test_a_stack_survives_anything(received: list[bytes], pauses: list[float]) -> None:
    """Together with the examples above far more than 10 000 inputs."""
    ours = stack(LEFT)
    ours.listen(None)
    ours.bind(53)
    now = 0.0
    for pause in [0.0, *pauses]:
        now += pause
        ours.receive(received, now)
        ours.transmit(now)
        after = ours.deadline()
        assert after is None or after > now


def mutate(packet: bytes, random: Random) -> bytes:
    """Change some octets of the headers, more seldom the length."""
    octets = bytearray(packet)
    for _ in range(random.randint(1, 3)):
        at = random.randrange(min(len(octets), 80))
        octets[at] = random.choice((0, 255, octets[at] ^ 1 << random.randrange(8)))
    if random.random() < 0.1:
        del octets[random.randrange(len(octets)) :]
    return bytes(octets)


@pytest.mark.parametrize("seed", range(25))
def test_mutated_packets_of_a_live_connection_do_no_lasting_harm(seed: int) -> None:
    """What arrives is a right prefix; the connection ends, or goes on when the noise is over.

    Changed payloads are left out: a tunnel authenticates, so there is no second check in TCP.
    """
    random = Random(seed)
    world = World(Weather(loss=0.01), seed=seed)
    stream = Stream(f"noise {seed}", 150_000)
    ours, theirs = Flow(stream, stream), Flow(stream, stream)
    world.flows = [ours, theirs]
    ours.connection = world.connect()
    world.run(lambda: len(world.connections) == 2, limit_s=60)
    for wire in (world.there, world.back):

        def noisy(
            packet: bytes, now: float, push: Callable[[bytes, float], None] = wire.push
        ) -> None:
            if random.random() < 0.2:
                # Headers only: a forged payload at the right number would be believed.
                push(mutate(packet[:60], random), now)
            push(packet, now)

        wire.push = noisy  # type: ignore[method-assign]
    world.run(
        lambda: (ours.is_done and theirs.is_done) or None not in [c.end for c in world.connections],
        limit_s=700,
    )
    assert {c.end for c in world.connections} <= {None, End.FINISHED, End.RESET, End.TIMED_OUT}

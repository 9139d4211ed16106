"""Requests: what is known comes through as it was meant, anything else is Malformed."""

import json
import math
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder_orch.agent.message import (
    REQUEST_LIMIT,
    Frames,
    Hello,
    Open,
    Retire,
    Status,
    Use,
    frame,
    parse,
)
from builder_orch.tunnel.carrier.choice import Choice
from builder_orch.tunnel.machine import Malformed
from tests.agent.rig import framed

GOOD: list[dict[str, Any]] = [
    {"id": 1, "do": "hello", "protocols": [1, 3], "version": "1.2.3"},
    {"id": 2, "do": "status"},
    {"id": 3, "do": "retire", "now": True},
    {"id": 4, "do": "open", "path": "/a/peer", "carrier": Choice().dump()},
    {"id": 5, "do": "dial", "host": "x.internal", "port": 80, "timeout_s": 2.5},
    {"id": 6, "do": "resolve", "name": "x.internal"},
    {"id": 7, "do": "ping", "address": "fdaa::3", "timeout_s": 1},
    {"id": 8, "do": "ready", "timeout_s": 120.0},
    {"id": 9, "do": "moved", "from": ["udp", "1.2.3.4:5", "why"]},
    {"id": 10, "do": "route"},
    {"id": 11, "do": "drops"},
]
BAD: list[dict[str, Any]] = [
    {},
    {"do": "status"},
    {"id": True, "do": "status"},
    {"id": "1", "do": "status"},
    {"id": 1, "do": "kill"},
    {"id": 1, "do": "hello", "protocols": [1], "version": "1"},
    {"id": 1, "do": "hello", "protocols": [1, 1], "version": ""},
    {"id": 1, "do": "retire", "now": 1},
    {"id": 1, "do": "open", "path": "peer", "carrier": Choice().dump()},
    {"id": 1, "do": "open", "path": "/a\0b", "carrier": Choice().dump()},
    {"id": 1, "do": "open", "path": "/" + "a" * 5000, "carrier": Choice().dump()},
    {"id": 1, "do": "open", "path": "/a", "carrier": {}},
    {"id": 1, "do": "open", "path": "/a", "carrier": {**Choice().dump(), "kind": "pigeon"}},
    {"id": 1, "do": "open", "path": "/a", "carrier": {**Choice().dump(), "port": -1}},
    {"id": 1, "do": "open", "path": "/a", "carrier": {**Choice().dump(), "pin": "xy"}},
    {"id": 1, "do": "dial", "host": "x", "port": 0},
    {"id": 1, "do": "dial", "host": "x", "port": 65536},
    {"id": 1, "do": "dial", "host": "x", "port": True},
    {"id": 1, "do": "dial", "host": "x\n", "port": 1},
    {"id": 1, "do": "dial", "host": "x", "port": 1, "timeout_s": math.nan},
    {"id": 1, "do": "dial", "host": "x", "port": 1, "timeout_s": math.inf},
    {"id": 1, "do": "dial", "host": "x", "port": 1, "timeout_s": 10**400},
    {"id": 1, "do": "dial", "host": "x", "port": 1, "timeout_s": "1"},
    {"id": 1, "do": "dial", "host": "x", "port": 1, "timeout_s": -1},
    {"id": 1, "do": "ping", "address": "1.2.3.4"},
    {"id": 1, "do": "moved", "from": ["udp", "x"]},
    {"id": 1, "do": "config", "config": "[Interface]"},
]


def test_every_request_is_understood() -> None:
    kinds = [type(parse(message)) for message in GOOD]
    assert kinds == [Hello, Status, Retire, Open, *[Use] * 7]
    opened = parse(GOOD[3])
    assert isinstance(opened, Open)
    assert (opened.path, opened.choice) == ("/a/peer", Choice())
    used = [request.message for request in map(parse, GOOD) if isinstance(request, Use)]
    assert used == GOOD[4:]


def test_members_that_nobody_knows_go_no_further() -> None:
    used = parse({**GOOD[4], "shell": "rm", "config": "key"})
    assert isinstance(used, Use)
    assert used.message == GOOD[4]


@pytest.mark.parametrize("message", BAD, ids=repr)
def test_what_is_no_request_is_malformed(message: dict[str, Any]) -> None:
    with pytest.raises(Malformed):
        parse(message)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=20))
def test_messages_come_out_whole_however_they_are_cut(cuts: list[int]) -> None:
    octets = b"".join(map(frame, GOOD)) * 2
    assert octets == b"".join(map(framed, GOOD)) * 2
    frames, found, at = Frames(), [], 0
    while at < len(octets):
        step = cuts[at % len(cuts)]
        found += frames.receive(octets[at : at + step])
        at += step
    assert found == GOOD * 2
    assert not frames.partial


def test_a_frame_of_seventy_kilobytes_is_refused_by_its_length() -> None:
    with pytest.raises(Malformed, match="71680"):
        Frames().receive(struct.pack("!I", 70 << 10))
    largest = b" " * (REQUEST_LIMIT - 2) + b"{}"
    assert Frames().receive(struct.pack("!I", REQUEST_LIMIT) + largest) == [{}]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
NAMES = st.sampled_from([name for message in GOOD for name in message])
NEARLY = st.builds(
    lambda message, changes: {**message, **changes},
    st.sampled_from(GOOD),
    st.dictionaries(NAMES, JSON | st.sampled_from([v for m in GOOD for v in m.values()])),
)
TEXTS = (
    st.binary(max_size=200)
    | st.builds(lambda depth: b'{"id":1,"do":' + b"[" * depth, st.integers(0, 60000))
    | JSON.map(lambda value: json.dumps(value).encode())
    | NEARLY.map(lambda value: json.dumps(value).encode())
)


def judge(octets: bytes) -> None:
    """A parser may only say Malformed, and keeps no more than one frame."""
    frames = Frames()
    try:
        for message in frames.receive(octets):
            request = parse(message)
            assert request.id == message["id"]
    except Malformed:
        return


SEVERAL = pytest.param(10_000, marks=pytest.mark.long)


@pytest.mark.parametrize("count", [300, SEVERAL])
def test_garbage_is_malformed_and_nothing_else(count: int) -> None:
    @settings(max_examples=count, deadline=None)
    @given(TEXTS, st.booleans())
    def once(text: bytes, honest: bool) -> None:
        judge(struct.pack("!I", len(text)) + text if honest else text)

    once()

"""Which carrier a tunnel gets, and what is remembered of it."""

import os
from dataclasses import replace
from ipaddress import IPv6Address, IPv6Network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder_orch.errors import TunnelNotUp
from builder_orch.tunnel.carrier.choice import AUTO, KINDS, UDP, WEBSOCKET, Choice
from builder_orch.tunnel.carrier.memory import ENTRIES, EXPIRY_S, Memory
from builder_orch.tunnel.carrier.opening import gate_of, open_carrier
from builder_orch.tunnel.carrier.proxy import Outside
from builder_orch.tunnel.carrier.websocket import Gate
from builder_orch.tunnel.config import Door, PeerConfig, PrivateKey, PublicKey, TunnelConfig

CONFIG = TunnelConfig(
    PrivateKey(bytes(31) + b"\1"),
    IPv6Address("fdaa:0:7::2"),
    (PeerConfig(PublicKey(bytes(31) + b"\2"), (IPv6Network("fdaa:0:7::/48"),), ("127.0.0.1", 9)),),
)

PIN = b"\xab" * 32


def towards(host: str) -> TunnelConfig:
    return replace(CONFIG, peers=(replace(CONFIG.peers[0], endpoint=(host, 51820)),))


@given(
    st.builds(
        Choice,
        st.sampled_from(KINDS),
        st.integers(0, 65535),
        st.none() | st.binary(min_size=32, max_size=32),
        st.builds(Outside, st.text(), st.text(), st.lists(st.text()).map(tuple)),
        st.none() | st.just(Path("/a/b")),
    )
)
def test_a_choice_comes_back_as_it_was(choice: Choice) -> None:
    assert Choice.load(choice.dump()) == choice


@pytest.mark.parametrize("dumped", [None, {}, {"kind": "udp"}, {**Choice().dump(), "pin": "x"}])
def test_what_is_no_choice_is_an_error(dumped: object) -> None:
    with pytest.raises(ValueError, match=r"choice|hex"):
        Choice.load(dumped)


@pytest.mark.parametrize(("kind", "made"), [(AUTO, "udp"), (UDP, "udp"), (WEBSOCKET, "websocket")])
async def test_what_was_asked_for_is_made(kind: str, made: str) -> None:
    _, carrier = await open_carrier(CONFIG, Choice(kind, 4433))
    assert carrier.route().kind == made
    carrier.close()


@pytest.mark.parametrize(
    ("choice", "told", "gate"),
    [
        (Choice(WEBSOCKET), None, Gate("gw", 443)),
        (Choice(WEBSOCKET), Door(4433, PIN), Gate("gw", 4433, PIN)),
        (Choice(WEBSOCKET, 1), Door(4433, PIN), Gate("gw", 1)),
        (Choice(WEBSOCKET, 1, bytes(32)), Door(4433, PIN), Gate("gw", 1, bytes(32))),
        (Choice(WEBSOCKET, pin=bytes(32)), Door(4433, PIN), Gate("gw", 4433, bytes(32))),
        (Choice(WEBSOCKET, pin=bytes(32)), None, Gate("gw", 443, bytes(32))),
    ],
)
def test_what_was_said_here_counts_more_than_what_the_platform_says(
    choice: Choice, told: Door | None, gate: Gate
) -> None:
    assert gate_of(choice, "gw", told) == gate


async def test_where_the_platform_says_is_called() -> None:
    (peer,) = CONFIG.peers
    told = replace(CONFIG, peers=(replace(peer, door=Door(4433, PIN)),))
    _, carrier = await open_carrier(told, Choice(WEBSOCKET))
    assert carrier.route().endpoint == "wss://127.0.0.1:4433"
    carrier.close()


async def test_a_name_that_nobody_knows_is_an_error_unless_a_proxy_may_know_it() -> None:
    config = towards("gateway.invalid")
    for kind in (AUTO, UDP):
        with pytest.raises(TunnelNotUp, match=r"gateway\.invalid cannot be resolved"):
            await open_carrier(config, Choice(kind))
    behind = Choice(AUTO, outside=Outside("http://192.0.2.1:3128"))
    _, carrier = await open_carrier(config, behind)
    route = carrier.route()
    assert (route.kind, route.endpoint) == ("websocket", "wss://gateway.invalid:443")
    assert "cannot be resolved" in route.why
    carrier.close()


def test_a_winner_is_remembered_for_hours(tmp_path: Path) -> None:
    path = tmp_path / "new" / "carriers.json"
    memory = Memory(path)
    assert memory.recall("here") == ""
    memory.keep("here", "websocket", now=1000.0)
    memory.keep("there", "udp", now=1001.0)
    again = Memory(path)
    assert again.recall("here", now=1000.0 + EXPIRY_S - 1) == "websocket"
    assert again.recall("here", now=1000.0 + EXPIRY_S) == ""
    assert again.recall("here", now=999.0) == "", "the clock was wrong then, or is now"
    assert again.recall("there", now=1002.0) == "udp"
    assert list(path.parent.iterdir()) == [path], "nothing is left beside it"


def test_the_memory_has_a_bound(tmp_path: Path) -> None:
    memory = Memory(tmp_path / "carriers.json")
    for number in range(ENTRIES + 5):
        memory.keep(f"network {number}", "udp", now=float(number))
    assert memory.recall("network 4", now=100.0) == ""
    assert memory.recall("network 5", now=100.0) == "udp"


@given(st.binary(max_size=50) | st.sampled_from([b"[]", b'{"a": 1}', b'{"a": ["udp", "x"]}']))
def test_a_file_that_holds_something_else_is_no_memory(octets: bytes) -> None:
    path = Path(os.environ["FLY_BUILD_HOME"]) / "carriers.json"
    path.write_bytes(octets)
    assert Memory(path).recall("a") == ""


def test_a_memory_that_cannot_be_written_is_only_forgotten() -> None:
    memory = Memory(Path("/dev/null/carriers.json"))
    memory.keep("here", "udp")
    assert memory.recall("here") == ""

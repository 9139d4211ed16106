"""Peers that are installed late, and what is said of those that never are; on a jumping clock."""

import asyncio
import os
import socket
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from itertools import pairwise

import pytest

from builder_orch.api.models import Region
from builder_orch.errors import (
    Blame,
    Exit,
    GatewayDown,
    PeerNotInstalled,
    PeerUnknown,
    PlatformUnavailable,
    TunnelNotUp,
    UdpBlocked,
)
from builder_orch.pipeline.readiness import DENIALS, PACE_S, Evidence, Readiness, Witness, judge
from builder_orch.selfhost.gateway import Gateway
from builder_orch.tunnel.carrier import BARRED, FAILED, OPEN, REFUSED, SILENT, Sign
from builder_orch.tunnel.config import PeerConfig, PrivateKey, TunnelConfig
from builder_orch.tunnel.driver import Tunnel, open_tunnel
from builder_orch.tunnel.machine import Endpoint
from builder_orch.tunnel.wireguard.message import INITIATION_LEN
from tests.pipeline.fake_world import FakePlatform
from tests.tunnel.joined import CLIENT, GATEWAY, NETWORK, public
from tests.virtual import Air, now, play

HERE: Endpoint = ("192.0.2.9", 1)
THERE: Endpoint = ("192.0.2.1", 51820)
RTT_S = 0.04
SLACK_S = 5.4 + RTT_S
"""WireGuard begins anew every 5 to 5.334 s; by then the gateway knows, and answers in one RTT."""


@dataclass
class Scene:
    """A gateway that learns of its peer when told to, and the peer's own tunnel."""

    air: Air
    gateway: Gateway
    tunnel: Tunnel
    config: TunnelConfig
    said: list[str] = field(default_factory=list)

    async def wait(self, limit_s: float = 120.0, platform: FakePlatform | None = None) -> float:
        witness = None if platform is None else Witness(platform, CLIENT)
        return await Readiness(self.tunnel, witness, limit_s, self.said.append).wait()


@asynccontextmanager
async def scene(delay_s: float | None) -> AsyncGenerator[Scene]:
    """The peer is installed `delay_s` from now; None for never."""
    ours, theirs = PrivateKey(os.urandom(32)), PrivateKey(os.urandom(32))
    air = Air(RTT_S / 2)
    peer = PeerConfig(public(theirs), (NETWORK,), THERE)
    config = TunnelConfig(ours, CLIENT, (peer,), dns=GATEWAY)
    server = TunnelConfig(theirs, GATEWAY, ())
    async with (
        open_tunnel(server, carrier=air.carrier(THERE)) as far,
        open_tunnel(config, carrier=air.carrier(HERE)) as near,
    ):
        gateway = Gateway(far, public(theirs), THERE, install_delay_s=delay_s or 0.0)
        if delay_s is not None:
            await gateway.install(public(ours), CLIENT)

        async def echo(_: int) -> socket.socket:
            return await tunnel_echo(echoes)

        echoes: list[asyncio.Future[None]] = []
        gateway.expose(GATEWAY, 7, echo)
        yield Scene(air, gateway, near, config)
        gateway.close()
    await asyncio.gather(*echoes, return_exceptions=True)


async def tunnel_echo(tasks: list[asyncio.Future[None]]) -> socket.socket:
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=theirs)

    async def repeat() -> None:
        while octets := await reader.read(65536):
            writer.write(octets)
        writer.close()

    tasks.append(asyncio.ensure_future(repeat()))
    return ours


async def converse(tunnel: Tunnel) -> None:
    sock = await tunnel.dial(str(GATEWAY), 7, timeout_s=60)
    reader, writer = await asyncio.open_connection(sock=sock)
    writer.write(b"hello")
    assert await reader.readexactly(5) == b"hello"
    writer.close()


@pytest.mark.parametrize("delay_s", [0.0, 5.0, 45.0, 95.0])
def test_a_peer_is_reached_soon_after_it_was_installed(
    delay_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        async with scene(delay_s) as made:
            began = now()
            took = await made.wait()
            assert took == pytest.approx(now() - began, abs=0.01)
            assert delay_s <= took <= delay_s + SLACK_S
            assert bool(made.said) is (delay_s > 0)
            # The first data is not burdened with what the handshake took.
            began = now()
            await converse(made.tunnel)
            assert now() - began < 1.0

    play(story(), monkeypatch)


@pytest.mark.parametrize("delay_s", [0.0, 5.0, 45.0, 95.0])
def test_data_that_is_lost_right_after_a_late_handshake_is_repeated_within_a_second(
    delay_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[float] = []

    def lose_the_first(octets: bytes, to: Endpoint) -> bool:
        # Longer than a keepalive and no handshake: the SYN, which goes out with the new session.
        if to == THERE and octets[0] == 4 and len(octets) > 32:
            sent.append(now())
            return len(sent) > 1
        return True

    async def story() -> None:
        async with scene(delay_s) as made:
            made.air.passes = lose_the_first
            # Dialled before anybody knows us.
            dialling = asyncio.ensure_future(made.tunnel.dial(str(GATEWAY), 7, timeout_s=200))
            began = now()
            await made.wait()
            assert now() - began <= delay_s + SLACK_S
            (await dialling).close()
            assert sent[0] - began <= delay_s + SLACK_S
            assert sent[1] - sent[0] <= 1.0

    play(story(), monkeypatch)


def test_handshakes_go_on_after_wireguard_itself_has_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    initiations: list[float] = []

    def count(octets: bytes, _: Endpoint) -> bool:
        if len(octets) == INITIATION_LEN:
            initiations.append(now())
        return True

    async def story() -> None:
        async with scene(200.0) as made:
            made.air.passes = count
            took = await made.wait(limit_s=300)
            assert 200 <= took <= 200 + SLACK_S
            gaps = [b - a for a, b in pairwise(initiations)]
            assert max(gaps) <= 5.34 + 0.25

    play(story(), monkeypatch)


def test_nothing_is_said_of_an_answer_that_is_not_overdue(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        async with scene(0.0) as made:
            made.air.delay_s = 0.3
            await made.wait()
            assert made.said == []

    play(story(), monkeypatch)


def test_the_reason_the_second_witness_and_the_time_are_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def story() -> None:
        async with scene(None) as made:
            platform = FakePlatform()
            with pytest.raises(TunnelNotUp):
                await made.wait(limit_s=12, platform=platform)
            first, *_, last = made.said
            assert len(set(made.said)) == len(made.said) == 4
            assert first == "udp the air handshake attempt 1 unanswered; 1 of 12 s"
            attempt, known, elapsed = last.split("; ")
            assert attempt == "udp the air handshake attempt 3 unanswered"
            assert known == "the platform knows the peer, and does not say whether its gateway does"
            # The third handshake begins 10 to 10.67 s after the first.
            assert elapsed in {"10 of 12 s", "11 of 12 s"}

    play(story(), monkeypatch)


def test_a_witness_that_hangs_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        async with scene(45.0) as made:
            platform = FakePlatform(held={"validate_peers"})
            assert await made.wait(platform=platform) <= 45 + SLACK_S
            assert platform.calls == ["validate_peers"]
        async with scene(None) as made:
            began = now()
            with pytest.raises(TunnelNotUp):
                await made.wait(limit_s=10, platform=FakePlatform(held={"validate_peers"}))
            assert now() - began <= 10 + 3.1

    play(story(), monkeypatch)


def test_a_peer_that_the_platform_disowns_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def story() -> None:
        async with scene(None) as made:
            began = now()
            with pytest.raises(PeerUnknown) as caught:
                await made.wait(platform=FakePlatform(knows_peers=False))
            assert now() - began <= (DENIALS + 1) * PACE_S + 0.1
            assert "fly-build wireguard reset" in caught.value.hint

    play(story(), monkeypatch)


@dataclass
class Forgetful(FakePlatform):
    """Does not know a peer the first time that it is asked: it was just made."""

    async def validate_peers(self, addresses: Iterable[IPv6Address]) -> list[IPv6Address]:
        await super().validate_peers(addresses)
        return list(addresses) if self.calls.count("validate_peers") == 1 else []


def test_one_denial_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        async with scene(45.0) as made:
            assert await made.wait(platform=Forgetful()) >= 45.0
            assert any("does not know the peer" in line for line in made.said)

    play(story(), monkeypatch)


def test_what_the_platform_cannot_be_asked_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        async with scene(None) as made:
            broken = PlatformUnavailable("no connection", hint="Wait.")
            platform = FakePlatform(failures={"validate_peers": broken})
            with pytest.raises(TunnelNotUp):
                await made.wait(limit_s=20, platform=platform)
            assert any("the platform cannot be asked (no connection)" in it for it in made.said)

    play(story(), monkeypatch)


UDP, WSS = "192.0.2.1:51820", "wss://192.0.2.1:443"


def udp(state: str, said: str = "") -> Sign:
    return Sign("udp", state, UDP, said)


def websocket(state: str, said: str = "") -> Sign:
    return Sign("websocket", state, WSS, said)


KNOWN = Evidence(True, True)
INSTALLED = Evidence(True, True, installed=True)
NOT_YET = Evidence(True, True, installed=False)
NOTHING = Evidence(trouble="no connection")


@pytest.mark.parametrize(
    ("signs", "evidence", "limit_s", "kind", "says"),
    [
        ([udp(SILENT)], Evidence(False, True), 120, PeerUnknown, "does not know this peer"),
        ([udp(SILENT)], Evidence(True, False), 120, GatewayDown, "says it is not available"),
        ([udp(SILENT), websocket(OPEN)], KNOWN, 120, PeerNotInstalled, "is reached"),
        ([udp(SILENT), websocket(OPEN)], NOTHING, 120, PeerNotInstalled, "no connection"),
        ([websocket(OPEN)], KNOWN, 120, PeerNotInstalled, WSS),
        ([udp(REFUSED)], KNOWN, 120, GatewayDown, "does not run there"),
        ([udp(REFUSED), websocket(REFUSED)], KNOWN, 120, GatewayDown, WSS),
        ([udp(SILENT), websocket(SILENT)], KNOWN, 120, UdpBlocked, "neither way"),
        ([udp(REFUSED), websocket(SILENT)], NOTHING, 120, UdpBlocked, "neither way"),
        ([udp(SILENT), websocket(FAILED, "407")], KNOWN, 120, UdpBlocked, "407"),
        ([udp(BARRED, "is forbidden")], NOTHING, 5, UdpBlocked, "is forbidden"),
        ([udp(SILENT)], KNOWN, 120, UdpBlocked, "does not say whether its gateway"),
        ([udp(SILENT)], INSTALLED, 10, UdpBlocked, "so does its gateway"),
        ([udp(SILENT)], NOT_YET, 120, PeerNotInstalled, "not told of it yet. Whether it would"),
        ([udp(SILENT), websocket(SILENT)], INSTALLED, 10, UdpBlocked, "neither way"),
        ([udp(SILENT), websocket(SILENT)], NOT_YET, 10, PeerNotInstalled, "not told of it yet"),
        ([udp(SILENT), websocket(OPEN)], INSTALLED, 10, TunnelNotUp, "though it knows it"),
        ([udp(REFUSED)], NOT_YET, 10, GatewayDown, "does not run there"),
        ([udp(SILENT), udp(BARRED)], KNOWN, 10, TunnelNotUp, "the reason"),
        ([udp(BARRED), udp(REFUSED)], KNOWN, 120, GatewayDown, "does not run there"),
        ([udp(SILENT)], KNOWN, 10, TunnelNotUp, "within 10 s: the reason"),
        ([udp(SILENT)], NOTHING, 120, TunnelNotUp, "within 120 s: the reason"),
        ([udp(SILENT)], NOTHING, 120, TunnelNotUp, "cannot be asked (no connection). A network"),
        ([websocket(SILENT)], KNOWN, 120, TunnelNotUp, "the reason"),
        ([], KNOWN, 120, TunnelNotUp, "the reason"),
    ],
)
def test_each_kind_of_silence_has_a_name_of_its_own(
    signs: list[Sign], evidence: Evidence, limit_s: float, kind: type[TunnelNotUp], says: str
) -> None:
    failure = judge(signs, evidence, limit_s, "the reason")
    assert type(failure) is kind
    assert says in str(failure)
    assert failure.hint
    assert failure.code is Exit.TUNNEL_NOT_UP


def test_kinds_of_silence_differ_in_id_and_in_whose_fault_it_is() -> None:
    kinds: list[type[TunnelNotUp]] = [TunnelNotUp, *TunnelNotUp.__subclasses__()]
    assert len({kind.kind for kind in kinds}) == len(kinds) == 6
    assert UdpBlocked.blame is Blame.NETWORK
    assert GatewayDown.blame is PeerUnknown.blame is Blame.PLATFORM


async def test_the_witness_asks_for_the_peer_and_for_the_gateway() -> None:
    platform = FakePlatform()
    assert await Witness(platform, CLIENT).ask() == Evidence(True, True)
    platform.installed = False
    assert await Witness(platform, CLIENT).ask() == NOT_YET
    platform.knows_peers = False
    assert await Witness(platform, CLIENT).ask() == Evidence(False, True)
    platform.has_gateway = False
    assert (await Witness(platform, CLIENT).ask()).has_gateway is False
    assert Region("a", "A").available

"""What each way to the gateway looks like while nobody has answered."""

import asyncio
import errno
import socket
from pathlib import Path

import pytest

from builder_orch.selfhost.wgtcpd import Certificate
from builder_orch.tunnel.carrier import BARRED, FAILED, OPEN, REFUSED, SILENT
from builder_orch.tunnel.carrier.proxy import Outside
from builder_orch.tunnel.carrier.race import RaceCarrier
from builder_orch.tunnel.carrier.udp import UdpCarrier
from builder_orch.tunnel.carrier.websocket import Gate, WebSocketCarrier
from builder_orch.tunnel.machine import Datagrams, Endpoint
from tests.tunnel.carrier.gate import Heard, gate


def bound(kind: socket.SocketKind) -> socket.socket:
    sock = socket.socket(socket.AF_INET, kind)
    sock.bind(("127.0.0.1", 0))
    return sock


def hello(to: Endpoint) -> Datagrams:
    return Datagrams(bytes(148), 148, to)


async def state(carrier: WebSocketCarrier) -> str:
    """What it shows once its first try has come to an end."""
    told = asyncio.Event()
    carrier.start(lambda *_: None, told.set)
    assert carrier.signs() == ()
    carrier.open()
    try:
        async with asyncio.timeout(10):
            while not (carrier.is_up or carrier.trouble):
                told.clear()
                await asyncio.wait({asyncio.ensure_future(told.wait())}, timeout=0.05)
        (sign,) = carrier.signs()
        assert (sign.kind, sign.said) == ("websocket", carrier.trouble)
        return sign.state
    finally:
        carrier.close()
        told.set()
        await asyncio.sleep(0)


async def test_udp_that_is_swallowed_is_silent_and_a_closed_port_refuses() -> None:
    with bound(socket.SOCK_DGRAM) as sock:
        where: Endpoint = sock.getsockname()
        settled = asyncio.Event()
        carrier = UdpCarrier.connect(where)
        carrier.start(lambda *_: None, settled.set)
        carrier.send(hello(where))
        (sign,) = carrier.signs()
        assert (sign.kind, sign.state) == ("udp", SILENT)
        assert sign.where == f"{where[0]}:{where[1]}"
    carrier.send(hello(where))
    async with asyncio.timeout(10):
        await settled.wait()
    (sign,) = carrier.signs()
    assert sign.state == REFUSED
    assert "refuses datagrams" in sign.said
    carrier.close()


class Forbidden(socket.socket):
    """A socket behind a firewall of this machine."""

    def sendmsg(self, *given: object) -> int:
        raise PermissionError(errno.EPERM, "not permitted")


async def test_udp_that_this_machine_does_not_let_out_is_barred() -> None:
    with bound(socket.SOCK_DGRAM) as far:
        sock = Forbidden(socket.AF_INET, socket.SOCK_DGRAM)
        sock.connect(far.getsockname())
        carrier = UdpCarrier(sock)
        carrier.start(lambda *_: None, lambda: None)
        carrier.send(hello(far.getsockname()))
        (sign,) = carrier.signs()
        assert (sign.state, sign.said) == (BARRED, "is forbidden by this machine's firewall")
        carrier.close()


async def test_a_gate_is_open_refuses_or_is_none(tmp_path: Path) -> None:
    certificate = Certificate.at(tmp_path / "wgtcpd.pem")
    async with gate(certificate, Heard()) as there:
        assert await state(WebSocketCarrier(there, Outside())) == OPEN
        other = Gate(there.host, there.port, bytes(32))
        assert await state(WebSocketCarrier(other, Outside())) == FAILED
    with bound(socket.SOCK_STREAM) as sock:
        closed = Gate("127.0.0.1", sock.getsockname()[1])
    assert await state(WebSocketCarrier(closed, Outside())) == REFUSED


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (TimeoutError(), SILENT),
        (OSError(errno.ENETUNREACH, "no route"), BARRED),
        (OSError(errno.EHOSTUNREACH, "no route"), BARRED),
        (ConnectionResetError("reset"), FAILED),
    ],
)
async def test_what_keeps_a_connection_from_being_made_is_told_apart(
    monkeypatch: pytest.MonkeyPatch, failure: OSError, expected: str
) -> None:
    async def reach(*_: object) -> None:
        raise failure

    monkeypatch.setattr("builder_orch.tunnel.carrier.websocket.reach", reach)
    assert await state(WebSocketCarrier(Gate("192.0.2.1", 443), Outside())) == expected


async def test_the_race_shows_websocket_only_once_it_was_begun() -> None:
    with bound(socket.SOCK_DGRAM) as far:
        udp = UdpCarrier.connect(far.getsockname())
        websocket = WebSocketCarrier(Gate("127.0.0.1", 1), Outside())
        race = RaceCarrier(udp, websocket)
        race.start(lambda *_: None, lambda: None)
        assert [sign.kind for sign in race.signs()] == ["udp"]
        websocket.open()
        assert [sign.kind for sign in race.signs()] == ["udp", "websocket"]
        race.close()
        await asyncio.sleep(0)

"""wgtcpd with clients that are not ours, rude ones, and whole tunnels through it."""

import asyncio
import contextlib
import hashlib
import os
import socket
import ssl
import stat
import struct
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from ipaddress import IPv6Network
from pathlib import Path

import aiohttp
import pytest
from aiohttp import WSMsgType
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from builder_orch.errors import TunnelNotUp
from builder_orch.selfhost import wgtcpd
from builder_orch.selfhost.gateway import Gateway, open_gateway
from builder_orch.selfhost.wgtcpd import FIRST_WORDS_S, IDLE_S, STUCK_S, Certificate, Wgtcpd
from builder_orch.tunnel.carrier.choice import Choice
from builder_orch.tunnel.carrier.memory import Memory
from builder_orch.tunnel.carrier.udp import UdpCarrier
from builder_orch.tunnel.carrier.websocket import unverified
from builder_orch.tunnel.config import Door, PeerConfig, PrivateKey, PublicKey, TunnelConfig
from builder_orch.tunnel.driver import open_tunnel
from builder_orch.tunnel.machine import Datagrams, Endpoint
from builder_orch.tunnel.stamps import Stamps

MAGIC = bytes.fromhex("2faced77")
NETWORK = IPv6Network("fdaa:0:7::/48")
GATEWAY, SINK, CLIENT = NETWORK[3], NETWORK[16], NETWORK[0xA7B0002]


@dataclass
class Core:
    """What stands behind the carrier: keeps what comes, and can answer."""

    came: list[tuple[bytes, Endpoint]] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def deliver(self, octets: memoryview, segment: int, source: Endpoint) -> None:
        self.came += [
            (bytes(octets[at : at + segment]), source) for at in range(0, len(octets), segment)
        ]

    async def until(self, count: int) -> list[tuple[bytes, Endpoint]]:
        async with asyncio.timeout(20):
            while len(self.came) < count:
                self.changed.clear()
                await self.changed.wait()
        return self.came


class Clock:
    """Stands still until it is told."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class House:
    """A wgtcpd that listens, what is behind it, and its clock."""

    wgtcpd: Wgtcpd
    door: Door
    core: Core
    clock: Clock

    @asynccontextmanager
    async def call(self) -> AsyncGenerator["aiohttp.ClientWebSocketResponse[bool]"]:
        """A client by aiohttp; it has not said the magic yet."""
        url = f"https://127.0.0.1:{self.door.port}/"
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(url, ssl=unverified(), decode_text=False) as client,
        ):
            yield client

    @asynccontextmanager
    async def connect(
        self,
    ) -> AsyncGenerator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A client that has said nothing at all inside TLS."""
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", self.door.port, ssl=unverified()
        )
        try:
            yield reader, writer
        finally:
            writer.transport.abort()
            await _turns()


async def _turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    return Certificate.at(tmp_path / "wgtcpd.pem")


@pytest.fixture
async def house(certificate: Certificate) -> AsyncGenerator[House]:
    core, clock = Core(), Clock()
    both = Wgtcpd(UdpCarrier.bind("127.0.0.1", 0), clock=clock)
    both.start(core.deliver, core.changed.set)
    door = await both.listen(certificate, "127.0.0.1", 0)
    try:
        yield House(both, door, core, clock)
    finally:
        both.close()
        await _turns()


def item(octets: bytes) -> bytes:
    return struct.pack("!I", len(octets)) + octets


def test_a_certificate_is_made_once_and_belongs_to_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "wgtcpd.pem"
    first = Certificate.at(path)
    assert Certificate.at(path) == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("no certificate")
    assert Certificate.at(path).pin != first.pin


@pytest.mark.parametrize("kind", [WSMsgType.TEXT, WSMsgType.BINARY])
async def test_messages_of_either_kind_are_a_stream_of_datagrams(
    house: House, kind: WSMsgType
) -> None:
    async with house.call() as client:
        for message in (MAGIC[:1], MAGIC[1:] + item(b"\xff")[:3], item(b"\xff")[3:] + bytes(4)):
            await client.send_frame(message, kind)
        await client.send_frame(item(b"two") + item(b"four"), kind)
        came = await house.core.until(3)
        assert [octets for octets, _ in came] == [b"\xff", b"two", b"four"]
        source = came[0][1]
        house.wgtcpd.send(Datagrams(b"\xfe\xfdx", 2, source))
        assert (await client.receive()).data == item(b"\xfe\xfd")
        assert (await client.receive()).data == item(b"x")


async def test_a_ping_is_answered(house: House) -> None:
    async with house.call() as client:
        await client.send_frame(MAGIC, WSMsgType.TEXT)
        await client.ping(b"there?")
        house.clock.now += 2
        await client.send_frame(item(b"x"), WSMsgType.TEXT)
        await house.core.until(1)
    assert len(house.core.came) == 1


async def test_each_connection_is_an_endpoint_of_its_own(house: House) -> None:
    async with house.call() as one, house.call() as other:
        for number, client in enumerate((one, other)):
            await client.send_frame(MAGIC, WSMsgType.TEXT)
            await client.send_frame(item(b"from %d" % number), WSMsgType.TEXT)
        for octets, source in await house.core.until(2):
            house.wgtcpd.send(Datagrams(b"to" + octets[4:], 4, source))
        assert (await one.receive()).data == item(b"to 0")
        assert (await other.receive()).data == item(b"to 1")


async def test_what_is_sent_to_a_connection_that_is_gone_is_counted(house: House) -> None:
    house.wgtcpd.send(Datagrams(b"x", 1, ("websocket/192.0.2.1", 4)))
    assert house.wgtcpd.drops["websocket gone"] == 1


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (b"GET ", 1002),
        (MAGIC + struct.pack("!I", 65536), 1009),
        (MAGIC + b"\xff\xff\xff\xff" + bytes(100), 1009),
    ],
)
async def test_a_stream_that_is_none_is_closed(house: House, said: bytes, code: int) -> None:
    async with house.call() as client:
        await client.send_frame(said, WSMsgType.TEXT)
        async with asyncio.timeout(10):
            message = await client.receive()
        assert message.type is WSMsgType.CLOSE
        assert message.data == code
    assert house.core.came == []


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (b"POST / HTTP/1.1\r\n\r\n", b"HTTP/1.1 400 "),
        (b"GET /admin HTTP/1.1\r\n\r\n", b"HTTP/1.1 404 "),
        (b"GET / HTTP/1.1\r\n\r\n", b"HTTP/1.1 426 "),
        (b"\x16\x03\x01" + b"\r\n\r\n", b"HTTP/1.1 400 "),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 5000, b""),
    ],
)
async def test_first_words_that_are_others_are_refused(
    house: House, words: bytes, answer: bytes
) -> None:
    async with house.connect() as (reader, writer):
        writer.write(words)
        async with asyncio.timeout(10):
            assert (await reader.read()).startswith(answer)
    assert len(house.wgtcpd) == 0


async def test_who_does_not_speak_tls_is_hung_up_on_without_a_word_in_the_log(
    house: House,
) -> None:
    told: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\0\2ab", b""):
        reader, writer = await asyncio.open_connection("127.0.0.1", house.door.port)
        writer.write(words)
        writer.write_eof()
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionError):
                await reader.read()
        writer.close()
    await _turns()
    assert len(house.wgtcpd) == 0
    assert told == []


async def test_who_is_slow_with_the_first_words_is_not_waited_for(house: House) -> None:
    async with house.connect() as (reader, writer), house.call() as polite:
        writer.write(b"GET / HTTP/1.1\r\nHost: ")
        await polite.send_frame(MAGIC + item(b"x"), WSMsgType.TEXT)
        await house.core.until(1)
        house.clock.now += FIRST_WORDS_S + 1
        house.wgtcpd.sweep()
        async with asyncio.timeout(10):
            assert await reader.read() == b""
        assert (await polite.receive()).data == bytes(4), "a keepalive"
        assert len(house.wgtcpd) == 1


async def test_who_is_silent_for_a_minute_is_gone(house: House) -> None:
    async with house.call() as client:
        await client.send_frame(MAGIC + item(b"x"), WSMsgType.TEXT)
        await house.core.until(1)
        house.clock.now += IDLE_S + 1
        house.wgtcpd.sweep()
        async with asyncio.timeout(10):
            message = await client.receive()
        assert message.type in {WSMsgType.CLOSED, WSMsgType.CLOSE, WSMsgType.ERROR}
    assert len(house.wgtcpd) == 0


async def test_who_takes_nothing_loses_the_oldest_and_then_the_connection(house: House) -> None:
    async with house.connect() as (reader, writer):
        words = ["GET / HTTP/1.1", "Upgrade: websocket", "Connection: Upgrade"]
        words += ["Sec-WebSocket-Key: eA==", "Sec-WebSocket-Version: 13", "", ""]
        writer.write("\r\n".join(words).encode())
        hello = MAGIC + item(b"x")
        writer.write(bytes([0x82, 0x80 | len(hello)]) + bytes(4) + hello)
        ((_, source),) = await house.core.until(1)
        train = Datagrams(os.urandom(44 * 1452), 1452, source)
        for _ in range(1000):
            house.wgtcpd.send(train)
            # Somebody else is served all the same.
            assert not house.wgtcpd.blocked
            if house.wgtcpd.drops["websocket queue full"]:
                break
            await asyncio.sleep(0)
        assert house.wgtcpd.drops["websocket queue full"]
        house.clock.now += STUCK_S + 1
        house.wgtcpd.sweep()
        await _turns()
        assert len(house.wgtcpd) == 0
        assert not reader.at_eof() or reader.exception() is None


async def test_one_address_may_not_have_all_connections(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wgtcpd, "LINKS_OF_ONE", 2)
    async with house.call() as one, house.call():
        with pytest.raises(aiohttp.ClientError):
            async with house.call():
                raise AssertionError("not reached")
        await one.send_frame(MAGIC + item(b"x"), WSMsgType.TEXT)
        await house.core.until(1)
    assert house.wgtcpd.drops["too many websockets"] >= 1


async def test_hundreds_of_connections_do_not_mix(house: House) -> None:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        url = f"https://127.0.0.1:{house.door.port}/"

        async def converse(number: int) -> None:
            name = b"%04d" % number
            async with session.ws_connect(url, ssl=unverified(), decode_text=False) as client:
                await client.send_frame(MAGIC + item(name), WSMsgType.BINARY)
                assert (await client.receive()).data == item(b"to " + name)

        async def answer() -> None:
            done = 0
            while done < 200:
                await house.core.until(done + 1)
                for octets, source in house.core.came[done:]:
                    house.wgtcpd.send(Datagrams(b"to " + octets, 7, source))
                    done += 1

        async with asyncio.timeout(60):
            await asyncio.gather(answer(), *(converse(number) for number in range(200)))


# -- whole tunnels ------------------------------------------------------------------------------


def public(key: bytes) -> PublicKey:
    return PublicKey(X25519PrivateKey.from_private_bytes(key).public_key().public_bytes_raw())


@dataclass
class Both:
    """A gateway and what a client needs to reach it."""

    gateway: Gateway
    config: TunnelConfig
    choice: Choice
    tasks: list[asyncio.Future[None]] = field(default_factory=list)

    async def swallow(self, _: int) -> socket.socket:
        ours, far = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=far)

        async def digest() -> None:
            writer.write(hashlib.sha256(await reader.read()).digest())
            writer.close()

        self.tasks.append(asyncio.ensure_future(digest()))
        return ours

    def without_udp(self) -> TunnelConfig:
        """The gateway where this machine refuses UDP."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as gone:
            gone.bind(("127.0.0.1", 0))
            endpoint = gone.getsockname()
        (peer,) = self.config.peers
        return replace(self.config, peers=(replace(peer, endpoint=endpoint),))


@pytest.fixture
async def both(tmp_path: Path) -> AsyncGenerator[Both]:
    ours, theirs = PrivateKey(os.urandom(32)), PrivateKey(os.urandom(32))
    async with open_gateway(theirs, GATEWAY, certificate=tmp_path / "wgtcpd.pem") as gateway:
        await gateway.install(public(ours), CLIENT)
        peer = PeerConfig(public(theirs), (NETWORK,), gateway.endpoint)
        config = TunnelConfig(ours, CLIENT, (peer,), dns=GATEWAY)
        door = gateway.websocket
        assert door is not None
        memory = tmp_path / "carriers.json"
        made = Both(gateway, config, Choice("auto", door.port, door.pin, memory=memory))
        gateway.expose(SINK, 7, made.swallow)
        yield made
    await asyncio.gather(*made.tasks, return_exceptions=True)
    await _turns()


async def test_a_tunnel_through_it_carries_octets_exactly(both: Both) -> None:
    choice = replace(both.choice, kind="websocket")
    async with open_tunnel(both.config, choice=choice) as tunnel:
        octets = os.urandom(8 << 20)
        await tunnel.ready(timeout_s=20)
        sock = await tunnel.dial(str(SINK), 7)
        reader, writer = await asyncio.open_connection(sock=sock)
        writer.write(octets)
        writer.write_eof()
        async with asyncio.timeout(60):
            assert await reader.read() == hashlib.sha256(octets).digest()
        writer.close()
        route = await tunnel.route()
        assert (route.kind, route.why) == ("websocket", "asked for")
        assert tunnel.drops() == {}


@dataclass
class Relay:
    """Between a client and wgtcpd, and cut when a test wants it."""

    port: int
    transports: list[asyncio.WriteTransport] = field(default_factory=list)

    async def attend(self, near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        far, forth = await asyncio.open_connection("127.0.0.1", self.port)
        self.transports += [back.transport, forth.transport]
        await asyncio.gather(_copy(near, forth), _copy(far, back))

    def cut(self) -> None:
        for transport in self.transports:
            transport.abort()
        self.transports.clear()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while octets := await reader.read(65536):
            writer.write(octets)
    writer.close()


async def test_a_download_goes_on_when_its_connection_was_cut(both: Both) -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        writer.write(b"one")
        # Nothing more comes from the client: the gateway has to know by itself where it is.
        await cut.wait()
        writer.write(b"two")
        writer.close()

    async def connect(_: int) -> socket.socket:
        ours, far = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=far)
        both.tasks.append(asyncio.ensure_future(speak(reader, writer)))
        return ours

    cut = asyncio.Event()
    both.gateway.expose(SINK, 7, connect)
    relay = Relay(both.choice.port)
    server = await asyncio.start_server(relay.attend, "127.0.0.1", 0)
    choice = replace(both.choice, kind="websocket", port=server.sockets[0].getsockname()[1])
    async with open_tunnel(both.config, choice=choice) as tunnel:
        await tunnel.ready(timeout_s=20)
        sock = await tunnel.dial(str(SINK), 7)
        reader, writer = await asyncio.open_connection(sock=sock)
        writer.write(b"?")
        assert await reader.readexactly(3) == b"one"
        relay.cut()
        cut.set()
        # Long before TCP asks by itself whether the other side is there.
        async with asyncio.timeout(15):
            assert await reader.readexactly(3) == b"two"
        writer.close()
    server.close()
    relay.cut()
    await _turns()


async def test_a_refusal_of_udp_is_no_waiting_time_and_is_remembered(
    both: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The second one begins sooner after the first than a gateway works on handshakes of one peer.
    monkeypatch.setattr("builder_orch.tunnel.wireguard.handshake.INITIATION_SPACING", 0.0)
    config = both.without_udp()
    memory = Memory(both.choice.memory)
    assert both.choice.memory is not None
    stamps = Stamps(both.choice.memory.with_name("stamps"))
    (peer,) = config.peers
    async with open_tunnel(config, choice=both.choice, stamps=stamps) as tunnel:
        reasons: list[str] = []
        await tunnel.ready(timeout_s=20, report=reasons.append)
        route = await tunnel.route()
        assert (route.kind, route.why) == ("websocket", "UDP was refused")
        assert await tunnel.ping(GATEWAY) > 0
    assert peer.endpoint is not None
    assert memory.recall(f"127.0.0.1:{peer.endpoint[1]} from 127.0.0.1") == "websocket"
    async with open_tunnel(config, choice=both.choice, stamps=stamps) as tunnel:
        await tunnel.ready(timeout_s=20)
        route = await tunnel.route()
        assert (route.kind, route.why) == ("websocket", "it answered here before, and again")


async def test_where_udp_answers_nothing_is_connected(both: Both) -> None:
    async with open_tunnel(both.config, choice=both.choice) as tunnel:
        await tunnel.ready(timeout_s=20)
        assert await tunnel.ping(GATEWAY) > 0
        route = await tunnel.route()
        assert (route.kind, route.why) == ("udp", "it answered first")
    # Nobody called: the one descriptor that wgtcpd has is the one it listens with.
    assert both.choice.memory is not None
    assert "websocket" not in both.choice.memory.read_text()


async def test_with_another_key_than_the_pinned_one_nothing_is_carried(both: Both) -> None:
    choice = replace(both.choice, kind="websocket", pin=bytes(32))
    async with open_tunnel(both.config, choice=choice) as tunnel:
        with pytest.raises(TunnelNotUp, match="another key than expected"):
            await tunnel.ready(timeout_s=1)


async def test_a_port_that_is_taken_is_replaced_by_a_free_one(tmp_path: Path) -> None:
    key = PrivateKey(os.urandom(32))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        path = tmp_path / "wgtcpd.pem"
        opening = open_gateway(key, GATEWAY, certificate=path, websocket_port=port)
        async with opening as gateway:
            assert gateway.websocket is not None
            assert gateway.websocket.port not in {0, port}
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            with pytest.raises(ssl.SSLCertVerificationError):
                await asyncio.open_connection("127.0.0.1", gateway.websocket.port, ssl=context)

"""Our client against a WebSocket server that is not ours, directly and through proxies."""

import asyncio
import ipaddress
import os
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from aiohttp import WSMsgType
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from builder_orch.tunnel.carrier.proxy import Outside, ProxyRefused, reach
from builder_orch.tunnel.carrier.websocket import Gate, unverified
from builder_orch.tunnel.machine import Datagrams
from tests.tunnel.carrier.gate import (
    Heard,
    Proxy,
    Received,
    Socks,
    calling,
    certificate_in,
    gate,
    serving,
)

MAGIC = bytes.fromhex("2faced77")


class Pauses:
    """Remembers for how long it should have waited, and lets a test say when that is over."""

    def __init__(self, received: Received, limit: int = 1) -> None:
        self.asked: list[float] = []
        self._received = received
        self._limit = limit

    async def __call__(self, seconds: float) -> None:
        self.asked.append(seconds)
        self._received.settled()
        if len(self.asked) >= self._limit:
            await asyncio.get_running_loop().create_future()


def datagrams(*sent: bytes) -> Datagrams:
    return Datagrams(b"".join(sent), len(sent[0]), ("", 0))


async def test_the_server_hears_what_the_public_client_would_say(tmp_path: Path) -> None:
    heard, received = Heard(), Received()
    async with (
        gate(certificate_in(tmp_path), heard) as target,
        calling(target, received) as carrier,
    ):
        assert not carrier.is_begun
        carrier.send(datagrams(b"\xff\xfe", b"\x80\x81", b"!"))
        await heard.until(4)
        assert heard.messages == [
            (WSMsgType.TEXT, MAGIC),
            (WSMsgType.TEXT, b"\0\0\0\2\xff\xfe"),
            (WSMsgType.TEXT, b"\0\0\0\2\x80\x81"),
            (WSMsgType.TEXT, b"\0\0\0\1!"),
        ]
        (request,) = heard.requests
        assert request.path == "/"
        assert request.headers["Origin"] == f"wss://127.0.0.1:{target.port}/"
        assert "Sec-WebSocket-Protocol" not in request.headers
        assert not {"Authorization", "Cookie"} & set(request.headers)
        assert carrier.route() == ("websocket", f"wss://127.0.0.1:{target.port}", "")


@pytest.mark.parametrize("kind", [WSMsgType.TEXT, WSMsgType.BINARY])
async def test_what_the_server_says_is_a_stream(tmp_path: Path, kind: WSMsgType) -> None:
    heard, received = Heard(), Received()
    async with (
        gate(certificate_in(tmp_path), heard) as target,
        calling(target, received) as carrier,
    ):
        carrier.open()
        await heard.until(1)
        (socket,) = heard.sockets
        for message in (b"\0\0", b"\0\3\xff\xfe", b"\xfd\0\0\0\0\0\0\0\2ok\0\0\0\1."):
            await socket.send_frame(message, kind)
        await socket.ping(b"anybody?")
        await received.until(lambda: len(received.datagrams) == 3)
        assert received.datagrams == [b"\xff\xfe\xfd", b"ok", b"."]
        assert received.sources == {carrier.source}


async def test_an_idle_connection_is_kept_alive(tmp_path: Path) -> None:
    heard, received = Heard(), Received()
    async with (
        gate(certificate_in(tmp_path), heard) as target,
        calling(target, received) as carrier,
    ):
        carrier.open()
        await heard.until(2)
        assert heard.messages[1] == (WSMsgType.TEXT, bytes(4))


async def test_a_key_that_was_pinned_is_the_only_one(tmp_path: Path) -> None:
    heard, received = Heard(), Received()
    certificate = certificate_in(tmp_path)
    async with gate(certificate, heard) as target:
        right = Gate(target.host, target.port, certificate.pin)
        async with calling(right, received) as carrier:
            carrier.open()
            await heard.until(1)
        wrong = Gate(target.host, target.port, bytes(32))
        async with calling(wrong, received) as carrier:
            carrier.open()
            await received.until(lambda: carrier.refusals == 1)
            assert "another key than expected" in carrier.waiting(1)
        assert len(heard.requests) == 1, "nothing is said to whoever that is"


async def test_a_lost_connection_is_made_again_and_begins_with_the_magic(tmp_path: Path) -> None:
    heard, received = Heard(), Received()
    pauses = Pauses(received, limit=10)
    async with (
        gate(certificate_in(tmp_path), heard) as target,
        calling(target, received, pause=pauses) as carrier,
    ):
        carrier.send(datagrams(b"one"))
        await heard.until(2)
        transport = heard.requests[0].transport
        assert transport is not None
        transport.abort()
        await received.until(lambda: not carrier.is_up)
        carrier.send(datagrams(b"two"))
        await heard.until(4)
        kinds = [message for _, message in heard.messages if message != bytes(4)]
        assert kinds == [MAGIC, b"\0\0\0\3one", MAGIC, b"\0\0\0\3two"]


async def test_a_gate_that_is_away_is_asked_ever_less_often() -> None:
    received = Received()
    pauses = Pauses(received, limit=12)
    with_nobody = Gate("127.0.0.1", _free_port())
    async with calling(with_nobody, received, pause=pauses) as carrier:
        carrier.open()
        await received.until(lambda: len(pauses.asked) == 12)
        assert all(1 <= wait <= 30 for wait in pauses.asked)
        assert pauses.asked[:5] == sorted(pauses.asked[:5])
        assert pauses.asked[-1] == 30
        assert "refused" in carrier.waiting(1).lower() or "connect" in carrier.waiting(1).lower()


def _free_port() -> int:
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"HTTP/1.1 403 Forbidden\r\n\r\n", "answered 403 Forbidden"),
        (b"HTTP/1.1 101 Sure\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n", "accept key"),
        (b"HTTP/1.1 101 Sure\r\n\r\n", "without an upgrade"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "no HTTP answer"),
        (b"x" * (17 << 10), "without an end"),
        (b"", "closed by the other side"),
    ],
)
async def test_a_server_that_is_no_gate_is_said_to_be_none(
    tmp_path: Path, answer: bytes, why: str
) -> None:
    async def attend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    received = Received()
    async with serving(attend, certificate_in(tmp_path).context()) as port:
        target = Gate("127.0.0.1", port)
        async with calling(target, received, pause=Pauses(received)) as carrier:
            carrier.open()
            await received.until(lambda: bool(carrier.trouble))
            assert why in carrier.trouble


# -- proxies ------------------------------------------------------------------------------------


@pytest.fixture
def as_if_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loopback is never reached through a proxy; here it is far away."""
    monkeypatch.setattr("builder_orch.tunnel.carrier.proxy._is_local", lambda _: False)


@pytest.mark.usefixtures("as_if_far")
@pytest.mark.parametrize("login", ["", "user:p%40ss@"])
async def test_a_proxy_is_asked_to_connect(tmp_path: Path, login: str) -> None:
    heard, received = Heard(), Received()
    proxy = Proxy(credentials="user:p@ss" if login else "")
    async with gate(certificate_in(tmp_path), heard) as target, proxy.running() as address:
        outside = Outside(f"http://{login}{address}")
        async with calling(target, received, outside=outside) as carrier:
            carrier.send(datagrams(b"through"))
            await heard.until(2)
            assert heard.messages[1][1] == b"\0\0\0\7through"
            await heard.sockets[0].send_frame(b"\0\0\0\4back", WSMsgType.TEXT)
            await received.until(lambda: received.datagrams == [b"back"])
            assert received.sources == {carrier.source}
        assert proxy.asked[0].startswith(f"CONNECT 127.0.0.1:{target.port} HTTP/1.1\r\n")


@pytest.mark.usefixtures("as_if_far")
@pytest.mark.parametrize(
    ("proxy", "why"),
    [
        (Proxy(credentials="user:other"), "wants a name and password, or others (407 Proxy"),
        (Proxy(answer=b"HTTP/1.1 502 Bad Gateway\r\n\r\n"), "refused (502 Bad Gateway)"),
        (Proxy(answer=None), "closed the connection"),
        (Proxy(answer=b"what?\r\n\r\n"), "no HTTP answer"),
    ],
)
async def test_a_proxy_that_does_not_is_named_in_one_line(proxy: Proxy, why: str) -> None:
    received = Received()
    async with proxy.running() as address:
        outside = Outside(f"http://user:secret@{address}")
        target = Gate("127.0.0.1", 443)
        async with calling(target, received, outside=outside, pause=Pauses(received)) as carrier:
            carrier.open()
            await received.until(lambda: bool(carrier.trouble))
            assert why in carrier.trouble
            assert f"the proxy {address}" in carrier.trouble
            assert "secret" not in carrier.waiting(1)
            assert "\n" not in carrier.trouble


@pytest.mark.usefixtures("as_if_far")
async def test_a_proxy_behind_tls_is_verified_with_the_extra_certificates(tmp_path: Path) -> None:
    heard, received = Heard(), Received()
    authority = _certificate_for_loopback(tmp_path / "proxy.pem")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(authority)
    proxy = Proxy()
    async with gate(certificate_in(tmp_path), heard) as target, proxy.running(tls) as address:
        unknown = Outside(f"https://{address}")
        async with calling(target, received, outside=unknown, pause=Pauses(received)) as carrier:
            carrier.open()
            await received.until(lambda: bool(carrier.trouble))
            assert "certificate verify failed" in carrier.trouble.lower()
        assert proxy.asked == []
        known = Outside(f"https://{address}", ca_files=(str(authority),))
        async with calling(target, received, outside=known) as carrier:
            carrier.send(datagrams(b"through"))
            await heard.until(2)
            assert heard.messages[1][1] == b"\0\0\0\7through"


@pytest.mark.usefixtures("as_if_far")
@pytest.mark.parametrize("kind", ["socks5", "socks5h"])
@pytest.mark.parametrize("login", ["", "user:p%40ss@"])
async def test_a_socks_proxy_is_asked_to_connect(tmp_path: Path, kind: str, login: str) -> None:
    heard, received = Heard(), Received()
    proxy = Socks(credentials="user:p@ss" if login else "")
    async with gate(certificate_in(tmp_path), heard) as target, proxy.running() as address:
        outside = Outside(f"{kind}://{login}{address}")
        async with calling(target, received, outside=outside) as carrier:
            carrier.send(datagrams(b"through"))
            await heard.until(2)
            assert heard.messages[1][1] == b"\0\0\0\7through"
            await heard.sockets[0].send_frame(b"\0\0\0\4back", WSMsgType.TEXT)
            await received.until(lambda: received.datagrams == [b"back"])
            assert received.sources == {carrier.source}
        assert proxy.asked == [f"127.0.0.1 {target.port}"]


@pytest.mark.usefixtures("as_if_far")
async def test_who_looks_names_up_is_said_by_the_kind_of_socks(tmp_path: Path) -> None:
    heard, received = Heard(), Received()
    proxy = Socks()
    async with gate(certificate_in(tmp_path), heard) as target, proxy.running() as address:
        for kind, name in (("socks5h", "gateway.invalid"), ("socks5", "localhost")):
            named = Gate(name, target.port)
            async with calling(named, received, outside=Outside(f"{kind}://{address}")) as carrier:
                carrier.open()
                await heard.until(len(proxy.asked) + 1)
        assert proxy.asked[0] == f"gateway.invalid {target.port}"
        assert proxy.asked[1] in {f"127.0.0.1 {target.port}", f"::1 {target.port}"}
        unknown = Gate("gateway.invalid", target.port)
        outside = Outside(f"socks5://{address}")
        async with calling(unknown, received, outside=outside, pause=Pauses(received)) as carrier:
            carrier.open()
            await received.until(lambda: bool(carrier.trouble))
            assert "socks5h lets the proxy do it" in carrier.trouble


@pytest.mark.usefixtures("as_if_far")
@pytest.mark.parametrize(
    ("proxy", "login", "why"),
    [
        (Socks(credentials="user:other"), "user:secret@", "authentication failure"),
        (Socks(credentials="user:other"), "", "No acceptable authentication methods"),
        (Socks(reply=2), "user:secret@", "refused (Connection not allowed by ruleset)"),
        (Socks(reply=5), "user:secret@", "refused (Connection refused by destination host)"),
        (Socks(answer=b""), "user:secret@", "closed unexpectedly"),
        (Socks(answer=b"HTTP/1.1 400 Bad Request\r\n\r\n"), "user:secret@", "version number: 72"),
        (Socks(), "user:%C3%A9secret@", "ASCII, 255 characters"),
        (Socks(), f"user:{'secret' * 50}@", "ASCII, 255 characters"),
    ],
)
async def test_a_socks_proxy_that_does_not_is_named_in_one_line(
    proxy: Socks, login: str, why: str
) -> None:
    received = Received()
    async with proxy.running() as address:
        outside = Outside(f"socks5://{login}{address}")
        target = Gate("127.0.0.1", 443)
        async with calling(target, received, outside=outside, pause=Pauses(received)) as carrier:
            carrier.open()
            await received.until(lambda: bool(carrier.trouble))
            assert why in carrier.trouble
            assert f"the proxy {address}" in carrier.trouble
            assert "secret" not in carrier.waiting(1)
            assert "\n" not in carrier.trouble


@given(
    st.binary(max_size=40)
    | st.tuples(st.sampled_from([b"\5\0", b"\5\2\1\0", b"\5\0\5\0\0\1"]), st.binary()).map(b"".join)
)
@settings(max_examples=60, deadline=None)
def test_whatever_a_socks_proxy_says_only_an_oserror_comes_of_it(said: bytes) -> None:
    async def attend(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        writer.write_eof()

    async def main() -> None:
        async with serving(attend) as port:
            outside = Outside(f"socks5h://user:secret@127.0.0.1:{port}")
            with pytest.raises(OSError, match=r"^(?!.*secret)"):
                await reach("192.0.2.1", 443, unverified(), outside, asyncio.Protocol)

    asyncio.run(main())


def _certificate_for_loopback(path: Path) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a proxy")])
    now = datetime.now(UTC)
    loopback = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([loopback]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(private + made.public_bytes(Encoding.PEM))
    return path


@pytest.mark.parametrize(
    ("exceptions", "host", "direct"),
    [
        ("", "gw.example.com", False),
        ("*", "gw.example.com", True),
        ("example.com", "gw.example.com", True),
        (".example.com", "gw.example.com", True),
        ("example.com", "badexample.com", False),
        ("other, gw.example.com:443", "gw.example.com", True),
        ("gw.example.com:80", "gw.example.com", False),
        ("192.0.2.0/24", "192.0.2.7", True),
        ("192.0.2.0/24", "198.51.100.7", False),
        ("2001:db8::/32", "2001:db8::1", True),
        ("", "localhost", True),
        ("", "127.0.0.1", True),
        ("", "::1", True),
    ],
)
def test_whom_a_proxy_is_not_for(exceptions: str, host: str, direct: bool) -> None:
    outside = Outside("http://proxy.example:3128", exceptions)
    assert (outside.proxy_for(host, 443) is None) is direct


def test_variables_name_the_proxy_and_its_exceptions() -> None:
    variables = {"https_proxy": "p:1", "ALL_PROXY": "q:2", "no_proxy": "a", "SSL_CERT_FILE": "/ca"}
    assert Outside.of(variables) == Outside("p:1", "a", ("/ca",))
    assert Outside.of({"ALL_PROXY": "q:2", "HTTPS_PROXY": ""}) == Outside("q:2")
    assert Outside.of({}).proxy_for("192.0.2.1", 443) is None
    assert "secret" not in repr(Outside("http://user:secret@p"))


@pytest.mark.parametrize("text", ["socks4://p:1", "ftp://p", "http://", "http://p:none"])
def test_a_proxy_of_another_kind_is_said_to_be_unsupported(text: str) -> None:
    with pytest.raises(ProxyRefused, match="prox"):
        Outside(text).proxy_for("192.0.2.1", 443)


async def test_too_much_at_once_drops_the_oldest(tmp_path: Path) -> None:
    heard, received = Heard(), Received()
    async with (
        gate(certificate_in(tmp_path), heard) as target,
        calling(target, received) as carrier,
    ):
        for number in range(100):
            carrier.send(datagrams(bytes([number])))
        await heard.until(65)
        assert heard.messages[1][1] == b"\0\0\0\1" + bytes([36])
        assert carrier.drops["websocket not connected"] == 36


async def test_a_full_connection_blocks_and_drops_the_oldest(tmp_path: Path) -> None:
    blocked, upgraded = asyncio.Event(), asyncio.Event()

    async def attend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        key = next(line for line in head.split(b"\r\n") if b"-Key:" in line).split()[1].decode()
        from builder_orch.tunnel.carrier.upgrade import accept_key

        lines = ["HTTP/1.1 101 x", "Upgrade: websocket", "Connection: Upgrade"]
        lines += [f"Sec-WebSocket-Accept: {accept_key(key)}", "", ""]
        writer.write("\r\n".join(lines).encode() + b"\x81\x05\0\0\0\1.")
        upgraded.set()
        await blocked.wait()
        while await reader.read(1 << 20):
            pass
        writer.close()

    received = Received()
    async with (
        serving(attend, certificate_in(tmp_path).context()) as port,
        calling(Gate("127.0.0.1", port), received) as carrier,
    ):
        carrier.send(datagrams(b"first"))
        async with asyncio.timeout(10):
            await upgraded.wait()
        await received.until(lambda: carrier.is_up)
        train = datagrams(*[os.urandom(1452)] * 44)
        sent = 0
        while not carrier.drops:
            carrier.send(train)
            sent += 1
            assert sent < 1000, "somewhere is a queue without an end"
        assert carrier.blocked
        blocked.set()
        await received.until(lambda: not carrier.blocked)

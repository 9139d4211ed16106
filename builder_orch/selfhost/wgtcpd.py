"""wgtcpd: where clients call that cannot use UDP; WireGuard's datagrams over WebSocket over TLS.

A second carrier of the gateway's tunnel: each connection is an endpoint that a peer may be at, as
an address and port of UDP is. The certificate is our own and proves nothing; WireGuard's keys do.
"""

import asyncio
import resource
import socket
import ssl
import time
from asyncio.sslproto import SSLProtocol
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import structlog
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from builder_orch.errors import PortInUse
from builder_orch.selfhost.home import write_private
from builder_orch.tunnel.carrier import Deliver, Route, Sign
from builder_orch.tunnel.carrier.link import Clock, Link
from builder_orch.tunnel.carrier.udp import UdpCarrier
from builder_orch.tunnel.carrier.upgrade import Head, answer, authority
from builder_orch.tunnel.carrier.websocket import spki_sha256
from builder_orch.tunnel.config import Door
from builder_orch.tunnel.machine import Datagrams, Endpoint, Malformed

FIRST_WORDS_S = 10
"""For TLS, and again for the upgrade and the first message."""
IDLE_S = 60.0
"""Clients send a keepalive every second; one that is silent for so long is gone."""
STUCK_S = 30.0
"""How long a client may take nothing."""
TICK_S = 1.0
LINKS = 4096
LINKS_OF_ONE = 1024
"""Connections in all, and from one address."""
DESCRIPTORS = 2 * LINKS
BACKLOG = 512
FIRST_BUFFER = 16 << 10
FULL_BUFFER = 256 << 10
"""Octets that are read at a time from a new connection, and from one that has filled the first."""
VALID_DAYS = 3650


_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Certificate:
    """A PEM file with a key and a certificate for it; `pin` is what clients may compare."""

    path: Path
    pin: bytes

    @classmethod
    def at(cls, path: Path) -> "Certificate":
        """The one in a file; one that is missing, unreadable or nearly expired is made anew."""
        try:
            found = x509.load_pem_x509_certificate(path.read_bytes())
        except (OSError, ValueError):
            found = None
        if found is None or found.not_valid_after_utc < datetime.now(UTC) + timedelta(days=30):
            found = _make(path)
        return cls(path, spki_sha256(found.public_bytes(Encoding.DER)))

    def context(self) -> ssl.SSLContext:
        """TLS for a server."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self.path)
        return context


def _make(path: Path) -> x509.Certificate:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "wgtcpd")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # A clock that is a little behind ours must not find it too new.
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=VALID_DAYS))
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write_private(path, (private + certificate.public_bytes(Encoding.PEM)).decode("ascii"))
    return certificate


class Called(Link):
    """The server's end of a connection."""

    def __init__(self, owner: "Wgtcpd", clock: Clock) -> None:
        super().__init__(owner, clock, None)
        self._wgtcpd = owner

    def greet(self, transport: asyncio.Transport) -> None:
        if not self._wgtcpd.came(self):
            transport.abort()

    def negotiate(self, head: Head) -> bool:
        words, agrees = answer(head)
        self.write(words)
        if not agrees:
            raise Malformed("no WebSocket request")
        return True


class Tls(SSLProtocol):
    """asyncio's, with a buffer that grows when it is needed. Its own is filled with zeroes at the
    beginning: a gigabyte for LINKS connections that say nothing."""

    max_size = FIRST_BUFFER

    def buffer_updated(self, nbytes: int) -> None:
        """Pass on what came, and be ready for more of it."""
        if nbytes == FIRST_BUFFER:
            self.max_size = FULL_BUFFER  # type: ignore[misc] # nothing keeps it the class's
        super().buffer_updated(nbytes)


class Wgtcpd:
    """A carrier made of two: the UDP socket it was given, and WebSocket once it listens."""

    def __init__(self, udp: UdpCarrier, *, clock: Clock = time.monotonic) -> None:
        self.drops: Counter[str] = Counter()
        self._udp = udp
        self._clock = clock
        self._links: dict[Endpoint, Link] = {}
        self._all: set[Link] = set()
        self._of_one: Counter[str] = Counter()
        self._limit = LINKS
        self._server: asyncio.Server | None = None
        self._ticker: asyncio.TimerHandle | None = None
        self._deliver: Deliver | None = None
        self._settled: Callable[[], None] | None = None

    async def listen(self, certificate: Certificate, host: str, port: int) -> Door:
        """Take calls at this port if it is free, else at another; PortInUse when none is."""
        listener = _listener(host, port)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < DESCRIPTORS and (hard == resource.RLIM_INFINITY or hard > soft):
            soft = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        # The rest of the platform needs descriptors too.
        self._limit = min(LINKS, soft // 2)
        loop, context = asyncio.get_running_loop(), certificate.context()

        def made() -> Tls:
            # As `create_server` does it when it is given the context.
            called = Called(self, self._clock)
            nobody: Any = None  # waits for it, which the annotations do not foresee
            return Tls(loop, called, context, nobody, True, ssl_handshake_timeout=FIRST_WORDS_S)

        self._server = await loop.create_server(made, sock=listener, backlog=BACKLOG)
        self._tick()
        return Door(listener.getsockname()[1], certificate.pin)

    def __len__(self) -> int:
        return len(self._all)

    # -- as a carrier ---------------------------------------------------------------------------

    @property
    def blocked(self) -> bool:
        """Whether UDP takes no more. A slow connection is its own trouble: its oldest is dropped,
        and the others do not wait for it.
        """
        return self._udp.blocked

    @property
    def refusals(self) -> int:
        """Those of UDP."""
        return self._udp.refusals

    def route(self) -> Route:
        """Where peers call."""
        return Route("udp", authority(*self._udp.endpoint), "")

    def waiting(self, attempt: int) -> str:
        """As of UDP: whoever is called, is not called by WebSocket."""
        return self._udp.waiting(attempt)

    def signs(self) -> tuple[Sign, ...]:
        """As of UDP."""
        return self._udp.signs()

    def start(self, deliver: Deliver, settled: Callable[[], None]) -> None:
        """Begin to deliver."""
        self._deliver, self._settled = deliver, settled
        self._udp.start(deliver, settled)

    def send(self, datagrams: Datagrams) -> None:
        """Send to where the peer is."""
        link = self._links.get(datagrams.endpoint)
        if link is not None:
            link.send(datagrams)
        elif datagrams.endpoint[0].startswith("websocket/"):
            self.drops["websocket gone"] += 1
        else:
            self._udp.send(datagrams)

    def close(self) -> None:
        """Close the UDP socket and all connections, and take no more calls."""
        self._deliver = self._settled = None
        if self._ticker is not None:
            self._ticker.cancel()
        if self._server is not None:
            self._server.close()
        for link in list(self._all):
            link.abort("the gateway ends")
        self._udp.close()

    # -- as the owner of links ------------------------------------------------------------------

    def came(self, link: Link) -> bool:
        """A connection is there; False when there are too many."""
        host = link.endpoint[0]
        if len(self._all) >= self._limit or self._of_one[host] >= LINKS_OF_ONE:
            self.drops["too many websockets"] += 1
            return False
        self._all.add(link)
        self._of_one[host] += 1
        return self._deliver is not None

    def opened(self, link: Link) -> None:
        """It speaks our language."""
        self._links[link.endpoint] = link

    def deliver(self, octets: memoryview, segment: int, source: Endpoint) -> None:
        """Pass on what came."""
        if self._deliver is not None:
            self._deliver(octets, segment, source)

    def settled(self) -> None:
        """Pass on that there is a pause."""
        if self._settled is not None:
            self._settled()

    def lost(self, link: Link, reason: str) -> None:
        """A connection is gone."""
        if link not in self._all:
            return
        self._all.discard(link)
        host = link.endpoint[0]
        self._of_one[host] -= 1
        if not self._of_one[host]:
            del self._of_one[host]
        if self._links.get(link.endpoint) is link:
            del self._links[link.endpoint]
        _log.debug("websocket ended", client=link.endpoint, cause=reason)

    def sweep(self) -> None:
        """Send keepalives and end connections that waste our time; called every second."""
        now = self._clock()
        for link in list(self._all):
            if not link.is_open:
                if now - link.began > FIRST_WORDS_S:
                    link.abort("too slow with the first words")
            elif now - link.heard_at > IDLE_S:
                link.abort("silent for too long")
            elif link.paused_at is not None and now - link.paused_at > STUCK_S:
                link.abort("takes nothing")
            else:
                link.tick(now)

    def _tick(self) -> None:
        self.sweep()
        self._ticker = asyncio.get_running_loop().call_later(TICK_S, self._tick)


def _listener(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        if port:
            return _listener(host, 0)
        raise PortInUse(
            f"the gateway cannot listen on TCP {host}: {error.strerror}",
            hint="Choose another address of this machine.",
        ) from None

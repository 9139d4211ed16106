"""The way out of a company: proxies, whom they are not for, and certificates they need."""

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit

from builder_orch.tunnel.carrier.upgrade import Head, authority, connect_request
from builder_orch.tunnel.machine import Malformed

HANDSHAKE_S = 10.0
HTTP, HTTPS, SOCKS, SOCKS_NAMES = "http", "https", "socks5", "socks5h"
PORTS = {HTTP: 80, HTTPS: 443, SOCKS: 1080, SOCKS_NAMES: 1080}
"""The kinds of proxies by the schemes of their URLs, with their usual ports."""
SOCKS_WORD = 255
"""Octets of a name or password (RFC 1929)."""
SOCKS_RULES = 2
"""A reply: not allowed by the proxy's rules (RFC 1928)."""

Reached = TypeVar("Reached", bound=asyncio.Protocol)


class ProxyRefused(OSError):
    """The proxy did not connect us; says why in one line, without credentials.

    `lasting`: would it, or the variable that names it, have to change first?
    """

    def __init__(self, cause: str, *, lasting: bool = False) -> None:
        super().__init__(cause)
        self.lasting = lasting


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy: of HTTP, also spoken to over TLS, or of SOCKS 5, to which socks5h gives names and
    socks5 the addresses that we find for them."""

    host: str
    port: int
    kind: str = HTTP
    user: str = ""
    password: str = field(default="", repr=False)

    @classmethod
    def parse(cls, text: str) -> "Proxy":
        """Read what a variable holds; ProxyRefused for a kind of proxy that is not supported."""
        parts = urlsplit(text if "://" in text else f"http://{text}")
        try:
            port = parts.port
        except ValueError:
            cause = "the proxy's URL has a port that is none"
            raise ProxyRefused(cause, lasting=True) from None
        if parts.scheme not in PORTS:
            kinds = ", ".join(PORTS)
            cause = f"a {parts.scheme} proxy is not supported; these are: {kinds}"
            raise ProxyRefused(cause, lasting=True)
        if not parts.hostname:
            raise ProxyRefused("the proxy's URL names no host", lasting=True)
        user, password = unquote(parts.username or ""), unquote(parts.password or "")
        port = port or PORTS[parts.scheme]
        return cls(parts.hostname, port, parts.scheme, user, password)

    def __str__(self) -> str:
        return authority(self.host, self.port)


@dataclass(frozen=True, slots=True)
class Outside:
    """How to get out of this network. `ca_files` are trusted beside the system's certificates, for
    a proxy that is spoken to over TLS as for servers (the gateway proves itself inside).
    """

    proxy: str = field(default="", repr=False)
    no_proxy: str = ""
    ca_files: tuple[str, ...] = ()

    @classmethod
    def of(cls, variables: Mapping[str, str], scheme: str = HTTPS) -> "Outside":
        """What an environment says for URLs of a scheme; the lower-case names count as well, as
        everywhere."""

        def first(*names: str) -> str:
            both = [each for name in names for each in (name, name.lower())]
            return next((variables[name] for name in both if variables.get(name, "").strip()), "")

        files = first("SSL_CERT_FILE"), first("FLY_BUILD_CA_FILE")
        return cls(
            proxy=first(f"{scheme.upper()}_PROXY", "ALL_PROXY").strip(),
            no_proxy=first("NO_PROXY"),
            ca_files=tuple(file for file in files if file),
        )

    def proxy_for(self, host: str, port: int) -> Proxy | None:
        """The proxy for a host, if one is to be used; ProxyRefused when it cannot be."""
        if not self.proxy or _is_local(host) or self._is_exempt(host.lower(), port):
            return None
        return Proxy.parse(self.proxy)

    def _is_exempt(self, host: str, port: int) -> bool:
        for entry in self.no_proxy.lower().split(","):
            pattern = entry.strip()
            if pattern == "*" or (pattern and _matches(pattern, host, port)):
                return True
        return False

    def verifying(self) -> ssl.SSLContext:
        """TLS towards whom we tell secrets, or believe; OSError names the file that is none."""
        context = ssl.create_default_context()
        # With SSL_CERT_FILE set, OpenSSL takes that file instead of the system's.
        usual = ssl.get_default_verify_paths().openssl_cafile
        if self.ca_files and Path(usual).is_file():
            context.load_verify_locations(usual)
        for file in self.ca_files:
            try:
                context.load_verify_locations(file)
            except OSError as error:
                why = "it holds none" if isinstance(error, ssl.SSLError) else error.strerror
                raise OSError(f"no certificates can be read from {file}: {why}") from None
        return context


def _is_local(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ip_address(host).is_loopback
    return False


def _matches(pattern: str, host: str, port: int) -> bool:
    """One entry of NO_PROXY: a name and those below it, an address, a network, each with a port."""
    with contextlib.suppress(ValueError):
        return ip_address(host) in ip_network(pattern, strict=False)
    name, colon, number = pattern.rpartition(":")
    if colon and number.isdecimal():
        if int(number) != port:
            return False
        pattern = name
    pattern = pattern.removeprefix("*").removeprefix(".").removeprefix("[").removesuffix("]")
    return host == pattern or host.endswith("." + pattern)


async def reach(
    host: str, port: int, tls: ssl.SSLContext | None, outside: Outside, made: Callable[[], Reached]
) -> Reached:
    """A protocol of ours at the far end, over TLS if there is `tls`, through a proxy where one is
    to be used.

    OSError (ssl.SSLError is one) or ProxyRefused say why not.
    """
    loop = asyncio.get_running_loop()
    proxy = outside.proxy_for(host, port)
    name = None if tls is None else host
    handshake_s = None if tls is None else HANDSHAKE_S
    if proxy is None:
        _, protocol = await loop.create_connection(
            made, host, port, ssl=tls, server_hostname=name, ssl_handshake_timeout=handshake_s
        )
        return protocol
    if proxy.kind in {SOCKS, SOCKS_NAMES}:
        sock = await _by_socks(proxy, host, port)
        _, protocol = await loop.create_connection(
            made, sock=sock, ssl=tls, server_hostname=name, ssl_handshake_timeout=handshake_s
        )
        return protocol
    transport = await _through(proxy, host, port, outside)
    protocol = made()
    if tls is None:
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        return protocol
    try:
        secured = await loop.start_tls(
            transport, protocol, tls, server_hostname=host, ssl_handshake_timeout=HANDSHAKE_S
        )
    except BaseException:
        transport.abort()
        raise
    assert secured is not None
    protocol.connection_made(secured)
    return protocol


def _cause(error: BaseException | None) -> str:
    """What the system says; asyncio's words are about its own calls."""
    number = 0 if isinstance(error, ssl.SSLError) else getattr(error, "errno", None) or 0
    return os.strerror(number) if number > 0 else str(getattr(error, "strerror", None) or error)


class _Asking(asyncio.Protocol):
    """Waits for a proxy's answer. Nobody else speaks before we do, so nothing follows the head."""

    def __init__(self) -> None:
        self.answered: asyncio.Future[Head] = asyncio.get_running_loop().create_future()
        self._head = Head()

    def data_received(self, data: bytes) -> None:
        if self.answered.done():
            return
        try:
            if self._head.receive(data):
                self.answered.set_result(self._head)
        except Malformed as error:
            self.answered.set_exception(error)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.answered.done():
            why = f": {exc}" if exc else ""
            self.answered.set_exception(ConnectionResetError(f"closed the connection{why}"))


async def _through(proxy: Proxy, host: str, port: int, outside: Outside) -> asyncio.Transport:
    """A connection that the proxy passes on."""
    loop = asyncio.get_running_loop()
    try:
        transport, asking = await loop.create_connection(
            _Asking,
            proxy.host,
            proxy.port,
            ssl=outside.verifying() if proxy.kind == HTTPS else None,
        )
    except OSError as error:
        raise ProxyRefused(f"the proxy {proxy} cannot be reached: {_cause(error)}") from None
    try:
        credentials = f"{proxy.user}:{proxy.password}" if proxy.user else ""
        transport.write(connect_request(host, port, credentials))
        head = await asking.answered
        code, reason = head.status()
    except (Malformed, ConnectionResetError) as error:
        transport.abort()
        raise ProxyRefused(f"the proxy {proxy} {error}") from None
    except BaseException:
        transport.abort()
        raise
    if code // 100 == 2:
        return transport
    transport.abort()
    wants = "wants a name and password, or others" if code == 407 else "refused"
    raise ProxyRefused(f"the proxy {proxy} {wants} ({code} {reason})", lasting=code // 100 == 4)


async def _by_socks(proxy: Proxy, host: str, port: int) -> socket.socket:
    """A connected socket that the proxy passes on (RFC 1928, RFC 1929)."""
    from python_socks import ProxyConnectionError, ProxyError, ProxyType
    from python_socks.async_.asyncio import Proxy as Socks

    for word in (proxy.user, proxy.password):
        if len(word) > SOCKS_WORD or not word.isascii():
            what = f"a name and password of ASCII, {SOCKS_WORD} characters each"
            raise ProxyRefused(f"the proxy {proxy} can be told {what}", lasting=True)
    asking = Socks(
        ProxyType.SOCKS5,
        proxy.host,
        proxy.port,
        proxy.user or None,
        proxy.password or None,
        rdns=proxy.kind == SOCKS_NAMES,
    )
    try:
        return await asking.connect(host, port)
    except ProxyConnectionError as error:
        raise ProxyRefused(
            f"the proxy {proxy} cannot be reached: {_cause(error.__cause__)}"
        ) from None
    except socket.gaierror as error:
        why = f"{host} cannot be resolved here ({error.strerror}); socks5h lets the proxy do it"
        raise ProxyRefused(f"the proxy {proxy} is not asked: {why}") from None
    except ProxyError as error:
        # Without a code it is a login, or no SOCKS at all; with one, what RFC 1928 section 6 says.
        lasting = error.error_code in {None, SOCKS_RULES}
        raise ProxyRefused(f"the proxy {proxy} refused ({error})", lasting=lasting) from None
    except (OSError, ValueError) as error:
        # A ValueError is what the library makes of addresses that are none.
        raise ProxyRefused(f"the proxy {proxy} refused ({error})") from None

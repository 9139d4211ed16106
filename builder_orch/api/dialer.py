"""How an HTTP request leaves this network: the one way of the API and of what is fetched by URL.

Connections go by the proxy that `Outside` names, if any; a proxy is asked as it is for the tunnel's
WebSockets. What is said over TLS is said to the far end: the proxy hears a name and a port.
"""

import asyncio
from ssl import SSLCertVerificationError, SSLError
from typing import Final

from aiohttp import (
    BaseConnector,
    ClientConnectorCertificateError,
    ClientConnectorError,
    ClientConnectorSSLError,
    ClientRequest,
    ClientTimeout,
    TCPConnector,
)
from aiohttp.client_proto import ResponseHandler
from aiohttp.tracing import Trace
from yarl import URL

from builder_orch.errors import UsageFailure
from builder_orch.tunnel.carrier.proxy import HTTP, HTTPS, Outside, Proxy, ProxyRefused, reach

IDLE_S: Final = 4.0
"""Connections idle for longer are not used again: a mutation that meets one which the other end is
just closing cannot be told from one that was carried out."""


def proxy_for(url: URL, outside: Outside) -> Proxy | None:
    """The proxy that a URL is reached by; UsageFailure when what names it cannot be used."""
    try:
        return outside.proxy_for(url.host or "", url.port or 0)
    except ProxyRefused as refused:
        raise UsageFailure(
            f"{url.host} is to be reached by a proxy: {refused}",
            hint="Correct HTTPS_PROXY, HTTP_PROXY or ALL_PROXY, or name the host in NO_PROXY.",
        ) from None


def passes_on(proxy: Proxy, url: URL) -> bool:
    """Is a request of this URL for the proxy to make? Plain ones are, with proxies of HTTP: those
    commonly connect to port 443 only."""
    return url.scheme == HTTP and proxy.kind in {HTTP, HTTPS}


def connector(url: URL, outside: Outside) -> BaseConnector:
    """What makes connections to the URL's origin; needs a running loop.

    Certificates are always checked. A request that the proxy `passes_on` has to name it as well.
    UsageFailure says which variable or which file of certificates is wrong.
    """
    proxy = proxy_for(url, outside)
    if proxy is not None and not passes_on(proxy, url):
        return _Through(proxy, outside)
    try:
        tls = outside.verifying() if outside.ca_files else True
    except OSError as error:
        raise _untrusting(error) from None
    return TCPConnector(keepalive_timeout=IDLE_S, ssl=tls)


class _Through(BaseConnector):
    """Connections that a proxy makes for us and does not look into."""

    def __init__(self, proxy: Proxy, outside: Outside) -> None:
        super().__init__(keepalive_timeout=IDLE_S)
        self._proxy = proxy
        self._outside = outside
        try:
            self._tls = outside.verifying()
        except OSError as error:
            raise _untrusting(error) from None

    async def _create_connection(
        self,
        req: ClientRequest,
        traces: list[Trace],  # noqa: ARG002 (aiohttp's signature)
        timeout: ClientTimeout,  # noqa: ASYNC109 (aiohttp's signature)
    ) -> ResponseHandler:
        host, port = (req.url.host or "").rstrip("."), req.port or 0
        key = req.connection_key
        tls = self._tls if req.is_ssl() else None
        try:
            async with asyncio.timeout(timeout.sock_connect):
                return await reach(host, port, tls, self._outside, self._factory)
        except TimeoutError:
            cause = f"the proxy {self._proxy} did not connect us in {timeout.sock_connect:g} s"
            raise ClientConnectorError(key, ProxyRefused(cause)) from None
        except SSLCertVerificationError as error:
            raise ClientConnectorCertificateError(key, error) from error
        except SSLError as error:
            raise ClientConnectorSSLError(key, error) from error
        except OSError as error:
            raise ClientConnectorError(key, error) from error


def _untrusting(error: OSError) -> UsageFailure:
    return UsageFailure(str(error), hint="Correct SSL_CERT_FILE or FLY_BUILD_CA_FILE.")

"""One HTTP exchange: the token for one origin only, no redirects, an answer of bounded size."""

from collections.abc import Callable
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from time import time
from typing import Final

from aiohttp import ClientHandlerType, ClientRequest, ClientResponse, DummyCookieJar
from aiohttp.hdrs import AUTHORIZATION, DATE, RETRY_AFTER
from gql.transport.aiohttp import AIOHTTPTransport
from yarl import URL

from builder_orch import __version__
from builder_orch.api.dialer import connector
from builder_orch.api.failures import BadStatus, Elsewhere, TooLarge
from builder_orch.api.models import Secret
from builder_orch.errors import NotLoggedIn, UsageFailure
from builder_orch.tunnel.carrier.proxy import Outside

ANSWER_LIMIT: Final = 16 << 20
"""Octets of one answer after decompression."""

_SAID_LIMIT: Final = 4096
_MACAROONS: Final = ("fm1r_", "fm1a_", "fm2_")


def authorization(token: Secret) -> Secret:
    """The header's value: scheme `FlyV1` for lists with a macaroon in them, else `Bearer`.

    A scheme that was pasted along with the token is taken off. NotLoggedIn when nothing is left, or
    something that no header may hold.
    """
    words = token.reveal().strip().split(" ")
    text = " ".join(words[words[0] in {"Bearer", "FlyV1"} :]).strip()
    if not text:
        raise NotLoggedIn("there is no token", hint="log in, or set FLY_API_TOKEN")
    if not text.isascii() or not text.isprintable() or " " in text:
        raise NotLoggedIn(
            "the token holds characters that no token has",
            hint="copy it again, whole and on one line",
        )
    macaroon = any(part.startswith(_MACAROONS) for part in text.split(","))
    return Secret(f"{'FlyV1' if macaroon else 'Bearer'} {text}")


def checked_url(text: str) -> URL:
    """The URL of an API, if a token may be sent there; UsageFailure otherwise."""
    try:
        url = URL(text)
        origin = url.origin()
    except ValueError:
        raise UsageFailure(
            "the API URL is not a URL", hint="it looks like https://api.fly.io/graphql"
        ) from None
    if url.user is not None or url.password is not None:
        raise UsageFailure(
            "the API URL holds credentials", hint="give the token by environment or login instead"
        )
    if origin.scheme not in {"http", "https"}:
        raise UsageFailure(f"the API URL has the scheme {origin.scheme}", hint="use https")
    if origin.scheme == "http" and not is_this_machine(url):
        raise UsageFailure(
            f"the token would travel to {url.host} in clear",
            hint="use https; plain http is for this machine only",
        )
    return url


def is_this_machine(url: URL) -> bool:
    """Does the URL name a server on this machine?"""
    host = url.host or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Bounded(ClientResponse):
    """A response whose body, once decompressed, may not pass the limit."""

    async def read(self) -> bytes:
        if self._body is None:
            body = bytearray()
            async for chunk in self.content.iter_any():
                body += chunk
                if len(body) > ANSWER_LIMIT:
                    self.close()
                    raise TooLarge(f"the answer is over {ANSWER_LIMIT >> 20} MB")
            self._body = bytes(body)
        return self._body


def open_transport(
    url: URL,
    token: Secret,
    *,
    outside: Outside,
    dated: Callable[[str | None], None] = lambda _: None,
) -> AIOHTTPTransport:
    """gql's transport, still to be connected; needs a running loop.

    Certificates are always checked. A proxy of `outside` connects us and hears no more. `dated` is
    given the Date of each answer.
    """
    value = authorization(token)
    origin = url.origin()
    # Plain http is for this machine: whatever else is said, no proxy reads the token.
    way = outside if url.scheme == "https" else Outside()

    async def guard(request: ClientRequest, handler: ClientHandlerType) -> ClientResponse:
        """The one place that attaches the token, and that judges what HTTP answered."""
        if request.url.origin() != origin:
            raise Elsewhere("the request would have left for another host")
        request.headers[AUTHORIZATION] = value.reveal()
        response = await handler(request)
        dated(response.headers.get(DATE))
        try:
            await _judge(response)
        except BaseException:
            response.close()
            raise
        return response

    return AIOHTTPTransport(
        url=str(url),
        ssl=True,
        headers={"User-Agent": f"fly-build/{__version__}"},
        client_session_args={
            "connector": connector(url, way),
            "cookie_jar": DummyCookieJar(),
            "middlewares": (guard,),
            "response_class": _Bounded,
        },
    )


async def _judge(response: ClientResponse) -> None:
    """BadStatus for an answer that is none of GraphQL's."""
    status = response.status
    if 300 <= status < 400:
        raise BadStatus(status)
    body = await response.read()
    if status in {401, 403, 429} or status >= 500:
        said = body[:_SAID_LIMIT].decode("utf-8", "replace")
        raise BadStatus(status, said=said, wait_s=_retry_after(response.headers.get(RETRY_AFTER)))


def _retry_after(text: str | None) -> float | None:
    """Seconds to wait by RFC 9110 section 10.2.3, which allows a number or a date."""
    if text is None:
        return None
    if text.isascii() and text.isdecimal():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time())
    except (ValueError, OverflowError):
        return None

"""What goes wrong between us and a platform, and what each kind becomes; the one such table."""

import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from ssl import SSLCertVerificationError, SSLError
from typing import Final

from aiohttp import (
    ClientConnectorCertificateError,
    ClientConnectorDNSError,
    ClientConnectorError,
    ClientOSError,
    ClientPayloadError,
    ClientProxyConnectionError,
    ConnectionTimeoutError,
    ServerDisconnectedError,
    ServerTimeoutError,
)
from gql.transport.exceptions import (
    TransportConnectionFailed,
    TransportError,
    TransportProtocolError,
    TransportServerError,
)

from builder_orch.api.models import printable
from builder_orch.errors import (
    AppUnknown,
    BuilderOrchError,
    NotAllowed,
    NotLoggedIn,
    PlatformRefused,
    PlatformUnavailable,
)
from builder_orch.tunnel.carrier.proxy import ProxyRefused

MESSAGE_LIMIT: Final = 500
"""Characters of a server's own words that we repeat."""
ERRORS_SHOWN: Final = 3

LATER: Final = "try again later; if it stays so, ask those who run the platform"
"""The next step where nothing but time can help."""
_REACH: Final = (
    "check the API URL (--api-url or FLY_BUILD_API_URL), the network and any proxy between"
)
_PROXY: Final = (
    "correct HTTPS_PROXY or ALL_PROXY, name the API's host in NO_PROXY if no proxy leads to it, or "
    "ask those who run the proxy"
)
_LOGIN: Final = (
    "give a token that is still valid in FLY_BUILD_TOKEN, or in the file FLY_BUILD_TOKEN_FILE names"
)
_CLOCK: Final = (
    "clock skew? If that is not the date and time now, set this machine's clock, best by the "
    "network: timedatectl set-ntp true. If it is, those who run the platform must renew it"
)
_TRUST: Final = (
    "the server's certificate is not one that this machine trusts; somebody may be listening in, "
    "or a private authority is missing (SSL_CERT_FILE)"
)
# OpenSSL X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED
_OUTSIDE_ITS_TIME: Final = frozenset({9, 10})


class Trouble(Exception):
    """A try that failed though the request may be good.

    `sent`: may the server have acted on it? `lasting`: would the next try fail likewise?
    `wait_s`: how long the server asked to be left alone.
    """

    def __init__(
        self,
        cause: str,
        *,
        sent: bool,
        hint: str = LATER,
        wait_s: float | None = None,
        lasting: bool = False,
    ) -> None:
        super().__init__(cause)
        self.sent = sent
        self.hint = hint
        self.wait_s = wait_s
        self.lasting = lasting


class BadStatus(Exception):
    """An HTTP status that carries no GraphQL answer; `said` is the body's beginning."""

    def __init__(self, status: int, *, said: str = "", wait_s: float | None = None) -> None:
        super().__init__(f"HTTP status {status}")
        self.status = status
        self.said = said
        self.wait_s = wait_s


class Elsewhere(Exception):
    """A request, or a redirect, to another origin than the configured one."""


class TooLarge(Exception):
    """An answer over the size limit."""


@dataclass(frozen=True, slots=True)
class _Rule:
    """GraphQL errors whose code is one of `codes` (any, if empty) and whose words match."""

    codes: frozenset[str]
    words: re.Pattern[str]
    leaf: type[BuilderOrchError]
    says: str
    hint: str


_ANY: Final = re.compile("")
_UNAUTHORIZED: Final = frozenset({"UNAUTHORIZED", "UNAUTHENTICATED"})
_RULES: Final = (
    _Rule(
        _UNAUTHORIZED,
        re.compile("expired", re.IGNORECASE),
        NotLoggedIn,
        "the token has expired",
        _LOGIN,
    ),
    # Fly.io says UNAUTHORIZED also to a good token that does not reach far enough
    _Rule(
        _UNAUTHORIZED,
        re.compile(r"not authori[sz]ed to|permission|forbidden|not allowed", re.IGNORECASE),
        NotAllowed,
        "the token does not reach this far",
        "use a token with the right scope, or ask an owner of the organization",
    ),
    _Rule(_UNAUTHORIZED, _ANY, NotLoggedIn, "the platform does not accept the token", _LOGIN),
    _Rule(
        frozenset({"FORBIDDEN"}),
        _ANY,
        NotAllowed,
        "the token does not reach this far",
        "use a token with the right scope, or ask an owner of the organization",
    ),
    _Rule(
        frozenset({"NOT_FOUND"}),
        _ANY,
        AppUnknown,
        "the platform does not know it",
        "check the name, and that the token reaches its organization",
    ),
    _Rule(
        frozenset(),
        re.compile("could not find app", re.IGNORECASE),
        AppUnknown,
        "the platform does not know the app",
        "check the app's name, and that the token reaches its organization",
    ),
    _Rule(
        frozenset({"SERVER_ERROR", "INTERNAL_SERVER_ERROR", "SERVICE_UNAVAILABLE", "MAINTENANCE"}),
        _ANY,
        PlatformUnavailable,
        "the platform failed",
        LATER,
    ),
    _Rule(
        frozenset(),
        _ANY,
        PlatformRefused,
        "the platform refused",
        "the words after the colon are the platform's own",
    ),
)


def from_errors(errors: object) -> BuilderOrchError | Trouble:
    """The `errors` of a GraphQL answer, whatever their form, as one failure."""
    items = errors if isinstance(errors, list) else [errors]
    said: list[str] = []
    code = ""
    for item in items[:ERRORS_SHOWN]:
        fields: dict[str, object] = item if isinstance(item, dict) else {"message": str(item)}
        said.append(printable(str(fields.get("message", "")), MESSAGE_LIMIT))
        extensions = fields.get("extensions")
        if not code and isinstance(extensions, dict):
            code = str(extensions.get("code", ""))
    words = "; ".join(text for text in said if text) or "no message"
    rule = next(
        rule
        for rule in _RULES
        if (not rule.codes or code in rule.codes) and rule.words.search(words)
    )
    message = f"{rule.says}: {words}"
    if rule.leaf is PlatformUnavailable:
        return Trouble(message, sent=True, hint=rule.hint)
    return rule.leaf(message, hint=rule.hint)


def from_transport(error: TransportError) -> BuilderOrchError | Trouble:
    """What the transport raised as the failure that it is a sign of."""
    if isinstance(error, TransportServerError):
        return _from_status(BadStatus(error.code or 0))
    if isinstance(error, TransportProtocolError):
        return Trouble(
            "the answer is not GraphQL",
            sent=True,
            hint="check that the API URL is right and that no proxy answers in its place",
            lasting=True,
        )
    if isinstance(error, TransportConnectionFailed) and error.__cause__ is not None:
        return _from_cause(error.__cause__)
    return Trouble(printable(str(error), MESSAGE_LIMIT), sent=True)


def _from_status(answer: BadStatus) -> BuilderOrchError | Trouble:
    status, said = answer.status, printable(answer.said, MESSAGE_LIMIT)
    if status == 401:
        expired = "expired" in said.lower()
        says = "the token has expired" if expired else "the platform does not accept the token"
        return NotLoggedIn(says, hint=_LOGIN)
    if status == 403:
        return NotAllowed(
            "the platform, or something before it, forbids this",
            hint="check the token's scope, and whether a proxy or firewall answers instead",
        )
    if 300 <= status < 400:
        return Trouble(
            "the platform redirects, and a token is not carried along",
            sent=True,
            hint="set the API URL to where it points, if you trust that place",
            lasting=True,
        )
    if status == 429:
        # a request over the limit is refused, not carried out (RFC 6585 section 4)
        return Trouble("too many requests", sent=False, wait_s=answer.wait_s)
    lasting = status < 500
    hint = _REACH if lasting else LATER
    cause = f"HTTP status {status}"
    return Trouble(cause, sent=True, hint=hint, wait_s=answer.wait_s, lasting=lasting)


def _from_cause(cause: BaseException) -> BuilderOrchError | Trouble:
    match cause:
        case BadStatus():
            return _from_status(cause)
        case TooLarge() | Elsewhere():
            return Trouble(str(cause), sent=True, hint=_REACH, lasting=True)
        case ClientConnectorCertificateError():
            return _from_certificate(cause.certificate_error)
        case ConnectionTimeoutError():
            return Trouble("no connection within the time for one", sent=False, hint=_REACH)
        case ClientConnectorError():
            refused = cause.os_error if isinstance(cause.os_error, ProxyRefused) else None
            lasting = refused is not None and refused.lasting
            hint = _REACH if refused is None else _PROXY
            return Trouble(unconnected(cause), sent=False, hint=hint, lasting=lasting)
        case ServerTimeoutError() | TimeoutError():
            return Trouble("no answer within the time for one try", sent=True)
        case ServerDisconnectedError() | ConnectionResetError():
            return Trouble("the connection broke before the answer", sent=True)
        case ClientPayloadError():
            return Trouble("the connection broke within the answer", sent=True)
        case ClientOSError():
            return Trouble(f"the connection broke: {_reason(cause)}", sent=True)
        case _:
            words = printable(f"{type(cause).__name__}: {cause}", MESSAGE_LIMIT)
            return Trouble(words, sent=True)


def unconnected(error: ClientConnectorError) -> str:
    """What could not be connected to and why, in words for people."""
    if isinstance(error.os_error, ProxyRefused):
        return printable(str(error.os_error), MESSAGE_LIMIT)
    if isinstance(error, ClientConnectorDNSError):
        return f"no address for {error.host}"
    place = f"[{error.host}]" if ":" in error.host else error.host
    proxy = "the proxy " if isinstance(error, ClientProxyConnectionError) else ""
    return f"no connection to {proxy}{place}:{error.port}: {_reason(error.os_error)}"


def _reason(error: OSError) -> str:
    """What the system says; asyncio's words are about its own calls, and may be of several."""
    if isinstance(error, SSLError):
        words = getattr(error, "reason", "") or str(error)
        return f"no TLS with what answers there ({printable(words)})"
    numbers = [error.errno] if error.errno else map(int, re.findall(r"\[Errno (\d+)\]", str(error)))
    reasons = list(dict.fromkeys(os.strerror(number) for number in numbers))
    return "; ".join(reasons) or printable(error.strerror or str(error), MESSAGE_LIMIT)


def _from_certificate(error: Exception) -> Trouble:
    words = printable(str(error), MESSAGE_LIMIT)
    hint = _TRUST
    if isinstance(error, SSLCertVerificationError):
        words = printable(error.verify_message or words)
        if error.verify_code in _OUTSIDE_ITS_TIME:
            words += f" by this machine's clock, which says {_now():%Y-%m-%d %H:%M} UTC"
            hint = _CLOCK
    return Trouble(f"the server's certificate: {words}", sent=False, hint=hint, lasting=True)


def _now() -> datetime:
    return datetime.now(UTC)

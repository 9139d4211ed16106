"""What a platform answers, parsed and checked once; a value that is here can be trusted in form."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from hmac import compare_digest
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Final, NoReturn, Self
from unicodedata import category

from builder_orch.errors import PlatformRefused
from builder_orch.tunnel.config import Door, PublicKey, decode_key
from builder_orch.tunnel.machine import Endpoint

PRIVATE_NETWORK: Final = IPv6Network("fdaa::/16")
"""Every address inside a tunnel, of whatever organization, is in here."""
WIREGUARD_PORT: Final = 51820
"""Where a gateway listens when the platform names only its host."""
TEXT_LIMIT: Final = 4096
"""Characters in one field, at most."""
NODE_LIMIT: Final = 1000
"""Items in one list, at most."""

_HOST_NAME: Final = re.compile(
    r"(?=.{1,253}\Z)(?!-)[A-Za-z0-9-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*\Z"
)
# Separators and marks that reorder or break what a terminal shows; Cc and Cs come by category.
_UNPRINTABLE: Final = frozenset(
    "\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)
_HINT: Final = "the answer of the platform cannot be used; check that the API URL is the right one"


class Secret:
    """A text that no print, log, format or pickle shows; `reveal` is the one way to it."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """The text itself, for the one place that must send it."""
        return self._text

    def __repr__(self) -> str:
        return "***"

    def __format__(self, spec: str) -> str:
        return "***"

    def __bool__(self) -> bool:
        return bool(self._text)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return compare_digest(self._text.encode(), other._text.encode())

    def __hash__(self) -> int:
        return hash((Secret, self._text))

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is not written down")


def is_printable(text: str) -> bool:
    """Is it free of control characters, line breaks and marks that reorder text?"""
    return not any(category(c) in {"Cc", "Cs"} or c in _UNPRINTABLE for c in text)


def printable(text: str, limit: int = TEXT_LIMIT) -> str:
    """Somebody else's text made fit for a terminal: one line, no controls, at most `limit` long."""
    shown = "".join(c if is_printable(c) else " " for c in text[: 4 * limit])
    shown = " ".join(shown.split())
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


class Answer:
    """An object of a GraphQL answer that remembers where it was found.

    Each method takes one field out of it and raises PlatformRefused with the field's whole name
    when it is missing or is not what it should be. `extensions` is what the platform said beside
    the data, in whatever form: nobody has to know any of it.
    """

    def __init__(self, value: object, path: str, extensions: object = None) -> None:
        self._path = path
        self.extensions = extensions
        self._fields: dict[str, object] = value if isinstance(value, dict) else {}
        if not isinstance(value, dict):
            raise self.refusal("is not an object")

    def refusal(self, why: str, field: str | None = None) -> PlatformRefused:
        """The error that names the field, or this object, and says what is wrong with it."""
        where = self._path if field is None else f"{self._path}.{field}"
        return PlatformRefused(f"the platform's answer was refused: {where} {why}", hint=_HINT)

    def has(self, field: str) -> bool:
        """Is the field there and not null?"""
        return self._fields.get(field) is not None

    def at(self, field: str) -> "Answer":
        """An object inside this one."""
        return Answer(self._fields.get(field), f"{self._path}.{field}", self.extensions)

    def text(self, field: str, *, empty: bool = False) -> str:
        """A line of text without control characters."""
        value = self._fields.get(field)
        if not isinstance(value, str):
            raise self.refusal("is missing or is not text", field)
        if not value and not empty:
            raise self.refusal("is empty", field)
        if len(value) > TEXT_LIMIT:
            raise self.refusal(f"is longer than {TEXT_LIMIT} characters", field)
        if not is_printable(value):
            raise self.refusal("holds control characters", field)
        return value

    def maybe_text(self, field: str) -> str:
        """Text as from `text`; "" when the field is null."""
        return self.text(field, empty=True) if self.has(field) else ""

    def prose(self, field: str) -> str:
        """Text for people, which may have lines: made printable instead of refused."""
        value = self._fields.get(field)
        return printable(value) if isinstance(value, str) else ""

    def number(self, field: str) -> int:
        """A whole number that is not negative."""
        value = self._fields.get(field)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.refusal("is missing or is not a whole number", field)
        return value

    def flag(self, field: str) -> bool:
        """True or false."""
        value = self._fields.get(field)
        if not isinstance(value, bool):
            raise self.refusal("is missing or is neither true nor false", field)
        return value

    def texts(self, field: str) -> list[str]:
        """A list of lines."""
        path = f"{self._path}.{field}"
        return [Answer({"item": item}, path).text("item") for item in self.items(field)]

    def nodes(self, field: str) -> list["Answer"]:
        """The objects of a connection."""
        inner = self.at(field)
        return [Answer(item, f"{self._path}.{field}.nodes") for item in inner.items("nodes")]

    def key(self, field: str) -> PublicKey:
        """A WireGuard public key: 32 octets in base64, not all zero."""
        try:
            key = decode_key(self.text(field))
        except ValueError as error:
            raise self.refusal(f"is not a key: {error}", field) from None
        if not any(key):
            raise self.refusal("is a key of zeroes", field)
        return PublicKey(key)

    def address(self, field: str) -> IPv6Address:
        """An address inside the tunnel."""
        try:
            address = _private_address(self.text(field))
        except ValueError as error:
            raise self.refusal(str(error), field) from None
        return address

    def parsed(self, field: str, parse: Callable[[str], object]) -> str:
        """Text that `parse` accepts; its ValueError becomes the refusal."""
        text = self.text(field)
        try:
            parse(text)
        except ValueError as error:
            raise self.refusal(str(error), field) from None
        return text

    def items(self, field: str) -> list[object]:
        """A list of a bounded length."""
        value = self._fields.get(field)
        if not isinstance(value, list):
            raise self.refusal("is missing or is not a list", field)
        if len(value) > NODE_LIMIT:
            raise self.refusal(f"has more than {NODE_LIMIT} items", field)
        return value


def _private_address(text: str) -> IPv6Address:
    try:
        address = IPv6Address(text)
    except ValueError:
        raise ValueError("is not an IPv6 address") from None
    if address.scope_id is not None or address not in PRIVATE_NETWORK:
        raise ValueError(f"is not inside {PRIVATE_NETWORK}")
    return address


def split_endpoint(text: str, *, local: bool = False) -> Endpoint:
    """Read `host`, `host:port`, `address` or `[address]:port`; ValueError says what is wrong.

    Without `local` an address has to be global unicast: a platform somewhere else has no business
    to send our datagrams to this machine, its neighbours or a metadata service. Link-local,
    multicast and unspecified addresses are never right.
    """
    host, port = _split(text)
    try:
        address = ip_address(host)
    except ValueError:
        if not _HOST_NAME.match(host) or host.rpartition(".")[2].isdigit():
            raise ValueError("is not a host or host:port") from None
        if not local and (host.lower() == "localhost" or host.lower().endswith(".localhost")):
            raise ValueError("names this machine") from None
        return host, port
    if isinstance(address, IPv6Address):
        if address.scope_id is not None:
            raise ValueError("has a scope")
        address = address.ipv4_mapped or address
    if address.is_multicast or address.is_unspecified or address.is_link_local:
        raise ValueError("is not an address that a gateway can have")
    if not local and not _is_public(address):
        raise ValueError("is not a public address")
    return str(address), port


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    return address.is_global and not address.is_reserved


def _split(text: str) -> Endpoint:
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or ":" not in host:
            raise ValueError("is not [address]:port")
        if rest and not rest.startswith(":"):
            raise ValueError("is not [address]:port")
        return host, _port(rest[1:]) if rest else WIREGUARD_PORT
    if text.count(":") == 1:
        host, _, port = text.partition(":")
        return host, _port(port)
    return text, WIREGUARD_PORT


def _port(text: str) -> int:
    # isdecimal alone lets other scripts' digits through
    if not (text.isascii() and text.isdecimal() and len(text) <= 5 and 1 <= int(text) <= 65535):
        raise ValueError("has a port that is none")
    return int(text)


@dataclass(frozen=True, slots=True)
class Organization:
    """Who owns apps; `id` is the platform's own name for it, `slug` the people's."""

    id: str
    slug: str
    name: str
    raw_slug: str = ""
    personal: bool = False

    @classmethod
    def parse(cls, answer: Answer) -> Self:
        """From `{id slug rawSlug name type}`."""
        return cls(
            id=answer.text("id"),
            slug=answer.text("slug"),
            name=answer.text("name"),
            raw_slug=answer.maybe_text("rawSlug"),
            personal=answer.maybe_text("type") == "PERSONAL",
        )


@dataclass(frozen=True, slots=True)
class App:
    """What is deployed; `hostname` is "" where the platform has none for it."""

    id: str
    name: str
    organization: Organization
    status: str = ""
    hostname: str = ""

    @classmethod
    def parse(cls, answer: Answer) -> Self:
        """From `{id name status hostname organization{...}}`."""
        return cls(
            id=answer.text("id"),
            name=answer.text("name"),
            organization=Organization.parse(answer.at("organization")),
            status=answer.maybe_text("status"),
            hostname=answer.maybe_text("hostname"),
        )


@dataclass(frozen=True, slots=True)
class Region:
    """A place with a gateway, and whether the platform says that this one works."""

    code: str
    name: str
    available: bool = True

    @classmethod
    def parse(cls, answer: Answer) -> Self:
        """From `{code name gatewayAvailable}`."""
        available = not answer.has("gatewayAvailable") or answer.flag("gatewayAvailable")
        return cls(code=answer.text("code"), name=answer.text("name"), available=available)


@dataclass(frozen=True, slots=True)
class Granted:
    """A peer as the platform lists it; `key` is the peer's own."""

    name: str
    address: IPv6Address
    key: PublicKey
    region: str

    @classmethod
    def parse(cls, answer: Answer) -> Self:
        """From `{name peerip pubkey region}`."""
        return cls(
            name=answer.text("name"),
            address=answer.address("peerip"),
            key=answer.key("pubkey"),
            region=answer.maybe_text("region"),
        )


@dataclass(frozen=True, slots=True)
class Peer:
    """What a gateway granted: our address, and where and who the gateway is.

    `endpoint` is a host, an address, `host:port` or `[address]:port`, as `split_endpoint` reads it.
    `door` is where that host takes WebSockets, if the platform says so.
    """

    address: IPv6Address
    endpoint: str
    gateway_key: PublicKey
    door: Door | None = None

    @classmethod
    def parse(cls, answer: Answer, *, local: bool = False) -> Self:
        """From `{peerip endpointip pubkey}` and what `told_door` reads; `local` as for
        `split_endpoint`."""
        return cls(
            address=answer.address("peerip"),
            endpoint=answer.parsed("endpointip", lambda text: split_endpoint(text, local=local)),
            gateway_key=answer.key("pubkey"),
            door=told_door(answer.extensions),
        )


def told_door(extensions: object) -> Door | None:
    """Where WebSockets are taken, by the extension `wgtcpd: {port spkiSha256}`; None where that is
    not said clearly: most platforms say nothing, and what others mean by the word is not known."""
    match extensions:
        case {"wgtcpd": {"port": int(port), "spkiSha256": str(pin)}}:
            try:
                return Door.parse(f"{port} {pin}")
            except ValueError:
                return None
        case _:
            return None


def told_installed(extensions: object, address: IPv6Address) -> bool | None:
    """Whether its gateway answers a peer, by the extension `gateway: {installedPeerIps}`; None
    where that is not said."""
    match extensions:
        case {"gateway": {"installedPeerIps": [*told]}}:
            return str(address) in told
        case _:
            return None


@dataclass(frozen=True, slots=True)
class Builder:
    """A machine with a Docker engine at `address`, reached through the tunnel."""

    app_name: str
    machine_id: str
    state: str
    address: IPv6Address

    @classmethod
    def parse(cls, answer: Answer) -> Self:
        """From `{app{name} machine{id state ips{nodes{kind ip}}}}`."""
        machine = answer.at("machine")
        return cls(
            app_name=answer.at("app").text("name"),
            machine_id=machine.text("id"),
            state=machine.text("state"),
            address=_private_ips(machine, required=True)[0],
        )


@dataclass(frozen=True, slots=True)
class Build:
    """The platform's record of one build."""

    id: str
    status: str

    @classmethod
    def parse(cls, answer: Answer) -> Self:
        """From `{id status}`."""
        return cls(id=answer.text("id"), status=answer.text("status"))


@dataclass(frozen=True, slots=True)
class Release:
    """One version of an app. `addresses` are those of its machines that run, inside the tunnel."""

    id: str
    version: int
    status: str
    in_progress: bool
    reason: str = ""
    image: str = ""
    hostname: str = ""
    addresses: tuple[IPv6Address, ...] = ()

    @classmethod
    def parse(cls, answer: Answer, app: Answer | None = None) -> Self:
        """From `{id version status inProgress reason imageRef}` and, where asked for, its app."""
        addresses: list[IPv6Address] = []
        if app is not None and app.has("machines"):
            for machine in app.nodes("machines"):
                if machine.text("state") == "started":
                    addresses += _private_ips(machine)
        return cls(
            id=answer.text("id"),
            version=answer.number("version"),
            status=answer.text("status"),
            in_progress=answer.flag("inProgress"),
            reason=answer.prose("reason"),
            image=answer.maybe_text("imageRef"),
            hostname=app.maybe_text("hostname") if app is not None else "",
            addresses=tuple(addresses),
        )


def _private_ips(machine: Answer, *, required: bool = False) -> list[IPv6Address]:
    nodes = [node for node in machine.nodes("ips") if node.text("kind") == "privatenet"]
    if required and not nodes:
        raise machine.refusal("holds no address inside the private network", "ips")
    return [node.address("ip") for node in nodes]

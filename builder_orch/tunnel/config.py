"""What a tunnel is made of: keys, addresses and peers, in the text form of wg-quick(8)."""

from base64 import b64decode, b64encode
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Address, IPv6Interface, IPv6Network, ip_address, ip_network
from typing import NamedTuple, NewType, Self

from builder_orch.tunnel.machine import Endpoint

PrivateKey = NewType("PrivateKey", bytes)
PublicKey = NewType("PublicKey", bytes)

KEY_LEN = 32
DEFAULT_MTU = 1420
MINIMUM_MTU = 1280
NO_PRESHARED_KEY = bytes(KEY_LEN)
PIN_LEN = 32


def encode_key(key: bytes) -> str:
    """32 octets as the 44 characters that `wg` prints."""
    return b64encode(key).decode("ascii")


def decode_key(text: str) -> bytes:
    """The inverse of `encode_key`; ValueError for anything but 32 octets of base64."""
    try:
        key = b64decode(text, validate=True)
    except ValueError:
        raise ValueError("a key is 32 octets in base64") from None
    if len(key) != KEY_LEN:
        raise ValueError(f"a key is 32 octets in base64, this one has {len(key)}")
    return key


class Door(NamedTuple):
    """Where a gateway takes WebSockets, beside UDP: a TCP port of the same host, and the SHA-256 of
    the public key (SubjectPublicKeyInfo) that callers meet there."""

    port: int
    pin: bytes

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `port hexadecimal`, as `str` writes it; ValueError for anything else."""
        port, _, pin = text.partition(" ")
        made = cls(_port(port), bytes.fromhex(pin))
        if made.port == 0 or len(made.pin) != PIN_LEN:
            raise ValueError("a WebSocket is a TCP port and a SHA-256 in hexadecimal")
        return made

    def __str__(self) -> str:
        return f"{self.port} {self.pin.hex()}"


@dataclass(frozen=True, slots=True)
class PeerConfig:
    """One [Peer]. Without an endpoint it calls us, which is how a gateway sees its clients.

    `door` is a line of our own in the text form, which wg-quick(8) does not know.
    """

    public_key: PublicKey
    allowed: tuple[IPv6Network, ...]
    endpoint: Endpoint | None = None
    keepalive_s: float | None = None
    preshared_key: bytes = field(default=NO_PRESHARED_KEY, repr=False)
    door: Door | None = None


@dataclass(frozen=True, slots=True)
class TunnelConfig:
    """[Interface] and its peers: a client has one, a gateway many."""

    private_key: PrivateKey = field(repr=False)
    address: IPv6Address
    peers: tuple[PeerConfig, ...]
    dns: IPv6Address | None = None
    listen_port: int = 0
    mtu: int = DEFAULT_MTU

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read wg-quick text; ValueError names the line. IPv4 addresses and routes are passed over,
        the keys that only a root-owned interface could honour (PostUp, Table ...) as well."""
        interface: dict[str, str] = {}
        peers: list[dict[str, str]] = []
        section: dict[str, str] | None = None
        for number, line in _lines(text):
            if line.startswith("["):
                name = line.lower()
                if name == "[interface]":
                    section = interface
                elif name == "[peer]":
                    section = {}
                    peers.append(section)
                else:
                    raise ValueError(f"line {number}: unknown section {line}")
                continue
            key, equals, value = line.partition("=")
            if not equals or section is None:
                raise ValueError(f"line {number}: expected `Name = value` inside a section")
            name, value = key.strip().lower(), value.strip()
            _check(name, value, number)
            section[name] = f"{section[name]}, {value}" if name in section else value
        if "privatekey" not in interface or "address" not in interface:
            raise ValueError("[Interface] needs PrivateKey and Address")
        address = _first_ipv6(interface["address"])
        if address is None:
            raise ValueError("[Interface] needs an IPv6 Address")
        return cls(
            private_key=PrivateKey(decode_key(interface["privatekey"])),
            address=address,
            peers=tuple(_peer(fields) for fields in peers),
            dns=_first_ipv6(interface.get("dns", "")),
            listen_port=int(interface.get("listenport", "0")),
            mtu=int(interface.get("mtu", str(DEFAULT_MTU))),
        )

    def dump(self) -> str:
        """wg-quick text that holds the private key; `parse(dump()) == self`."""
        lines = ["[Interface]", f"PrivateKey = {encode_key(self.private_key)}"]
        lines.append(f"Address = {self.address}/128")
        if self.dns is not None:
            lines.append(f"DNS = {self.dns}")
        if self.listen_port:
            lines.append(f"ListenPort = {self.listen_port}")
        lines.append(f"MTU = {self.mtu}")
        for peer in self.peers:
            lines += ["", "[Peer]", f"PublicKey = {encode_key(peer.public_key)}"]
            if peer.preshared_key != NO_PRESHARED_KEY:
                lines.append(f"PresharedKey = {encode_key(peer.preshared_key)}")
            lines.append(f"AllowedIPs = {', '.join(str(network) for network in peer.allowed)}")
            if peer.endpoint is not None:
                host, port = peer.endpoint
                lines.append(f"Endpoint = {f'[{host}]' if ':' in host else host}:{port}")
            if peer.keepalive_s is not None:
                lines.append(f"PersistentKeepalive = {peer.keepalive_s:g}")
            if peer.door is not None:
                lines.append(f"WebSocket = {peer.door}")
        return "\n".join(lines) + "\n"


def _lines(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.partition("#")[0].strip()
        if stripped:
            yield number, stripped


def _check(name: str, value: str, number: int) -> None:
    """Parse each value once where its line number is still known."""
    try:
        match name:
            case "privatekey" | "publickey" | "presharedkey":
                decode_key(value)
            case "address" | "allowedips":
                for part in value.split(","):
                    if part.strip():
                        ip_network(part.strip(), strict=False)
            case "endpoint":
                _endpoint(value)
            case "mtu":
                if int(value) < MINIMUM_MTU:
                    raise ValueError(f"IPv6 needs an MTU of at least {MINIMUM_MTU}")  # noqa: TRY301
            case "listenport":
                _port(value)
            case "persistentkeepalive":
                _keepalive(value)
            case "websocket":
                Door.parse(value)
            case _:
                pass
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from None


def _peer(fields: dict[str, str]) -> PeerConfig:
    if "publickey" not in fields:
        raise ValueError("[Peer] needs PublicKey")
    parts = [part.strip() for part in fields.get("allowedips", "").split(",")]
    networks = [ip_network(part, strict=False) for part in parts if part]
    return PeerConfig(
        public_key=PublicKey(decode_key(fields["publickey"])),
        allowed=tuple(net for net in networks if not isinstance(net, IPv4Network)),
        endpoint=_endpoint(fields["endpoint"]) if "endpoint" in fields else None,
        keepalive_s=_keepalive(fields.get("persistentkeepalive", "off")),
        preshared_key=decode_key(fields["presharedkey"])
        if "presharedkey" in fields
        else NO_PRESHARED_KEY,
        door=Door.parse(fields["websocket"]) if "websocket" in fields else None,
    )


def _first_ipv6(text: str) -> IPv6Address | None:
    for part in (part.strip() for part in text.split(",")):
        if part and isinstance(ip_address(part.partition("/")[0]), IPv6Address):
            return IPv6Interface(part).ip
    return None


def _endpoint(text: str) -> Endpoint:
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host:
        raise ValueError(f"an endpoint is host:port, not {text!r}")
    return host, _port(port)


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise ValueError(f"{port} is not a port")
    return port


def _keepalive(text: str) -> float | None:
    return None if text in {"off", "0"} else float(int(text))

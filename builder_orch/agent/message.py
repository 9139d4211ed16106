"""What clients ask of the agent: from octets to requests that are known to be well formed.

Frames are those of `tunnel.control`, but their sender may be anybody's program, so they are small
and judged before anything is done. No I/O, no clock; whatever comes, only Malformed goes out.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv6Address

from builder_orch.tunnel.carrier.choice import KINDS, Choice
from builder_orch.tunnel.control import LENGTH, Message
from builder_orch.tunnel.machine import Malformed

REQUEST_LIMIT = 1 << 16
TEXT_LIMIT = 4096
TIMEOUT_LIMIT_S = 3600.0


@dataclass(frozen=True, slots=True)
class Hello:
    """The first request: which protocols and which release the client is."""

    id: int
    protocols: tuple[int, int]
    version: str


@dataclass(frozen=True, slots=True)
class Status:
    """What the agent holds."""

    id: int


@dataclass(frozen=True, slots=True)
class Retire:
    """Listen no more and end with the last stream; `now` resets the streams instead."""

    id: int
    now: bool


@dataclass(frozen=True, slots=True)
class Open:
    """Use the tunnel that a file of this user describes, reached as `choice` says."""

    id: int
    path: str
    choice: Choice


@dataclass(frozen=True, slots=True)
class Use:
    """Something of the opened tunnel, as `tunnel.host.Host` carries it out."""

    id: int
    message: Message


Request = Hello | Status | Retire | Open | Use


class Frames:
    """Puts messages together; what is not complete yet is never more than one frame."""

    def __init__(self) -> None:
        self._octets = bytearray()

    @property
    def partial(self) -> bool:
        """Whether a message has begun and not ended."""
        return bool(self._octets)

    def receive(self, octets: bytes) -> list[Message]:
        """The messages that are complete with these octets; Malformed if it cannot be one."""
        self._octets += octets
        found: list[Message] = []
        begin = 0
        while len(self._octets) - begin >= LENGTH.size:
            (size,) = LENGTH.unpack_from(self._octets, begin)
            if size > REQUEST_LIMIT:
                raise Malformed(f"a request of {size} octets")
            end = begin + LENGTH.size + size
            if len(self._octets) < end:
                break
            found.append(_object(bytes(self._octets[begin + LENGTH.size : end])))
            begin = end
        del self._octets[:begin]
        return found


def frame(message: Message) -> bytes:
    """The octets of one message."""
    text = json.dumps(message).encode()
    return LENGTH.pack(len(text)) + text


def parse(message: Message) -> Request:
    """What a message asks for; Malformed if nothing that is known."""
    number = message.get("id")
    # A bool is an int for isinstance.
    if type(number) is not int:
        raise Malformed("a request has a number")
    match message:
        case {"do": "hello", "protocols": [int(first), int(last)], "version": str(version)}:
            return Hello(number, (first, last), _text(version))
        case {"do": "status"}:
            return Status(number)
        case {"do": "retire", "now": bool(now)}:
            return Retire(number, now)
        case {"do": "open", "path": str(path), "carrier": carrier}:
            if not path.startswith("/") or "\0" in path:
                raise Malformed("a path begins with /")
            return Open(number, _text(path), _choice(carrier))
        case _:
            return Use(number, _use(message))


def _object(text: bytes) -> Message:
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        raise Malformed("no JSON") from None
    if not isinstance(message, dict):
        raise Malformed("a message is an object")
    return message


def _use(message: Message) -> Message:
    """Only the members that the host knows, each of the right kind."""
    _timeout(message)
    match message:
        case {"do": "dial", "host": str(host), "port": int(port)}:
            if isinstance(port, bool) or not 0 < port <= 65535:
                raise Malformed("a port is from 1 to 65535")
            return _only(message, "host", "port", "timeout_s") | {"host": _text(host)}
        case {"do": "resolve", "name": str(name)}:
            return _only(message, "name") | {"name": _text(name)}
        case {"do": "ping", "address": str(address)}:
            try:
                IPv6Address(address)
            except AddressValueError:
                raise Malformed("no IPv6 address") from None
            return _only(message, "address", "timeout_s")
        case {"do": "ready"}:
            return _only(message, "timeout_s")
        case {"do": "moved", "from": [str(), str(), str()]}:
            return _only(message, "from")
        case {"do": "route" | "drops" | "signs" | "twin"}:
            return _only(message)
        case _:
            raise Malformed("an unknown request")


def _only(message: Message, *names: str) -> Message:
    return {name: message[name] for name in ("id", "do", *names) if name in message}


def _timeout(message: Mapping[str, object]) -> None:
    value = message.get("timeout_s", 1.0)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Malformed("a timeout is a number")
    # An integer may be too large for a float, so it is compared before it is converted.
    if not 0 < value <= TIMEOUT_LIMIT_S or not math.isfinite(value):
        raise Malformed(f"a timeout is at most {TIMEOUT_LIMIT_S:g} s")


def _text(value: str) -> str:
    if not value or len(value) > TEXT_LIMIT or not value.isprintable():
        raise Malformed("a text that cannot be one")
    return value


def _choice(dumped: object) -> Choice:
    try:
        choice = Choice.load(dumped)
    except ValueError:
        raise Malformed("no choice of a carrier") from None
    if choice.kind not in KINDS or not 0 <= choice.port <= 65535:
        raise Malformed("no choice of a carrier")
    return choice

"""What members of the network may ask of the builder's engine: what builds need, and no rights over
the machine that it runs on.

A connection carries one request: the engine is told to close it after the answer, so that nothing
follows unseen what was let through. A stream that the engine makes of it (BuildKit, `run -i`) is
passed on as it is. (Docker Engine API 1.41; Go's decoder takes the names of fields in any case.)
"""

import asyncio
import json
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final, Self
from urllib.parse import unquote

from builder_orch.tunnel.forward import splice

HEAD_OCTETS: Final = 64 << 10
BODY_OCTETS: Final = 1 << 20
"""The largest body that is read before it is let through: what makes a container is JSON."""
CHUNK: Final = 64 << 10
READING: Final = frozenset({"GET", "HEAD"})

_FIRST = re.compile(rb"([A-Z]{1,16}) (/[!-~]*) HTTP/1\.[01]")
_FIELD = re.compile(rb"[!#-'*+.^-z|~0-9A-Z-]+:[^\r\n\x00]*")
_VERSION = re.compile(r"/v[0-9.]+(?=/)")
_WRITTEN = re.compile(
    r"/(build|build/prune|build/cancel|session|grpc|auth|commit|(images|containers|exec|volumes)/.+)"
)
"""What may be written to: neither plugins, swarms and their services, nor networks."""
_READ_FIRST = re.compile(r"/(containers|volumes)/.+|/exec/.+/start")
_VOLUME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*:[^:]+(:[a-zA-Z,]*)?")


class Refused(Exception):
    """A request that is not passed on, and the status that says so."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


def forbidden(given: object) -> str:
    """What in the JSON of a request would give rights over the machine; "" for nothing."""
    for part in (given, *_values(given, "hostconfig")):
        for name, wrong in _RULES.items():
            for value in _values(part, name):
                if wrong(value):
                    return f"{name} {json.dumps(value)[:100]}"
    return ""


def _values(given: object, name: str) -> Iterator[object]:
    if isinstance(given, dict):
        yield from (value for key, value in given.items() if key.casefold() == name)


def _any(wrong: Callable[[object], bool]) -> Callable[[object], bool]:
    """Whether one of a list is wrong; what should be a list and is none is taken for its only."""
    return lambda value: (
        value is not None and any(map(wrong, value if isinstance(value, list) else [value]))
    )


def _but(*allowed: object) -> Callable[[object], bool]:
    return lambda value: value not in (None, "", *allowed)


def _reaches_out(mount: object) -> bool:
    kinds = list(_values(mount, "type"))
    options = (
        one for each in _values(mount, "volumeoptions") for one in _values(each, "driverconfig")
    )
    return not kinds or any(kind not in ("volume", "tmpfs") for kind in kinds) or any(options)


_RULES: Final[dict[str, Callable[[object], bool]]] = {
    "privileged": bool,
    "capadd": bool,
    "devices": bool,
    "devicerequests": bool,
    "devicecgrouprules": bool,
    "driveropts": bool,
    "binds": _any(lambda one: not _VOLUME.fullmatch(str(one))),
    "mounts": _any(_reaches_out),
    "securityopt": _any(lambda one: one != "no-new-privileges"),
    "driver": _but("local"),
    "volumedriver": _but("local"),
    "runtime": _but("runc"),
    # Even an empty list takes away what is masked otherwise.
    "maskedpaths": lambda value: value is not None,
    "readonlypaths": lambda value: value is not None,
    **dict.fromkeys(
        ("networkmode", "pidmode", "ipcmode", "utsmode", "usernsmode", "cgroupnsmode"),
        lambda value: value == "host",
    ),
}
"""By the name of a field in small letters: whether a value of it is out of the question."""


@dataclass(frozen=True, slots=True)
class Request:
    """The head of an HTTP/1.1 request; `lines` are those of its fields, `path` has no version."""

    first: bytes
    method: str
    path: str
    lines: tuple[bytes, ...]

    @classmethod
    def parse(cls, head: bytes) -> Self:
        """Read it, without its empty last line; Refused where the engine could read another."""
        first, *lines = head.split(b"\r\n")
        found = _FIRST.fullmatch(first)
        if found is None or any(_FIELD.fullmatch(line) is None for line in lines):
            raise Refused(HTTPStatus.BAD_REQUEST, "no plain HTTP/1.1 request")
        path = unquote(found[2].decode().partition("?")[0])
        if {"", ".", ".."} & set(path.split("/")[1:]):
            raise Refused(HTTPStatus.BAD_REQUEST, f"not a plain path: {path}")
        return cls(first, found[1].decode(), _VERSION.sub("", path, count=1), tuple(lines))

    def values(self, name: bytes) -> list[bytes]:
        """Those of one field."""
        pairs = (line.partition(b":") for line in self.lines)
        return [value.strip() for key, _, value in pairs if key.lower() == name]

    def head(self, *, body: bytes | None = None) -> bytes:
        """It again as the only one of its connection; with its body, if that was read."""
        own = {b"connection"} | (set() if body is None else {b"content-length", b"expect"})
        kept = [line for line in self.lines if line.partition(b":")[0].lower() not in own]
        also = b"Upgrade, close" if self.values(b"upgrade") else b"close"
        length = [] if body is None else [b"Content-Length: %d" % len(body)]
        return b"\r\n".join([self.first, b"Connection: " + also, *length, *kept, b"", body or b""])


async def attend(near: socket.socket, engine: socket.socket) -> None:
    """Pass one request and all that comes of it on to the engine, or refuse it; owns both."""
    loop = asyncio.get_running_loop()
    try:
        try:
            octets = await _checked(near)
        except Refused as refused:
            await loop.sock_sendall(near, _answer(refused))
            return
        if octets:
            await loop.sock_sendall(engine, octets)
            await splice(near, engine)
    except OSError:
        # Either side went away; the other sees it by the end of its connection.
        return
    finally:
        near.close()
        engine.close()


async def _checked(near: socket.socket) -> bytes:
    """What the engine may be given of a connection so far; nothing where nothing was asked."""
    octets = bytearray()
    while (end := octets.find(b"\r\n\r\n")) < 0:
        if len(octets) > HEAD_OCTETS:
            raise Refused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "its head is too long")
        if not await _more(near, octets):
            return b""
    request, rest = Request.parse(bytes(octets[:end])), octets[end + 4 :]
    if request.method in READING:
        return request.head() + rest
    if _WRITTEN.fullmatch(request.path) is None:
        raise _not_here(f"{request.method} {request.path}")
    if request.method != "POST" or _READ_FIRST.fullmatch(request.path) is None:
        return request.head() + rest
    body = await _body(request, near, rest)
    if not body.strip():
        return request.head(body=b"")
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(HTTPStatus.BAD_REQUEST, "its body is no JSON") from None
    if what := forbidden(given):
        raise _not_here(what)
    # As it was understood here, so that the engine cannot understand it otherwise.
    return request.head(body=json.dumps(given).encode())


async def _body(request: Request, near: socket.socket, rest: bytearray) -> bytes:
    lengths = request.values(b"content-length") or [b"0"]
    if request.values(b"transfer-encoding") or len(lengths) > 1 or not lengths[0].isdigit():
        raise Refused(HTTPStatus.LENGTH_REQUIRED, "its body needs a Content-Length")
    length = int(lengths[0])
    if length > BODY_OCTETS:
        raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "its body is too long")
    while len(rest) < length:
        if not await _more(near, rest):
            raise Refused(HTTPStatus.BAD_REQUEST, "its body ends too early")
    return bytes(rest[:length])


async def _more(near: socket.socket, octets: bytearray) -> bool:
    came = await asyncio.get_running_loop().sock_recv(near, CHUNK)
    octets += came
    return bool(came)


def _not_here(what: str) -> Refused:
    return Refused(HTTPStatus.FORBIDDEN, f"the builder is for builds, and does not allow {what}")


def _answer(refused: Refused) -> bytes:
    body = json.dumps({"message": str(refused)}).encode()
    head = f"HTTP/1.1 {refused.status.value} {refused.status.phrase}\r\n"
    fields = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return f"{head}{fields}Connection: close\r\n\r\n".encode() + body

"""The messages of BuildKit that a build needs, with the field numbers of its .proto files.

control.proto (moby.buildkit.v1), wire.proto and stat.proto (fsutil.types), auth.proto,
secrets.proto, ssh.proto.
"""

import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Self

from builder_orch.buildkit.wire import (
    bytes_field,
    entry,
    fields,
    map_field,
    message_field,
    number_field,
    raw,
    signed,
    text,
    text_field,
    whole,
)
from builder_orch.tunnel.machine import Malformed

_GO_KINDS = (
    (stat.S_ISDIR, 1 << 31),
    (stat.S_ISLNK, 1 << 27),
    (stat.S_ISFIFO, 1 << 25),
    (stat.S_ISSOCK, 1 << 24),
    (stat.S_ISBLK, 1 << 26),
    (stat.S_ISCHR, 1 << 26 | 1 << 21),
)
_GO_BITS = ((stat.S_ISUID, 1 << 23), (stat.S_ISGID, 1 << 22), (stat.S_ISVTX, 1 << 20))


def go_mode(mode: int) -> int:
    """An st_mode in the bits of Go's io/fs.FileMode."""
    made = mode & 0o777
    for is_kind, bit in _GO_KINDS:
        if is_kind(mode):
            made |= bit
    for theirs, bit in _GO_BITS:
        if mode & theirs:
            made |= bit
    return made


class PacketKind(IntEnum):
    """What a packet of DiffCopy is for."""

    STAT = 0
    REQ = 1
    DATA = 2
    FIN = 3
    ERR = 4


@dataclass(frozen=True, slots=True)
class Stat:
    """What a file is; `mode` in Go's bits, `mtime_ns` since 1970, owner and group always 0."""

    path: str
    mode: int
    size: int = 0
    mtime_ns: int = 0
    linkname: str = ""
    xattrs: Mapping[str, bytes] = field(default_factory=dict)

    def encode(self) -> bytes:
        """As octets."""
        return (
            text_field(1, self.path)
            + number_field(2, self.mode)
            + number_field(5, self.size)
            + number_field(6, self.mtime_ns)
            + text_field(7, self.linkname)
            + map_field(10, self.xattrs)
        )


@dataclass(frozen=True, slots=True)
class Packet:
    """One message of DiffCopy; a STAT without `stat` ends the list of files."""

    kind: PacketKind
    number: int = 0
    octets: bytes = b""
    stat: Stat | None = None

    def encode(self) -> bytes:
        """As octets."""
        return (
            number_field(1, self.kind)
            + (b"" if self.stat is None else message_field(2, self.stat.encode()))
            + number_field(3, self.number)
            + bytes_field(4, self.octets)
        )

    @classmethod
    def decode(cls, octets: bytes) -> Self:
        """What a receiver sends; Malformed for anything else. It never sends a file's stat."""
        found = dict(fields(octets))
        kind = whole(found.get(1))
        if kind not in list(PacketKind):
            raise Malformed(f"a packet of kind {kind}")
        return cls(PacketKind(kind), whole(found.get(3)), raw(found.get(4)))


@dataclass(frozen=True, slots=True)
class SolveRequest:
    """Have a frontend make something of what the session gives, and export it."""

    ref: str
    session: str
    frontend: str
    attributes: Mapping[str, str] = field(default_factory=dict, repr=False)
    exporter: str = ""
    exporter_attributes: Mapping[str, str] = field(default_factory=dict)

    def encode(self) -> bytes:
        """As octets; the exporter twice, because old engines and new ones read different fields."""
        exporter = text_field(1, self.exporter) + map_field(2, self.exporter_attributes)
        return (
            text_field(1, self.ref)
            + text_field(3, self.exporter)
            + map_field(4, self.exporter_attributes)
            + text_field(5, self.session)
            + text_field(6, self.frontend)
            + map_field(7, self.attributes)
            + bytes_field(13, exporter)
        )


def solve_response(octets: bytes) -> dict[str, str]:
    """What the exporter says of its work."""
    return dict(entry(raw(value)) for number, value in fields(octets) if number == 1)


def worker_labels(octets: bytes) -> list[dict[str, str]]:
    """The labels of every worker in a ListWorkersResponse."""
    workers = [raw(value) for number, value in fields(octets) if number == 1]
    return [
        dict(entry(raw(value)) for number, value in fields(worker) if number == 2)
        for worker in workers
    ]


@dataclass(frozen=True, slots=True)
class Vertex:
    """One thing to be done, as it stands."""

    digest: str
    name: str
    started: bool = False
    completed: bool = False
    cached: bool = False
    error: str = ""


@dataclass(frozen=True, slots=True)
class VertexStatus:
    """How far a part of a vertex has come, in octets mostly; `total` 0 where nobody knows."""

    vertex: str
    name: str
    current: int
    total: int


@dataclass(frozen=True, slots=True)
class VertexLog:
    """Output of a vertex; stream 1 or 2."""

    vertex: str
    stream: int
    octets: bytes


@dataclass(frozen=True, slots=True)
class VertexWarning:
    """What the frontend found that stops nothing; `line` in the Dockerfile or 0."""

    message: str
    url: str = ""
    line: int = 0


@dataclass(frozen=True, slots=True)
class StatusResponse:
    """What has changed since the one before."""

    vertices: tuple[Vertex, ...] = ()
    statuses: tuple[VertexStatus, ...] = ()
    logs: tuple[VertexLog, ...] = ()
    warnings: tuple[VertexWarning, ...] = ()

    @classmethod
    def decode(cls, octets: bytes) -> Self:
        """Malformed for what is none."""
        found: dict[int, list[bytes]] = {1: [], 2: [], 3: [], 4: []}
        for number, value in fields(octets):
            if number in found:
                found[number].append(raw(value))
        return cls(
            tuple(map(_vertex, found[1])),
            tuple(map(_status, found[2])),
            tuple(map(_log, found[3])),
            tuple(map(_warning, found[4])),
        )


def _vertex(octets: bytes) -> Vertex:
    found = dict(fields(octets))
    return Vertex(
        text(found.get(1)),
        text(found.get(3)),
        5 in found,
        6 in found,
        bool(whole(found.get(4))),
        text(found.get(7)),
    )


def _status(octets: bytes) -> VertexStatus:
    found = dict(fields(octets))
    current, total = signed(found.get(4)), signed(found.get(5))
    name = text(found.get(3)) or text(found.get(1))
    return VertexStatus(text(found.get(2)), name, current, total)


def _log(octets: bytes) -> VertexLog:
    found = dict(fields(octets))
    return VertexLog(text(found.get(1)), signed(found.get(3)), raw(found.get(4)))


def _warning(octets: bytes) -> VertexWarning:
    found = dict(fields(octets))
    where = dict(fields(raw(found.get(7))))
    start = dict(fields(raw(where.get(1))))
    return VertexWarning(text(found.get(3)), text(found.get(5)), signed(start.get(1)))


def single(field_number: int, octets: bytes) -> bytes:
    """One field of a message that has hardly any others: GetSecret, Credentials, BytesMessage."""
    return raw(dict(fields(octets)).get(field_number))

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
    entry_of_octets,
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
_KINDS = (
    (stat.S_IFDIR, 1 << 31),
    (stat.S_IFLNK, 1 << 27),
    (stat.S_IFIFO, 1 << 25),
    (stat.S_IFSOCK, 1 << 24),
    (stat.S_IFCHR, 1 << 26 | 1 << 21),
    (stat.S_IFBLK, 1 << 26),
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


def st_mode(mode: int) -> int:
    """The other way round: an st_mode from Go's bits; what has none of theirs is a file."""
    made = mode & 0o777
    for theirs, bit in _GO_BITS:
        if mode & bit:
            made |= theirs
    for kind, bits in _KINDS:
        if mode & bits == bits:
            return made | kind
    return made | stat.S_IFREG


class PacketKind(IntEnum):
    """What a packet of DiffCopy is for."""

    STAT = 0
    REQ = 1
    DATA = 2
    FIN = 3
    ERR = 4


XATTRS = 10
"""The field of a Stat that comes once for each attribute."""


@dataclass(frozen=True, slots=True)
class Stat:
    """What a file is; `mode` in Go's bits, `mtime_ns` since 1970, owner and group always 0."""

    path: str
    mode: int
    size: int = 0
    mtime_ns: int = 0
    linkname: str = ""
    xattrs: Mapping[str, bytes] = field(default_factory=dict)

    @classmethod
    def decode(cls, octets: bytes) -> Self:
        """What a sender tells of a file; Malformed for what is none."""
        found: dict[int, int | bytes] = {}
        xattrs: dict[str, bytes] = {}
        for number, value in fields(octets):
            if number == XATTRS:
                name, content = entry_of_octets(raw(value))
                xattrs[name] = content
            else:
                found[number] = value
        return cls(
            text(found.get(1)),
            whole(found.get(2)),
            signed(found.get(5)),
            signed(found.get(6)),
            text(found.get(7)),
            xattrs,
        )

    def encode(self) -> bytes:
        """As octets."""
        return (
            text_field(1, self.path)
            + number_field(2, self.mode)
            + number_field(5, self.size)
            + number_field(6, self.mtime_ns)
            + text_field(7, self.linkname)
            + map_field(XATTRS, self.xattrs)
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
        """Malformed for what is none."""
        found = dict(fields(octets))
        kind = whole(found.get(1))
        if kind not in list(PacketKind):
            raise Malformed(f"a packet of kind {kind}")
        told = Stat.decode(raw(found[2])) if 2 in found else None
        return cls(PacketKind(kind), whole(found.get(3)), raw(found.get(4)), told)


@dataclass(frozen=True, slots=True)
class Cache:
    """A place that steps are taken over from, or kept in for others: `registry`, `inline` ..."""

    kind: str
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SolveRequest:
    """Have a frontend make something of what the session gives, and export it."""

    ref: str
    session: str
    frontend: str
    attributes: Mapping[str, str] = field(default_factory=dict, repr=False)
    exporter: str = ""
    exporter_attributes: Mapping[str, str] = field(default_factory=dict)
    caches: tuple[Cache, ...] = ()
    """Those to be written. What is read has to be named among the frontend's attributes."""

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
            + bytes_field(8, b"".join(message_field(4, _cache(one)) for one in self.caches))
            + bytes_field(13, exporter)
        )


def _cache(cache: Cache) -> bytes:
    return text_field(1, cache.kind) + map_field(2, cache.attributes)


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
    """One thing to be done, as it stands; times in ns since 1970 by the engine's clock."""

    digest: str
    name: str
    started_ns: int | None = None
    completed_ns: int | None = None
    cached: bool = False
    error: str = ""
    inputs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class VertexStatus:
    """How far a part of a vertex has come, in octets mostly; `total` 0 where nobody knows."""

    vertex: str
    name: str
    current: int
    total: int
    id: str = ""
    at_ns: int | None = None
    started_ns: int | None = None
    completed_ns: int | None = None


@dataclass(frozen=True, slots=True)
class VertexLog:
    """Output of a vertex; stream 1 or 2."""

    vertex: str
    stream: int
    octets: bytes
    at_ns: int | None = None


@dataclass(frozen=True, slots=True)
class VertexWarning:
    """What the frontend found that stops nothing; `line` in the Dockerfile or 0."""

    message: str
    url: str = ""
    line: int = 0
    vertex: str = ""
    level: int = 0
    detail: tuple[bytes, ...] = ()


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
    every = list(fields(octets))
    found = dict(every)
    return Vertex(
        text(found.get(1)),
        text(found.get(3)),
        _time(found.get(5)),
        _time(found.get(6)),
        bool(whole(found.get(4))),
        text(found.get(7)),
        tuple(text(value) for number, value in every if number == 2),
    )


def _time(value: int | bytes | None) -> int | None:
    """A google.protobuf.Timestamp; None where there is none."""
    if value is None:
        return None
    found = dict(fields(raw(value)))
    return signed(found.get(1)) * 1_000_000_000 + signed(found.get(2))


def _status(octets: bytes) -> VertexStatus:
    found = dict(fields(octets))
    current, total = signed(found.get(4)), signed(found.get(5))
    name = text(found.get(3)) or text(found.get(1))
    times = (_time(found.get(number)) for number in (6, 7, 8))
    return VertexStatus(text(found.get(2)), name, current, total, text(found.get(1)), *times)


def _log(octets: bytes) -> VertexLog:
    found = dict(fields(octets))
    at_ns = _time(found.get(2))
    return VertexLog(text(found.get(1)), signed(found.get(3)), raw(found.get(4)), at_ns)


def _warning(octets: bytes) -> VertexWarning:
    every = list(fields(octets))
    found = dict(every)
    where = dict(fields(raw(found.get(7))))
    start = dict(fields(raw(where.get(1))))
    return VertexWarning(
        text(found.get(3)),
        text(found.get(5)),
        signed(start.get(1)),
        text(found.get(1)),
        signed(found.get(2)),
        tuple(raw(value) for number, value in every if number == 4),
    )


def single(field_number: int, octets: bytes) -> bytes:
    """One field of a message that has hardly any others: GetSecret, Credentials, BytesMessage."""
    return raw(dict(fields(octets)).get(field_number))

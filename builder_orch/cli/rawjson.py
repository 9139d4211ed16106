"""`--progress rawjson`: BuildKit's status stream, one JSON object per line, in buildx's words."""

import json
from base64 import b64encode
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TextIO

from builder_orch.buildkit.messages import StatusResponse, Vertex, VertexStatus
from builder_orch.events import EngineStatus, Event
from builder_orch.tunnel.machine import Malformed

Object = dict[str, object]


@dataclass(slots=True)
class RawJson:
    """Writes the status stream of builds by BuildKit; the classic builder has none."""

    err: TextIO

    def show(self, event: Event) -> None:
        """Take one event."""
        if isinstance(event, EngineStatus):
            try:
                status = StatusResponse.decode(event.octets)
            except Malformed:
                # Whoever watches the stream for its meaning warns of it.
                return
            self.err.write(json.dumps(as_json(status)) + "\n")
            self.err.flush()

    def close(self) -> None:
        """There is nothing to leave."""


def as_json(status: StatusResponse) -> Object:
    """As `docker buildx build --progress rawjson` has it; what is empty is left out."""
    return _given(
        vertexes=[_vertex(vertex) for vertex in status.vertices],
        statuses=[_status(one) for one in status.statuses],
        logs=[
            _given(vertex=log.vertex, stream=log.stream)
            | {"data": _base64(log.octets), "timestamp": _time(log.at_ns or 0)}
            for log in status.logs
        ],
        warnings=[
            _given(
                vertex=warning.vertex,
                level=warning.level,
                short=_base64(warning.message.encode("utf-8", "surrogateescape")),
                detail=[_base64(line) for line in warning.detail],
                url=warning.url,
                range=[{"start": {"line": warning.line}}] if warning.line else [],
            )
            for warning in status.warnings
        ],
    )


def _vertex(vertex: Vertex) -> Object:
    return _given(
        digest=vertex.digest,
        inputs=list(vertex.inputs),
        name=vertex.name,
        started=_time(vertex.started_ns),
        completed=_time(vertex.completed_ns),
        cached=vertex.cached,
        error=vertex.error,
    )


def _status(one: VertexStatus) -> Object:
    return {"id": one.id, "current": one.current} | _given(
        vertex=one.vertex,
        name=one.name if one.name != one.id else "",
        total=one.total,
        timestamp=_time(one.at_ns),
        started=_time(one.started_ns),
        completed=_time(one.completed_ns),
    )


def _given(**fields: object) -> Object:
    return {name: value for name, value in fields.items() if value}


def _base64(octets: bytes) -> str:
    return b64encode(octets).decode("ascii")


def _time(at_ns: int | None) -> str | None:
    """By RFC 3339 with nanoseconds; None for a time that is none."""
    if at_ns is None:
        return None
    seconds, ns = divmod(at_ns, 1_000_000_000)
    try:
        moment = datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        return None
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{ns:09d}Z"

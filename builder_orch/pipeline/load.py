"""From an image on the builder to this machine: into a file, or into an engine here."""

import asyncio
import errno
import json
import secrets
import socket
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from ipaddress import IPv6Address
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar
from urllib.parse import urlsplit

from builder_orch.buildkit.export import PREFIX
from builder_orch.errors import BuilderLost, BuilderOrchError, UsageFailure
from builder_orch.events import Emit, Progress
from builder_orch.pipeline.amount import readable
from builder_orch.pipeline.build import Built
from builder_orch.pipeline.engine import DIAL_S, Engine, Refused
from builder_orch.pipeline.output import not_written
from builder_orch.pipeline.thread import Relay

PIECE = 1 << 20
PROGRESS_STEP = 8 << 20
"""Octets between two announcements."""


HERE = "unix:///var/run/docker.sock"


async def engine_here(host: str) -> Engine:
    """The engine that `--load` is for: `unix:///PATH` or `tcp://HOST:PORT`, as in DOCKER_HOST.

    UsageFailure, before anything is built, when none answers.
    """
    url = urlsplit(host or HERE)

    async def dial(_: str, __: int) -> socket.socket:
        if url.scheme == "unix":
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.setblocking(False)
            try:
                await asyncio.get_running_loop().sock_connect(sock, url.path)
            except OSError:
                sock.close()
                raise
            return sock
        if url.scheme != "tcp":
            raise OSError(errno.EPROTONOSUPPORT, "only unix:// and tcp:// are understood")
        return await asyncio.to_thread(
            socket.create_connection, (url.hostname or "", url.port or 2375), DIAL_S
        )

    engine = Engine(IPv6Address("::1"), dial)
    try:
        # First by itself: what says why there is no connection is about this machine's engine.
        (await dial("", 0)).close()
        return replace(engine, version=await engine.api_version())
    except (BuilderOrchError, Refused, ValueError, OSError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UsageFailure(
            f"no Docker engine on this machine to load the image into ({host or HERE}): {why}",
            hint="Start it, or name it in DOCKER_HOST; --dest type=docker,dest=FILE needs none.",
        ) from None


@dataclass(frozen=True, slots=True)
class Loaded:
    """An image as an engine on this machine, or a file for one, has it."""

    name: str
    where: str
    size_bytes: int

    def __str__(self) -> str:
        return f"{self.name} in {self.where}, {readable(self.size_bytes)}"


@dataclass(frozen=True, slots=True)
class Load:
    """Bring an image from the builder to this machine: into a file, or into an engine here."""

    builder: Engine
    repository: str
    label: str
    place: Path | None
    here: Engine | None
    name: ClassVar[str] = "load"

    async def run(self, image: Built, emit: Emit) -> Loaded:
        given = f"{self.repository}:{self.label}"
        try:
            await self.builder.tag(image.image_id, self.repository, self.label)
        except Refused as error:
            raise UsageFailure(
                f"the builder cannot name the image {given}: {error}", hint="Check --image-label."
            ) from None
        if self.place is not None:
            return await self._to(self.place, given, emit)
        assert self.here is not None
        with TemporaryDirectory(prefix=PREFIX) as folder:
            archive = Path(folder) / "image.tar"
            await self._to(archive, given, emit)
            return await take_in(self.here, archive, given)

    async def _to(self, place: Path, image: str, emit: Emit) -> Loaded:
        written = place.with_name(f"{PREFIX}{secrets.token_hex(8)}")
        relay = Relay(emit)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            await self.builder.save(image, _save(written, relay))
            _check(written, image)
            size = written.stat().st_size
            written.replace(place)
        except _Unwritten as error:
            raise not_written(place, error.args[0]) from None
        except OSError as error:
            raise not_written(place, error) from None
        except Refused as error:
            raise BuilderLost(
                f"the builder does not give the image away: {error}", hint="Run it again."
            ) from None
        finally:
            relay.close()
            with suppress(OSError):
                written.unlink()
        return Loaded(image, str(place), size)


async def take_in(here: Engine, archive: Path, image: str) -> Loaded:
    """Give an archive to an engine on this machine, and look whether it has the image then."""
    hint = "Its own log says more; --dest type=docker,dest=FILE keeps the archive."
    size = 0

    def pieces() -> Iterator[bytes]:
        nonlocal size
        for piece in _pieces(archive):
            size += len(piece)
            yield piece

    try:
        await here.load(pieces)
        loaded = await here.inspect(image)
    except (Refused, BuilderLost) as error:
        raise UsageFailure(
            f"the engine on this machine does not take the image: {error}", hint=hint
        ) from None
    if loaded is None:
        raise UsageFailure(
            f"the engine on this machine took {image}, but does not have it", hint=hint
        )
    return Loaded(image, "the engine of this machine", size)


class _Unwritten(Exception):
    """This machine could not write, which is not the connection's fault."""


def _save(place: Path, relay: Relay) -> Callable[[bytes], None]:
    """Takes what the engine sends, in its thread."""
    place.open("xb").close()
    octets = said = 0

    def take(piece: bytes) -> None:
        nonlocal octets, said
        try:
            with place.open("ab") as file:
                file.write(piece)
        except OSError as error:
            raise _Unwritten(error) from None
        octets += len(piece)
        if octets - said >= PROGRESS_STEP:
            said = octets
            relay(Progress("load", octets, None))

    return take


def _pieces(archive: Path) -> Iterator[bytes]:
    with archive.open("rb") as file:
        while piece := file.read(PIECE):
            yield piece


def _check(archive: Path, image: str) -> None:
    """A whole archive lists this image; tarfile only reads names here and unpacks nothing."""
    try:
        with tarfile.open(archive) as tar:
            listed = tar.extractfile("manifest.json")
            found = json.loads(listed.read()) if listed is not None else []
        names = [name for one in found for name in one.get("RepoTags") or []]
    except (tarfile.TarError, KeyError, ValueError, TypeError, AttributeError):
        names = []
    if image not in names:
        raise BuilderLost(
            f"what the builder sent is no whole archive of {image}",
            hint="Run it again; what was built so far is cached.",
        )

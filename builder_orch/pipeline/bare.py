"""A build by a buildkitd that the user has: no platform, no tunnel, no engine around it.

It keeps no images. What it makes leaves with the build: to a registry, or to this machine.
"""

import asyncio
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar
from urllib.parse import urlsplit

from builder_orch.buildkit.control import NATIVE, Tls
from builder_orch.buildkit.export import PREFIX
from builder_orch.buildkit.http2 import Vigilance
from builder_orch.errors import BuilderLost, UsageFailure
from builder_orch.events import Emit
from builder_orch.pipeline.build import Build, Send, building
from builder_orch.pipeline.deploy import Deployed, Order
from builder_orch.pipeline.engine import DIAL_S, Engine
from builder_orch.pipeline.liveness import Patience
from builder_orch.pipeline.load import Loaded, take_in
from builder_orch.pipeline.output import Exported, Form, Output
from builder_orch.pipeline.outside import Logins
from builder_orch.pipeline.pack import Pack
from builder_orch.pipeline.push import Pushed
from builder_orch.pipeline.stage import perform

DEFAULT_PORT = 1234
ARCHIVE = "image.tar"

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Daemon:
    """Where it listens: `unix:///PATH`, or `tcp://HOST:PORT` with or without TLS."""

    address: str
    tls: Tls | None = None
    vigilance: Vigilance = field(default_factory=Vigilance)
    version: str = NATIVE
    bare: bool = True

    @classmethod
    def at(cls, address: str, certificates: Path | None) -> "Daemon":
        """UsageFailure for an address that is none, or certificates that cannot be used.

        `certificates` is a directory with `ca.pem`, `cert.pem` and `key.pem`, as Docker has it.
        """
        url = urlsplit(address)
        if not (url.scheme == "unix" and url.path) and not (url.scheme == "tcp" and url.hostname):
            raise UsageFailure(
                f"--buildkit-host {address}: no address of a buildkitd",
                hint="Write unix:///run/buildkit/buildkitd.sock or tcp://HOST:1234.",
            )
        if certificates is None:
            return cls(address)
        try:
            context = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
            context.load_cert_chain(certificates / "cert.pem", certificates / "key.pem")
        except (OSError, ssl.SSLError) as error:
            raise UsageFailure(
                f"--buildkit-certs {certificates}: {error}",
                hint="The directory has to hold ca.pem, cert.pem and key.pem, all in PEM form.",
            ) from None
        context.set_alpn_protocols(["h2"])
        return cls(address, Tls(context, url.hostname or "localhost"))

    async def connect(self, doing: str) -> socket.socket:
        """A connection to it; BuilderLost when there is none."""
        url = urlsplit(self.address)
        unix = url.scheme == "unix"
        try:
            async with asyncio.timeout(DIAL_S):
                if unix:
                    return await _connected_unix(url.path)
                place = (url.hostname or "", url.port or DEFAULT_PORT)
                sock = await asyncio.to_thread(socket.create_connection, place, DIAL_S)
                sock.setblocking(False)
                return sock
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error) or "no answer in time"
            raise BuilderLost(
                f"no connection to the buildkitd at {self.address}: {why} ({doing})",
                hint="Check --buildkit-host, and whether the daemon runs there.",
            ) from None

    async def attend(
        self,
        doing: str,  # noqa: ARG002 - whoever watches by questions of its own says it
        working: asyncio.Task[Made],
        moved: Callable[[], int],  # noqa: ARG002
    ) -> Made:
        """Wait for work; that the daemon is gone is noticed by its connection."""
        try:
            return await working
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)


async def _connected_unix(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(sock, path)
    except OSError:
        sock.close()
        raise
    return sock


def check_order(order: Order) -> None:
    """UsageFailure for what only a Docker engine could do."""
    if order.publish and not order.image:
        raise UsageFailure(
            "a buildkitd keeps no images, and this build says nothing of where its result goes",
            hint="Name an image to be pushed (--tag REGISTRY/NAME:TAG) or a --dest, or take "
            "--no-push to fill the cache only.",
        )


async def build_bare(
    order: Order,
    daemon: Daemon,
    logins: Logins,
    here: Engine | None,
    patience: Patience,
    emit: Emit,
) -> Deployed:
    """Carry out an order that ends with the build."""
    context = await perform(Pack(), order.directory, emit)
    recipe = order.recipe(context.dockerfile_name, order.image)
    if order.output.form is Form.IMAGE and not order.publish:
        recipe = replace(recipe, name="")
    with TemporaryDirectory(prefix=PREFIX) as folder:
        loading = order.output == Output(Form.DOCKER)
        if loading:
            recipe = replace(recipe, output=Output(Form.DOCKER, Path(folder) / ARCHIVE))
        async with building(daemon, context, recipe, emit, logins, patience) as under_way:
            await perform(Send(), under_way, emit)
            built = await perform(Build(), under_way, emit)
        if loading and here is not None:
            name = order.image or "fly-build:latest"
            loaded = await perform(_TakeIn(here, name), Path(folder) / ARCHIVE, emit)
            return Deployed("", loaded=loaded)
    if isinstance(built, Exported):
        return Deployed("", exported=built)
    if not recipe.name:
        return Deployed("", built)
    repository, _, tag = order.image.rpartition(":")
    reference = f"{repository}@{built.image_id}"
    return Deployed("", built, pushed=Pushed(reference, built.image_id, tag, built.image_id, 0))


@dataclass(frozen=True, slots=True)
class _TakeIn:
    here: Engine
    image: str
    name: str = "load"

    async def run(self, given: Path, emit: Emit) -> Loaded:  # noqa: ARG002
        return await take_in(self.here, given, self.image)

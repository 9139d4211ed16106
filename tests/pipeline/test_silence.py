"""A step that says nothing for two hours, through every layer: what is asked, and what lasts.

A translator between client and gateway forgets a caller who was silent for half a minute, keys are
changed every two minutes, TCP and HTTP/2 ask for signs of life; all of it on a clock that jumps.
"""

import asyncio
import os
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from socket import socket, socketpair

import pytest

from builder_orch.api.models import Builder
from builder_orch.events import Event, Retry, Warned
from builder_orch.pipeline.context import Directory, scan
from builder_orch.pipeline.deploy import Order, make, recorded
from builder_orch.pipeline.engine import PORT, Engine, Image
from builder_orch.pipeline.liveness import Patience, Return, persist
from builder_orch.pipeline.outside import World
from builder_orch.tunnel.config import PeerConfig, PrivateKey, TunnelConfig
from builder_orch.tunnel.driver import Tunnel, open_tunnel
from builder_orch.tunnel.machine import Endpoint
from builder_orch.tunnel.wireguard.message import INITIATION_LEN
from builder_orch.tunnel.wireguard.timers import REKEY_AFTER_TIME
from tests.buildkit.fake_daemon import (
    IMAGE,
    FakeDaemon,
    Session,
    log,
    vertex,
    whole_context,
)
from tests.pipeline.fake_world import APP, FakeWorld, fake_world
from tests.tunnel.joined import CLIENT, GATEWAY, NETWORK, public
from tests.virtual import Air, now, play

HERE: Endpoint = ("192.0.2.9", 1)
THERE: Endpoint = ("192.0.2.1", 51820)
SILENCE_S = 7200.0
FORGETS_S = 30.0
"""After how long without a word from inside the translator lets nothing in any more."""


@dataclass
class Translator:
    """Between the two: lets in only what answers somebody who spoke not long ago."""

    spoke_at: float = 0.0
    longest_s: float = 0.0
    refused: int = 0
    handshakes: int = 0

    def passes(self, octets: bytes, to: Endpoint) -> bool:
        if to == THERE:
            self.handshakes += len(octets) == INITIATION_LEN
            self.longest_s = max(self.longest_s, now() - self.spoke_at)
            self.spoke_at = now()
            return True
        heard = now() - self.spoke_at <= FORGETS_S
        self.refused += not heard
        return heard


@dataclass
class Behind:
    """What the gateway leads to: an engine whose questions are counted."""

    daemon: FakeDaemon
    asked: Counter[str] = field(default_factory=Counter)
    talking: set["asyncio.Future[None]"] = field(default_factory=set)

    async def backend(self, *_: object) -> socket:
        ours, theirs = socketpair()
        reader, writer = await asyncio.open_connection(sock=theirs)
        self.talking.add(asyncio.ensure_future(self._talk(reader, writer)))
        return ours

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            self.asked[head.split()[1].decode()] += 1
            if head.startswith(b"POST /grpc "):
                await self.daemon.serve(reader, writer)
            else:
                writer.write(b"HTTP/1.0 200 OK\r\n\r\nOK")
                await writer.drain()
        finally:
            writer.close()


class Asking(Engine):
    """docker-py asks in threads, which know nothing of a clock that jumps; this asks the same."""

    async def ping(self) -> None:
        reader, writer = await asyncio.open_connection(sock=await self.connect("the ping"))
        writer.write(b"GET /_ping HTTP/1.0\r\n\r\n")
        assert (await reader.read()).endswith(b"OK")
        writer.close()

    async def inspect(self, reference: str) -> Image | None:
        return Image(reference, 1, ())


@asynccontextmanager
async def reached(behind: Behind, translator: Translator) -> AsyncGenerator[Tunnel]:
    ours, theirs = PrivateKey(os.urandom(32)), PrivateKey(os.urandom(32))
    air = Air()
    air.passes = translator.passes
    caller = PeerConfig(public(ours), (NETWORK,))
    gateway = PeerConfig(public(theirs), (NETWORK,), THERE)
    async with (
        open_tunnel(TunnelConfig(theirs, GATEWAY, (caller,)), carrier=air.carrier(THERE)) as far,
        open_tunnel(TunnelConfig(ours, CLIENT, (gateway,)), carrier=air.carrier(HERE)) as near,
    ):
        far.serve(GATEWAY, PORT, behind.backend)
        yield near
    await asyncio.gather(*behind.talking, return_exceptions=True)


async def build(outside: FakeWorld, tunnel: Tunnel, root: Path, emit: list[Event]) -> str:
    """One whole run between record and image, as `deploy` makes it."""
    world: World = outside.world
    builder = Builder("fly-builder", "m1", "started", GATEWAY)
    order = Order(Directory(root), APP.name, publish=False, release=False)
    context = scan(order.directory, emit.append)
    engine = Asking(GATEWAY, tunnel.dial, "1.41", emit=emit.append)
    async with recorded(world.platform, APP, builder, emit.append) as record:
        patience = Patience(stall_s=600.0)
        made = await persist(
            engine,
            lambda there: make(order, world, there, context, APP, record, patience),
            Return(world, APP, builder, tunnel, record.emit),
            record.emit,
        )
    assert made.built is not None
    return made.built.image_id


@pytest.mark.parametrize("checks", [False, pytest.param(True, marks=pytest.mark.long)])
def test_two_silent_hours_of_a_step_end_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checks: bool
) -> None:
    """Also with an engine that never asks whether we are still there."""
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY . /\nRUN make\n")
    events: list[Event] = []
    translator = Translator()
    said_at: list[float] = []

    async def script(session: Session, daemon: FakeDaemon) -> None:
        await whole_context(session, daemon)
        await daemon.say(vertex("[3/3] RUN make", completed=False))
        began = now()
        while checks and now() - began < SILENCE_S:
            assert await session.ask("/grpc.health.v1.Health/Check", b"") == b"\x08\x01"
            await asyncio.sleep(5)
        await asyncio.sleep(began + SILENCE_S - now())
        said_at.append(now())
        await daemon.say(log("[3/3] RUN make", b"made\n"), vertex("[3/3] RUN make"))

    async def story() -> tuple[Behind, FakeWorld]:
        behind = Behind(FakeDaemon(script, response={"containerimage.digest": IMAGE}))
        translator.spoke_at = now()
        async with fake_world() as outside, reached(behind, translator) as tunnel:
            assert await build(outside, tunnel, tmp_path, events) == IMAGE
            assert now() - said_at[0] < 5
        return behind, outside

    behind, outside = play(story(), monkeypatch)
    assert outside.platform.calls == ["create_build", "finish_build"]
    assert outside.platform.builds["b1"]["status"] == "completed"
    assert not [event for event in events if isinstance(event, Retry | Warned)]
    # One connection carried it all, and the translator never had a reason to forget it.
    assert behind.asked["/grpc"] == 1
    assert checks or behind.asked["/_ping"] >= SILENCE_S / 20
    assert translator.refused == 0
    assert translator.longest_s < FORGETS_S
    assert translator.handshakes >= SILENCE_S / REKEY_AFTER_TIME - 2

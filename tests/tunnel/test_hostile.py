"""A gateway with a changed program: whatever it seals for us, it spoils only what it may spoil.

It has a valid session and serves honest streams on it. Between their packets it sends all that
octets can be, and at last one exact reset, which ends that one stream and no other.
"""

import asyncio
import gc
import os
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from pathlib import Path
from random import Random
from typing import Any

import pytest

from builder_orch.tunnel.capture import Capture
from builder_orch.tunnel.carrier.udp import UdpCarrier
from builder_orch.tunnel.config import PeerConfig, PrivateKey, TunnelConfig
from builder_orch.tunnel.driver import Tunnel, open_tunnel
from builder_orch.tunnel.ipv6 import header, icmp
from builder_orch.tunnel.ipv6.segment import ACK, FIN, PSH, RST, SYN, Template
from builder_orch.tunnel.machine import Datagrams
from builder_orch.tunnel.wireguard.session import Session
from tests.sim import Stream
from tests.tunnel.joined import CLIENT, GATEWAY, NETWORK, public

PORT = 7
ROUND = 200_000
BATCH = 44
TURNS = 100
"""Of the loop, after which what was sent must have been lost."""
GROWTH = 64 << 20
STRANGER = IPv6Address("fdaa:9::1").packed
US, THEM = CLIENT.packed, GATEWAY.packed
LARGEST = 65_507 - 32
COUNTS = [2_000, pytest.param(100_000, marks=pytest.mark.long)]


class Spy(Capture):
    """What the gateway sees anyway: where each stream is. Keyed by the client's port."""

    def __init__(self) -> None:
        self.expects: dict[int, int] = {}

    def record(self, packets: Any) -> None:
        for packet in packets:
            if packet[8:24] == US and packet[6] == header.TCP:
                port = int.from_bytes(packet[40:42], "big")
                self.expects[port] = int.from_bytes(packet[48:52], "big")


@dataclass
class Stage:
    """The client, its gateway, and how to send it anything."""

    client: Tunnel
    gateway: Tunnel
    carrier: UdpCarrier
    spy: Spy
    sessions: list[Session]
    live: set[int] = field(default_factory=set)

    def send(self, packets: list[bytes]) -> int:
        """Seal whatever these octets are; how many datagrams' octets that makes."""
        session = next(one for one in reversed(self.sessions) if not one.initiator)
        endpoint = self.gateway.status()[0].endpoint
        assert endpoint is not None
        sent = 0
        for packet in packets:
            octets, segment = session.seal([packet], max(1420, len(packet)))
            self.carrier.send(Datagrams(octets, segment, endpoint))
            sent += len(octets)
        return sent

    async def storm(self, make: Callable[[Random], bytes], dice: Random, count: int) -> None:
        """Send so many of these, no faster than the client takes them."""
        for _ in range(0, count, BATCH):
            before = self.client.status()[0].received_octets
            sent = self.send([make(dice) for _ in range(BATCH)])
            for _ in range(TURNS):
                await asyncio.sleep(0)
                if self.client.status()[0].received_octets >= before + sent:
                    break


@asynccontextmanager
async def stage(sessions: list[Session]) -> AsyncGenerator[Stage]:
    """Both ends on the loopback interface; the gateway echoes what it is sent."""
    ours, theirs = PrivateKey(os.urandom(32)), PrivateKey(os.urandom(32))
    carrier, spy = UdpCarrier.bind("127.0.0.1", 0), Spy()
    server = TunnelConfig(theirs, GATEWAY, (PeerConfig(public(ours), (NETWORK,)),))
    peer = PeerConfig(public(theirs), (NETWORK,), carrier.endpoint)
    conversations: set[asyncio.Future[None]] = set()

    async def backend(*_: object) -> socket.socket:
        near, far = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=far)
        conversations.add(asyncio.ensure_future(echo(reader, writer)))
        return near

    async with (
        open_tunnel(server, carrier=carrier, capture=spy) as gateway,
        open_tunnel(TunnelConfig(ours, CLIENT, (peer,))) as client,
    ):
        gateway.serve(GATEWAY, PORT, backend)
        await client.ready(timeout_s=10)
        yield Stage(client, gateway, carrier, spy, sessions)
    await asyncio.gather(*conversations, return_exceptions=True)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while octets := await reader.read(65536):
        writer.write(octets)
        await writer.drain()
    writer.close()


class Honest:
    """A stream that must stay exact: rounds of octets there and back, until it is to stop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.rounds = 0

    async def round(self) -> None:
        start = self.rounds * ROUND
        stream = Stream("honest", start + ROUND)
        self._writer.write(stream.octets(start, ROUND))
        stream.check(start, await self._reader.readexactly(ROUND))
        self.rounds += 1

    async def run(self, stopped: asyncio.Event) -> None:
        while not stopped.is_set():
            await self.round()

    def close(self) -> None:
        self._writer.close()


async def dial(on: Stage) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, int]:
    """A stream, and the port of ours that it comes from."""
    before = set(on.spy.expects)
    streams = await asyncio.open_connection(sock=await on.client.dial(str(GATEWAY), PORT))
    streams[1].write(b"x")
    assert await streams[0].readexactly(1) == b"x"
    (port,) = set(on.spy.expects) - before
    return *streams, port


# What it sends


def ip(payload: bytes, following: int, *, source: bytes = THEM, length: int | None = None) -> bytes:
    octets = header.emit(source, US, following, payload)
    return octets if length is None else octets[:4] + length.to_bytes(2, "big") + octets[6:]


def extension(following: int, length: int = 0, body: bytes = b"\x01\x04\0\0\0\0") -> bytes:
    return bytes([following, length]) + body


def no_packets(dice: Random) -> bytes:
    """IPv4, strangers, nothing, and lengths that are wrong."""
    whole = ip(dice.randbytes(64), 59)
    return dice.choice(
        [
            b"\x45" + whole[1:],
            b"",
            whole[: dice.randrange(1, 40)],
            whole[:40],
            ip(b"", 59, length=dice.randrange(1, 65536)),
            ip(dice.randbytes(64), 59, length=65535),
            ip(dice.randbytes(64), header.UDP, source=STRANGER),
            ip(dice.randbytes(20), header.TCP, source=US),
            ip(dice.randbytes(64), 59, source=bytes(16)),
            dice.randbytes(dice.randrange(1, 200)),
            ip(dice.randbytes(LARGEST - 40 - dice.randrange(16)), dice.choice([6, 17, 58, 59])),
        ]
    )


def chains(dice: Random) -> bytes:
    """Headers before headers, some without an end."""
    kinds = [header.HOP_BY_HOP, header.ROUTING, header.DESTINATION_OPTIONS, 135, 139, 140, 253]
    chain = b"".join(extension(dice.choice(kinds)) for _ in range(dice.randrange(1, 170)))
    broken = extension(header.HOP_BY_HOP, dice.randrange(256), dice.randbytes(6))
    tail = dice.choice([b"", broken, extension(header.TCP) + dice.randbytes(20), dice.randbytes(9)])
    return ip(chain + tail, dice.choice(kinds))


def fragments(dice: Random) -> bytes:
    """Pieces that overlap, that lack their beginning or their end, of very many wholes."""
    place = dice.choice([0, 0, 185, 8191, dice.randrange(8192)]) << 3 | dice.choice([0, 1])
    head = bytes([dice.choice([6, 17, 44, 58]), 0]) + place.to_bytes(2, "big") + dice.randbytes(4)
    return ip(head + dice.randbytes(dice.choice([0, 8, 1232])), header.FRAGMENT)


def knocking(dice: Random) -> bytes:
    """SYNs and RSTs from everywhere to everywhere."""
    here = (US, dice.choice([PORT, 22, 80, dice.randrange(65536)]))
    forger = Template((THEM, dice.randrange(65536)), here)
    flags = dice.choice([SYN, SYN, RST, SYN | ACK, RST | ACK, FIN, ACK, SYN | FIN | RST])
    return forger.segment(dice.randrange(1 << 32), dice.randrange(1 << 32), flags, 65535)


def messages(dice: Random) -> bytes:
    """Errors about packets that we never sent, echoes, and datagrams to nobody."""
    cause = Template((US, dice.randrange(65536)), (THEM, PORT)).segment(7, 7, ACK, 0)
    kind = dice.choice([icmp.PACKET_TOO_BIG, icmp.DESTINATION_UNREACHABLE])
    told = icmp.Failure(kind, dice.randrange(8), dice.randrange(1 << 32), cause)
    return dice.choice(
        [icmp.failure(THEM, US, told), ip(dice.randbytes(30), 17), ip(dice.randbytes(30), 58)]
    )


def nonsense(on: Stage) -> Callable[[Random], bytes]:
    """For the honest streams: resets beside the mark, and what nobody could acknowledge."""

    def make(dice: Random) -> bytes:
        port = dice.choice(sorted(on.live))
        forger = Template((THEM, PORT), (US, port))
        at = on.spy.expects[port]
        beyond = dice.choice([1, -1]) * dice.randrange(1 << 25, 1 << 30)
        options = dice.choice([b"", b"\x05\x0a" + dice.randbytes(8) + b"\1\1", dice.randbytes(8)])
        flags = dice.choice([RST, RST | ACK, SYN, ACK, ACK | PSH | FIN])
        window = dice.choice([0, 1, 65535])
        return forger.segment(
            at + beyond, dice.randrange(1 << 32), flags, window, b"evil", options=options
        )

    return make


def windows(on: Stage, victim: int) -> Callable[[Random], bytes]:
    """For one stream that it may spoil: in order, but with absurd windows and blocks."""

    def make(dice: Random) -> bytes:
        forger = Template((THEM, PORT), (US, victim))
        blocks = b"\1\1\x05\x12" + dice.randbytes(16)
        window = dice.choice([0, 1, 3, 65535])
        ack = dice.choice([0, 1, dice.randrange(1 << 32)])
        return forger.segment(on.spy.expects[victim], ack, ACK, window, options=blocks)

    return make


def resident() -> int:
    """Octets of memory that this process uses."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> list[Session]:
    """All sessions of this process."""
    made: list[Session] = []
    begin = Session.__init__

    def noted(session: Session, *arguments: Any, **named: Any) -> None:
        begin(session, *arguments, **named)
        made.append(session)

    monkeypatch.setattr(Session, "__init__", noted)
    return made


@pytest.mark.parametrize("count", COUNTS)
async def test_whatever_a_gateway_seals_for_us_spoils_only_what_it_may(
    sessions: list[Session], count: int
) -> None:
    broken: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: broken.append(context))
    stopped, dice = asyncio.Event(), Random(11)
    async with stage(sessions) as on:
        honest = []
        for _ in range(3):
            reader, writer, port = await dial(on)
            honest.append(Honest(reader, writer))
            on.live.add(port)
        reader, writer, victim = await dial(on)
        running = [asyncio.create_task(one.run(stopped)) for one in honest]
        before = resident()
        storms = [no_packets, chains, fragments, knocking, messages, nonsense(on)]
        for storm in [*storms, windows(on, victim)]:
            await on.storm(storm, dice, count)
        stopped.set()
        await asyncio.gather(*running)
        grown = resident() - before
        assert min(one.rounds for one in honest) > 1
        forger = Template((THEM, PORT), (US, victim))
        on.send([forger.segment(on.spy.expects[victim], 0, RST, 0)])
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)
        for one in honest:
            await one.round()
            one.close()
        writer.close()
        dropped = on.client.drops()
    assert broken == []
    assert grown < GROWTH
    for reason in ("inner packet not IPv6", "inner source not allowed", "inner packet cut short"):
        assert dropped[reason] > count / 50
    assert sum(dropped.values()) > 2 * count

"""The whole tunnel against the server of mitmproxy_rs 0.11: boringtun and smoltcp, both in Rust.

It shares no line with wireguard-go or the kernel's TCP, and needs neither root nor namespaces. Of
the matrix of tests/system/test_interop.py it has the cells in which we call without a preshared
key, by IPv4 and by IPv6. The others do not exist: this server only answers, and cannot be given a
preshared key.

Limits and defects of its own, which these tests keep clear of and do not hide:

- An ICMPv6 echo is answered in a packet that says ICMP for IPv4 (next header 1).
- It never calls `update_timers` of boringtun: no keepalive, no new handshake and no end of a key
  comes from it, and after ten initiations of a peer it wants a cookie with each, for good.
- A stream of it can only be closed, never reset, and a reset of ours reads as an end. One that is
  closed before the handshake is over loses its FIN, so all of them hear an octet before they close.
- A stream that it closed takes what is sent to it still, up to its window, and never reads it.
- In CLOSE-WAIT and LAST-ACK any acknowledgement stops its retransmission timer, and what was lost
  is repeated half a minute later or never. So where datagrams get lost, we end our direction after
  it has ended its own.
"""

import asyncio
import hashlib
import json
import os
import socket
import struct
import sys
from asyncio.subprocess import PIPE, Process
from base64 import b64encode
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest

from builder_orch.tunnel.capture import Capture
from builder_orch.tunnel.carrier.udp import UdpCarrier
from builder_orch.tunnel.config import TunnelConfig
from builder_orch.tunnel.driver import Tunnel, open_tunnel
from builder_orch.tunnel.ipv6 import header, segment
from builder_orch.tunnel.machine import Address
from builder_orch.tunnel.wireguard.handshake import Handshake
from builder_orch.tunnel.wireguard.message import CookieReply
from tests.system.conversation import BLOCK, call, digest, settings, stream
from tests.system.lab import OURS, ROOT, THEIRS
from tests.system.test_rekey import Keys
from tests.tunnel.joined import public, until

pytest.importorskip("mitmproxy_rs", reason="there is no wheel of mitmproxy_rs for this platform")
from tests.tunnel.mitmproxy_end import (
    CLOSE,
    CONVERSE,
    ECHO,
    HEAR,
    REST,
    TALK,
    WAKE,
)

SIZES = [4_000_000, pytest.param(100_000_000, marks=pytest.mark.long)]
HOSTS = {"IPv4": "127.0.0.1", "IPv6": "::1"}
PATIENCE_S = 120.0
END_S = 20.0
STREAM_OCTETS = 4_000_000
OFTEN_S = 0.2
ENOUGH_KEYS = 14
"""Four more than it answers without asking for a cookie."""
DIRTY = ("2", "0.01", "0.01", "0.01", "0.01")
"""Milliseconds each way, and the shares that are lost, late, doubled and corrupted."""
SEEDS = [1, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(2, 12))]
ECHO_REPLY = 129
WINDOWS_OCTETS = 24_000_000
"""More than all buffers between the two applications hold together."""
RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Judge:
    """Its process, what to call it by, and what it says."""

    process: Process
    config: TunnelConfig

    async def said(self) -> dict[str, Any]:
        """Its next line: of a stream that ended, with `port`, `heard` and `digest`."""
        assert self.process.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            line = await self.process.stdout.readline()
        assert line, "it is gone"
        told: dict[str, Any] = json.loads(line)
        return told


@asynccontextmanager
async def judge(
    *, host: str = "127.0.0.1", octets: int = 0, keys: tuple[bytes, bytes] | None = None
) -> AsyncGenerator[Judge]:
    """A server that runs; `keys` are ours and its own."""
    ours, theirs = keys or (os.urandom(32), os.urandom(32))
    words = (host, b64encode(theirs).decode(), b64encode(public(ours)).decode(), str(octets))
    module = (sys.executable, "-m", "tests.tunnel.mitmproxy_end")
    async with running(*module, *words) as process:
        assert process.stdout is not None
        port = json.loads(await process.stdout.readline())["port"]
        yield Judge(process, settings(port, theirs, ours, None, host=host))


@asynccontextmanager
async def running(*words: str) -> AsyncGenerator[Process]:
    """A program that ends with its standard input, which is the end of the block."""
    process = await asyncio.create_subprocess_exec(*words, cwd=ROOT, stdin=PIPE, stdout=PIPE)
    assert process.stdin is not None
    try:
        yield process
    finally:
        process.stdin.close()
        try:
            async with asyncio.timeout(END_S):
                await process.communicate()
        except TimeoutError:
            process.kill()
            await process.wait()
            raise


@asynccontextmanager
async def called(
    at: Judge, *, host: str = "127.0.0.1", capture: Capture | None = None
) -> AsyncGenerator[Tunnel]:
    """A tunnel to it that is up. Its socket is not connected, so that the judge may move."""
    carrier = UdpCarrier.bind(host, 0)
    async with (
        asyncio.timeout(2 * PATIENCE_S),
        open_tunnel(at.config, carrier=carrier, capture=capture) as tunnel,
    ):
        await tunnel.ready(timeout_s=20)
        yield tunnel


class Seen(Capture):
    """All packets inside, and a way to wait for one of them."""

    def __init__(self) -> None:
        self.kept: list[bytes] = []
        self._changed = asyncio.Event()

    def record(self, packets: Any) -> None:
        self.kept += [bytes(packet) for packet in packets]
        self._changed.set()

    def theirs(self) -> list[bytes]:
        """Those of the judge, by TCP."""
        return [one for one in self.kept if one[8:24] == THEIRS.packed and one[6] == header.TCP]

    async def first(self, *, ours: bool, protocol: int, window: int | None = None) -> bytes:
        """The first one of that sender and protocol, and for TCP with that window and no RST."""
        sender, at = (OURS if ours else THEIRS).packed, 0
        while True:
            self._changed.clear()
            for packet in self.kept[at:]:
                if (
                    packet[8:24] == sender
                    and packet[6] == protocol
                    and (window is None or is_window(packet, window))
                ):
                    return packet
            at = len(self.kept)
            await self._changed.wait()


def is_window(packet: bytes, field: int) -> bool:
    got = segment.parse(packet)
    return got.window == field and not got.flags & segment.RST


def is_question(packet: bytes) -> bool:
    """Whether it is one octet, as smoltcp's keep-alives are."""
    got = segment.parse(packet)
    return len(got.payload) == 1


def speak(sock: socket.socket, octets: int) -> None:
    """The stream up, and the end of our direction."""
    for block in stream(b"up", octets):
        sock.sendall(block)
    sock.shutdown(socket.SHUT_WR)


def hear(sock: socket.socket) -> str:
    """The SHA-256 of all octets to the end."""
    heard = hashlib.sha256()
    while octets := sock.recv(BLOCK):
        heard.update(octets)
    return heard.hexdigest()


def expected(direction: bytes, octets: int) -> str:
    return digest(stream(direction, octets)).hex()


async def echoed(tunnel: Tunnel, octets: bytes) -> None:
    """A connection of its own for one question and the same answer."""
    with await tunnel.dial(str(THEIRS), ECHO) as sock:
        reader, writer = await asyncio.open_connection(sock=sock)
        writer.write(octets)
        writer.write_eof()
        assert await reader.read() == octets
        writer.close()


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


# -- the cells


@pytest.mark.parametrize("octets", SIZES, ids=lambda octets: f"{octets // 1_000_000}MB")
@pytest.mark.parametrize("outside", HOSTS)
async def test_an_echo_and_a_stream_each_way(outside: str, octets: int) -> None:
    host = HOSTS[outside]
    if outside == "IPv6" and not has_ipv6():
        pytest.skip("the loopback interface has no IPv6 address")
    async with judge(host=host, octets=octets) as at, called(at, host=host) as tunnel:
        await echoed(tunnel, os.urandom(1000))
        with await tunnel.dial(str(THEIRS), CONVERSE) as sock:
            await asyncio.to_thread(call, sock, octets)
        assert not tunnel.drops()


async def test_an_echo_request_is_answered_by_what_is_no_icmpv6() -> None:
    """Its own defect: the message is right but for the header before it, so it does not count."""
    seen = Seen()
    async with judge() as at, called(at, capture=seen) as tunnel:
        asking = asyncio.create_task(tunnel.ping(THEIRS, timeout_s=PATIENCE_S))
        asked = await seen.first(ours=True, protocol=header.ICMPV6)
        answer = await seen.first(ours=False, protocol=1)
        assert answer[40] == ECHO_REPLY
        assert answer[44:] == asked[44:]
        await echoed(tunnel, b"whatever came before has been looked at")
        assert not asking.done()
        assert tunnel.drops() == {"rejected: unknown protocol": 1}
        asking.cancel()
        await asyncio.wait({asking})


async def test_datagrams_come_back_as_they_were() -> None:
    come: asyncio.Queue[tuple[bytes, Address]] = asyncio.Queue()

    def heard(datagram: bytes, sender: Address) -> None:
        come.put_nowait((datagram, sender))

    async with judge() as at, called(at) as tunnel:
        with tunnel.datagrams(heard) as send:
            for length in (1, 17, 1420 - 48):
                sent = os.urandom(length)
                send((THEIRS.packed, 53), sent)
                assert await come.get() == (sent, (THEIRS.packed, 53))


# -- keys


async def test_new_keys_while_a_stream_flows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way, until each initiation has to carry the cookie that it was answered by at last."""
    cookies: list[CookieReply] = []
    keep = Handshake.keep_cookie

    def noted(shake: Handshake, reply: CookieReply, now: float) -> None:
        keep(shake, reply, now)
        cookies.append(reply)

    monkeypatch.setattr(Handshake, "keep_cookie", noted)
    keys = Keys(monkeypatch)
    async with judge(octets=STREAM_OCTETS) as at, called(at) as tunnel:
        keys.renew(OFTEN_S)
        while keys.made < ENOUGH_KEYS // 2:
            with await tunnel.dial(str(THEIRS), HEAR) as up:
                await asyncio.to_thread(speak, up, STREAM_OCTETS)
                assert (await at.said())["digest"] == expected(b"up", STREAM_OCTETS)
        while keys.made < ENOUGH_KEYS:
            with await tunnel.dial(str(THEIRS), TALK) as down:
                down.sendall(b"!")
                assert await asyncio.to_thread(hear, down) == expected(b"down", STREAM_OCTETS)
        assert cookies


async def test_one_that_begins_anew_resets_what_was_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its successor knows neither our session nor our stream; it is told of both by silence."""
    monkeypatch.setattr("builder_orch.tunnel.wireguard.peer.KEEPALIVE_TIMEOUT", 0.2)
    monkeypatch.setattr("builder_orch.tunnel.wireguard.peer.REKEY_TIMEOUT", 0.1)
    keys = os.urandom(32), os.urandom(32)
    async with judge(keys=keys) as at, called(at) as tunnel, judge(keys=keys) as successor:
        with await tunnel.dial(str(THEIRS), ECHO) as sock:
            sock.sendall(b"one")
            assert await asyncio.to_thread(sock.recv, 3) == b"one"
            at.process.kill()
            await at.process.wait()
            tunnel.add_peer(successor.config.peers[0])
            sock.sendall(b"two")
            with pytest.raises(ConnectionResetError):
                await asyncio.to_thread(sock.recv, 3)
        await echoed(tunnel, b"and goes on with the next")
        await until(lambda: tunnel.streams == 0)


# -- beginnings and ends


async def test_we_end_our_direction_first_and_hear_it_to_its_end() -> None:
    async with judge(octets=700_000) as at, called(at) as tunnel:
        for _ in range(5):
            with await tunnel.dial(str(THEIRS), CONVERSE) as sock:
                await asyncio.to_thread(speak, sock, 300_000)
                told = await asyncio.to_thread(sock.recv, 32, socket.MSG_WAITALL)
                assert told.hex() == expected(b"up", 300_000)
                assert await asyncio.to_thread(hear, sock) == expected(b"down", 700_000)
            assert (await at.said())["heard"] == 300_000


async def test_it_ends_its_direction_first_and_hears_us_to_our_end() -> None:
    async with judge(octets=700_000) as at, called(at) as tunnel:
        for _ in range(5):
            with await tunnel.dial(str(THEIRS), TALK) as sock:
                sock.sendall(b"!")
                assert await asyncio.to_thread(hear, sock) == expected(b"down", 700_000)
                await asyncio.to_thread(speak, sock, 300_000)
                told = await at.said()
            wanted = hashlib.sha256(b"!" + b"".join(stream(b"up", 300_000))).hexdigest()
            assert (told["heard"], told["digest"]) == (300_001, wanted)


async def test_a_stream_that_it_closes_reads_as_an_end_and_may_still_be_spoken_to() -> None:
    """That is all it can do: there is no reset, however much comes afterwards."""
    seen = Seen()
    async with judge() as at, called(at, capture=seen) as tunnel:
        with await tunnel.dial(str(THEIRS), CLOSE) as sock:
            sock.sendall(b"!")
            assert await asyncio.to_thread(sock.recv, 1) == b""
            assert (await at.said())["heard"] == 1
            sock.sendall(bytes(30_000))
            await echoed(tunnel, b"what is sent behind it would be behind a reset, too")
            assert tunnel.streams
            sock.shutdown(socket.SHUT_WR)
        await until(lambda: tunnel.streams == 0)
        assert not [one for one in seen.kept if segment.parse(one).flags & segment.RST]


async def test_a_stream_that_we_reset_is_over_for_both() -> None:
    async with judge() as at, called(at) as tunnel:
        with await tunnel.dial(str(THEIRS), HEAR) as sock:
            await asyncio.to_thread(sock.sendall, b"cut short")
            # Whatever is asked behind it has come behind it.
            await echoed(tunnel, b"ready?")
            assert (await at.said())["port"] == ECHO
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        told = await at.said()
        assert (told["port"], told["heard"]) == (HEAR, 9)
        await until(lambda: tunnel.streams == 0)


async def test_fifty_connections_one_after_the_other() -> None:
    async with judge() as at, called(at) as tunnel:
        for number in range(50):
            await echoed(tunnel, number.to_bytes(2) * 50)
            assert (await at.said())["heard"] == 100
        await until(lambda: tunnel.streams == 0)


async def test_twenty_connections_at_once() -> None:
    async with judge() as at, called(at) as tunnel:
        questions = [number.to_bytes(2) * 50_000 for number in range(20)]
        await asyncio.gather(*(echoed(tunnel, question) for question in questions))
        told = [await at.said() for _ in questions]
        wanted = {hashlib.sha256(question).hexdigest() for question in questions}
        assert {one["digest"] for one in told} == wanted


# -- what happens on the way


@pytest.mark.parametrize("seed", SEEDS)
async def test_a_way_that_loses_reorders_doubles_and_corrupts(seed: int) -> None:
    relay = (sys.executable, "-m", "tests.system.relay")
    async with judge(octets=STREAM_OCTETS) as at:
        endpoint = at.config.peers[0].endpoint
        assert endpoint is not None
        host, port = endpoint
        async with running(*relay, host, str(port), *DIRTY, str(seed)) as way:
            assert way.stdout is not None
            there = host, int(await way.stdout.readline())
            peer = replace(at.config.peers[0], endpoint=there)
            dirty = replace(at, config=replace(at.config, peers=(peer,)))
            async with called(dirty) as tunnel:
                with await tunnel.dial(str(THEIRS), HEAR) as up:
                    await asyncio.to_thread(speak, up, STREAM_OCTETS)
                    assert (await at.said())["digest"] == expected(b"up", STREAM_OCTETS)
                with await tunnel.dial(str(THEIRS), TALK) as down:
                    down.sendall(b"!")
                    assert await asyncio.to_thread(hear, down) == expected(b"down", STREAM_OCTETS)
                assert tunnel.drops()["forged"] > 0


async def test_it_goes_on_when_we_open_a_window_that_was_closed() -> None:
    """It asks by a keep-alive after half a minute: before that our word has to come by itself."""
    seen = Seen()
    async with judge(octets=WINDOWS_OCTETS) as at, called(at, capture=seen) as tunnel:
        with await tunnel.dial(str(THEIRS), TALK) as sock:
            sock.sendall(b"!")
            await seen.first(ours=True, protocol=header.TCP, window=0)
            assert await asyncio.to_thread(hear, sock) == expected(b"down", WINDOWS_OCTETS)
        assert not [one for one in seen.theirs() if is_question(one)]


async def test_we_go_on_when_it_opens_a_window_that_was_closed() -> None:
    seen = Seen()
    async with judge() as at, called(at, capture=seen) as tunnel:
        with await tunnel.dial(str(THEIRS), REST) as sock:
            speaking = asyncio.create_task(asyncio.to_thread(speak, sock, WINDOWS_OCTETS))
            await seen.first(ours=False, protocol=header.TCP, window=0)
            assert not speaking.done()
            (await tunnel.dial(str(THEIRS), WAKE)).close()
            assert (await at.said())["port"] == WAKE
            await speaking
            told = await at.said()
            assert (told["heard"], told["digest"]) == (
                WINDOWS_OCTETS,
                expected(b"up", WINDOWS_OCTETS),
            )

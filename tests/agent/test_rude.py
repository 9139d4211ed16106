"""Clients that mean harm or do not know better: bounded, given up, and nobody else notices."""

import asyncio
import contextlib
import os
import resource
import socket
import struct
from collections.abc import AsyncGenerator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from builder_orch.agent.place import Place
from builder_orch.agent.server import Terms
from builder_orch.agent.session import ANSWERS_WAITING
from tests.agent.rig import HASTY, HELLO, QUICK, Served, framed, keep, raw, serving
from tests.agent.test_server import HOST, converse, echo
from tests.tunnel.joined import Pair, pair

PATIENT = Terms(tick_s=0.02)
STATUS = framed({"id": 2, "do": "status"})


@pytest.fixture
async def served(home: Path) -> AsyncGenerator[Served]:
    async with serving(Place(home / "agent"), HASTY) as found:
        yield found


@pytest.fixture
async def ends() -> AsyncGenerator[Pair]:
    async with pair() as both:
        await both.serve(7, echo)
        yield both


async def gone(sock: socket.socket) -> bytes:
    """What the agent says to a client until it hangs up."""

    def listen() -> bytes:
        heard = bytearray()
        with sock, contextlib.suppress(ConnectionResetError):
            while octets := sock.recv(65536):
                heard += octets
        return bytes(heard)

    return await asyncio.to_thread(listen)


RUDE = {
    "says nothing": b"",
    "half a length": b"\0",
    "half a frame": struct.pack("!I", 100) + b"{",
    "70 KB": struct.pack("!I", 70 << 10) + b"x" * 1000,
    "2^32-1": b"\xff" * 64,
    "no JSON": struct.pack("!I", 3) + b"abc",
    "deep": struct.pack("!I", 60000) + b"[" * 60000,
    "no hello": STATUS,
    "no tunnel": HELLO + framed({"id": 2, "do": "dial", "host": HOST, "port": 7}),
    "greets and is silent": HELLO,
    "an unknown word": HELLO + framed({"id": 2, "do": "config"}),
    "HTTP": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


@pytest.mark.parametrize("what", RUDE)
async def test_a_rude_client_is_given_up(served: Served, what: str) -> None:
    sock = raw(served.place)
    sock.sendall(RUDE[what])
    heard = await gone(sock)
    # It may be greeted; more than that it never gets.
    assert heard.count(b"result") <= RUDE[what].startswith(HELLO)
    found = served.agent.status()["given_up"]
    assert isinstance(found, dict)
    assert sum(found.values()) == 1


async def test_a_client_that_dribbles_is_given_up(served: Served) -> None:
    with raw(served.place) as sock:
        sock.settimeout(0.02)
        sock.sendall(HELLO + struct.pack("!I", 60000))

        def dribble() -> None:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                while True:
                    sock.sendall(b" ")
                    with contextlib.suppress(TimeoutError):
                        while sock.recv(1000):
                            pass
                        return

        await asyncio.to_thread(dribble)


async def test_a_client_that_never_reads_stops_only_itself(served: Served) -> None:
    with raw(served.place) as sock:
        sock.settimeout(0.5)
        sock.sendall(HELLO)
        sent = 0

        def flood() -> None:
            nonlocal sent
            with contextlib.suppress(TimeoutError, BrokenPipeError, ConnectionResetError):
                while True:
                    sent += sock.send(STATUS * 100)

        await asyncio.to_thread(flood)
    # What the kernel takes in both directions, one read and one table of answers.
    assert sent < 4 << 20
    await served.until(given_up={"takes no answers": 1})


async def test_descriptors_that_clients_send_are_closed(served: Served) -> None:
    ours, theirs = os.pipe()
    with raw(served.place) as sock:
        socket.send_fds(sock, [HELLO], [theirs] * 10)
        os.close(theirs)
        # The end of the pipe comes only when nobody has the other side any more.
        assert await asyncio.to_thread(os.read, ours, 1) == b""
        assert sock.recv(1000)
    os.close(ours)


@pytest.mark.parametrize("count", [120, pytest.param(500, marks=pytest.mark.long)])
async def test_a_crowd_of_idle_clients_disturbs_nobody(home: Path, ends: Pair, count: int) -> None:
    path = keep(ends.config, home / "peer.conf")
    place = Place(home / "agent")
    async with serving(place, PATIENT) as served, served.tunnel(path) as tunnel:
        await tunnel.ready(timeout_s=20)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with ExitStack() as crowd:
            for number in range(count):
                sock = crowd.enter_context(raw(place))
                sock.sendall([b"", HELLO, HELLO[:9], HELLO + STATUS * 50][number % 4])
                if number % 20 == 0:
                    assert await converse(tunnel, b"x" * 1000) == b"x" * 1000
            # One more that behaves: answered at once although the crowd is there.
            call = await served.call()
            await asyncio.to_thread(call.ask, {"do": "status"})
            call.close()
        grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown_kb < 100 * count
        assert await converse(tunnel, b"well") == b"well"


async def test_there_is_room_for_who_comes_after_the_crowd(home: Path) -> None:
    place = Place(home / "agent")
    async with serving(place, replace(PATIENT, sessions=5)) as served:
        crowd = [raw(place) for _ in range(8)]
        call = await served.call()
        assert call.greeting.pid == os.getpid()
        call.close()
        found = served.agent.status()["given_up"]
        assert found == {"had to make room": 4}
        for sock in crowd:
            sock.close()


async def test_requests_beyond_the_limit_wait_their_turn(home: Path, ends: Pair) -> None:
    path = keep(ends.config, home / "peer.conf")
    place = Place(home / "agent")
    async with serving(place, QUICK) as served, served.tunnel(path) as tunnel:
        socks = await asyncio.gather(*(tunnel.dial(HOST, 7) for _ in range(ANSWERS_WAITING * 2)))
        assert len({sock.fileno() for sock in socks}) == ANSWERS_WAITING * 2
        await served.until(connections=ANSWERS_WAITING * 2)
        for sock in socks:
            sock.close()
        await served.until(connections=0)

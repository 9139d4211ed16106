"""Questions that get no answer, another's answer, or one that does not fit a datagram."""

import asyncio
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import IPv6Address

import dns.flags
import dns.message
import dns.rrset
import pytest

from builder_orch.tunnel import resolver
from builder_orch.tunnel.failures import NameUnknown
from builder_orch.tunnel.machine import Address
from builder_orch.tunnel.resolver import Heard, Resolver

SERVER = IPv6Address("fdaa::3")
FOUND = IPv6Address("fdaa::7")


def reply(query: bytes, *, truncated: bool = False) -> bytes:
    answer = dns.message.make_response(dns.message.from_wire(query))
    if truncated:
        answer.flags |= dns.flags.TC
    else:
        answer.answer.append(dns.rrset.from_text("a.internal.", 5, "IN", "AAAA", str(FOUND)))
    return answer.to_wire()


@dataclass
class Server:
    """Answers what is sent to it by a script: one function for each question that comes."""

    script: list[Callable[[bytes, Heard], None]]
    asked: int = 0
    over_stream: bytes | None = None
    conversations: list[asyncio.Future[None]] = field(default_factory=list)

    @contextmanager
    def open_port(self, heard: Heard) -> Iterator[Callable[[Address, bytes], None]]:
        def send(_: Address, payload: bytes) -> None:
            step = self.script[min(self.asked, len(self.script) - 1)]
            self.asked += 1
            step(payload, heard)

        yield send

    async def dial(self, _: IPv6Address, __: int) -> socket.socket:
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=theirs)

        async def converse() -> None:
            (size,) = struct.unpack("!H", await reader.readexactly(2))
            query = await reader.readexactly(size)
            answer = self.over_stream if self.over_stream is not None else reply(query)
            if answer:
                writer.write(struct.pack("!H", len(answer)) + answer)
            writer.close()

        self.conversations.append(asyncio.ensure_future(converse()))
        return ours

    def resolver(self) -> Resolver:
        return Resolver(SERVER, self.open_port, self.dial)


def good(query: bytes, heard: Heard) -> None:
    heard(reply(query), (SERVER.packed, 53))


def truncated(query: bytes, heard: Heard) -> None:
    heard(reply(query, truncated=True), (SERVER.packed, 53))


def silent(query: bytes, heard: Heard) -> None:
    return


def spoofed(query: bytes, heard: Heard) -> None:
    """From elsewhere; then for another question; then nonsense."""
    heard(reply(query), (IPv6Address("fdaa::666").packed, 53))
    heard(b"\xff" + reply(query)[1:], (SERVER.packed, 53))
    heard(b"nonsense", (SERVER.packed, 53))


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "WAITS_S", (0.02, 0.02))


async def test_a_lost_question_is_asked_again() -> None:
    server = Server([silent, good])
    assert await server.resolver().resolve("a.internal") == [FOUND]
    assert server.asked == 2


async def test_spoofed_answers_are_not_believed() -> None:
    server = Server([spoofed])
    with pytest.raises(TimeoutError, match="does not answer"):
        await server.resolver().resolve("a.internal")


async def test_a_truncated_answer_is_asked_for_over_tcp() -> None:
    server = Server([truncated])
    assert await server.resolver().resolve("a.internal") == [FOUND]


@pytest.mark.parametrize("octets", [b"", b"nonsense"])
async def test_a_bad_stream_is_an_error(octets: bytes) -> None:
    server = Server([truncated], over_stream=octets)
    with pytest.raises(OSError, match="inside DNS"):
        await server.resolver().resolve("a.internal")


async def test_without_a_server_no_name_is_known() -> None:
    lone = Server([good])
    with pytest.raises(NameUnknown, match="no DNS server"):
        await Resolver(None, lone.open_port, lone.dial).resolve("a.internal")

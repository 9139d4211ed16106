"""Inside names to addresses: asks the tunnel's DNS server over UDP, and over TCP if truncated."""

import asyncio
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from ipaddress import IPv6Address

from dns.message import Message

from builder_orch.tunnel.dns import PORT, Question, is_truncated
from builder_orch.tunnel.failures import NameUnknown
from builder_orch.tunnel.machine import Address, Malformed

WAITS_S = (0.5, 1.0, 1.5, 2.0)
"""Waits for the answer to each of the UDP questions; together they stay within five seconds."""
STREAM_TIMEOUT_S = 5.0

Heard = Callable[[bytes, Address], bytes | None]
SendDatagram = Callable[[Address, bytes], None]
OpenPort = Callable[[Heard], AbstractContextManager[SendDatagram]]
"""A fresh random UDP port for the length of a block, its datagrams handed to `Heard`."""
DialAddress = Callable[[IPv6Address, int], Awaitable[socket.socket]]


class Resolver:
    """One DNS server inside; given ways to send datagrams and to open streams there."""

    def __init__(self, server: IPv6Address | None, open_port: OpenPort, dial: DialAddress) -> None:
        self._server = server
        self._open_port = open_port
        self._dial = dial

    async def resolve(self, name: str) -> list[IPv6Address]:
        """IPv6 addresses of a name; NameUnknown, ServerFailed or TimeoutError (all OSError)."""
        if self._server is None:
            raise NameUnknown(f"{name}: the tunnel has no DNS server")
        question = Question(name, os.urandom)
        for wait_s in WAITS_S:
            answer = await self._ask(self._server, question, wait_s)
            if answer is not None:
                if is_truncated(answer):
                    answer = await self._ask_by_stream(self._server, question)
                return question.addresses(answer)
        raise TimeoutError(f"inside DNS [{self._server}]:{PORT} does not answer")

    async def _ask(self, server: IPv6Address, question: Question, wait_s: float) -> Message | None:
        address = (server.packed, PORT)
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

        def judge(payload: bytes, remote: Address) -> None:
            if remote == address and not future.done():
                try:
                    future.set_result(question.judge(payload))
                except Malformed:
                    return

        with self._open_port(judge) as send:
            send(address, question.octets)
            try:
                async with asyncio.timeout(wait_s):
                    return await future
            except TimeoutError:
                return None

    async def _ask_by_stream(self, server: IPv6Address, question: Question) -> Message:
        sock = await self._dial(server, PORT)
        reader, writer = await asyncio.open_connection(sock=sock)
        try:
            writer.write(struct.pack("!H", len(question.octets)) + question.octets)
            async with asyncio.timeout(STREAM_TIMEOUT_S):
                (size,) = struct.unpack("!H", await reader.readexactly(2))
                octets = await reader.readexactly(size)
        except asyncio.IncompleteReadError:
            raise ConnectionResetError("inside DNS closed the stream before its answer") from None
        finally:
            writer.close()
        try:
            return question.judge(octets)
        except Malformed as error:
            raise OSError(f"inside DNS answered nonsense over TCP: {error}") from None

"""mitmproxy's WireGuard server, a process of its own that talks JSON lines.

usage: mitmproxy_end HOST PRIVATE_KEY PUBLIC_KEY OCTETS, keys in base64

Listens at a free UDP port of HOST, says which, and takes each connection to any inside address.
What becomes of one depends on the inside port that was called; how it went is said at its end. It
ends with its standard input.
"""

import asyncio
import hashlib
import json
import sys
from collections.abc import Awaitable, Callable

from mitmproxy_rs import Stream
from mitmproxy_rs.wireguard import start_wireguard_server

from tests.system.conversation import BLOCK, stream

ECHO, HEAR, TALK, CONVERSE, CLOSE, REST, WAKE = 7, 9, 19, 80, 81, 82, 83
"""Inside ports: sends back what it hears · hears to the end · sends OCTETS when it has heard one
octet, ends its direction and hears to the end · `conversation.answer` · closes when it has heard
one octet · hears one octet, and all that follows after somebody has called WAKE."""


class Talk:
    """A stream, and what was heard of it."""

    def __init__(self, stream: Stream, octets: int, woken: asyncio.Event) -> None:
        self.octets = octets
        self.heard = 0
        self.digest = hashlib.sha256()
        self._stream = stream
        self._woken = woken

    async def hear(self, limit: int = BLOCK) -> bytes:
        """Some octets; none at the end."""
        octets = await self._stream.read(limit)
        self.heard += len(octets)
        self.digest.update(octets)
        return octets

    async def say(self, octets: bytes) -> None:
        self._stream.write(octets)
        await self._stream.drain()

    async def echo(self) -> None:
        while octets := await self.hear():
            await self.say(octets)

    async def listen(self) -> None:
        while await self.hear():
            pass

    async def recite(self) -> None:
        for block in stream(b"down", self.octets):
            await self.say(block)

    async def talk(self) -> None:
        await self.hear(1)
        await self.recite()
        self._stream.write_eof()
        await self.listen()

    async def converse(self) -> None:
        await self.listen()
        await self.say(self.digest.digest())
        await self.recite()

    async def close(self) -> None:
        await self.hear(1)

    async def rest(self) -> None:
        await self.hear(1)
        await self._woken.wait()
        await self.listen()

    async def wake(self) -> None:
        self._woken.set()


WAYS: dict[int, Callable[[Talk], Awaitable[None]]] = {
    ECHO: Talk.echo,
    HEAR: Talk.listen,
    TALK: Talk.talk,
    CONVERSE: Talk.converse,
    CLOSE: Talk.close,
    REST: Talk.rest,
    WAKE: Talk.wake,
}


def say(**fields: object) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


async def main(host: str, private_key: str, public_key: str, octets: str) -> None:
    woken = asyncio.Event()

    async def attend(stream: Stream) -> None:
        _, port = stream.get_extra_info("sockname")
        talk = Talk(stream, int(octets), woken)
        await WAYS[port](talk)
        stream.close()
        say(port=port, heard=talk.heard, digest=talk.digest.hexdigest())

    async def return_datagrams(stream: Stream) -> None:
        while datagram := await stream.read(BLOCK):
            stream.write(datagram)

    server = await start_wireguard_server(
        host, 0, private_key, [public_key], attend, return_datagrams
    )
    say(port=server.getsockname()[1])
    stdin = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    await stdin.read()
    server.close()
    await server.wait_closed()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

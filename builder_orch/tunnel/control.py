"""Messages between a process that hosts a tunnel and the one that uses it: JSON, and descriptors.

A message is a length (u32, big-endian), as many octets of JSON, and with its first octet at most
one descriptor (SCM_RIGHTS). The two sides share a socket pair; nobody else can reach it.

    to the host     {"id": n, "do": "open", "config": wg-quick text, "capture": path or "",
                     "carrier": as of Choice.dump}                                         first
                    {"id": n, "do": "dial", "host": h, "port": p, "timeout_s": s}
                    {"id": n, "do": "resolve", "name": h}
                    {"id": n, "do": "ping", "address": a, "timeout_s": s}
                    {"id": n, "do": "ready", "timeout_s": s}
                    {"id": n, "do": "drops"}
                    {"id": n, "do": "route"}
                    {"id": n, "do": "signs"}
                    {"id": n, "do": "twin"}      answered when there is one
                    {"id": n, "do": "moved", "from": [kind, endpoint, why]}
    from the host   {"id": n, "result": value}   for dial "descriptor", which comes with it
                    {"id": n, "reason": text}    any number of times before the end of `ready`
                    {"id": n, "failure": kind, "message": text, "hint": text}
"""

import json
import os
import socket
import struct
from collections.abc import Iterator

from builder_orch.tunnel.machine import Malformed

Message = dict[str, object]

LENGTH = struct.Struct("!I")
DESCRIPTOR = "descriptor"
MESSAGE_LIMIT = 1 << 20
"""No honest message comes near it; a length beyond it is not a message."""


def send(sock: socket.socket, message: Message, descriptor: int | None = None) -> None:
    """Send one message; the descriptor is duplicated, the caller still owns its own."""
    text = json.dumps(message).encode()
    octets = LENGTH.pack(len(text)) + text
    descriptors = [] if descriptor is None else [descriptor]
    sent = socket.send_fds(sock, [octets], descriptors)
    if sent < len(octets):
        sock.sendall(octets[sent:])


class Inbox:
    """Puts messages together from what a stream socket delivers."""

    def __init__(self) -> None:
        self._octets = bytearray()
        self._descriptors: list[int] = []

    def receive(self, sock: socket.socket) -> bool:
        """Take what is there; False at the end of the stream. BlockingIOError when nothing is."""
        octets, descriptors, _, _ = socket.recv_fds(sock, 1 << 16, 16)
        self._octets += octets
        self._descriptors += descriptors
        return bool(octets)

    def messages(self) -> Iterator[Message]:
        """The whole messages so far; Malformed if what came is none."""
        while len(self._octets) >= LENGTH.size:
            (size,) = LENGTH.unpack_from(self._octets)
            if size > MESSAGE_LIMIT:
                raise Malformed(f"a message of {size} octets")
            end = LENGTH.size + size
            if len(self._octets) < end:
                return
            text = bytes(self._octets[LENGTH.size : end])
            del self._octets[:end]
            try:
                message = json.loads(text)
            except ValueError as error:
                raise Malformed(f"no JSON: {error}") from None
            if not isinstance(message, dict):
                raise Malformed("a message is an object")
            yield message

    def descriptor(self) -> int:
        """The oldest descriptor that came and was not taken; the caller owns it now."""
        if not self._descriptors:
            raise Malformed("a message came without its descriptor")
        return self._descriptors.pop(0)

    def close(self) -> None:
        """Close descriptors that nobody took."""
        while self._descriptors:
            os.close(self._descriptors.pop())

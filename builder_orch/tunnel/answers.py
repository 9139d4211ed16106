"""Who hears what comes to our UDP ports inside, and answers it."""

import contextlib
from collections.abc import Callable, Iterator

from builder_orch.tunnel.ipv6.events import DatagramReceived
from builder_orch.tunnel.ipv6.stack import Stack
from builder_orch.tunnel.machine import Address

Answer = Callable[[bytes, Address], bytes | None]
"""Given a datagram and its sender: the datagram to send back, if any."""


class Answers:
    """The ports that somebody listens to."""

    def __init__(self, stack: Stack, pump: Callable[[], None]) -> None:
        self._stack = stack
        self._pump = pump
        self._heard: dict[int, Answer] = {}

    def at(self, port: int, answer: Answer) -> None:
        """Answer at a port of all own addresses, for good; OSError when it is taken."""
        self._stack.bind(port)
        self._heard[port] = answer

    @contextlib.contextmanager
    def anywhere(self, heard: Answer) -> Iterator[Callable[[Address, bytes], None]]:
        """A random port for the length of the block; yields how to send from it."""
        port = self._stack.bind(None)
        self._heard[port] = heard

        def send(remote: Address, payload: bytes) -> None:
            self._stack.send_datagram(port, remote, payload)
            self._pump()

        try:
            yield send
        finally:
            self._stack.unbind(port)
            del self._heard[port]

    def received(self, datagram: DatagramReceived) -> None:
        """One came; nobody may listen there any more."""
        answer = self._heard.get(datagram.port)
        reply = None if answer is None else answer(datagram.payload, datagram.remote)
        if reply is not None:
            self._stack.send_datagram(datagram.port, datagram.remote, reply, local=datagram.local)

"""A dialled stream for blocking clients, which another thread can give up."""

import os
import select
import socket
import struct
import threading
from typing import Any

from urllib3 import HTTPConnectionPool
from urllib3.connection import HTTPConnection


class Line(socket.socket):
    """A connected socket for one blocking user and one who may interrupt it.

    Whatever waits in it when it is given up fails at once. (Closing a descriptor under a thread
    that waits on it wakes nobody, and shutting it down would end it as if it were complete.)
    """

    def __init__(self, sock: socket.socket) -> None:
        """Takes over a connected stream socket; `end` must be called when all is done."""
        super().__init__(fileno=sock.detach())
        self._lock = threading.Lock()
        self._bell, self._rope = os.pipe()
        self._given_up = False
        self._ended = False
        self.moved = 0
        """Octets that went either way: the sign of life."""

    def fragile(self, fragile: bool) -> None:
        """While fragile, whatever closes it (even the end of this process) makes it a reset: the
        far end must never take what it got so far for all there was."""
        if self.fileno() >= 0:
            self.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", fragile, 0))

    def give_up(self) -> None:
        """Wake up whoever waits, and end in a reset; from any thread, any number of times."""
        with self._lock:
            self._given_up = True
            if not self._ended:
                self.fragile(True)
                os.write(self._rope, b"x")

    def end(self) -> None:
        """Close for good, even if a response still refers to it."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
            os.close(self._bell)
            os.close(self._rope)
            if self.fileno() >= 0:
                os.close(self.detach())

    def sendall(self, data: Any, flags: int = 0) -> None:  # noqa: ANN401 - as the class above
        view = memoryview(data).cast("B")
        while view:
            self._wait(select.POLLOUT)
            sent = self._send_some(view, flags)
            self.moved += sent
            view = view[sent:]

    def _send_some(self, view: memoryview, flags: int) -> int:
        try:
            return super().send(view, flags | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:  # noqa: ANN401
        self._wait(select.POLLIN)
        received = super().recv_into(buffer, nbytes, flags)
        self.moved += received
        return received

    def _wait(self, wanted: int) -> None:
        if self._given_up:
            raise ConnectionAbortedError("given up on this side")
        poll = select.poll()
        poll.register(self, wanted)
        poll.register(self._bell, select.POLLIN)
        limit_s = self.gettimeout()
        ready = dict(poll.poll(None if limit_s is None else limit_s * 1000))
        if self._bell in ready:
            raise ConnectionAbortedError("given up on this side")
        if not ready:
            raise TimeoutError("timed out")


def pool_over(line: Line) -> type[HTTPConnectionPool]:
    """A connection pool for urllib3 whose only connection is the line."""
    lines = [line]

    class Connection(HTTPConnection):
        def connect(self) -> None:
            if not lines:
                raise ConnectionResetError("the far end closed the connection")
            self.sock = lines.pop()

    class Pool(HTTPConnectionPool):
        ConnectionCls = Connection

    return Pool

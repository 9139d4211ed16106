"""An inner TCP connection as an ordinary socket: octets, half-closes and resets pass both ways.

The application's end is one side of a TCP pair over the loopback interface and not of a Unix
socketpair, because a Unix socket cannot carry a reset: an aborted stream would read as a finished
one, which is how truncated data passes for whole.
"""

import asyncio
import socket
import struct
from collections.abc import Callable

from builder_orch.tunnel.ipv6.connection import Connection
from builder_orch.tunnel.ipv6.state import End
from builder_orch.tunnel.machine import TRAIN_PACKETS

CHUNK = 2 * TRAIN_PACKETS * 1360
"""Octets moved by one system call between the local socket and the connection: two full trains, cut
while they are still in the processor's cache, and small enough for malloc to have room at hand."""
CHUNKS_PER_WAKEUP = 4
FREED_MEMORY = 8 << 20
"""Octets in one piece that are taken and let go once. glibc learns from it to keep as much at hand;
without that it returns whatever is above 128 KiB to the kernel, and the next train has to fault
the pages in again (a tenth of an upload's time). Elsewhere it costs nothing."""
PAIR_BUFFER = 1 << 20
_ABORT_ON_CLOSE = struct.pack("ii", 1, 0)
_FINISH_ON_CLOSE = struct.pack("ii", 0, 0)


def loopback_pair() -> tuple[socket.socket, socket.socket]:
    """Two joined TCP sockets: ours without blocking, and one to give away (blocking).

    A stranger who connects to the listener in between is told apart by its port and turned away.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, PAIR_BUFFER)
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        theirs = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            theirs.connect(listener.getsockname())
            while True:
                ours, caller = listener.accept()
                if caller == theirs.getsockname():
                    break
                ours.close()
        except OSError:
            theirs.close()
            raise
    for sock in (ours, theirs):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    ours.setblocking(False)
    return ours, theirs


def reset(sock: socket.socket) -> None:
    """Close a TCP socket so that its peer sees a reset instead of an end of file."""
    _linger(sock, _ABORT_ON_CLOSE)
    sock.close()


def _linger(sock: socket.socket, how: bytes) -> None:
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, how)


class Splice:
    """A local stream socket and an inner connection joined; owns the socket and closes it.

    `pump` is called after octets moved from the socket into the connection; moves the other way are
    made inside the driver's own turn and need no further push.
    """

    def __init__(
        self, connection: Connection, sock: socket.socket, pump: Callable[[], None]
    ) -> None:
        self._connection = connection
        self._socket = sock
        self._pump = pump
        self._loop = asyncio.get_running_loop()
        self._untaken = b""
        self._unsent = memoryview(b"")
        self._reading = False
        self._writing = False
        self._inbound_done = False
        self._outbound_done = False
        self._over: Callable[[], object] = lambda: None
        self.closed = False
        sock.setblocking(False)
        bytes(FREED_MEMORY)
        # Should this process be killed, its sockets are closed by the kernel: as resets, too.
        _linger(sock, _ABORT_ON_CLOSE)

    def start(self) -> None:
        """Begin to move octets; what the connection already holds is delivered first."""
        self._listen(reading=True)
        self.readable()

    def readable(self) -> None:
        """The connection has octets, or has ended its direction."""
        if self.closed or self._writing:
            return
        self._deliver()

    def writable(self) -> None:
        """The connection has room again."""
        if self.closed or self._outbound_done:
            return
        if self._untaken:
            taken = self._connection.write(self._untaken)
            self._untaken = self._untaken[taken:]
        if not self._untaken:
            self._listen(reading=True)

    def ended(self, over: Callable[[], object]) -> None:
        """The connection is gone; anything but an orderly end becomes a reset here.

        `over` is called when the socket is closed, too: the application may have much to read yet.
        """
        if self.closed:
            over()
            return
        self._over = over
        if self._connection.end is End.FINISHED:
            self._outbound_done = True
            self._listen(reading=False)
            if not self._writing:
                self._deliver()
        else:
            self.abort()

    def abort(self) -> None:
        """Reset both sides."""
        if self.closed:
            return
        self._forget()
        self._connection.abort()
        reset(self._socket)

    def _deliver(self) -> None:
        """Move octets from the connection to the socket until one of them has no more."""
        try:
            while True:
                if not self._unsent:
                    self._unsent = memoryview(self._connection.read(CHUNK))
                    if not self._unsent:
                        break
                sent = self._socket.send(self._unsent)
                self._unsent = self._unsent[sent:]
        except (BlockingIOError, InterruptedError):
            self._listen(writing=True)
            return
        except OSError:
            # The application is gone without having read everything: the far end must know.
            self.abort()
            return
        self._listen(writing=False)
        if self._connection.at_eof and not self._inbound_done:
            self._inbound_done = True
            self._shut_write()
        self._close_if_done()

    def _shut_write(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            self.abort()

    def _on_socket_readable(self) -> None:
        for _ in range(CHUNKS_PER_WAKEUP):
            try:
                octets = self._socket.recv(CHUNK)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                self.abort()
                break
            if not octets:
                self._outbound_done = True
                self._listen(reading=False)
                self._connection.close()
                break
            taken = self._connection.write(octets)
            if taken < len(octets):
                self._untaken = octets[taken:]
                self._listen(reading=False)
                break
            if len(octets) < CHUNK:
                break  # that was all; if more comes, the loop tells
        self._close_if_done()
        self._pump()

    def _on_socket_writable(self) -> None:
        self._deliver()
        self._pump()

    def _listen(self, *, reading: bool | None = None, writing: bool | None = None) -> None:
        if reading is not None and reading != self._reading:
            self._reading = reading
            if reading:
                self._loop.add_reader(self._socket, self._on_socket_readable)
            else:
                self._loop.remove_reader(self._socket)
        if writing is not None and writing != self._writing:
            self._writing = writing
            if writing:
                self._loop.add_writer(self._socket, self._on_socket_writable)
            else:
                self._loop.remove_writer(self._socket)

    def _close_if_done(self) -> None:
        if self._inbound_done and self._outbound_done and not self.closed:
            self._forget()
            _linger(self._socket, _FINISH_ON_CLOSE)
            self._socket.close()

    def _forget(self) -> None:
        self._listen(reading=False, writing=False)
        self.closed = True
        self._over()


_ENDS: dict[End, tuple[type[OSError], str]] = {
    End.REFUSED: (ConnectionRefusedError, "refused: nothing listens there"),
    End.RESET: (ConnectionResetError, "reset by the far end"),
    End.TIMED_OUT: (TimeoutError, "no answer in time"),
    End.UNREACHABLE: (OSError, "unreachable inside the network"),
    End.ABORTED: (ConnectionAbortedError, "given up on this side"),
    End.FINISHED: (ConnectionResetError, "closed while connecting"),
}


def failed(end: End | None) -> OSError:
    """Why a connection did not come to be, in Python's own words."""
    kind, text = _ENDS[end or End.RESET]
    return kind(text)

"""One client of the agent: octets in, requests out, answers back, everything with a bound."""

import asyncio
import os
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from builder_orch.agent.message import Frames, Hello, Request, frame, parse
from builder_orch.tunnel.control import Message
from builder_orch.tunnel.driver import Tunnel
from builder_orch.tunnel.machine import Malformed

REQUESTS_AT_ONCE = 32
ANSWERS_WAITING = 128
CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds: for the first request, and for the rest of one that has begun (`frame_s`); for a
    client that uses no tunnel and asks nothing (`quiet_s`); for one that takes no answers
    (`stall_s`)."""

    frame_s: float = 10.0
    quiet_s: float = 60.0
    stall_s: float = 30.0


class Session:
    """Reads what the client asks and sends what it is told.

    Requests run beside each other, REQUESTS_AT_ONCE of them; no more is read while as many are
    under way or while answers wait, so a client that does not read stops only itself.
    """

    def __init__(
        self,
        sock: socket.socket,
        attend: Callable[["Session", Request], Awaitable[None]],
        closed: Callable[["Session", str], None],
    ) -> None:
        self._socket = sock
        self._attend = attend
        self._on_closed = closed
        self._loop = asyncio.get_running_loop()
        self._frames = Frames()
        self._waiting: deque[Request] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._outbox: deque[tuple[bytes, int | None]] = deque()
        self._reading = False
        self._writing = False
        self.hello: Hello | None = None
        self.tunnel: Tunnel | None = None
        self.heard_at = self._loop.time()
        self._moved_at = self.heard_at
        self.closed = False
        sock.setblocking(False)
        self._watch()

    @property
    def idle(self) -> bool:
        """Whether it uses no tunnel and nothing is under way for it."""
        return self.tunnel is None and not self._tasks

    def overdue(self, patience: Patience) -> str:
        """Why this client is to be given up; "" while it is not."""
        now = self._loop.time()
        if self._outbox and now - self._moved_at > patience.stall_s:
            return "takes no answers"
        silent_s = now - self.heard_at
        begun = self._reading and self._frames.partial
        if (self.hello is None or begun) and silent_s > patience.frame_s:
            return "did not finish a request"
        if self.idle and silent_s > patience.quiet_s:
            return "asks nothing"
        return ""

    def say(self, message: Message, descriptor: int | None = None) -> None:
        """Send a message; a descriptor is duplicated, the caller still owns its own."""
        if self.closed:
            return
        if len(self._outbox) >= ANSWERS_WAITING:
            self.close("takes no answers")
            return
        if not self._outbox:
            self._moved_at = self._loop.time()
        copy = None if descriptor is None else os.dup(descriptor)
        self._outbox.append((frame(message), copy))
        self._flush()

    def close(self, why: str) -> None:
        """End the conversation; what was dialled lives on with those who have it."""
        if self.closed:
            return
        self.closed = True
        self._watch()
        self._socket.close()
        while self._outbox:
            _, copy = self._outbox.popleft()
            if copy is not None:
                os.close(copy)
        self._waiting.clear()
        for task in self._tasks:
            task.cancel()
        self._on_closed(self, why)

    # -- inside ---------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Listen to the socket for what there is room for."""
        room = not self._waiting and not self._outbox and len(self._tasks) < REQUESTS_AT_ONCE
        reading = room and not self.closed
        if reading != self._reading:
            self._reading = reading
            if reading:
                self._loop.add_reader(self._socket, self._on_readable)
            else:
                self._loop.remove_reader(self._socket)
        writing = bool(self._outbox) and not self.closed
        if writing != self._writing:
            self._writing = writing
            if writing:
                self._loop.add_writer(self._socket, self._flush)
            else:
                self._loop.remove_writer(self._socket)

    def _on_readable(self) -> None:
        try:
            # Not recv_fds: descriptors that a client sends are closed by the kernel.
            octets = self._socket.recv(CHUNK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            octets = b""
        if not octets:
            self.close("is gone")
            return
        began = self._frames.partial
        try:
            requests = [parse(message) for message in self._frames.receive(octets)]
        except Malformed as malformed:
            self.close(f"is malformed: {malformed}")
            return
        if requests or not began:
            self.heard_at = self._loop.time()
        self._waiting.extend(requests)
        self._go_on()

    def _go_on(self) -> None:
        while self._waiting and len(self._tasks) < REQUESTS_AT_ONCE and not self.closed:
            task = asyncio.ensure_future(self._attend(self, self._waiting.popleft()))
            self._tasks.add(task)
            task.add_done_callback(self._done)
        self._watch()

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # A defect of ours: it must be seen, and this client cannot be answered any more.
            self._loop.call_exception_handler({"message": "a request failed", "exception": error})
            self.close("asked for what we cannot do")
        elif not self.closed:
            self.heard_at = self._loop.time()
            self._go_on()

    def _flush(self) -> None:
        while self._outbox:
            octets, copy = self._outbox[0]
            try:
                sent = socket.send_fds(self._socket, [octets], [] if copy is None else [copy])
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                self.close("is gone")
                return
            self._moved_at = self._loop.time()
            if copy is not None:
                os.close(copy)
            if sent < len(octets):
                self._outbox[0] = (octets[sent:], None)
            else:
                self._outbox.popleft()
        self._watch()

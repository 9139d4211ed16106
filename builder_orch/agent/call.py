"""Talking to the agent without an event loop: enough to find it, to ask it and to end it."""

import json
import os
import select
import signal
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from builder_orch import __version__
from builder_orch.agent import PROTOCOLS
from builder_orch.agent.place import Place, stranger
from builder_orch.errors import AgentFailed
from builder_orch.tunnel.control import LENGTH, MESSAGE_LIMIT, Message, send

ANSWER_LIMIT_S = 5.0
END_LIMIT_S = 5.0


class Gone(Exception):
    """The agent ended, or left, before it answered."""


@dataclass(frozen=True, slots=True)
class Greeting:
    """What an agent says of itself."""

    protocols: tuple[int, int]
    version: str
    pid: int

    def shares(self, protocols: tuple[int, int]) -> bool:
        """Whether there is a protocol that both speak."""
        return max(protocols[0], self.protocols[0]) <= min(protocols[1], self.protocols[1])


class Call:
    """A connection on which one waits for each answer; owns its socket until `detach`."""

    def __init__(self, sock: socket.socket, version: str, protocols: tuple[int, int]) -> None:
        self._socket = sock
        self._number = 0
        found = self.ask({"do": "hello", "protocols": list(protocols), "version": version})
        match found:
            case {"protocols": [int(first), int(last)], "version": str(theirs), "pid": int(pid)}:
                self.greeting = Greeting((first, last), theirs, pid)
            case _:
                raise _not_an_agent(sock)

    def ask(self, request: Message) -> object:
        """The answer to one request. Gone when there is none any more, AgentFailed when it does not
        come in ANSWER_LIMIT_S."""
        self._number -= 1
        try:
            send(self._socket, {"id": self._number, **request})
            while True:
                message = self._receive()
                if message.get("id") == self._number:
                    return message.get("result")
        except TimeoutError:
            self._deaf()
        except OSError:
            raise Gone from None

    def detach(self) -> socket.socket:
        """The socket, for whoever goes on with it."""
        return self._socket

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def _receive(self) -> Message:
        (size,) = LENGTH.unpack(self._exactly(LENGTH.size))
        if size > MESSAGE_LIMIT:
            raise _not_an_agent(self._socket)
        try:
            message = json.loads(self._exactly(size))
        except ValueError:
            raise _not_an_agent(self._socket) from None
        if not isinstance(message, dict):
            raise _not_an_agent(self._socket)
        return message

    def _exactly(self, size: int) -> bytes:
        octets = b""
        while len(octets) < size:
            # Not a byte more than this answer: the next reader must find the rest.
            more = self._socket.recv(size - len(octets))
            if not more:
                raise Gone
            octets += more
        return octets

    def _deaf(self) -> NoReturn:
        raise AgentFailed(
            f"the agent ({_who(self._socket)}) does not answer",
            hint="End it with fly-build agent stop --now, or use --agent off.",
        ) from None


def greet(
    place: Place, *, version: str = __version__, protocols: tuple[int, int] = PROTOCOLS
) -> Call | None:
    """A connection to the agent that listens there; None when none does."""
    sock = place.connect(ANSWER_LIMIT_S)
    if sock is None:
        return None
    try:
        return Call(sock, version, protocols)
    except Gone:
        # It ended just now, which is as if it had ended before.
        sock.close()
        return None
    except BaseException:
        sock.close()
        raise


@dataclass(frozen=True, slots=True)
class Ending:
    """An agent that was told to end, and the connections that it waits for."""

    pid: int
    connections: int


def end_agent(place: Place, *, now: bool) -> Ending | None:
    """Have the agent end when its connections do, or `now`; None when there is none.

    One that is to end now and does not is killed.
    """
    sock = place.connect(ANSWER_LIMIT_S)
    if sock is None:
        return None
    with sock:
        who = stranger(sock)
        try:
            call = Call(sock, __version__, PROTOCOLS)
            answer = call.ask({"do": "retire", "now": now})
        except Gone:
            answer = None
        except AgentFailed:
            if not now or who is None:
                raise
            answer = None
        match answer:
            case {"pid": int(pid), "connections": int(connections)}:
                ending = Ending(pid, connections)
            case _:
                if who is None:
                    return None
                ending = Ending(who.pid, 0)
    if ending.connections == 0:
        _wait(ending.pid, kill=now)
    return ending


def _wait(pid: int, *, kill: bool) -> None:
    if not hasattr(os, "pidfd_open"):
        return
    with suppress(ProcessLookupError):
        process = os.pidfd_open(pid)
        try:
            if select.select([process], [], [], END_LIMIT_S)[0] or not kill:
                return
            signal.pidfd_send_signal(process, signal.SIGKILL)
            select.select([process], [], [], END_LIMIT_S)
        finally:
            os.close(process)


def _who(sock: socket.socket) -> str:
    found = stranger(sock)
    return f"pid {found.pid}" if found else "its pid is not known"


def _not_an_agent(sock: socket.socket) -> AgentFailed:
    return AgentFailed(
        f"what listens on the agent's socket ({_who(sock)}) is no agent",
        hint="End that process, or use --agent off.",
    )

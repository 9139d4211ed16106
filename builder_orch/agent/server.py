"""The agent: listens, holds tunnels, carries out what its user's processes ask, ends when idle."""

import asyncio
import os
import resource
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from builder_orch import __version__
from builder_orch.agent import PROTOCOLS
from builder_orch.agent.message import Hello, Open, Request, Retire, Status, Use
from builder_orch.agent.place import Place, Tenure, stranger
from builder_orch.agent.session import Patience, Session
from builder_orch.agent.tunnels import Busy, Held, Tunnels, Unusable
from builder_orch.errors import TunnelNotUp, UsageFailure
from builder_orch.tunnel.control import Message
from builder_orch.tunnel.host import Host, failure

SESSIONS = 1000
DESCRIPTORS = 1 << 16
ACCEPT_PAUSE_S = 0.2
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Terms:
    """How an agent behaves; seconds. It ends after `idle_s` without use, a tunnel is closed after
    `tunnel_idle_s` without. `version` and `protocols` are its own unless a test says otherwise.
    """

    idle_s: float = 900.0
    tunnel_idle_s: float = 300.0
    patience: Patience = field(default_factory=Patience)
    sessions: int = SESSIONS
    tick_s: float = 1.0
    version: str = __version__
    protocols: tuple[int, int] = PROTOCOLS


class Agent:
    """The one of its place, from its tenure to its end."""

    def __init__(self, place: Place, tenure: Tenure, terms: Terms) -> None:
        self._place = place
        self._tenure = tenure
        self._terms = terms
        self._loop = asyncio.get_running_loop()
        self._began = self._busy_at = self._loop.time()
        self._tunnels = Tunnels(place.stamps)
        self._sessions: set[Session] = set()
        self._given_up: Counter[str] = Counter()
        self._leaving = False
        self._over = asyncio.Event()
        self._loop.add_reader(tenure.listener, self._on_caller)

    async def run(self) -> None:
        """Serve until it was idle for long enough, was told to leave or `stop` was called."""
        try:
            while not self._over.is_set():
                try:
                    async with asyncio.timeout(self._terms.tick_s):
                        await self._over.wait()
                except TimeoutError:
                    await self._tend()
        finally:
            self._leave()
            await self._tunnels.close()
            for session in list(self._sessions):
                session.close("ends with the agent")

    def stop(self) -> None:
        """End now; what is open is reset."""
        self._over.set()

    # -- clients --------------------------------------------------------------------------------

    def _on_caller(self) -> None:
        try:
            sock, _ = self._tenure.listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            # No descriptors left: callers wait in the kernel's queue until some are free.
            _log.warning("callers have to wait", cause=str(error))
            self._loop.remove_reader(self._tenure.listener)
            self._loop.call_later(ACCEPT_PAUSE_S, self._listen_again)
            return
        who = stranger(sock)
        if who is not None and who.uid != os.geteuid():
            _log.warning("another user was turned away", uid=who.uid, pid=who.pid)
            sock.close()
            return
        if len(self._sessions) >= self._terms.sessions and not self._make_room():
            sock.close()
            return
        self._sessions.add(Session(sock, self._attend, self._closed))

    def _listen_again(self) -> None:
        if not self._leaving:
            self._loop.add_reader(self._tenure.listener, self._on_caller)

    def _make_room(self) -> bool:
        """Give up the one of the idle clients that was silent the longest."""
        idle = [session for session in self._sessions if session.idle]
        if idle:
            min(idle, key=lambda session: session.heard_at).close("had to make room")
        return bool(idle)

    def _closed(self, session: Session, why: str) -> None:
        self._sessions.discard(session)
        self._tunnels.release(session)
        if why != "is gone":
            kind = why.partition(":")[0]
            self._given_up[kind] += 1
            # One line for each order of magnitude: rude clients must not fill the log either.
            if self._given_up[kind] in {1, 10, 100, 1000, 10000}:
                _log.info("a client", why=why, times=self._given_up[kind])

    async def _attend(self, session: Session, request: Request) -> None:
        match request:
            case Hello(number):
                session.hello = request
                self._say(session, number, self._greeting())
            case _ if session.hello is None:
                session.close("is malformed: no hello")
            case Status(number):
                self._say(session, number, self.status())
            case Retire(number, now):
                self._retire(session, number, now)
            case Open():
                await self._open(session, request)
            case Use(message=message):
                if session.tunnel is None:
                    session.close("is malformed: no tunnel was opened")
                    return
                await Host(session.tunnel, session.say).attend(message)

    async def _open(self, session: Session, request: Open) -> None:
        number = request.id
        if self._leaving:
            self._say(session, number, {"state": "leaving"})
            return
        if session.tunnel is not None:
            session.close("is malformed: a second tunnel")
            return
        try:
            tunnel = await self._tunnels.take(request.path, request.choice, session)
        except (Unusable, UsageFailure) as error:
            self._say(session, number, {"state": "unusable", "why": str(error)})
        except Busy as error:
            self._say(session, number, {"state": "busy", "why": str(error)})
        except (TunnelNotUp, OSError) as error:
            session.say(failure(number, error))
        else:
            session.tunnel = tunnel
            self._say(session, number, {"state": "open"})

    def _say(self, session: Session, number: int, result: object) -> None:
        session.say({"id": number, "result": result})

    def _greeting(self) -> Message:
        terms = self._terms
        return {"protocols": list(terms.protocols), "version": terms.version, "pid": os.getpid()}

    def status(self) -> Message:
        """What `fly-build agent status` shows; no key is in it but the gateways' public ones."""
        return {
            **self._greeting(),
            "uid": os.geteuid(),
            "uptime_s": round(self._loop.time() - self._began, 1),
            "idle_exit_s": self._terms.idle_s,
            "leaving": self._leaving,
            "clients": sum(session.tunnel is not None for session in self._sessions),
            "connections": self._tunnels.streams,
            "given_up": dict(self._given_up),
            "tunnels": [_described(held) for held in self._tunnels],
        }

    # -- its end --------------------------------------------------------------------------------

    def _retire(self, session: Session, number: int, now: bool) -> None:
        self._leave()
        streams = self._tunnels.streams
        self._say(session, number, {"pid": os.getpid(), "connections": 0 if now else streams})
        if now or not self._tunnels.in_use:
            self.stop()

    def _leave(self) -> None:
        """Listen no more and let another agent begin."""
        if not self._leaving:
            self._leaving = True
            self._loop.remove_reader(self._tenure.listener)
            self._tenure.end()
            _log.info("leaving", connections=self._tunnels.streams)

    async def _tend(self) -> None:
        for session in list(self._sessions):
            if why := session.overdue(self._terms.patience):
                session.close(why)
        await self._tunnels.tidy(self._terms.tunnel_idle_s)
        if self._tunnels.in_use:
            self._busy_at = self._loop.time()
        elif self._leaving or self._loop.time() - self._busy_at >= self._terms.idle_s:
            self.stop()


def _described(held: Held) -> Message:
    tunnel = held.tunnel
    peers = [] if tunnel is None else tunnel.status()
    return {
        "file": held.path,
        "address": str(held.config.address),
        "clients": len(held.users),
        "connections": held.streams,
        "handshake_age_s": peers[0].last_handshake_age_s if peers else None,
        "sent_bytes": sum(peer.sent_octets for peer in peers),
        "received_bytes": sum(peer.received_octets for peer in peers),
    }


async def serve(
    place: Place, terms: Terms | None = None, begun: Callable[[Agent], None] = lambda _: None
) -> None:
    """Be the agent of a place until its end; AlreadyRunning when it has one.

    `begun` is given the agent as soon as it listens.
    """
    tenure = place.take()
    try:
        _allow_many_descriptors()
        agent = Agent(place, tenure, terms or Terms())
        _log.info("listening", pid=os.getpid(), version=__version__, folder=str(place.folder))
        begun(agent)
        await agent.run()
        _log.info("ended")
    finally:
        tenure.end()


def _allow_many_descriptors() -> None:
    """Each client and each connection takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

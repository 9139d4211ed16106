"""The tunnel: one carrier, one WireGuard interface, one IPv6 stack, one timer, one event loop."""

import asyncio
import os
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from functools import partial
from ipaddress import AddressValueError, IPv6Address

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from builder_orch.errors import TunnelNotUp
from builder_orch.tunnel.answers import Answer, Answers
from builder_orch.tunnel.capture import Capture
from builder_orch.tunnel.carrier import Carrier, Route, Sign
from builder_orch.tunnel.carrier.choice import Choice
from builder_orch.tunnel.carrier.families import UdpFamilies
from builder_orch.tunnel.carrier.opening import open_carrier
from builder_orch.tunnel.carrier.race import RaceCarrier
from builder_orch.tunnel.carrier.udp import UdpCarrier
from builder_orch.tunnel.carrier.websocket import WebSocketCarrier
from builder_orch.tunnel.clock import boot_time
from builder_orch.tunnel.config import PeerConfig, PublicKey, TunnelConfig
from builder_orch.tunnel.echo import Echoes
from builder_orch.tunnel.ipv6.connection import Connection
from builder_orch.tunnel.ipv6.events import (
    Accepted,
    Closed,
    DatagramReceived,
    EchoReplied,
    Event,
    Opened,
    Readable,
    Writable,
)
from builder_orch.tunnel.ipv6.stack import Stack
from builder_orch.tunnel.machine import TRAIN_PACKETS, Address, Endpoint
from builder_orch.tunnel.stamps import Stamps
from builder_orch.tunnel.stream import Splice, failed, loopback_pair, reset
from builder_orch.tunnel.transport import ConnectionTransport, Factory
from builder_orch.tunnel.usurper import ECHO_S, Usurper
from builder_orch.tunnel.wireguard.interface import (
    EndpointMoved,
    HandshakeStarted,
    Interface,
    PeerStatus,
    SessionStarted,
)

BACKEND_TIMEOUT_S = 10.0
OVERDUE_S = 1.0
"""How long an answer to a handshake may take before somebody is told of waiting for it."""
KEEPALIVE_S = 30.0
"""Silence after which a peer is asked whether it is still there: the only way to notice that an
idle one has gone, and that the far side of a half-closed stream was lost."""

Backend = Callable[[Address, Address], Awaitable[socket.socket]]
"""Given a caller's remote and local inside addresses: a connected socket to splice it to."""
Dial = Callable[[str, int], Awaitable[socket.socket]]
DialBlocking = Callable[[str, int], socket.socket]


class Tunnel:
    """Moves packets between a carrier and the two cores, and streams in and out of the stack.

    All methods but `dial_blocking` belong to the event loop that made the tunnel.
    """

    def __init__(
        self,
        config: TunnelConfig,
        carrier: Carrier,
        *,
        capture: Capture | None = None,
        stamps: Stamps | None = None,
    ) -> None:
        self._config = config
        self._capture = capture
        self._carrier = carrier
        self._loop = asyncio.get_running_loop()
        now = boot_time()
        self._stamps = stamps
        self._epoch = time.time() - now if stamps is None else stamps.epoch(time.time(), now)
        self._interface = Interface(
            config.private_key,
            mtu=config.mtu,
            entropy=os.urandom,
            epoch=self._epoch,
            peers=config.peers,
        )
        self._stack = Stack(
            [config.address],
            mtu=config.mtu,
            entropy=os.urandom,
            path=self._interface.has_session,
        )
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._arrived: list[bytes] = []
        self._pumping = False
        self._closed = False
        self._splices: dict[Connection, Splice | ConnectionTransport] = {}
        self._opening: dict[Connection, asyncio.Future[None]] = {}
        self._backends: dict[tuple[bytes | None, int | None], Backend] = {}
        self._answers = Answers(self._stack, self.pump)
        self._echoes = Echoes(self._stack.ping, self.pump)
        self._established: dict[PublicKey, asyncio.Event] = {}
        self._attempts = 0
        self._usurper = Usurper()
        self._tasks: set[asyncio.Task[None]] = set()
        self._moved = asyncio.Event()
        self._race = carrier if isinstance(carrier, RaceCarrier) else None
        if self._race is not None:
            self._race.changed = self._moved.set
        if isinstance(carrier, RaceCarrier | WebSocketCarrier):
            carrier.probe = self._probe
        self._hears = carrier if isinstance(carrier, RaceCarrier | UdpFamilies) else None
        if isinstance(carrier, RaceCarrier | UdpCarrier | UdpFamilies):
            carrier.relocated = self._announce
        carrier.start(self._deliver, self.pump)

    @property
    def address(self) -> IPv6Address:
        """Our own inside address."""
        return self._config.address

    def status(self) -> list[PeerStatus]:
        """What is known of each peer."""
        return self._interface.status(boot_time())

    @property
    def streams(self) -> int:
        """How many connections are open, whoever has their other ends."""
        return len(self._splices)

    async def route(self) -> Route:
        """How the gateway is reached now, and why so."""
        return self._carrier.route()

    async def signs(self) -> tuple[Sign, ...]:
        """What each way to the gateway that was tried looks like."""
        return self._carrier.signs()

    async def twin(self) -> None:
        """Wait until it is clear that somebody else uses our key: sessions get lost, again and
        again, though each handshake is answered. The resolver, if any, is asked for echoes."""
        await self._usurper.seen(
            self._config.dns, partial(self.ping, timeout_s=ECHO_S), self._renew
        )

    async def moved(self, route: Route) -> Route:
        """Wait until the gateway is reached in another way than `route`, and tell which."""
        while (now := self._carrier.route()) == route:
            self._moved.clear()
            await self._moved.wait()
        return now

    def drops(self) -> dict[str, int]:
        """How many packets each core threw away, by reason."""
        return dict(self._interface.drops + self._stack.drops)

    # -- reaching out ---------------------------------------------------------------------------

    async def dial(self, host: str, port: int, *, timeout_s: float = 30.0) -> socket.socket:
        """A connected blocking socket to an inside host, given by address or by name.

        ConnectionRefusedError, ConnectionResetError, TimeoutError, NameUnknown or another OSError
        say why not. Whoever gets the socket closes it.
        """
        ours, theirs = loopback_pair()
        try:
            connection = await self._connect(host, port, timeout_s)
        except BaseException:
            ours.close()
            theirs.close()
            raise
        self._splice(connection, ours)
        return theirs

    async def create_connection(
        self, factory: Factory, host: str, port: int, *, timeout_s: float = 30.0
    ) -> tuple[asyncio.Transport, asyncio.BaseProtocol]:
        """The method of an event loop, to an inside host and without a socket in between: what
        costs least. Failures as of `dial`; a protocol of streams is made by `open_connection`."""
        protocol = factory()
        connection = await self._connect(host, port, timeout_s)
        transport = ConnectionTransport(connection, protocol, self.pump)
        self._join(connection, transport)
        return transport, protocol

    async def _dial_address(self, address: IPv6Address, port: int) -> socket.socket:
        return await self.dial(str(address), port)

    def dial_blocking(self, host: str, port: int, *, timeout_s: float = 30.0) -> socket.socket:
        """`dial` for any other thread than the event loop's."""
        dialling = self.dial(host, port, timeout_s=timeout_s)
        return asyncio.run_coroutine_threadsafe(dialling, self._loop).result()

    async def attach(self, sock: socket.socket, host: str, port: int, *, timeout_s: float) -> None:
        """Join a local stream socket to a new inside connection; owns the socket in any case."""
        try:
            connection = await self._connect(host, port, timeout_s)
        except BaseException:
            reset(sock)
            raise
        self._splice(connection, sock)

    async def resolve(self, name: str) -> list[IPv6Address]:
        """IPv6 addresses of an inside name, asked of the tunnel's DNS server over UDP, then TCP."""
        # The first question pays for the DNS library, and not every program that opens a tunnel.
        from builder_orch.tunnel.resolver import Resolver

        resolver = Resolver(self._config.dns, self.datagrams, self._dial_address)
        return await resolver.resolve(name)

    def datagrams(self, heard: Answer) -> AbstractContextManager[Callable[[Address, bytes], None]]:
        """A random UDP port of ours for the length of the block; yields how to send from it.

        What comes to it is given to `heard`, whose result, if any, goes back to the sender.
        """
        return self._answers.anywhere(heard)

    async def ping(self, address: IPv6Address, *, timeout_s: float = 5.0) -> float:
        """Seconds that an ICMPv6 echo took there and back; TimeoutError without an answer."""
        return await self._echoes.ask(address, timeout_s)

    async def ready(
        self, *, timeout_s: float, report: Callable[[str], None] = lambda _: None
    ) -> float:
        """Wait until the first peer has answered a handshake; seconds it took.

        `report` is told the current reason whenever it changes, once an answer is overdue.
        TunnelNotUp after `timeout_s`; the handshake goes on, and may be waited for again.
        """
        peer = self._config.peers[0]
        established = self._established.setdefault(peer.public_key, asyncio.Event())
        began = boot_time()
        said = ""
        while not established.is_set():
            elapsed = boot_time() - began
            reason = self._carrier.waiting(max(1, self._attempts))
            overdue = elapsed >= OVERDUE_S or self._attempts > 1 or self._carrier.refusals
            if overdue and reason != said:
                report(reason)
                said = reason
            if elapsed >= timeout_s:
                raise TunnelNotUp(
                    f"the gateway did not answer within {timeout_s:g} s: {reason}",
                    hint="Check that UDP or HTTPS leaves this network and that the gateway runs.",
                )
            self._interface.summon(peer.allowed[0].network_address.packed, boot_time())
            self.pump()
            # Wakes up now and then only to say what it waits for; the event ends the wait.
            try:
                async with asyncio.timeout(min(0.25, timeout_s - elapsed)):
                    await established.wait()
            except TimeoutError:
                continue
        return boot_time() - began

    def _probe(self) -> None:
        """Have the gateway answer something small, so that each side knows of the other."""
        if self._config.dns is not None:
            self._echoes.probe(self._config.dns)

    def _renew(self, host: IPv6Address) -> None:
        self._interface.summon(host.packed, boot_time(), again=True)
        self.pump()

    def _announce(self) -> None:
        """Tell the peers where we are now, without asking for an answer."""
        self._interface.announce(boot_time())
        self.pump()

    # -- being reached --------------------------------------------------------------------------

    def serve(self, address: IPv6Address | None, port: int | None, backend: Backend) -> None:
        """Accept connections to an own address and port (None: any), each to its backend."""
        if address is not None:
            self._stack.add_address(address)
        self._stack.listen(port, address)
        self._backends[(None if address is None else address.packed, port)] = backend

    def withdraw(self, address: IPv6Address, port: int | None) -> None:
        """The end of `serve`; connections that are open stay."""
        self._stack.unlisten(port, address)
        self._backends.pop((address.packed, port), None)

    def answer_datagrams(self, port: int, answer: Answer) -> None:
        """Answer UDP at a port of all own addresses."""
        self._answers.at(port, answer)

    def add_peer(self, peer: PeerConfig) -> None:
        """From now on this peer's handshake is answered."""
        self._interface.add_peer(peer, boot_time())
        self.pump()

    def remove_peer(self, public_key: PublicKey) -> None:
        """From now on this peer is a stranger; what it has open times out at its side."""
        self._interface.remove_peer(public_key)
        self.pump()

    # -- inside ---------------------------------------------------------------------------------

    def pump(self) -> None:
        """Move everything that is ready, then set one timer. Cheap when nothing is."""
        if self._pumping or self._closed:
            return
        self._pumping = True
        try:
            now = boot_time()
            self._turn(now)
        finally:
            self._pumping = False
        self._arm(now)

    def _turn(self, now: float) -> None:
        stack, interface, carrier = self._stack, self._interface, self._carrier
        events = self._events(now)
        while True:
            for event in events:
                self._handle(event)
            if not carrier.blocked:
                for train in stack.transmit(now):
                    if self._capture is not None:
                        self._capture.record(train)
                    interface.send(train, now)
            for remote in stack.summons():
                interface.summon(remote, now)
            outgoing = interface.transmit(now)
            began = self._kick_after_handshakes(now)
            for datagrams in outgoing:
                carrier.send(datagrams)
            events = self._events(now)
            if not events and not began:
                return

    def _kick_after_handshakes(self, now: float) -> bool:
        """Hear the interface; connections of a peer with new keys need not wait for timers."""
        began: set[PublicKey | None] = set()
        for told in self._interface.events():
            match told:
                case SessionStarted(public_key=key, endpoint=endpoint):
                    began.add(key)
                    if self._hears is not None:
                        self._hears.heard(endpoint, session=True)
                    self._attempts = 0
                    if told.attempt:
                        self._usurper.began(key, now, told.attempt)
                    self._established.setdefault(key, asyncio.Event()).set()
                case HandshakeStarted():
                    # Not the core's own count, which begins anew where it has given up.
                    self._attempts += 1
                    if self._stamps is not None:
                        # Before it leaves: a stamp that was sent must not be forgotten.
                        self._stamps.keep(self._epoch + now)
                case EndpointMoved(endpoint=endpoint) if self._hears is not None:
                    self._hears.heard(endpoint, session=False)
                case _:
                    pass
        if began:
            self._stack.kick(now, lambda remote: self._interface.peer_of(remote) in began)
        return bool(began)

    def _arm(self, now: float) -> None:
        # A blocked carrier calls `settled` when it has room; a timer before that would only spin.
        deadlines = [] if self._carrier.blocked else [self._stack.deadline()]
        deadlines.append(self._interface.deadline())
        due = min((at for at in deadlines if at is not None), default=None)
        if due is None or (self._timer is not None and self._timer_at <= due):
            # A timer that is too early only pumps once for nothing; setting one anew for each
            # acknowledgement costs more.
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(max(0.0, due - now), self._on_timer)
        self._timer_at = due

    def _on_timer(self) -> None:
        self._timer = None
        self.pump()

    def _deliver(self, octets: memoryview, segment: int, source: Endpoint) -> None:
        now = boot_time()
        packets = self._interface.receive(octets, segment, source, now)
        if packets:
            if self._capture is not None:
                self._capture.record(packets)
            if len(packets) >= TRAIN_PACKETS:
                self._take_arrived(now)
                self._stack.receive(packets, now)
                return
            self._arrived += packets
            if len(self._arrived) >= TRAIN_PACKETS:
                self._take_arrived(now)

    def _take_arrived(self, now: float) -> None:
        """Acknowledgements come one by one, and what they cost is mostly the same for several."""
        if self._arrived:
            packets, self._arrived = self._arrived, []
            self._stack.receive(packets, now)

    def _events(self, now: float) -> list[Event]:
        self._take_arrived(now)
        return self._stack.events()

    def _handle(self, event: Event) -> None:
        match event:
            case Readable(connection=connection):
                if (splice := self._splices.get(connection)) is not None:
                    splice.readable()
            case Writable(connection=connection):
                if (splice := self._splices.get(connection)) is not None:
                    splice.writable()
            case Opened(connection=connection):
                if (opening := self._opening.get(connection)) is not None and not opening.done():
                    opening.set_result(None)
            case Closed(connection=connection):
                self._ended(connection)
            case Accepted(connection=connection):
                self._own(self._accept(connection))
            case DatagramReceived():
                self._answers.received(event)
            case EchoReplied():
                self._echoes.replied(event)
            case _:
                pass

    def _ended(self, connection: Connection) -> None:
        opening = self._opening.get(connection)
        if opening is not None and not opening.done():
            opening.set_exception(failed(connection.end))
        splice = self._splices.get(connection)
        if splice is not None:
            splice.ended(partial(self._splices.pop, connection, None))

    async def _connect(self, host: str, port: int, timeout_s: float) -> Connection:
        async with asyncio.timeout(timeout_s):
            addresses = await self._addresses(host)
            failure: OSError | None = None
            for address in addresses:
                try:
                    return await self._open((address.packed, port), timeout_s)
                except OSError as error:
                    failure = type(error)(f"[{address}]:{port} {error}")
        raise failure or OSError(f"{host} has no address")

    async def _addresses(self, host: str) -> list[IPv6Address]:
        try:
            return [IPv6Address(host.removeprefix("[").removesuffix("]"))]
        except AddressValueError:
            return await self.resolve(host)

    async def _open(self, remote: Address, timeout_s: float) -> Connection:
        connection = self._stack.connect(remote, boot_time(), timeout_s=timeout_s)
        self._opening[connection] = opening = self._loop.create_future()
        try:
            self.pump()
            await opening
        except BaseException:
            del self._opening[connection]
            connection.abort()
            self.pump()
            raise
        del self._opening[connection]
        return connection

    async def _accept(self, connection: Connection) -> None:
        address, port = connection.local
        backend = next(
            self._backends[key]
            for key in ((address, port), (address, None), (None, port), (None, None))
            if key in self._backends
        )
        try:
            async with asyncio.timeout(BACKEND_TIMEOUT_S):
                sock = await backend(connection.remote, connection.local)
        except OSError:
            # TimeoutError is one too: whatever keeps the backend away, the caller sees a reset.
            connection.abort()
            self.pump()
            return
        self._splice(connection, sock)

    def _splice(self, connection: Connection, sock: socket.socket) -> None:
        self._join(connection, Splice(connection, sock, self.pump))

    def _join(self, connection: Connection, splice: Splice | ConnectionTransport) -> None:
        connection.keep_alive(KEEPALIVE_S)
        self._splices[connection] = splice
        splice.start()
        if connection.end is not None:
            self._ended(connection)
        self.pump()

    def _own(self, work: Awaitable[None]) -> None:
        """Run a coroutine that belongs to this tunnel and ends with it."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def aclose(self) -> None:
        """Reset what is open, forget the keys and close the carrier."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # First the connections, so that the ends of streams hear that it was not their doing.
        for connection in list(self._splices):
            connection.abort()
        self.pump()
        for splice in list(self._splices.values()):
            splice.abort()
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._carrier.close()
        # The loop frees what a carrier closed in its next turns.
        await asyncio.sleep(0)


@asynccontextmanager
async def open_tunnel(
    config: TunnelConfig,
    *,
    carrier: Carrier | None = None,
    choice: Choice | None = None,
    capture: Capture | None = None,
    stamps: Stamps | None = None,
) -> AsyncGenerator[Tunnel]:
    """A tunnel that lives as long as the block; no interface, no privileges.

    Leaving the block resets what is still open. TunnelNotUp if no socket can be had; that the far
    end answers is known after `ready`, or with the first `dial`. UDP carries it unless `choice`
    says otherwise. `capture` is shown every inner packet, both ways; `stamps` is for a key that is
    used again by a later process.
    """
    X25519PrivateKey.from_private_bytes(config.private_key)
    if carrier is None:
        config, carrier = await open_carrier(config, choice or Choice())
    tunnel = Tunnel(config, carrier, capture=capture, stamps=stamps)
    try:
        yield tunnel
    finally:
        await tunnel.aclose()

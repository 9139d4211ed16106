"""One IPv6 host: ports, demultiplexing, ICMPv6, and the events above them; a Machine by trains."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2s
from heapq import heappop, heappush, heapreplace
from ipaddress import IPv6Address
from itertools import chain, count

from builder_orch.tunnel.ipv6 import header, icmp, segment, udp
from builder_orch.tunnel.ipv6.allowance import Allowance
from builder_orch.tunnel.ipv6.bbr import Bbr
from builder_orch.tunnel.ipv6.congestion import Congestion
from builder_orch.tunnel.ipv6.connection import CONNECT_TIMEOUT, Connection
from builder_orch.tunnel.ipv6.events import (
    Accepted,
    Closed,
    DatagramReceived,
    EchoReplied,
    Event,
    Opened,
    Readable,
    Unreachable,
    Writable,
)
from builder_orch.tunnel.ipv6.pacer import grain
from builder_orch.tunnel.ipv6.receiver import CAPACITY
from builder_orch.tunnel.ipv6.rtt import Remotes
from builder_orch.tunnel.ipv6.segment import ACK, RST, SYN, Segment, Template
from builder_orch.tunnel.ipv6.seq import MASK
from builder_orch.tunnel.ipv6.state import End, Notice, State
from builder_orch.tunnel.ipv6.timewait import TimeWaits
from builder_orch.tunnel.ipv6.train import couple, streams
from builder_orch.tunnel.machine import Address, Entropy, Malformed, Rejected, Train

FIRST_EPHEMERAL, LAST_EPHEMERAL = 32_768, 65_535
"""15 bits of ports to guess (RFC 6056)."""
UNSPECIFIED = bytes(16)
BACKLOG = 1024
"""Handshakes of peers under way at once; more SYNs are dropped, which the peer repeats."""
MAX_CONNECTIONS = 65_536
MAX_WAITING_DATAGRAMS = 1024
MAX_OUT = 4096
ANSWERS_PER_SECOND = 200
"""Resets and ICMPv6 errors that strangers may make us send (RFC 4443 §2.4 f)."""
CLOCK_TICKS = 250_000
"""The clock of initial sequence numbers: 4 us (RFC 6528 §3)."""

_TCP = bytes([header.TCP])


def always(remote: bytes) -> bool:  # noqa: ARG001
    """The path of a stack with nothing below that could be missing."""
    return True


class Stack:
    """A host with several addresses.

    `path(remote)` tells whether the layer below can carry packets to that address now. While it is
    False, connections that want to send there are held: nothing is sent, no retransmission timer
    runs, no round trip is measured, and `summons` names the address after each `transmit`.
    Datagrams and pings are not held; the layer below may stage them. `timestamps` says whether to
    offer them (RFC 7323); they are taken up from peers in any case.
    """

    def __init__(
        self,
        addresses: Iterable[IPv6Address],
        *,
        mtu: int,
        entropy: Entropy,
        path: Callable[[bytes], bool] = always,
        capacity: int = CAPACITY,
        congestion: Callable[[int], Congestion] = Bbr,
        timestamps: bool = False,
    ) -> None:
        self.drops: Counter[str] = Counter()
        self._addresses = {address.packed: None for address in addresses}
        self._mtu = mtu
        self._entropy = entropy
        self._path = path
        self._capacity = capacity
        self._congestion = congestion
        self._timestamps = timestamps
        self._secret = entropy(32)
        self._connections: dict[bytes, Connection] = {}
        self._half_open = 0
        self._remotes = Remotes()
        self._waits = TimeWaits()
        self._listeners: set[tuple[bytes | None, int | None]] = set()
        self._bound: set[int] = set()
        self._dirty: dict[Connection, None] = {}
        self._held: dict[Connection, None] = {}
        self._summons: dict[bytes, None] = {}
        self._sending: set[Connection] = set()
        self._heap: list[tuple[float, int, Connection]] = []
        self._serial = count()
        self._events: list[Event] = []
        self._out: deque[bytes] = deque()
        self._answers = Allowance(ANSWERS_PER_SECOND)

    # -- commands

    def add_address(self, address: IPv6Address) -> None:
        """Answer to one more address."""
        self._addresses[address.packed] = None

    def remove_address(self, address: IPv6Address) -> None:
        """Stop answering; connections from it are reset."""
        self._addresses.pop(address.packed, None)
        for connection in list(self._connections.values()):
            if connection.local[0] == address.packed:
                connection.abort()

    def connect(
        self,
        remote: Address,
        now: float,
        *,
        local: bytes | None = None,
        timeout_s: float = CONNECT_TIMEOUT,
    ) -> Connection:
        """Begin a connection; Opened or Closed follows. OSError when no address or port is left."""
        source = self._source(local)
        port = self._free_port(source, remote)
        ours = (source, port)
        connection = Connection(
            self,
            ours,
            remote,
            initial=self._initial(ours, remote, now),
            mtu=self._mtu,
            give_up_at=now + timeout_s,
            capacity=self._capacity,
            congestion=self._congestion,
            timestamps=self._timestamps,
        )
        self._connections[_key(remote, ours)] = connection
        self._remotes.prepare(connection.remote[0], connection.sender.rtt)
        self.touch(connection)
        return connection

    def listen(self, port: int | None, address: IPv6Address | None = None) -> None:
        """Accept connections; None for every port or every address."""
        self._listeners.add((address.packed if address else None, port))

    def unlisten(self, port: int | None, address: IPv6Address | None = None) -> None:
        """Take back `listen`; connections that were accepted live on."""
        self._listeners.discard((address.packed if address else None, port))

    def bind(self, port: int | None) -> int:
        """Receive UDP datagrams on a port, a random free one for None; OSError when it is taken."""
        if port is None:
            port = next((p for p in self._ports() if p not in self._bound), None)
        if port is None or port in self._bound:
            raise OSError("no free UDP port")
        self._bound.add(port)
        return port

    def unbind(self, port: int) -> None:
        """Stop receiving on a port."""
        self._bound.discard(port)

    def send_datagram(
        self, port: int, remote: Address, payload: bytes, *, local: bytes | None = None
    ) -> None:
        """Send one UDP datagram; ValueError when it does not fit the MTU."""
        source = self._source(local)
        packet = udp.emit((source, port), remote, payload)
        if len(packet) > self._mtu:
            raise ValueError(f"a datagram of {len(payload)} octets does not fit the MTU")
        self._queue(packet)

    def ping(self, remote: bytes, identifier: int, sequence: int, payload: bytes = b"") -> None:
        """Send one echo request; EchoReplied follows, or not."""
        source = self._source(None)
        self._queue(icmp.echo(source, remote, icmp.Echo(True, identifier, sequence, payload)))

    def kick(self, now: float, carries: Callable[[bytes], bool] = always) -> None:
        """A new session began below, which carries some or all remotes.

        Whatever has data or a handshake outstanding there sends again at once, without back-off.
        """
        for connection in self._connections.values():
            if carries(connection.remote[0]):
                connection.kick(now)
                self._dirty[connection] = None

    # -- the machine

    def receive(self, packets: Sequence[bytes], now: float) -> None:
        """Take packets in the order they came, best whole trains at a time."""
        find = self._connections.get
        for name, start, stop in streams(packets):
            index = start
            while index < stop:
                connection = find(name[2:]) if name[:1] == _TCP else None
                if connection is not None:
                    self._dirty[connection] = None
                    after = connection.receive_run(packets, index, stop, now)
                    if after > index:
                        index = after
                        continue
                try:
                    self._receive_one(packets[index], now)
                except Malformed as error:
                    self.drops[f"malformed: {error}"] += 1
                except Rejected as error:
                    self.drops[f"rejected: {error}"] += 1
                index += 1

    def transmit(self, now: float) -> list[Train]:
        """Everything that may go now."""
        self._waits.expire(now)
        self._collect_due(now)
        trains: list[Train] = [[packet] for packet in self._out]
        self._out.clear()
        ways: dict[bytes, list[Train]] = {}
        share = grain(len(self._sending))
        self._summons.clear()
        open_paths: dict[bytes, bool] = {}
        self._dirty |= self._held
        while self._dirty:
            connection, _ = self._dirty.popitem()
            if connection.queued_at is not None and connection.only_waits_for_rate(now):
                continue
            remote = connection.remote[0]
            if remote not in open_paths:
                open_paths[remote] = self._path(remote)
            made = connection.transmit(now, open_paths[remote], share)
            way = ways.get(remote)
            if way is None:
                ways[remote] = made
            else:
                for train in made:
                    couple(way, train)
            self._settle(connection, now)
        return [*trains, *chain.from_iterable(ways.values())]

    def deadline(self) -> float | None:
        """When to call `transmit` next, whatever else happens."""
        waits = self._waits.deadline()
        while self._heap:
            at, _, connection = self._heap[0]
            actual = connection.due_at if connection.queued_at == at else None
            if actual is None:
                heappop(self._heap)
                if connection.queued_at == at:
                    connection.queued_at = None
            elif actual > at:
                connection.queued_at = actual
                heapreplace(self._heap, (actual, next(self._serial), connection))
            else:
                return at if waits is None else min(at, waits)
        return waits

    def summons(self) -> list[bytes]:
        """Remotes that something waited for, with their path closed, at the last `transmit`."""
        summons = list(self._summons)
        self._summons.clear()
        return summons

    def events(self) -> list[Event]:
        """What happened since the last call."""
        events, self._events = self._events, []
        return events

    # -- what connections ask for

    def touch(self, connection: Connection) -> None:
        """See `Host`."""
        self._dirty[connection] = None

    def announce(self, connection: Connection, notice: Notice) -> None:
        """See `Host`. A passive connection is nobody's business before it is open."""
        if connection.is_passive and not connection.was_open:
            return
        match notice:
            case Notice.OPENED:
                self._remotes.remember(connection.remote[0], connection.sender.rtt)
                if connection.is_passive:
                    self._half_open -= 1
                    self._waits.forget(_key(connection.remote, connection.local))
                made = Accepted if connection.is_passive else Opened
                self._events.append(made(connection))
            case Notice.READABLE:
                self._events.append(Readable(connection))
            case Notice.WRITABLE:
                self._events.append(Writable(connection))
            case Notice.CLOSED:
                self._events.append(Closed(connection))

    # -- timers

    def _collect_due(self, now: float) -> None:
        while self._heap and self._heap[0][0] <= now:
            at, _, connection = heappop(self._heap)
            if connection.queued_at == at:
                connection.queued_at = None
                self._dirty[connection] = None

    def _settle(self, connection: Connection, now: float) -> None:
        """After it has transmitted: keep its deadline, its summons, or nothing of it at all."""
        if connection.held:
            self._held[connection] = None
            self._summons[connection.remote[0]] = None
        else:
            self._held.pop(connection, None)
            if connection.sender.is_waiting and not connection.end:
                self._sending.add(connection)
            else:
                self._sending.discard(connection)
            if connection.end:
                self._forget(connection, now)
                return
        at = connection.due_at = connection.deadline()
        if at is not None and (connection.queued_at is None or at < connection.queued_at):
            connection.queued_at = at
            heappush(self._heap, (at, next(self._serial), connection))

    def _forget(self, connection: Connection, now: float) -> None:
        key = _key(connection.remote, connection.local)
        if self._connections.get(key) is not connection:
            return
        del self._connections[key]
        connection.queued_at = connection.due_at = None
        if connection.is_passive and not connection.was_open:
            self._half_open -= 1
            self._waits.return_to(key, now)
        if connection.state is State.TIME_WAIT:
            self._waits.add(key, connection, now)
        elif not connection.is_passive:
            self._waits.leave(key, now)

    # -- packets in

    def _receive_one(self, packet: bytes, now: float) -> None:
        ip = header.parse(packet)
        if ip.destination not in self._addresses:
            raise Rejected("not our address")
        if ip.source[0] == 0xFF or ip.source == UNSPECIFIED or ip.source in self._addresses:
            raise Rejected("impossible source")
        if ip.next_header == header.TCP:
            self._receive_segment(packet, ip, now)
        elif ip.next_header == header.UDP:
            self._receive_datagram(packet, ip, now)
        elif ip.next_header == header.ICMPV6:
            self._receive_icmp(packet, ip)
        else:
            raise Rejected("unknown protocol")

    def _receive_segment(self, packet: bytes, ip: header.Header, now: float) -> None:
        got = segment.parse(packet, ip.offset)
        ours, theirs = (ip.destination, got.destination_port), (ip.source, got.source_port)
        key = _key(theirs, ours)
        connection = self._connections.get(key)
        if connection is not None:
            self._dirty[connection] = None
            connection.receive(got, now)
            return
        waiting = self._waits.receive(key, got, now)
        if waiting is not None:
            if waiting:
                self._queue(waiting)
            return
        if got.flags & RST:
            self.drops["reset for no connection"] += 1
        elif got.flags & SYN and not got.flags & ACK and self._listens(ours):
            self._accept(ours, theirs, got, now)
        elif self._answers.take(now):
            self._queue(_refusal(ours, theirs, got))

    def _accept(self, ours: Address, theirs: Address, syn: Segment, now: float) -> None:
        if self._half_open >= BACKLOG or len(self._connections) >= MAX_CONNECTIONS:
            raise Rejected("too many connections")
        key = _key(theirs, ours)
        connection = Connection.accept(
            self,
            ours,
            theirs,
            syn,
            initial=self._waits.reopen(key, self._initial(ours, theirs, now)),
            mtu=self._mtu,
            now=now,
            capacity=self._capacity,
            congestion=self._congestion,
        )
        self._half_open += 1
        self._connections[key] = connection
        self._remotes.prepare(connection.remote[0], connection.sender.rtt)
        self._dirty[connection] = None

    def _receive_datagram(self, packet: bytes, ip: header.Header, now: float) -> None:
        got = udp.parse(packet, ip)
        if got.destination_port not in self._bound:
            self.drops["datagram to a closed port"] += 1
            if self._answers.take(now):
                failure = icmp.Failure(
                    icmp.DESTINATION_UNREACHABLE, icmp.PORT_UNREACHABLE, 0, packet
                )
                self._queue(icmp.failure(ip.destination, ip.source, failure))
            return
        if len(self._events) >= MAX_WAITING_DATAGRAMS:
            raise Rejected("datagram queue is full")
        theirs = (ip.source, got.source_port)
        self._events.append(
            DatagramReceived(got.destination_port, ip.destination, theirs, got.payload)
        )

    def _receive_icmp(self, packet: bytes, ip: header.Header) -> None:
        message = icmp.parse(packet, ip)
        if message is None:
            raise Rejected("unknown ICMPv6 message")
        if isinstance(message, icmp.Failure):
            self._receive_failure(message)
        elif message.is_request:
            reply = message._replace(is_request=False)
            self._queue(icmp.echo(ip.destination, ip.source, reply))
        elif len(self._events) < MAX_WAITING_DATAGRAMS:
            self._events.append(
                EchoReplied(ip.source, message.identifier, message.sequence, message.payload)
            )

    def _receive_failure(self, failure: icmp.Failure) -> None:
        """An error is believed as far as the packet inside it is one that we could have sent."""
        cause = failure.cause
        if len(cause) < header.HEADER_LEN + 8 or cause[8:24] not in self._addresses:
            raise Rejected("ICMPv6 error about nothing of ours")
        remote, protocol = cause[24:40], cause[6]
        ports = int.from_bytes(cause[40:42], "big"), int.from_bytes(cause[42:44], "big")
        if protocol == header.TCP:
            key = remote + cause[8:24] + cause[42:44] + cause[40:42]
            self._fail(self._connections.get(key), failure)
        elif len(self._events) >= MAX_WAITING_DATAGRAMS:
            raise Rejected("datagram queue is full")
        elif protocol == header.UDP and ports[0] in self._bound:
            event = Unreachable((remote, ports[1]), ports[0], failure.kind, failure.code)
            self._events.append(event)
        elif protocol == header.ICMPV6 and cause[40] == icmp.ECHO_REQUEST:
            self._events.append(Unreachable((remote, 0), None, failure.kind, failure.code))
        else:
            raise Rejected("ICMPv6 error about nothing of ours")

    def _fail(self, connection: Connection | None, failure: icmp.Failure) -> None:
        if connection is None:
            raise Rejected("ICMPv6 error about nothing of ours")
        position = int.from_bytes(failure.cause[44:48], "big")
        if failure.kind == icmp.PACKET_TOO_BIG:
            if failure.value < header.MINIMUM_MTU:
                raise Rejected("a path narrower than IPv6 allows")  # RFC 8201 §4
            connection.too_big(position, failure.value)
        elif failure.kind == icmp.DESTINATION_UNREACHABLE:
            refused = failure.code == icmp.PORT_UNREACHABLE
            connection.unreachable(End.REFUSED if refused else End.UNREACHABLE, position)
        self._dirty[connection] = None

    # -- numbers

    def _source(self, wanted: bytes | None) -> bytes:
        source = next(iter(self._addresses), None) if wanted is None else wanted
        if source is None or source not in self._addresses:
            raise OSError("the stack has no such address")
        return source

    def _listens(self, ours: Address) -> bool:
        address, port = ours
        wanted = ((address, port), (None, port), (address, None), (None, None))
        return any(key in self._listeners for key in wanted)

    def _initial(self, ours: Address, theirs: Address, now: float) -> int:
        """A clock plus a keyed hash of the connection's name (RFC 6528 §3)."""
        name = blake2s(_key(ours, theirs), key=self._secret, digest_size=4).digest()
        return (int(now * CLOCK_TICKS) + int.from_bytes(name, "big")) & MASK

    def _free_port(self, source: bytes, remote: Address) -> int:
        if len(self._connections) < MAX_CONNECTIONS:
            for port in self._ports():
                key = _key(remote, (source, port))
                if key not in self._connections and key not in self._waits:
                    return port
        raise OSError("no free TCP port")

    def _ports(self) -> Iterable[int]:
        """Every ephemeral port once, from a random one on (RFC 6056 §3.3.1)."""
        span = LAST_EPHEMERAL - FIRST_EPHEMERAL + 1
        start = int.from_bytes(self._entropy(4), "big")
        return (FIRST_EPHEMERAL + (start + step) % span for step in range(span))

    def _queue(self, packet: bytes) -> None:
        if len(self._out) >= MAX_OUT:
            self._out.popleft()
            self.drops["too many datagrams to send"] += 1
        self._out.append(packet)


def _key(theirs: Address, ours: Address) -> bytes:
    """What octets 8 to 44 of a packet from them to us read."""
    return theirs[0] + ours[0] + theirs[1].to_bytes(2, "big") + ours[1].to_bytes(2, "big")


def _refusal(ours: Address, theirs: Address, got: Segment) -> bytes:
    """The reset for a segment that belongs to no connection (RFC 9293 §3.10.7.1)."""
    template = Template(ours, theirs)
    if got.flags & ACK:
        return template.segment(got.ack, 0, RST, 0)
    return template.segment(0, got.seq + got.length, RST | ACK, 0)

"""Two stacks on a simulated wire, applications on them, and what must hold after every event."""

from collections.abc import Callable
from ipaddress import IPv6Address
from random import Random

from builder_orch.tunnel.ipv6 import header, icmp
from builder_orch.tunnel.ipv6.bbr import Bbr
from builder_orch.tunnel.ipv6.congestion import Congestion
from builder_orch.tunnel.ipv6.connection import Connection
from builder_orch.tunnel.ipv6.events import Accepted, Event
from builder_orch.tunnel.ipv6.stack import Stack, always
from builder_orch.tunnel.ipv6.state import State
from builder_orch.tunnel.machine import Malformed, Rejected
from tests.sim import Pair, Stream, Weather

LEFT = IPv6Address("fd00::1")
RIGHT = IPv6Address("fd00::2")
ROUTER = IPv6Address("fd00::77")
PORT = 80


def stack(
    address: IPv6Address,
    *,
    mtu: int = 1420,
    seed: int = 0,
    capacity: int = 4 << 20,
    path: Callable[[bytes], bool] = always,
    congestion: Callable[[int], Congestion] = Bbr,
    timestamps: bool = False,
) -> Stack:
    """A stack with seeded dice."""
    entropy = Random(f"{address} {seed}").randbytes
    return Stack(
        [address],
        mtu=mtu,
        entropy=entropy,
        path=path,
        capacity=capacity,
        congestion=congestion,
        timestamps=timestamps,
    )


class Flow:
    """An application that writes one stream and reads another; after writing it closes."""

    def __init__(
        self,
        out: Stream,
        into: Stream,
        *,
        read_limit: int = 1 << 20,
        write_size: int = 1 << 16,
    ) -> None:
        self.connection: Connection | None = None
        self.sent = self.got = 0
        self.reading = True
        self._out, self._into = out, into
        self._read_limit, self._write_size = read_limit, write_size

    def act(self) -> None:
        """Write and read what is possible."""
        connection = self.connection
        if connection is None:
            return
        while self.sent < self._out.length and (connection.room() or connection.end):
            taken = connection.write(self._out.octets(self.sent, self._write_size))
            self.sent += taken
            if not taken:
                break
        if self.sent == self._out.length:
            connection.close()
        while self.reading and (data := connection.read(self._read_limit)):
            self._into.check(self.got, data)
            self.got += len(data)

    @property
    def is_done(self) -> bool:
        """Everything has come and gone."""
        return (
            self.connection is not None
            and self.sent == self._out.length
            and self.got == self._into.length
            and self.connection.at_eof
        )


class Sealed:
    """A stack behind a layer that notices every wrong bit, as the tunnel does; counts them."""

    def __init__(self, inner: Stack) -> None:
        self.inner = inner
        self.broken = 0
        self.transmit = inner.transmit
        self.deadline = inner.deadline

    def receive(self, packets: list[bytes], now: float) -> None:
        """Pass on what is intact."""
        whole = [packet for packet in packets if _is_whole(packet)]
        self.broken += len(packets) - len(whole)
        if whole:
            self.inner.receive(whole, now)


def _is_whole(packet: bytes) -> bool:
    try:
        ip = header.parse(packet)
        # What TCP's checksum does not cover has but one legal value here.
        fixed = packet[:4] == b"\x60\0\0\0" and packet[7] == header.HOP_LIMIT
    except (Malformed, Rejected):
        return False
    return fixed and header.is_intact(ip.source, ip.destination, header.TCP, packet[ip.offset :])


class World(Pair):
    """A client on the left, a listener on the right, and the invariants of their connections."""

    def __init__(
        self,
        weather: Weather | None = None,
        *,
        seed: int = 0,
        back: Weather | None = None,
        client: Stack | None = None,
        server: Stack | None = None,
        grain_s: float = 0.0,
        turn_s: float = 0.0,
        sealed: bool = False,
    ) -> None:
        self.client = client or stack(LEFT, seed=seed)
        self.server = server or stack(RIGHT, seed=seed)
        self.server.listen(PORT)
        self.connections: list[Connection] = []
        self.events: list[Event] = []
        self.flows: list[Flow] = []
        self._edges: dict[Connection, tuple[int, int]] = {}
        super().__init__(
            Sealed(self.client) if sealed else self.client,
            Sealed(self.server) if sealed else self.server,
            weather,
            seed=seed,
            back=back,
            actor=self._act,
            invariant=self._check,
            grain_s=grain_s,
            turn_s=turn_s,
        )

    def tell_too_big(self) -> None:
        """From now on the wires answer what does not fit, as a router would."""
        self.there.too_big = lambda packet, mtu: _too_big(packet, mtu, LEFT)
        self.back.too_big = lambda packet, mtu: _too_big(packet, mtu, RIGHT)

    def connect(self, *, timeout_s: float = 180.0) -> Connection:
        """Begin a connection from the client."""
        connection = self.client.connect((RIGHT.packed, PORT), self.now, timeout_s=timeout_s)
        self.connections.append(connection)
        return connection

    def established(self) -> tuple[Connection, Connection]:
        """A connection, client's end and server's end, after its handshake."""
        ours = self.connect()
        before = len(self.connections)
        self.run(
            lambda: ours.state is State.ESTABLISHED and len(self.connections) > before, limit_s=60
        )
        return ours, self.connections[-1]

    def seen(self, kind: type) -> list[Event]:
        """All events of a kind so far."""
        return [event for event in self.events if isinstance(event, kind)]

    def _act(self) -> None:
        for node in (self.client, self.server):
            for event in node.events():
                self.events.append(event)
                if isinstance(event, Accepted):
                    self.connections.append(event.connection)
                    self._attach(event.connection)
        for flow in self.flows:
            flow.act()

    def _attach(self, connection: Connection) -> None:
        for flow in self.flows:
            if flow.connection is None:
                flow.connection = connection
                return

    def _check(self) -> None:
        for connection in self.connections:
            if connection.end is None:
                self._check_sender(connection)
                self._check_receiver(connection)
                self._check_deadline(connection)

    def _check_sender(self, connection: Connection) -> None:
        sender = connection.sender
        board = sender.board
        position = sender.una
        sums = [0, 0, 0]
        for run in board.runs:
            assert run.start == position < run.end, "runs must touch and not be empty"
            assert not (run.sacked and run.lost), "what has arrived is not lost"
            position = run.end
            sums[1 if run.sacked else 2 if run.lost else 0] += run.end - run.start
        assert position == sender.nxt, "runs cover what is outstanding"
        assert sums == [board.in_flight, board.sacked, board.lost], "sums of the scoreboard"
        assert sender.nxt <= sender.outbox.last
        if connection.held or connection.was_open is False:
            return
        if sender.una < sender.nxt:
            assert sender.rto_at is not None, "data outstanding without a timer"
        elif sender.nxt < sender.outbox.last:
            assert sender.deadline() is not None, "data waits for nothing"

    def _check_deadline(self, connection: Connection) -> None:
        wanted = connection.deadline()
        if wanted is None or wanted <= self.now:
            return
        node = self.client if connection.local[0] == LEFT.packed else self.server
        at = node.deadline()
        assert at is not None, "nobody will call"
        assert at <= wanted, "called too late"

    def _check_receiver(self, connection: Connection) -> None:
        receiver = connection.receiver
        key, edge = self._edges.get(connection, (0, 0))
        if key == id(receiver):
            assert receiver.edge >= edge, "the window retreated"
        self._edges[connection] = id(receiver), receiver.edge
        # One more for a FIN just behind a full window.
        assert receiver.nxt <= receiver.edge + 1, "took more than was offered"


def _too_big(packet: bytes, mtu: int, to: IPv6Address) -> bytes:
    failure = icmp.Failure(icmp.PACKET_TOO_BIG, 0, mtu, packet)
    return icmp.failure(ROUTER.packed, to.packed, failure)


def transfer(
    weather: Weather,
    *,
    seed: int = 0,
    up: int = 1 << 18,
    down: int = 0,
    limit_s: float = 600,
    world: World | None = None,
    read_limit: int = 1 << 20,
    write_size: int = 1 << 16,
) -> World:
    """Send `up` octets there and `down` octets back over a new connection; both must arrive."""
    world = world or World(weather, seed=seed)
    there, back = Stream(f"up {seed}", up), Stream(f"down {seed}", down)
    sizes = {"read_limit": read_limit, "write_size": write_size}
    ours, theirs = Flow(there, back, **sizes), Flow(back, there, **sizes)
    world.flows = [ours, theirs]
    ours.connection = world.connect()
    world.run(lambda: ours.is_done and theirs.is_done, limit_s=limit_s)
    return world

"""One private key and its peers: routes inside, indices outside; a machine by trains."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from math import inf
from struct import Struct

from builder_orch.tunnel.config import PeerConfig, PrivateKey, PublicKey
from builder_orch.tunnel.machine import (
    Datagrams,
    Endpoint,
    Entropy,
    Laid,
    Malformed,
    Rejected,
    Train,
)
from builder_orch.tunnel.wireguard import noise
from builder_orch.tunnel.wireguard.cookie import Door, Limiter
from builder_orch.tunnel.wireguard.handshake import read_name
from builder_orch.tunnel.wireguard.message import (
    COOKIE_REPLY,
    INITIATION,
    TRANSPORT,
    CookieReply,
    Initiation,
    Response,
    kind_of,
)
from builder_orch.tunnel.wireguard.peer import (
    Common,
    EndpointMoved,
    Event,
    HandshakeGaveUp,
    HandshakeStarted,
    Peer,
    PeerStatus,
    SessionStarted,
    trains,
)
from builder_orch.tunnel.wireguard.routes import Routes
from builder_orch.tunnel.wireguard.session import Session
from builder_orch.tunnel.wireguard.timers import Agenda

__all__ = [
    "EndpointMoved",
    "Event",
    "HandshakeGaveUp",
    "HandshakeStarted",
    "Interface",
    "PeerStatus",
    "SessionStarted",
]

BUSY_HANDSHAKES = 128
"""Handshake messages within a second from which on callers must prove their address."""
BUSY_S = 1.0
IPV6_HEADER_LEN = 40

_INDEX = Struct("<4xI")


@lru_cache(maxsize=256)
def _starts(size: int, count: int) -> Callable[[bytes], tuple[bytes, ...]]:
    """Takes the first 24 octets of each of `count` packets."""
    return Struct(f"24s{size - 24}x" * count).unpack


class Load:
    """Whether more handshakes arrive than we want to work on; sticks for a second."""

    def __init__(self) -> None:
        self._began = -inf
        self._count = 0
        self._busy_until = -inf

    def note(self, now: float) -> bool:
        """Count one handshake message; whether we are busy."""
        if now - self._began >= BUSY_S:
            self._began, self._count = now, 0
        self._count += 1
        if self._count > BUSY_HANDSHAKES:
            self._busy_until = now + BUSY_S
        return now < self._busy_until


class Interface:
    """Everything WireGuard does, told octets and the time.

    `epoch` is the wall-clock time (Unix seconds) at `now` 0, chosen by the caller so that `epoch +
    now` never repeats for this key, across restarts too: peers refuse initiations stamped no later
    than the last one. `session` is there for tests that want to watch the keys.
    """

    def __init__(
        self,
        private_key: PrivateKey,
        *,
        mtu: int,
        entropy: Entropy,
        epoch: float,
        peers: Iterable[PeerConfig] = (),
        session: type[Session] = Session,
    ) -> None:
        own = noise.Key(private_key)
        self._common = Common(own, mtu, entropy, epoch, session)
        self._peers: dict[PublicKey, Peer] = {}
        self._routes: Routes[Peer] = Routes()
        self._agenda: Agenda[Peer] = Agenda()
        self._door = Door(own.public, entropy)
        self._load = Load()
        self._limiter = Limiter()
        self._now = -inf
        self.public_key = PublicKey(own.public)
        self.drops: Counter[str] = self._common.drops
        for peer in peers:
            self.add_peer(peer, -inf)

    def add_peer(self, peer: PeerConfig, now: float) -> None:
        """Install a peer, or give the one with this public key new settings; its session goes on.

        ValueError for a public key of low order.
        """
        known = self._peers.get(peer.public_key)
        if known is None:
            known = self._peers[peer.public_key] = Peer(self._common, peer)
        else:
            self._routes.remove(known.config.allowed, known)
        self._routes.add(peer.allowed, known)
        known.configure(peer, now)
        self._agenda.note(known)

    def remove_peer(self, public_key: PublicKey) -> None:
        """Forget a peer, its keys and its routes; nothing if there is none."""
        peer = self._peers.pop(public_key, None)
        if peer is not None:
            self._routes.remove(peer.config.allowed, peer)
            peer.close()

    def has_session(self, remote: bytes) -> bool:
        """Whether a packet to this inside address would be sealed at once.

        Judged at the last time the interface was told, which is never far back: the end of a
        session is a deadline too.
        """
        peer = self._routes.find(remote)
        return peer is not None and peer.is_ready(self._now)

    def peer_of(self, remote: bytes) -> PublicKey | None:
        """Whose packets to this inside address would be."""
        peer = self._routes.find(remote)
        return None if peer is None else peer.config.public_key

    def summon(self, remote: bytes, now: float, *, again: bool = False) -> None:
        """Begin a handshake with the peer of an address, unless one is under way or, if not
        `again`, there is a session."""
        self._now = now
        peer = self._routes.find(remote)
        if peer is None:
            self.drops["no route"] += 1
            return
        if again:
            peer.renew(now)
        else:
            peer.summon(now)
        self._agenda.note(peer)

    def send(self, train: Train, now: float) -> None:
        """Seal a train for the peer of its first packet's destination, or stage it there."""
        self._now = now
        if not train:
            return
        first = train[0]
        if len(first) < IPV6_HEADER_LEN or first[0] >> 4 != 6:
            self.drops["not IPv6"] += len(train)
            return
        peer = self._routes.find(first[24:40])
        if peer is None:
            self.drops["no route"] += len(train)
            return
        sizes = list(map(len, train))
        size = sizes[0]
        if max(sizes) > self._common.mtu:
            self.drops["longer than MTU"] += len(train)
            return
        even = sizes.count(size)
        if even == len(sizes) or (even == len(sizes) - 1 and sizes[-1] < size):
            peer.send(train, now)
        else:
            for part in trains(train):
                peer.send(part, now)
        self._agenda.note(peer)

    def receive(
        self, octets: bytes | memoryview, segment: int, source: Endpoint, now: float
    ) -> Sequence[bytes]:
        """Take datagrams of `segment` octets laid end to end, the last perhaps shorter.

        Returns the inner IPv6 packets, cut to their length, from sources that their peer may use.
        Everything else is counted in `drops`.
        """
        self._now = now
        view = memoryview(octets)
        total = len(view)
        if segment <= 0:
            segment = max(total, 1)
        packets: list[bytes] = []
        at = 0
        while at < total:
            end = min(at + segment, total)
            try:
                kind = kind_of(view[at:end])
                if kind == TRANSPORT:
                    opened, end = self._open(view, at, segment, source, now)
                    if not at and end == total:
                        return opened
                    packets += opened
                else:
                    self._shake(kind, bytes(view[at:end]), source, now)
            except (Malformed, Rejected) as verdict:
                self.drops[str(verdict)] += 1
            at = end
        return packets

    def announce(self, now: float) -> None:
        """Send every peer with a session an empty packet: it moves where the peer sends to."""
        self._now = now
        for peer in self._peers.values():
            peer.announce(now)
            self._agenda.note(peer)

    def transmit(self, now: float) -> list[Datagrams]:
        """Everything to go outside: trains, handshakes, cookies and keepalives, in order."""
        self._now = now
        for peer in self._agenda.take_due(now):
            peer.fire(now)
            self._agenda.note(peer)
        outgoing, self._common.outgoing = self._common.outgoing, []
        return outgoing

    def deadline(self) -> float | None:
        """Nothing is due before this."""
        return self._agenda.deadline()

    def events(self) -> list[Event]:
        """What happened since the last call."""
        events = list(self._common.events)
        self._common.events.clear()
        return events

    def status(self, now: float) -> list[PeerStatus]:
        """One line for each peer."""
        return [peer.status(now) for peer in self._peers.values()]

    def _open(
        self, view: memoryview, at: int, segment: int, source: Endpoint, now: float
    ) -> tuple[Sequence[bytes], int]:
        """Open a run of one session's datagrams; its packets, and where it ends. Rejected."""
        index: int = _INDEX.unpack_from(view, at)[0]
        peer = self._common.owners.get(index)
        if peer is None:
            raise Rejected("unknown index")
        opened, end = peer.open(index, view, at, segment, source, now)
        self._agenda.note(peer)
        if isinstance(opened, Laid) and self._is_plain(opened, peer):
            return opened, end
        packets: list[bytes] = []
        add = packets.append
        head: bytes | None = None
        length = 0
        for packet in opened:
            # Within a stream nothing in the first 24 octets changes: version, length, source.
            if packet[:24] != head:
                length = self._inner_length(packet, peer)
                head = packet[:24] if length else None
                if not length:
                    continue
            if len(packet) == length:
                add(packet)
            elif len(packet) > length:
                add(packet[:length])
            else:
                self.drops["inner packet cut short"] += 1
        return packets, end

    def _is_plain(self, opened: Laid, peer: Peer) -> bool:
        """Whether all are packets without padding, of one source that this peer may use."""
        first, size, count = opened[0], opened.size, len(opened)
        if size < IPV6_HEADER_LEN or IPV6_HEADER_LEN + (first[4] << 8 | first[5]) != size:
            return False
        if _starts(size, count)(opened.octets).count(first[:24]) != count:
            return False
        return first[0] >> 4 == 6 and self._routes.find(first[8:24]) is peer

    def _inner_length(self, packet: bytes, peer: Peer) -> int:
        """Octets without padding of a packet this peer may send; 0, counted, of any other."""
        if not packet:
            return 0
        if len(packet) < IPV6_HEADER_LEN or packet[0] >> 4 != 6:
            self.drops["inner packet not IPv6"] += 1
            return 0
        if self._routes.find(packet[8:24]) is not peer:
            self.drops["inner source not allowed"] += 1
            return 0
        return IPV6_HEADER_LEN + (packet[4] << 8 | packet[5])

    def _shake(self, kind: int, octets: bytes, source: Endpoint, now: float) -> None:
        """Handle one handshake message; nothing that costs a DH before mac1 is right. Rejected."""
        if kind == COOKIE_REPLY:
            reply = CookieReply.parse(octets)
            self._owner(reply.receiver).keep_cookie(reply, now)
            return
        if not self._door.is_addressed(octets):
            raise Rejected("wrong mac1")
        self._limiter.sweep(now)
        if self._load.note(now) and not self._is_admitted(octets, source, now):
            return
        if kind == INITIATION:
            initiation = Initiation.parse(octets)
            named = read_name(self._common.own, initiation)
            peer = self._peers.get(PublicKey(named.remote))
            if peer is None:
                raise Rejected("unknown peer")
            peer.answer(named, initiation.sender, source, now)
        else:
            response = Response.parse(octets)
            peer = self._owner(response.receiver)
            peer.finish(response, source, now)
        self._agenda.note(peer)

    def _is_admitted(self, octets: bytes, source: Endpoint, now: float) -> bool:
        """Under load: whether the caller proved its address; one that has not gets a cookie."""
        if self._door.is_reachable(octets, source, now):
            if not self._limiter.allow(source[0], now):
                raise Rejected("too many handshakes")
            return True
        sender: int = _INDEX.unpack_from(octets)[0]
        reply = self._door.reply(octets, sender, source, now).emit()
        self._common.emit(Datagrams(reply, len(reply), source))
        self.drops["busy, cookie sent"] += 1
        return False

    def _owner(self, index: int) -> Peer:
        peer = self._common.owners.get(index)
        if peer is None:
            raise Rejected("unknown index")
        return peer

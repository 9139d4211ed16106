"""One peer: its sessions, its timers and where it is (WireGuard paper, section 6).

Read `fire` first: it says what each timer means. The rules that set and stop timers stand in the
`_has_` methods, one for each thing that can happen.
"""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from builder_orch.tunnel.config import PeerConfig, PublicKey
from builder_orch.tunnel.machine import (
    TRAIN_PACKETS,
    Datagrams,
    Endpoint,
    Entropy,
    Laid,
    Malformed,
    Rejected,
    Train,
)
from builder_orch.tunnel.wireguard import noise
from builder_orch.tunnel.wireguard.handshake import Handshake
from builder_orch.tunnel.wireguard.message import (
    INITIATION_LEN,
    RESPONSE_LEN,
    TRANSPORT_LEN,
    CookieReply,
    Response,
)
from builder_orch.tunnel.wireguard.session import Session, Slate, Slots
from builder_orch.tunnel.wireguard.timers import (
    HANDSHAKE_ATTEMPTS,
    KEEPALIVE_TIMEOUT,
    REJECT_AFTER_TIME,
    REKEY_TIMEOUT,
    ZERO_KEYS_TIME,
    Timer,
    Timers,
    jitter,
)

STAGED_PACKETS = 128
OUTGOING = 1024
"""Trains and handshakes that wait for `transmit`; whoever does not ask loses what follows."""
EVENTS = 1024


@dataclass(frozen=True, slots=True)
class HandshakeStarted:
    """An initiation went out, the `attempt`-th in a row."""

    public_key: PublicKey
    attempt: int
    endpoint: Endpoint


@dataclass(frozen=True, slots=True)
class SessionStarted:
    """There are new keys to send with. `attempt` is 0 when the peer began the handshake."""

    public_key: PublicKey
    attempt: int
    endpoint: Endpoint


@dataclass(frozen=True, slots=True)
class HandshakeGaveUp:
    """Nobody answered `attempts` initiations since `since_s` seconds; staged packets are gone.

    The next packet or summons begins anew.
    """

    public_key: PublicKey
    attempts: int
    since_s: float


@dataclass(frozen=True, slots=True)
class EndpointMoved:
    """An authentic packet of the peer came from here, so this is where it is now."""

    public_key: PublicKey
    endpoint: Endpoint


Event = HandshakeStarted | SessionStarted | HandshakeGaveUp | EndpointMoved


class PeerStatus(NamedTuple):
    """What `wg show` tells about a peer; `attempts` counts initiations since the last answer."""

    public_key: PublicKey
    endpoint: Endpoint | None
    last_handshake_age_s: float | None
    sent_octets: int
    received_octets: int
    attempts: int


@dataclass(slots=True, repr=False)
class Common:
    """What the peers of one interface share: its key, its indices and its ways out."""

    own: noise.Key
    mtu: int
    entropy: Entropy
    epoch: float
    session: type[Session]
    slate: Slate = field(default_factory=Slate)
    owners: dict[int, "Peer"] = field(default_factory=dict)
    outgoing: list[Datagrams] = field(default_factory=list)
    events: deque[Event] = field(default_factory=lambda: deque(maxlen=EVENTS))
    drops: Counter[str] = field(default_factory=Counter)

    def index_for(self, peer: "Peer") -> int:
        """A random index that nobody else on this interface has."""
        while (index := int.from_bytes(self.entropy(4), "little")) in self.owners:
            pass
        self.owners[index] = peer
        return index

    def emit(self, datagrams: Datagrams) -> bool:
        """Queue for `transmit`; False, counted, when nobody fetches."""
        if len(self.outgoing) >= OUTGOING:
            self.drops["outgoing full"] += 1
            return False
        self.outgoing.append(datagrams)
        return True


@dataclass(slots=True)
class Campaign:
    """Initiations in a row: how many, since when, and when a handshake message last went out."""

    attempts: int = 0
    since: float = 0.0
    last: float = float("-inf")


@dataclass(slots=True)
class Traffic:
    """Octets of datagrams both ways, handshakes and keepalives included."""

    sent: int = 0
    received: int = 0


def trains(packets: list[bytes]) -> Iterator[Train]:
    """Cut a sequence of packets where a datagram size changes, so that each part is a train."""
    begin = 0
    for end, (packet, following) in enumerate(pairwise(packets), 1):
        size = len(packets[begin])
        if len(packet) < size or len(following) > size or end - begin >= TRAIN_PACKETS:
            yield packets[begin:end]
            begin = end
    yield packets[begin:]


class Peer:
    """A machine that speaks for one public key.

    With an endpoint it can call; without, it waits to be called. `deadline` is exact.
    """

    def __init__(self, common: Common, config: PeerConfig) -> None:
        self._common = common
        self._handshake = Handshake(
            common.own, config.public_key, config.preshared_key, common.entropy, common.epoch
        )
        self._timers = Timers()
        self._slots = Slots()
        self._staged: deque[bytes] = deque(maxlen=STAGED_PACKETS)
        self._campaign = Campaign()
        self._traffic = Traffic()
        self._established_at: float | None = None
        self._keepalive_again = False
        self._endpoint = config.endpoint
        self.config = config

    def configure(self, config: PeerConfig, now: float) -> None:
        """Take (new) settings; sessions go on, persistent keepalive begins."""
        if config.endpoint is not None:
            self._endpoint = config.endpoint
        self._handshake.psk = config.preshared_key
        self.config = config
        self._timers.stop(Timer.PERSISTENT_KEEPALIVE)
        if config.keepalive_s:
            self._timers.set(Timer.PERSISTENT_KEEPALIVE, now)

    def close(self) -> None:
        """Forget everything and give all indices back."""
        self._release(self._slots.clear())
        self._drop_pending()
        self._timers.clear()
        self._staged.clear()

    # Called from inside.

    def send(self, train: Train, now: float) -> None:
        """Seal a train (equal packets, the last perhaps shorter), or stage it and call."""
        session = self._slots.current
        if session is not None and session.is_usable(now, len(train)):
            self._seal(session, train, now)
        elif self._endpoint is None:
            self._common.drops["no endpoint"] += len(train)
        else:
            overflow = len(self._staged) + len(train) - STAGED_PACKETS
            if overflow > 0:
                self._common.drops["staged full"] += overflow
            self._staged.extend(train)
            self._call(now)

    def summon(self, now: float) -> None:
        """Begin a handshake unless one is under way or there is a session to send on."""
        if not self.is_ready(now):
            self._call(now)

    def renew(self, now: float) -> None:
        """Begin a handshake unless one is under way, whatever session there is."""
        self._call(now)

    def announce(self, now: float) -> None:
        """Say that we are here, if there is a session to say it on."""
        if self.is_ready(now):
            self._keep_alive(now)

    def is_ready(self, now: float) -> bool:
        """Whether a packet would be sealed at once."""
        session = self._slots.current
        return session is not None and session.is_usable(now)

    # Called from outside, with what proved to be addressed to us.

    def answer(self, named: noise.Named, sender: int, source: Endpoint, now: float) -> None:
        """The peer begins a handshake: respond, and wait for it to use the new keys. Rejected."""
        index = self._common.index_for(self)
        try:
            keys, octets = self._handshake.answer(named, sender, index, now)
        except (Malformed, Rejected):
            del self._common.owners[index]
            raise
        session = self._common.session(
            keys,
            local=index,
            remote=sender,
            born=now,
            initiator=False,
            slate=self._common.slate,
        )
        self._release(self._slots.responded(session))
        self._timers.set(Timer.ZERO_KEYS, now + ZERO_KEYS_TIME)
        self._has_heard(INITIATION_LEN, source, now)
        self._emit_handshake(octets, source, now)

    def finish(self, response: Response, source: Endpoint, now: float) -> None:
        """The peer answered: the keys may be used, and must be, to confirm. Rejected."""
        keys = self._handshake.finish(response)
        session = self._common.session(
            keys,
            local=response.receiver,
            remote=response.sender,
            born=now,
            initiator=True,
            slate=self._common.slate,
        )
        self._release(self._slots.initiated(session))
        self._timers.set(Timer.ZERO_KEYS, now + ZERO_KEYS_TIME)
        self._has_heard(RESPONSE_LEN, source, now)
        self._has_established(session, source, now)
        if not self._flush(now):
            self._keep_alive(now)

    def keep_cookie(self, reply: CookieReply, now: float) -> None:
        """The peer is busy: prove our address with the next message. Rejected."""
        self._handshake.keep_cookie(reply, now)

    def open(
        self, index: int, octets: memoryview, start: int, segment: int, source: Endpoint, now: float
    ) -> tuple[Sequence[bytes], int]:
        """Open a run of datagrams as `Session.open` does. Rejected when `index` has no session."""
        session = self._slots.find(index)
        if session is None:
            raise Rejected("unknown index")
        if now - session.born >= REJECT_AFTER_TIME:
            raise Rejected("session expired")
        opened, end = session.open(octets, start, segment, self._common.drops)
        if opened:
            inner = len(opened.octets) if isinstance(opened, Laid) else sum(map(len, opened))
            self._has_heard(inner + TRANSPORT_LEN * len(opened), source, now)
            if session is self._slots.next:
                self._release(self._slots.confirmed())
                self._has_established(session, source, now)
                self._flush(now)
            self._has_received(session, now, data=inner > 0)
        return opened, end

    # Time.

    def fire(self, now: float) -> None:
        """Do what is due."""
        while (timer := self._timers.take_due(now)) is not None:
            match timer:
                case Timer.RETRANSMIT_HANDSHAKE:
                    if self._campaign.attempts < HANDSHAKE_ATTEMPTS:
                        self._initiate(now)
                    else:
                        self._give_up(now)
                case Timer.SEND_KEEPALIVE:
                    self._keep_alive(now)
                    if self._keepalive_again:
                        self._keepalive_again = False
                        self._timers.set(Timer.SEND_KEEPALIVE, now + KEEPALIVE_TIMEOUT)
                case Timer.NEW_HANDSHAKE:
                    self._call(now)
                case Timer.ZERO_KEYS:
                    self._release(self._slots.clear())
                    # An initiation that is still being repeated is seconds old and stays.
                    if not self._timers.is_set(Timer.RETRANSMIT_HANDSHAKE):
                        self._drop_pending()
                case Timer.SESSION_ENDS:
                    pass
                case Timer.PERSISTENT_KEEPALIVE:
                    # Set first, so that it goes on even when the keepalive cannot be sent.
                    self._put_off_persistent(now)
                    self._keep_alive(now)

    def deadline(self) -> float | None:
        """When `fire` has something to do."""
        return self._timers.deadline()

    def status(self, now: float) -> PeerStatus:
        """A snapshot for people."""
        at = self._established_at
        return PeerStatus(
            self.config.public_key,
            self._endpoint,
            None if at is None else now - at,
            self._traffic.sent,
            self._traffic.received,
            self._campaign.attempts,
        )

    # What happened, and which timers it moves.

    def _has_sent(self, octets: int, now: float) -> None:
        """Anything authentic went out."""
        self._traffic.sent += octets
        self._timers.stop(Timer.SEND_KEEPALIVE)
        self._put_off_persistent(now)

    def _has_heard(self, octets: int, source: Endpoint, now: float) -> None:
        """Anything authentic and new came in; only this may move the endpoint."""
        self._traffic.received += octets
        self._timers.stop(Timer.NEW_HANDSHAKE)
        self._put_off_persistent(now)
        if source != self._endpoint:
            self._endpoint = source
            self._common.events.append(EndpointMoved(self.config.public_key, source))

    def _has_received(self, session: Session, now: float, *, data: bool) -> None:
        """Transport messages came in on `session`."""
        if data:
            if self._timers.is_set(Timer.SEND_KEEPALIVE):
                self._keepalive_again = True
            else:
                self._timers.set(Timer.SEND_KEEPALIVE, now + KEEPALIVE_TIMEOUT)
        # This asks once: until the session has ended, the handshake it began is under way.
        if session is self._slots.current and session.is_ending(now):
            self._call(now)

    def _has_established(self, session: Session, source: Endpoint, now: float) -> None:
        """Both sides have the keys of `session`, which is `current` now."""
        self._drop_pending()
        self._timers.stop(Timer.RETRANSMIT_HANDSHAKE)
        self._timers.set(Timer.SESSION_ENDS, session.born + REJECT_AFTER_TIME)
        self._established_at = now
        attempt = self._campaign.attempts if session.initiator else 0
        self._campaign.attempts = 0
        self._common.events.append(SessionStarted(self.config.public_key, attempt, source))

    def _put_off_persistent(self, now: float) -> None:
        if self.config.keepalive_s:
            self._timers.set(Timer.PERSISTENT_KEEPALIVE, now + self.config.keepalive_s)

    # Deeds.

    def _seal(self, session: Session, train: Train, now: float) -> None:
        endpoint = self._endpoint
        assert endpoint is not None, "a session comes from a message, which came from somewhere"
        octets, segment = session.seal(train, self._common.mtu)
        if not self._common.emit(Datagrams(octets, segment, endpoint)):
            return
        self._has_sent(len(octets), now)
        if train[0] and not self._timers.is_set(Timer.NEW_HANDSHAKE):
            wait_s = KEEPALIVE_TIMEOUT + REKEY_TIMEOUT + jitter(self._common.entropy)
            self._timers.set(Timer.NEW_HANDSHAKE, now + wait_s)
        if session.is_stale(now):
            self._call(now)

    def _flush(self, now: float) -> bool:
        """Send what was staged; False when there was nothing."""
        if not self._staged:
            return False
        packets = list(self._staged)
        self._staged.clear()
        for train in trains(packets):
            self.send(train, now)
        return True

    def _keep_alive(self, now: float) -> None:
        """An empty packet; without a session, the handshake that leads to one."""
        session = self._slots.current
        if session is not None and session.is_usable(now):
            self._seal(session, [b""], now)
        else:
            self._call(now)

    def _call(self, now: float) -> None:
        """Begin a handshake unless one is under way."""
        if not self._timers.is_set(Timer.RETRANSMIT_HANDSHAKE):
            self._campaign.attempts = 0
            self._campaign.since = now
            self._initiate(now)

    def _initiate(self, now: float) -> None:
        """Send an initiation, or wait until REKEY_TIMEOUT has passed since our last message."""
        endpoint = self._endpoint
        if endpoint is None:
            return
        wait_s = REKEY_TIMEOUT + jitter(self._common.entropy)
        if now < self._campaign.last + REKEY_TIMEOUT:
            self._timers.set(Timer.RETRANSMIT_HANDSHAKE, self._campaign.last + wait_s)
            return
        self._drop_pending()
        octets = self._handshake.initiate(self._common.index_for(self), now)
        self._campaign.attempts += 1
        self._timers.set(Timer.RETRANSMIT_HANDSHAKE, now + wait_s)
        self._emit_handshake(octets, endpoint, now)
        self._common.events.append(
            HandshakeStarted(self.config.public_key, self._campaign.attempts, endpoint)
        )

    def _emit_handshake(self, octets: bytes, endpoint: Endpoint, now: float) -> None:
        self._campaign.last = now
        if self._common.emit(Datagrams(octets, len(octets), endpoint)):
            self._has_sent(len(octets), now)

    def _give_up(self, now: float) -> None:
        self._timers.stop(Timer.SEND_KEEPALIVE)
        self._drop_pending()
        if self._staged:
            self._common.drops["handshake gave up"] += len(self._staged)
            self._staged.clear()
        campaign = self._campaign
        self._common.events.append(
            HandshakeGaveUp(self.config.public_key, campaign.attempts, now - campaign.since)
        )

    def _drop_pending(self) -> None:
        index = self._handshake.pending()
        if index is not None:
            self._handshake.forget()
            del self._common.owners[index]

    def _release(self, sessions: list[Session]) -> None:
        for session in sessions:
            del self._common.owners[session.local]

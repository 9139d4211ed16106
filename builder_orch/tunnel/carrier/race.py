"""UDP and WebSocket to one gateway, raced with the same initiation; the first to answer carries.

`Race` decides and does nothing else (no clock, no I/O); `RaceCarrier` does it. What counts is never
that octets came, but that WireGuard found them authentic: only then the driver calls `heard`. At
the gateway nothing is needed: a peer is where its last authentic packet came from.
"""

import asyncio
import time
from collections.abc import Callable
from enum import Enum

from builder_orch.tunnel.carrier import Deliver, Route, Sign
from builder_orch.tunnel.carrier.families import UdpFamilies
from builder_orch.tunnel.carrier.link import Clock
from builder_orch.tunnel.carrier.memory import Memory
from builder_orch.tunnel.carrier.udp import UdpCarrier
from builder_orch.tunnel.carrier.websocket import WebSocketCarrier
from builder_orch.tunnel.machine import Datagrams, Endpoint

HEAD_START_S = 1.0
"""What the first carrier gets before the same initiation goes the other way too."""
DEAF_S = 11.0
"""Unanswered for so long: the other carrier is made ready, and a handshake that begins now goes
both ways at once. A peer that has nothing else to say answers data after 10 s (WireGuard's
keepalive), and after 15 s without an answer WireGuard begins a handshake."""
PROBES = 3
"""Answers over UDP, one after the other, before it is trusted again."""
PROBE_FIRST_S = 5.0
PROBE_LIMIT_S = 30.0
PROBE_AGAIN_S = 1.0
"""After a good one; after a bad one the wait doubles, from `PROBE_FIRST_S` to `PROBE_LIMIT_S`."""

INITIATION = 1
INITIATION_LEN = 148
TRANSPORT = 4
KEEPALIVE_LEN = 32


class Kind(Enum):
    """Of carriers."""

    UDP = "udp"
    WEBSOCKET = "websocket"

    @property
    def other(self) -> "Kind":
        return Kind.WEBSOCKET if self is Kind.UDP else Kind.UDP


class Deed(Enum):
    """What is to be done when it is due."""

    COPY = "send the initiation the other way too"
    READY = "have the other carrier ready"
    PROBE = "ask for an answer over UDP"


class Race:
    """Which way, told what happens and when. `active` is None until one answered."""

    def __init__(self, first: Kind = Kind.UDP) -> None:
        self.active: Kind | None = None
        self.why = ""
        self._first = first
        self._attempts = 0
        self._refused = False
        self._through: Kind | None = None
        self._copy_at: float | None = None
        self._unanswered_since: float | None = None
        self._ready_at: float | None = None
        self._probe_at: float | None = None
        self._probe_wait = PROBE_FIRST_S
        self._probing = False
        self._good = 0

    @property
    def way(self) -> Kind:
        """Where packets go now."""
        return self.active or self._first

    def initiation(self, now: float, *, connected: bool) -> Kind:
        """An initiation is to go out; which way first. The copy the other way becomes due.

        `connected` says whether there is a WebSocket connection.
        """
        self._attempts += 1
        first = self.way
        if self._attempts % 2 == 0 and connected:
            # Where answers are lost on their way back, the gateway takes the copy that comes
            # second for a replay. Let the other way be the first for once.
            first = first.other
        self._through = first
        at_once = self._is_deaf(now) or (first is Kind.UDP and self._refused)
        self._copy_at = now if at_once else now + HEAD_START_S
        return first

    def sent(self, now: float) -> None:
        """Data went out on the active carrier."""
        if self._unanswered_since is None:
            self._unanswered_since = now
            self._ready_at = now + DEAF_S

    def arrived(self, kind: Kind) -> None:
        """Something came that way. It may be forged, so it only ends a suspicion."""
        if kind is self.way:
            self._unanswered_since = self._ready_at = None

    def heard(self, kind: Kind, now: float, *, session: bool) -> bool:
        """An authentic packet came that way, with new keys if `session`; whether we change."""
        was_deaf = self._is_deaf(now)
        unanswered = self._attempts
        self.arrived(kind)
        if kind is Kind.UDP:
            self._refused = False
        if session:
            self._attempts, self._copy_at = 0, None
        if kind is self.active:
            return False
        if self.active is None:
            return session and self._change(kind, self._reason(kind), now)
        if kind is Kind.WEBSOCKET:
            return session and self._change(kind, "UDP went silent", now)
        if session and (was_deaf or unanswered > 1):
            return self._change(kind, "the WebSocket connection went silent", now)
        return self._has_answered(now)

    def refused(self, now: float) -> None:
        """The network said that UDP does not go there."""
        self._refused = True
        if self._copy_at is not None and self._through is Kind.UDP:
            self._copy_at = now

    def take_due(self, now: float) -> list[Deed]:
        """What is to be done now, once each."""
        deeds = []
        if self._copy_at is not None and self._copy_at <= now:
            self._copy_at = None
            deeds.append(Deed.COPY)
        if self._ready_at is not None and self._ready_at <= now:
            self._ready_at = None
            deeds.append(Deed.READY)
        if self._probe_at is not None and self._probe_at <= now:
            if self._probing:
                self._good = 0
                self._probe_wait = min(2 * self._probe_wait, PROBE_LIMIT_S)
            self._probing = True
            self._probe_at = now + self._probe_wait
            deeds.append(Deed.PROBE)
        return deeds

    def deadline(self) -> float | None:
        """When `take_due` has something."""
        times = (self._copy_at, self._ready_at, self._probe_at)
        return min((at for at in times if at is not None), default=None)

    @property
    def copy_through(self) -> Kind:
        """Which way the copy of the last initiation goes."""
        return (self._through or self._first).other

    def _is_deaf(self, now: float) -> bool:
        since = self._unanswered_since
        return since is not None and now - since >= DEAF_S

    def _reason(self, kind: Kind) -> str:
        if kind is Kind.UDP:
            return "it answered first"
        if self._first is Kind.WEBSOCKET:
            return "it answered here before, and again"
        return "UDP was refused" if self._refused else "UDP did not answer"

    def _has_answered(self, now: float) -> bool:
        if not self._probing:
            return False
        self._probing = False
        self._good += 1
        if self._good >= PROBES:
            return self._change(Kind.UDP, f"UDP answers again ({PROBES} probes)", now)
        self._probe_wait = PROBE_FIRST_S
        self._probe_at = now + PROBE_AGAIN_S
        return False

    def _change(self, kind: Kind, why: str, now: float) -> bool:
        self.active, self.why = kind, why
        self._unanswered_since = self._ready_at = None
        self._probing, self._good, self._probe_wait = False, 0, PROBE_FIRST_S
        self._probe_at = now + PROBE_FIRST_S if kind is Kind.WEBSOCKET else None
        return True


class RaceCarrier:
    """Both carriers behind one, for a tunnel with one gateway.

    Set `probe` to something that has the gateway answer (an echo request, say): whatever is sent
    while it runs goes over UDP. `changed` is called when `route` has, `relocated` when UDP goes on
    from another address of ours. `network` is what `memory` knows this place by.
    """

    def __init__(
        self,
        udp: UdpCarrier | UdpFamilies,
        websocket: WebSocketCarrier,
        *,
        memory: Memory | None = None,
        network: str = "",
        clock: Clock = time.monotonic,
    ) -> None:
        self._udp = udp
        self._websocket = websocket
        self._memory = memory or Memory(None)
        self._network = network
        self._clock = clock
        first = self._memory.recall(network)
        self._race = Race(Kind(first) if first else Kind.UDP)
        self._initiation: Datagrams | None = None
        self._diverted = False
        self._probes = 0
        self._udp_source: Endpoint = udp.far or ("", 0)
        self._refusals = 0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._deliver: Deliver | None = None
        self._settled: Callable[[], None] | None = None
        self.probe: Callable[[], None] = lambda: None
        self.relocated: Callable[[], None] = lambda: None
        self.changed: Callable[[], None] = lambda: None

    @property
    def blocked(self) -> bool:
        """Whether the carrier in use takes no more."""
        return self._of(self._race.way).blocked

    @property
    def refusals(self) -> int:
        """How often UDP was refused."""
        return self._udp.refusals

    def route(self) -> Route:
        """The carrier in use, and why it is."""
        return self._of(self._race.way).route()._replace(why=self._race.why)

    def waiting(self, attempt: int) -> str:
        """What stands between us and an answer, both ways."""
        said = self._udp.waiting(attempt)
        return f"{said}; {self._websocket.waiting(attempt)}" if self._websocket.is_begun else said

    def signs(self) -> tuple[Sign, ...]:
        """Of UDP, and of WebSocket once that was begun."""
        return self._udp.signs() + self._websocket.signs()

    def start(self, deliver: Deliver, settled: Callable[[], None]) -> None:
        """Begin to deliver what comes, whichever way."""
        self._deliver, self._settled = deliver, settled
        self._websocket.probe = self._announce
        self._udp.relocated = self._relocate
        self._udp.start(self._from_udp, self._udp_settled)
        self._websocket.start(self._from_websocket, settled)

    def send(self, datagrams: Datagrams) -> None:
        """Send the way that is in use; an initiation the other way too, if need be."""
        if self._diverted:
            self._udp.send(datagrams)
            return
        octets, segment, _ = datagrams
        if octets[0] == INITIATION and segment == INITIATION_LEN:
            self._initiation = datagrams
            now = self._clock()
            connected = self._websocket.is_up
            self._of(self._race.initiation(now, connected=connected)).send(datagrams)
            self._note_refusals()
            self._act()
            return
        self._of(self._race.way).send(datagrams)
        if octets[0] == TRANSPORT and len(octets) > KEEPALIVE_LEN:
            # Nothing else is answered by whoever has nothing to say.
            self._race.sent(self._clock())
            if self._timer is None:
                self._arm()

    def heard(self, endpoint: Endpoint, *, session: bool) -> bool:
        """An authentic packet came from here, with new keys if `session`; whether we change."""
        if endpoint == self._websocket.source:
            kind = Kind.WEBSOCKET
        elif endpoint == self._udp_source:
            kind = Kind.UDP
        else:
            # The answer to a probe that was given up.
            return False
        if kind is Kind.UDP and isinstance(self._udp, UdpFamilies):
            self._udp.heard(endpoint, session=session)
        changes = self._race.heard(kind, self._clock(), session=session)
        if changes:
            self._memory.keep(self._network, kind.value)
            self.changed()
        self._arm()
        return changes

    def close(self) -> None:
        """Close both."""
        self._deliver = None
        if self._timer is not None:
            self._timer.cancel()
        self._udp.close()
        self._websocket.close()

    def _of(self, kind: Kind) -> UdpCarrier | UdpFamilies | WebSocketCarrier:
        return self._udp if kind is Kind.UDP else self._websocket

    def _from_udp(self, octets: memoryview, segment: int, _: Endpoint) -> None:
        self._race.arrived(Kind.UDP)
        if self._deliver is not None:
            self._deliver(octets, segment, self._udp_source)

    def _from_websocket(self, octets: memoryview, segment: int, source: Endpoint) -> None:
        self._race.arrived(Kind.WEBSOCKET)
        if self._deliver is not None:
            self._deliver(octets, segment, source)

    def _announce(self) -> None:
        if self._race.way is Kind.WEBSOCKET:
            self.probe()

    def _relocate(self) -> None:
        if self._race.way is Kind.UDP:
            self.relocated()

    def _udp_settled(self) -> None:
        self._note_refusals()
        self._act()
        if self._settled is not None:
            self._settled()

    def _note_refusals(self) -> None:
        if self._udp.refusals != self._refusals:
            self._refusals = self._udp.refusals
            self._race.refused(self._clock())

    def _act(self) -> None:
        """Do what is due, then set one timer."""
        for deed in self._race.take_due(self._clock()):
            match deed:
                case Deed.COPY if self._initiation is not None:
                    self._of(self._race.copy_through).send(self._initiation)
                case Deed.READY:
                    self._websocket.open()
                case Deed.PROBE:
                    # A name of its own for each probe: the interface tells when a peer's authentic
                    # packets come from elsewhere than those before.
                    self._probes += 1
                    host, port = self._udp.far or ("", 0)
                    self._udp_source = (f"{host}/probe {self._probes}", port)
                    self._diverted = True
                    try:
                        self.probe()
                    finally:
                        self._diverted = False
                case _:
                    pass
        self._arm()

    def _arm(self) -> None:
        due = self._race.deadline()
        if self._deliver is None or due is None:
            return
        if self._timer is not None:
            if self._timer_at <= due:
                return
            self._timer.cancel()
        wait_s = max(0.0, due - self._clock())
        self._timer = asyncio.get_running_loop().call_later(wait_s, self._on_timer)
        self._timer_at = due

    def _on_timer(self) -> None:
        self._timer = None
        self._act()

"""UDP to a gateway that has an IPv4 and an IPv6 address: the same initiation goes to both.

Which family works is known only when an answer was authentic; that one carries everything until it
leaves an initiation unanswered, and then both are asked again. The gateway sees a peer that moved.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial

from builder_orch.tunnel.carrier import Deliver, Route, Sign
from builder_orch.tunnel.carrier.udp import UdpCarrier
from builder_orch.tunnel.machine import Datagrams, Endpoint

INITIATION = 1


class UdpFamilies:
    """Connected UDP carriers behind one, the preferred family first."""

    def __init__(self, ways: tuple[UdpCarrier, ...]) -> None:
        self._ways = ways
        self._way = ways[0]
        self._last = ways[0]
        self._is_sure = False
        self._asked = False
        self._deliver: Deliver | None = None

    def heard(self, _: Endpoint, *, session: bool) -> bool:
        """What was delivered last was authentic; with new keys its family is the one to use."""
        changes = session and self._way is not self._last
        if session:
            self._way, self._is_sure, self._asked = self._last, True, False
        return changes

    @property
    def relocated(self) -> Callable[[], None]:
        """Called when the family in use goes on from another address of ours."""
        return self._way.relocated

    @relocated.setter
    def relocated(self, call: Callable[[], None]) -> None:
        for way in self._ways:
            way.relocated = partial(self._relocated, way, call)

    def _relocated(self, way: UdpCarrier, call: Callable[[], None]) -> None:
        if way is self._way:
            call()

    @property
    def endpoint(self) -> Endpoint:
        """Our address and port in the family in use."""
        return self._way.endpoint

    @property
    def far(self) -> Endpoint | None:
        """The gateway's address and port in the family in use."""
        return self._way.far

    @property
    def drops(self) -> Counter[str]:
        """Of all families, by reason."""
        return sum((way.drops for way in self._ways), Counter())

    @property
    def blocked(self) -> bool:
        """Whether the family in use takes no more."""
        return self._way.blocked

    @property
    def refusals(self) -> int:
        """UDP is refused when every family is."""
        return min(way.refusals for way in self._ways)

    def route(self) -> Route:
        """Where the family in use leads."""
        return self._way.route()

    def waiting(self, attempt: int) -> str:
        """Of the family in use, or of each while none has answered."""
        if self._is_sure:
            return self._way.waiting(attempt)
        return "; ".join(way.waiting(attempt) for way in self._ways)

    def signs(self) -> tuple[Sign, ...]:
        """Of every family."""
        return tuple(sign for way in self._ways for sign in way.signs())

    def start(self, deliver: Deliver, settled: Callable[[], None]) -> None:
        """Begin to deliver, whichever way it comes."""
        self._deliver = deliver
        for way in self._ways:
            way.start(partial(self._arrived, way), settled)

    def _arrived(self, way: UdpCarrier, octets: memoryview, segment: int, source: Endpoint) -> None:
        self._last = way
        if self._deliver is not None:
            self._deliver(octets, segment, source)

    def send(self, datagrams: Datagrams) -> None:
        """Send by the family in use; an initiation by each while that is in doubt."""
        if datagrams.octets[0] != INITIATION:
            self._way.send(datagrams)
            return
        doubtful = self._asked or not self._is_sure
        self._asked = True
        for way in self._ways:
            if doubtful or way is self._way:
                way.send(datagrams)

    def close(self) -> None:
        """Close all sockets."""
        self._deliver = None
        for way in self._ways:
            way.close()

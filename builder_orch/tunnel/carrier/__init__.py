"""Carriers move datagrams outside; the driver knows no more of them than this contract."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from builder_orch.tunnel.machine import Datagrams, Endpoint

Deliver = Callable[[memoryview, int, Endpoint], None]
"""Takes received octets, the size to cut them by and their source; must not keep the view."""


class Route(NamedTuple):
    """How the gateway is reached (udp, websocket), where, and why so."""

    kind: str
    endpoint: str
    why: str


OPEN, SILENT, REFUSED, BARRED, FAILED = "open", "silent", "refused", "barred", "failed"


class Sign(NamedTuple):
    """What one way to the gateway (udp, websocket) looks like from here.

    `state` is open (a connection stands, so what we send gets there), silent, refused (the far host
    says that nobody listens), barred (this machine or a router does not let us) or failed, for the
    reason in `said`.
    """

    kind: str
    state: str
    where: str
    said: str = ""


class Carrier(Protocol):
    """Moves datagrams between here and the gateway; opened by its maker, closed by the driver."""

    @property
    def blocked(self) -> bool:
        """Whether the way out is full; `settled` is called when it is free again."""
        ...

    @property
    def refusals(self) -> int:
        """How often the far end's host said that nobody listens there."""
        ...

    def start(self, deliver: Deliver, settled: Callable[[], None]) -> None:
        """Begin to deliver; `settled` follows each burst, once, and each return to not blocked."""
        ...

    def send(self, datagrams: Datagrams) -> None:
        """Send or queue; what cannot be sent is dropped and counted, as on any network."""
        ...

    def route(self) -> Route:
        """How the far end is reached now, and why so."""
        ...

    def waiting(self, attempt: int) -> str:
        """What stands between us and an answer to handshake `attempt`, in a few words."""
        ...

    def signs(self) -> tuple[Sign, ...]:
        """What each way that was tried looks like."""
        ...

    def close(self) -> None:
        """Stop delivering and free the socket; what is queued is dropped."""
        ...

"""An event loop whose clock jumps: what takes minutes takes milliseconds, in the same order.

Real sockets on this machine work on it as well: only where nothing is ready to be read or written
the clock goes to the next timer.
"""

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest

from builder_orch.tunnel import driver
from builder_orch.tunnel.carrier import SILENT, Deliver, Route, Sign
from builder_orch.tunnel.machine import Datagrams, Endpoint

Made = TypeVar("Made")
BOOTED = 1000.0
TURN_S = 1e-6


class JumpingSelector(selectors.DefaultSelector):
    """Waits for nothing: it moves the clock by what it was to wait."""

    now = BOOTED

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        # A turn takes its time; without it, waits shorter than a float can tell would never end.
        self.now += TURN_S
        if not ready and timeout:
            self.now += timeout
        # With nothing to come but a thread's answer or a socket's, that is waited for.
        return super().select(None) if not ready and timeout is None else ready


class JumpingLoop(asyncio.SelectorEventLoop):
    """The loop of that clock."""

    def __init__(self) -> None:
        self.selector = JumpingSelector()
        super().__init__(self.selector)

    def time(self) -> float:
        return self.selector.now


def play(story: Coroutine[Any, Any, Made], monkeypatch: pytest.MonkeyPatch) -> Made:
    """Run a story about tunnels on a jumping clock; its result."""
    loop = JumpingLoop()
    monkeypatch.setattr(driver, "boot_time", loop.time)
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(story)


def now() -> float:
    """What the clock of the story says."""
    return asyncio.get_running_loop().time()


class Air:
    """Carries datagrams between carriers, each after `delay_s`; `passes` may swallow them."""

    def __init__(self, delay_s: float = 0.02) -> None:
        self.delay_s = delay_s
        self.carriers: dict[Endpoint, MemoryCarrier] = {}
        self.passes: Callable[[bytes, Endpoint], bool] = lambda octets, to: True

    def carrier(self, endpoint: Endpoint) -> "MemoryCarrier":
        """A carrier at an address of its own."""
        self.carriers[endpoint] = made = MemoryCarrier(self, endpoint)
        return made

    def throw(self, datagrams: Datagrams, source: Endpoint) -> None:
        """Send; what nobody listens for is lost."""
        if self.passes(bytes(datagrams.octets), datagrams.endpoint):
            loop = asyncio.get_running_loop()
            loop.call_later(self.delay_s, self._catch, datagrams, source)

    def _catch(self, datagrams: Datagrams, source: Endpoint) -> None:
        carrier = self.carriers.get(datagrams.endpoint)
        if carrier is not None:
            carrier.receive(datagrams, source)


class MemoryCarrier:
    """A carrier through the air of a test."""

    blocked = False
    refusals = 0

    def __init__(self, air: Air, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._air = air
        self._deliver: Deliver | None = None
        self._settled: Callable[[], None] = lambda: None

    def start(self, deliver: Deliver, settled: Callable[[], None]) -> None:
        self._deliver, self._settled = deliver, settled

    def send(self, datagrams: Datagrams) -> None:
        self._air.throw(datagrams, self.endpoint)

    def receive(self, datagrams: Datagrams, source: Endpoint) -> None:
        if self._deliver is not None:
            self._deliver(memoryview(datagrams.octets), datagrams.segment, source)
            self._settled()

    def route(self) -> Route:
        return Route("udp", "the air", "")

    def waiting(self, attempt: int) -> str:
        return f"udp the air handshake attempt {attempt} unanswered"

    def signs(self) -> tuple[Sign, ...]:
        return (Sign("udp", SILENT, "the air"),)

    def close(self) -> None:
        self._deliver = None

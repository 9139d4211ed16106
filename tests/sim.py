"""Two machines, two wires, one clock that jumps from event to event.

Everything is decided by seeds, so a failure repeats; its seed is added to the error. `Pair` joins
any two nodes that take and give trains of packets (`Stack` is one as it is; others need an adapter
with the three verbs). After every step it asserts the law of `machine.py` and calls the invariants
that it was given.
"""

from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from random import Random
from typing import Protocol

from builder_orch.tunnel.machine import Train

MAX_STEPS = 2_000_000
BLOCK = 1 << 16


class Node(Protocol):
    """A machine by trains."""

    def receive(self, packets: list[bytes], now: float) -> None: ...
    def transmit(self, now: float) -> list[Train]: ...
    def deadline(self) -> float | None: ...


@dataclass(frozen=True, slots=True)
class Weather:
    """What a wire does to packets. Times in seconds, probabilities per packet, rate in octets/s."""

    delay_s: float = 0.01
    jitter_s: float = 0.0
    loss: float = 0.0
    burst: float = 0.0
    """Probability that a burst of losses begins."""
    burst_s: float = 0.005
    reorder: float = 0.0
    reorder_s: float = 0.005
    """How much later a reordered packet arrives."""
    duplicate: float = 0.0
    rate: float | None = None
    queue: int = 1 << 18
    """Octets that may wait for a wire with a rate; more are dropped."""
    mtu: int = 65_535


class Wire:
    """One direction. Packets that arrive at the same moment come out as one list."""

    def __init__(self, weather: Weather, seed: int) -> None:
        self.weather = weather
        self.is_cut = False
        self.carried = 0
        self.lost = 0
        self._random = Random(seed)
        self._arrivals: list[tuple[float, int, bytes]] = []
        self._serial = count()
        self._free_at = 0.0
        self._burst_until = 0.0

    def push(self, packet: bytes, now: float) -> None:
        """Send one packet; it may get lost."""
        weather = self.weather
        self.carried += 1
        if self.is_cut or self._loses(now) or len(packet) > weather.mtu:
            self.lost += 1
            return
        leaves = now
        if weather.rate is not None:
            waiting = max(0.0, self._free_at - now) * weather.rate
            if waiting + len(packet) > weather.queue:
                self.lost += 1
                return
            leaves = self._free_at = max(now, self._free_at) + len(packet) / weather.rate
        for _ in range(2 if self._happens(weather.duplicate) else 1):
            at = leaves + weather.delay_s
            if weather.jitter_s:
                at += self._random.random() * weather.jitter_s
            if self._happens(weather.reorder):
                at += weather.reorder_s
            heappush(self._arrivals, (at, next(self._serial), packet))

    def due(self) -> float | None:
        """When the next packet arrives."""
        return self._arrivals[0][0] if self._arrivals else None

    def pop(self, now: float) -> list[bytes]:
        """What has arrived."""
        packets = []
        while self._arrivals and self._arrivals[0][0] <= now:
            packets.append(heappop(self._arrivals)[2])
        return packets

    def _happens(self, probability: float) -> bool:
        return probability > 0 and self._random.random() < probability

    def _loses(self, now: float) -> bool:
        if self._happens(self.weather.burst):
            self._burst_until = now + self.weather.burst_s
        return now < self._burst_until or self._happens(self.weather.loss)


class Pair:
    """Two nodes and the wires between them; `left` sends on `there`, `right` on `back`.

    `actor` plays the applications: it is called after every event, before the nodes transmit.
    """

    def __init__(
        self,
        left: Node,
        right: Node,
        weather: Weather | None = None,
        *,
        seed: int = 0,
        back: Weather | None = None,
        actor: Callable[[], None] = lambda: None,
        invariant: Callable[[], None] = lambda: None,
    ) -> None:
        weather = weather or Weather()
        self.now = 0.0
        self.seed = seed
        self.left, self.right = left, right
        self.there = Wire(weather, seed * 2 + 1)
        self.back = Wire(back or weather, seed * 2 + 2)
        self.actor = actor
        self.invariant = invariant
        self.steps = 0

    def pump(self) -> None:
        """Let the applications act and both nodes send what they want to send now."""
        self.actor()
        self._drain(self.left, self.there)
        self._drain(self.right, self.back)
        self.invariant()

    def next_event(self) -> float | None:
        """When something will happen."""
        times = (self.left.deadline(), self.right.deadline(), self.there.due(), self.back.due())
        return min((at for at in times if at is not None), default=None)

    def step(self) -> bool:
        """Jump to the next event and let it happen; False when nothing is left to come."""
        at = self.next_event()
        if at is None:
            return False
        self.steps += 1
        assert self.steps < MAX_STEPS, "the machines keep each other busy"
        self.now = max(self.now, at)
        for wire, node in ((self.there, self.right), (self.back, self.left)):
            packets = wire.pop(self.now)
            if packets:
                node.receive(packets, self.now)
        self.pump()
        return True

    def run(self, until: Callable[[], bool], *, limit_s: float) -> float:
        """Step until something holds; virtual seconds it took. AssertionError after `limit_s`."""
        began = self.now
        try:
            self.pump()
            while not until():
                assert self.step(), "everything came to rest before it was done"
                assert self.now - began <= limit_s, f"not done after {limit_s} virtual seconds"
        except AssertionError as error:
            error.add_note(f"seed {self.seed}, virtual time {self.now:.6f}, step {self.steps}")
            raise
        return self.now - began

    def run_for(self, seconds: float) -> None:
        """Let everything happen that happens in this time."""
        end = self.now + seconds
        self.pump()
        while (at := self.next_event()) is not None and at <= end:
            self.step()
        self.now = end
        self.pump()

    def _drain(self, node: Node, wire: Wire) -> None:
        for train in node.transmit(self.now):
            assert train, "an empty train"
            assert all(len(packet) == len(train[0]) for packet in train[:-1]), "unequal packets"
            assert len(train[-1]) <= len(train[0]), "the last packet may only be shorter"
            for packet in train:
                wire.push(packet, self.now)
        after = node.deadline()
        assert after is None or after > self.now, "a machine may not ask for now again"


class Stream:
    """A byte stream in which every position is known, so that the first wrong one can be named."""

    def __init__(self, name: str, length: int) -> None:
        self.length = length
        self._name = name
        self._number = -1
        self._block = b""

    def octets(self, start: int, size: int) -> bytes:
        """[start, start + size), cut at the stream's end."""
        end = min(start + size, self.length)
        parts = []
        while start < end:
            number, offset = divmod(start, BLOCK)
            if number != self._number:
                self._number = number
                self._block = Random(f"{self._name} {number}").randbytes(BLOCK)
            parts.append(self._block[offset : offset + end - start])
            start += len(parts[-1])
        return b"".join(parts)

    def check(self, start: int, data: bytes) -> None:
        """Assert that `data` is what belongs at `start`."""
        wanted = self.octets(start, len(data))
        if data != wanted:
            pairs = zip(data, wanted, strict=False)
            wrong = next((i for i, (got, want) in enumerate(pairs) if got != want), len(wanted))
            raise AssertionError(f"first wrong octet at {start + wrong} of {self.length}")

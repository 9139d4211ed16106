"""Two machines, two wires, and clocks that jump from event to event.

Everything is decided by seeds, so a failure repeats; its seed is added to the error. `Pair` joins
any two nodes that take and give trains of packets (`Stack` is one as it is; others need an adapter
with the three verbs). After every step it asserts the law of `machine.py` and calls the invariants
that it was given.

`grain_s` is how exact timers are; `turn_s` is how long the left machine, which shares its processor
with others, is away after each train it has sent.
"""

from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from math import ceil
from random import Random
from typing import Protocol

from builder_orch.tunnel.machine import Train

MAX_STEPS = 2_000_000
BLOCK = 1 << 16
BLOCKS = 160
"""How many are remembered: what writer and reader are apart."""


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
    turns_bad: float = 0.0
    """Gilbert and Elliott: per packet, the probability that good times end,"""
    turns_good: float = 0.1
    """that bad times end,"""
    bad_loss: float = 0.5
    """and what gets lost in bad times."""
    corrupt: float = 0.0
    """One bit of the packet arrives wrong; whoever is below the node has to notice."""
    reorder: float = 0.0
    reorder_s: float = 0.005
    """How much later a reordered packet arrives at most."""
    reorder_from_s: float | None = None
    """And at least; None for exactly `reorder_s`."""
    duplicate: float = 0.0
    rate: float | None = None
    queue: int = 1 << 18
    """Octets that may wait for a wire with a rate; more are dropped."""
    mtu: int = 65_535
    nat_s: float | None = None
    """What comes the other way is lost when nothing went this way for so long."""


class Wire:
    """One direction. Packets that arrive at the same moment come out as one list."""

    def __init__(self, weather: Weather, seed: int) -> None:
        self.weather = weather
        self.is_cut = False
        self.carried = 0
        self.lost = 0
        self.used_at = 0.0
        self.opposite: Wire | None = None
        self.too_big: Callable[[bytes, int], bytes] | None = None
        self._is_bad = False
        self._random = Random(seed)
        self._arrivals: list[tuple[float, int, bytes]] = []
        self._serial = count()
        self._free_at = 0.0
        self._burst_until = 0.0

    def push(self, packet: bytes, now: float) -> None:
        """Send one packet; it may get lost."""
        weather = self.weather
        self.carried += 1
        if len(packet) > weather.mtu:
            self._refuse(packet, now)
            return
        self.used_at = now
        if self.is_cut or self._loses(now) or self._is_forgotten(now):
            self.lost += 1
            return
        if self._happens(weather.corrupt):
            packet = self._corrupted(packet)
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
                at += self._lateness()
            heappush(self._arrivals, (at, next(self._serial), packet))

    def due(self) -> float | None:
        """When the next packet arrives."""
        return self._arrivals[0][0] if self._arrivals else None

    def waiting(self, now: float) -> float:
        """How long a packet would wait for the wire now, in seconds."""
        return max(0.0, self._free_at - now)

    def pop(self, now: float) -> list[bytes]:
        """What has arrived."""
        packets = []
        while self._arrivals and self._arrivals[0][0] <= now:
            packets.append(heappop(self._arrivals)[2])
        return packets

    def _lateness(self) -> float:
        least, most = self.weather.reorder_from_s, self.weather.reorder_s
        return most if least is None else least + self._random.random() * (most - least)

    def _happens(self, probability: float) -> bool:
        return probability > 0 and self._random.random() < probability

    def _refuse(self, packet: bytes, now: float) -> None:
        """Too big for a router on the way, which may tell."""
        self.lost += 1
        if self.too_big is not None and self.opposite is not None:
            self.opposite.push(self.too_big(packet, self.weather.mtu), now)

    def _is_forgotten(self, now: float) -> bool:
        """Whether a translator on the way has forgotten whose packets these are."""
        nat_s = self.opposite.weather.nat_s if self.opposite is not None else None
        return (
            nat_s is not None
            and self.opposite is not None
            and (now - self.opposite.used_at > nat_s)
        )

    def _corrupted(self, packet: bytes) -> bytes:
        wrong = bytearray(packet)
        wrong[self._random.randrange(len(wrong))] ^= 1 << self._random.randrange(8)
        return bytes(wrong)

    def _loses(self, now: float) -> bool:
        weather = self.weather
        if weather.turns_bad:
            self._is_bad ^= self._happens(weather.turns_good if self._is_bad else weather.turns_bad)
            if self._is_bad and self._happens(weather.bad_loss):
                return True
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
        grain_s: float = 0.0,
        turn_s: float = 0.0,
    ) -> None:
        weather = weather or Weather()
        self.now = 0.0
        self.seed = seed
        self.left, self.right = left, right
        self.there = Wire(weather, seed * 2 + 1)
        self.back = Wire(back or weather, seed * 2 + 2)
        self.there.opposite, self.back.opposite = self.back, self.there
        self.wall_offset = 0.0
        self.actor = actor
        self.invariant = invariant
        self.grain_s = grain_s
        self.turn_s = turn_s
        self._free_at = 0.0
        self.steps = 0

    @property
    def wall(self) -> float:
        """What the clock on the wall says; `now` counts from boot and only goes forward."""
        return self.now + self.wall_offset

    def set_wall(self, time: float) -> None:
        """Somebody sets the clock."""
        self.wall_offset = time - self.now

    def suspend(self, seconds: float) -> None:
        """The left machine sleeps: its timers do not go off, what is sent to it is lost."""
        end = self.now + seconds
        while True:
            times = (self._wakes(self.right), self.there.due(), self.back.due())
            at = min((at for at in times if at is not None), default=end)
            if at >= end:
                break
            self.now = max(self.now, at)
            self.back.pop(self.now)
            if packets := self.there.pop(self.now):
                self.right.receive(packets, self.now)
            self._drain(self.right, self.back)
        self.now = end
        self.pump()

    def pump(self) -> None:
        """Let the applications act and both nodes send what they want to send now."""
        self.actor()
        if self.now >= self._free_at:
            trains = self._drain(self.left, self.there)
            self._free_at = self.now + trains * self.turn_s
        self._drain(self.right, self.back)
        self.invariant()

    def next_event(self) -> float | None:
        """When something will happen."""
        ours = (self._wakes(self.left), self.back.due())
        left = min((max(at, self._free_at) for at in ours if at is not None), default=None)
        times = (left, self._wakes(self.right), self.there.due())
        return min((at for at in times if at is not None), default=None)

    def step(self) -> bool:
        """Jump to the next event and let it happen; False when nothing is left to come."""
        at = self.next_event()
        if at is None:
            return False
        self.steps += 1
        assert self.steps < MAX_STEPS, "the machines keep each other busy"
        self.now = max(self.now, at)
        if packets := self.there.pop(self.now):
            self.right.receive(packets, self.now)
        if self.now >= self._free_at and (packets := self.back.pop(self.now)):
            self.left.receive(packets, self.now)
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

    def _wakes(self, node: Node) -> float | None:
        """When its timer goes off: timers are only `grain_s` exact, and late rather than early."""
        at = node.deadline()
        return at if at is None or not self.grain_s else ceil(at / self.grain_s) * self.grain_s

    def _drain(self, node: Node, wire: Wire) -> int:
        trains = node.transmit(self.now)
        for train in trains:
            assert train, "an empty train"
            assert all(len(packet) == len(train[0]) for packet in train[:-1]), "unequal packets"
            assert len(train[-1]) <= len(train[0]), "the last packet may only be shorter"
            for packet in train:
                wire.push(packet, self.now)
        after = node.deadline()
        assert after is None or after > self.now, "a machine may not ask for now again"
        return len(trains)


class Stream:
    """A byte stream in which every position is known, so that the first wrong one can be named."""

    def __init__(self, name: str, length: int) -> None:
        self.length = length
        self._name = name
        self._blocks: dict[int, bytes] = {}

    def octets(self, start: int, size: int) -> bytes:
        """[start, start + size), cut at the stream's end."""
        end = min(start + size, self.length)
        parts = []
        while start < end:
            number, offset = divmod(start, BLOCK)
            parts.append(self._block(number)[offset : offset + end - start])
            start += len(parts[-1])
        return b"".join(parts)

    def _block(self, number: int) -> bytes:
        block = self._blocks.get(number)
        if block is None:
            if len(self._blocks) >= BLOCKS:
                del self._blocks[next(iter(self._blocks))]
            block = self._blocks[number] = Random(f"{self._name} {number}").randbytes(BLOCK)
        return block

    def check(self, start: int, data: bytes) -> None:
        """Assert that `data` is what belongs at `start`."""
        wanted = self.octets(start, len(data))
        if data != wanted:
            pairs = zip(data, wanted, strict=False)
            wrong = next((i for i, (got, want) in enumerate(pairs) if got != want), len(wanted))
            raise AssertionError(f"first wrong octet at {start + wrong} of {self.length}")

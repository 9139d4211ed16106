"""A stack under test and a peer played by hand, segment by segment, on a clock of its own.

All numbers are relative: 0 is the SYN of whoever counts, 1 the first octet of data.
"""

from typing import Any

from builder_orch.tunnel.ipv6 import header, segment
from builder_orch.tunnel.ipv6.connection import Connection
from builder_orch.tunnel.ipv6.events import Accepted, Event
from builder_orch.tunnel.ipv6.segment import ACK, SYN, Blocks, Segment, Template
from builder_orch.tunnel.ipv6.seq import MASK
from builder_orch.tunnel.ipv6.stack import Stack
from builder_orch.tunnel.ipv6.state import End, State
from tests.tunnel.ipv6.world import LEFT, PORT, RIGHT, stack

PEER_INITIAL = 4_000_000_000


class Script:
    """The stack has address LEFT, the peer RIGHT."""

    def __init__(
        self, under_test: Stack | None = None, *, peer_initial: int = PEER_INITIAL
    ) -> None:
        self.stack = under_test or stack(LEFT)
        self.now = 100.0
        self.initial = 0
        self.peer_initial = peer_initial
        self.ports = (0, PORT)
        self.events: list[Event] = []

    def out(self) -> list[Segment]:
        """What the stack sends now; its checksums are verified, its numbers made relative."""
        segments = []
        for train in self.stack.transmit(self.now):
            for packet in train:
                ip = header.parse(packet)
                assert header.is_intact(ip.source, ip.destination, header.TCP, packet[40:])
                segments.append(self._relative(segment.parse(packet)))
        self.events += self.stack.events()
        after = self.stack.deadline()
        assert after is None or after > self.now, "a machine may not ask for now again"
        return segments

    def send(
        self, flags: int, seq: int, ack: int = 0, payload: bytes = b"", **how: Any
    ) -> list[Segment]:
        """One segment from the peer, as `packet` makes it, and what the stack answers."""
        self.inject(flags, seq, ack, payload, **how)
        return self.out()

    def inject(self, flags: int, seq: int, ack: int = 0, payload: bytes = b"", **how: Any) -> None:
        """One segment from the peer."""
        self.stack.receive(self.packet(flags, seq, ack, payload, **how), self.now)

    def packet(
        self,
        flags: int,
        seq: int,
        ack: int = 0,
        payload: bytes = b"",
        *,
        window: int = 0xFFFF,
        options: bytes = b"",
        blocks: Blocks = (),
    ) -> list[bytes]:
        """One segment of the peer's that has not come yet."""
        ours, theirs = self.ports
        template = Template((RIGHT.packed, theirs), (LEFT.packed, ours))
        if blocks:
            absolute = tuple((left + self.initial, right + self.initial) for left, right in blocks)
            options += segment.sack_option(absolute)
        ack = ack + self.initial if flags & ACK else 0
        return [template.segment(seq + self.peer_initial, ack, flags, window, payload, options)]

    def wait(self, seconds: float) -> list[Segment]:
        """Let time pass, waking the stack when it asks for it; everything it sends."""
        end = self.now + seconds
        segments = self.out()
        while (at := self.stack.deadline()) is not None and at <= end:
            self.now = at
            segments += self.out()
        self.now = end
        return segments + self.out()

    def jump(self) -> list[Segment]:
        """To the next deadline."""
        at = self.stack.deadline()
        assert at is not None, "no timer is set"
        self.now = max(self.now, at)
        return self.out()

    def connect(
        self, *, window: int = 0xFFFF, scale: int | None = 7, sack: bool = True, mss: int = 1360
    ) -> Connection:
        """A connection of ours that the peer has accepted, after a round trip of 20 ms."""
        connection = self.stack.connect((RIGHT.packed, PORT), self.now)
        (syn,) = self.out()
        assert syn.flags == SYN
        self.now += 0.02
        options = segment.syn_options(mss, scale, sack)
        (ack,) = self.send(SYN | ACK, 0, 1, window=window, options=options)
        assert (ack.flags, ack.seq, ack.ack) == (ACK, 1, 1)
        return connection

    def accept(self, *, scale: int | None = 7, sack: bool = True) -> Connection:
        """A connection that the peer opened."""
        self.stack.listen(PORT)
        self.ports = (PORT, 40_000)
        (answer,) = self.send(SYN, 0, options=segment.syn_options(1360, scale, sack))
        assert answer.flags == SYN | ACK
        self.now += 0.02
        assert self.send(ACK, 1, 1) == []
        accepted = self.events[-1]
        assert isinstance(accepted, Accepted)
        return accepted.connection

    def kinds(self) -> list[str]:
        """Names of the events since the last call."""
        self.events += self.stack.events()
        names = [type(event).__name__ for event in self.events]
        self.events.clear()
        return names

    def _relative(self, got: Segment) -> Segment:
        if got.flags & SYN:
            self.initial = got.seq
            if not got.flags & ACK:
                self.ports = (got.source_port, got.destination_port)
        ack = (got.ack - self.peer_initial) & MASK if got.flags & ACK else 0
        blocks = tuple(
            ((left - self.peer_initial) & MASK, (right - self.peer_initial) & MASK)
            for left, right in got.blocks
        )
        return got._replace(seq=(got.seq - self.initial) & MASK, ack=ack, blocks=blocks)


def opened(**how: Any) -> tuple[Script, Connection]:
    """A connection of ours, as `Script.connect` makes it."""
    script = Script()
    connection = script.connect(**how)
    script.kinds()
    return script, connection


def is_in(connection: Connection, state: State) -> bool:
    """Its state; a function, so that no type checker takes the answer for lasting."""
    return connection.state is state


def ended(connection: Connection, end: End | None) -> bool:
    """Its end, None while it lives."""
    return connection.end is end

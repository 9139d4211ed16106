"""Our SYN: what it says, when it goes out, and what its round trip taught (RFC 9293 §3.5)."""

from builder_orch.tunnel.ipv6.receiver import Receiver, scale_for
from builder_orch.tunnel.ipv6.rtt import RoundTrip
from builder_orch.tunnel.ipv6.segment import ACK, SYN, Template, syn_options
from builder_orch.tunnel.ipv6.seq import MASK


class Handshake:
    """Lives until the connection is established. `at` is when the SYN goes out (again)."""

    __slots__ = ("_capacity", "_copies", "_mss", "_sent_at", "_was_lost", "at", "initial", "scales")

    def __init__(self, initial: int, mss: int, capacity: int) -> None:
        self.initial = initial
        self.at: float = 0.0
        self.scales = True
        self._mss = mss
        self._capacity = capacity
        self._copies = 0
        self._sent_at: float | None = None
        self._was_lost = False

    def answers(self, ack: int) -> bool:
        """Whether `ack`, 32 bits, acknowledges a SYN that went out."""
        return self._copies > 0 and ack == (self.initial + 1) & MASK

    def syn(
        self,
        template: Template,
        receiver: Receiver | None,
        rtt: RoundTrip,
        selective: bool,
        now: float,
    ) -> bytes:
        """The SYN once more; with ACK when the peer's SYN has come, so that there is a receiver."""
        window = min(self._capacity, 0xFFFF)
        options = syn_options(
            self._mss, scale_for(self._capacity) if self.scales else None, selective
        )
        self._sent_at = None if self._copies else now
        self._copies += 1
        self._was_lost = rtt.backoff > 0
        self.at = now + rtt.rto
        rtt.backoff += 1
        if receiver is None:
            return template.segment(self.initial, 0, SYN, window, b"", options)
        receiver.edge = max(receiver.edge, receiver.nxt + window)
        return template.segment(self.initial, receiver.nxt, SYN | ACK, window, b"", options)

    def again(self, rtt: RoundTrip, now: float) -> None:
        """Send at once, as if for the first time, but measure no round trip if it was not."""
        self.at = now
        self._was_lost = False
        rtt.backoff = 0

    def finish(self, rtt: RoundTrip, now: float) -> None:
        """Established: a round trip is known, unless the SYN went out twice (Karn)."""
        rtt.backoff = 0
        if self._sent_at is not None:
            rtt.sample(now - self._sent_at, now)
        elif self._was_lost:
            rtt.syn_was_lost()

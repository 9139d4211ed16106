"""The transmission control block of one connection, and what an arriving segment does to it.

Read `Sender` and `Receiver` first. `receive_run` is the fast path; below it everything follows the
order of RFC 9293 §3.10.7. `Connection` adds the calls of the application and of the stack.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from builder_orch.tunnel.ipv6.allowance import Allowance
from builder_orch.tunnel.ipv6.bbr import Bbr
from builder_orch.tunnel.ipv6.congestion import Congestion
from builder_orch.tunnel.ipv6.handshake import Handshake
from builder_orch.tunnel.ipv6.keepalive import Keepalive
from builder_orch.tunnel.ipv6.receiver import CAPACITY, Receiver, scale_for
from builder_orch.tunnel.ipv6.rtt import MIN_RTO
from builder_orch.tunnel.ipv6.segment import (
    ACK,
    DEFAULT_MSS,
    FIN,
    PACKET_OVERHEAD,
    RST,
    SYN,
    Segment,
    Template,
    read_answers,
    read_run,
)
from builder_orch.tunnel.ipv6.sender import CAPACITY as SEND_CAPACITY
from builder_orch.tunnel.ipv6.sender import Sender
from builder_orch.tunnel.ipv6.seq import unwrap
from builder_orch.tunnel.ipv6.stamps import PREFIX, Stamps
from builder_orch.tunnel.ipv6.state import End, Notice, State
from builder_orch.tunnel.machine import Address

MINIMUM_MSS = 64
"""A peer that asks for less would make us send headers only."""
CHALLENGES_PER_SECOND = 10
MAX_STRAY = 8
CONFIRM_ROUNDS = 3
"""Round trips of silence after which the last ACK of a handshake is sent once more. Nothing else
would repeat it but the peer's SYN, after a second, and a peer that speaks first waits for it."""

READING = frozenset({State.ESTABLISHED, State.FIN_WAIT_1, State.FIN_WAIT_2})
_FAST = READING | {State.CLOSE_WAIT, State.LAST_ACK}
"""What has been written by `close` is still sent in all of these."""


class ControlBlock(ABC):
    """State, sender, receiver and timers of one connection. `end` is None while it lives."""

    def __init__(
        self,
        local: Address,
        remote: Address,
        *,
        initial: int,
        mtu: int,
        give_up_at: float,
        capacity: int = CAPACITY,
        congestion: Callable[[int], Congestion] = Bbr,
        timestamps: bool = False,
    ) -> None:
        self.local = local
        self.remote = remote
        self.state = State.SYN_SENT
        self.end: End | None = None
        self.is_passive = False
        self.was_open = False
        self.held = False
        self.queued_at: float | None = None
        self.due_at: float | None = None
        self.template = Template(local, remote)
        self._mss = mtu - PACKET_OVERHEAD
        self._capacity = capacity
        self._control = congestion
        self._handshake: Handshake | None = Handshake(initial, self._mss, capacity)
        self.sender = Sender(
            initial + 1,
            mss=self._mss,
            template=self.template,
            congestion=congestion(self._mss),
            capacity=min(capacity, SEND_CAPACITY),
        )
        self.receiver = Receiver(0, self._mss, capacity)
        self._stamps = Stamps(initial) if timestamps else None
        self._scale = 0
        self._update: tuple[int, int] = (0, 0)
        self._give_up_at: float | None = give_up_at
        self._linger_at: float | None = None
        self._keepalive = Keepalive()
        self._challenges = Allowance(CHALLENGES_PER_SECOND)
        self._confirm_at: float | None = None
        self._stray: list[bytes] = []
        self._wants_room = False
        self._released = False

    @abstractmethod
    def _touch(self) -> None:
        """Something was done to it: it wants to transmit."""

    @abstractmethod
    def _announce(self, notice: Notice) -> None:
        """Tell whoever uses it."""

    # -- what arrives

    def receive_run(self, packets: Sequence[bytes], index: int, stop: int, now: float) -> int:
        """Take `packets[index:stop]`, which are of this connection, as far as they are plain
        segments in order, all in one update.

        Returns the index of the first packet that is not; `receive` takes that.
        """
        sender, receiver = self.sender, self.receiver
        if self.state not in _FAST or not self._is_stamped(packets[index], now):
            return index
        overhead = self.template.overhead
        reads = self.state in READING and receiver.in_order and not self._released
        room = receiver.edge - receiver.nxt if reads else 0
        outstanding = sender.nxt - sender.una
        run = read_run(packets, index, stop, receiver.nxt, sender.una, outstanding, room, overhead)
        if run is None:
            after = self._receive_ahead(packets, index, stop, outstanding, now)
            if after > index:
                return after
            return self._receive_answers(packets, index, stop, outstanding, now)
        self._note_heard(packets[index], now)
        if run.octets:
            was_empty = not receiver.readable
            receiver.extend(run.payloads, run.octets, now)
            if was_empty:
                self._announce(Notice.READABLE)
        ack = sender.una + run.acked
        self._update = receiver.nxt - (len(run.payloads[-1]) if run.payloads else 0), ack
        window = run.window << self._scale
        edge = ack + window
        if edge != sender.edge:
            sender.window_is(edge, window)
        if run.acked or edge == ack:
            sender.acknowledge(ack, (), now)
            self._after_acknowledgement()
        return run.after

    def _receive_ahead(
        self, packets: Sequence[bytes], index: int, stop: int, outstanding: int, now: float
    ) -> int:
        """The same for data behind a hole: all that comes for a round trip after a loss."""
        sender, receiver = self.sender, self.receiver
        if self.state not in READING or self._released or receiver.fin_at is not None:
            return index
        seq = unwrap(int.from_bytes(packets[index][44:48], "big"), receiver.nxt)
        room, overhead = receiver.edge - seq, self.template.overhead
        if seq <= receiver.nxt or room <= 0:
            return index
        run = read_run(packets, index, stop, seq, sender.una, outstanding, room, overhead)
        if run is None or not run.octets:
            return index
        self._keepalive.heard(now)
        self._confirm_at = None
        receiver.keep(seq, b"".join(run.payloads))
        ack, window = sender.una + run.acked, run.window << self._scale
        update = seq + run.octets - len(run.payloads[-1]), ack
        if update >= self._update:
            self._update = update
            sender.window_is(ack + window, window)
        if run.acked:
            sender.acknowledge(ack, (), now)
            self._after_acknowledgement()
        return run.after

    def _receive_answers(
        self, packets: Sequence[bytes], index: int, stop: int, outstanding: int, now: float
    ) -> int:
        """The same for acknowledgements with SACK blocks, of which a reordered path has most."""
        sender, receiver = self.sender, self.receiver
        if not sender.selective or not outstanding:
            return index
        overhead = self.template.overhead
        una = sender.una
        answers = read_answers(packets, index, stop, receiver.nxt, una, outstanding, overhead)
        if answers is None:
            return index
        self._note_heard(packets[index], now)
        ack, window = una + answers.acked, answers.window << self._scale
        self._update = receiver.nxt, ack
        if ack + window != sender.edge:
            sender.window_is(ack + window, window)
        blocks = tuple((una + left, una + right) for left, right in answers.blocks)
        sender.acknowledge(ack, blocks, now)
        self._after_acknowledgement()
        return answers.after

    def _note_heard(self, packet: bytes, now: float) -> None:
        """A plain packet of the peer at the next number has come."""
        self._keepalive.heard(now)
        self._confirm_at = None
        if self._stamps is not None and self.receiver.last_ack == self.receiver.nxt:
            self._stamps.came(int.from_bytes(packet[64:68], "big"), now)

    def receive(self, segment: Segment, now: float) -> None:
        """Take any segment (RFC 9293 §3.10.7)."""
        self._keepalive.heard(now)
        self._confirm_at = None
        if self.state is State.SYN_SENT:
            self._receive_in_syn_sent(segment, now)
        elif self.end is None:
            self._receive_synchronized(segment, now)

    # -- handshake

    def _learn(self, syn: Segment, now: float) -> None:
        """Take what the peer's SYN says."""
        sender = self.sender
        if syn.stamp is None:
            self._stamps = None
            self.template.stamp(b"")
        else:
            self._stamps = self._stamps or Stamps(sender.una)
            self._stamps.came(syn.stamp, now)
            self.template.stamp(self._stamps.option(now))
        mss = max(min(self._mss, syn.mss or DEFAULT_MSS), MINIMUM_MSS)
        mss -= self.template.overhead - PACKET_OVERHEAD
        if mss < sender.mss:
            sender.peer_takes(mss, self.template.overhead)
            sender.congestion = self._control(mss)
        sender.selective = syn.sack_permitted
        self._scale = syn.scale or 0
        if self._handshake is not None:
            self._handshake.scales = syn.scale is not None
        self.receiver = Receiver(syn.seq + 1, self._mss, self._capacity)
        self._update = syn.seq, 0

    def _receive_in_syn_sent(self, segment: Segment, now: float) -> None:
        """§3.10.7.3."""
        flags = segment.flags
        handshake = self._handshake
        assert handshake is not None
        if flags & ACK and not handshake.answers(segment.ack):
            if not flags & RST:
                self._add_stray(self.template.segment(segment.ack, 0, RST, 0))
            return
        if flags & RST:
            if flags & ACK:
                self._finish(End.REFUSED)
            return
        if not flags & SYN:
            return
        self._learn(segment, now)
        if flags & ACK:
            self.receiver.edge = self.receiver.nxt + min(self._capacity, 0xFFFF)
            self.receiver.ack_now = True
            self._establish(handshake, segment.window, now)
            self._confirm_at = now + max(CONFIRM_ROUNDS * (self.sender.rtt.srtt or 0), MIN_RTO / 2)
            self._take_payload(segment, self.receiver.nxt, now)
        else:
            self.state = State.SYN_RECEIVED  # both opened at once (§3.5 figure 7)
            handshake.at = now

    def _establish(self, handshake: Handshake, window: int, now: float) -> None:
        """The handshake is over."""
        handshake.finish(self.sender.rtt, now)
        self._handshake = self._give_up_at = None
        self.receiver.scale = scale_for(self._capacity) if handshake.scales else 0
        self.receiver.rtt = self.sender.rtt.min_rtt
        self.sender.opened(window)
        self.state = State.FIN_WAIT_1 if self.sender.outbox.fin else State.ESTABLISHED
        self.was_open = True
        self._announce(Notice.OPENED)

    # -- synchronized states

    def _receive_synchronized(self, segment: Segment, now: float) -> None:
        """§3.10.7.4 in its order: acceptability (and PAWS), RST, SYN, ACK, payload, FIN."""
        receiver = self.receiver
        seq = unwrap(segment.seq, receiver.nxt)
        flags = segment.flags
        handshake = self._handshake
        if seq > receiver.edge or seq + segment.length < receiver.nxt:
            self._receive_unacceptable(segment, seq, now)
        elif flags & RST:
            self._receive_reset(seq, now)
        elif not self._passes_paws(segment, seq, now):
            pass
        elif flags & SYN:
            if handshake is None:
                self._challenge(now)  # RFC 5961 §4.2
            else:
                self._receive_syn_again(handshake, segment, seq, now)
        elif flags & ACK and (
            handshake is None or self._receive_last_of_handshake(handshake, segment, now)
        ):
            self._receive_acknowledged(segment, seq, now)

    def _passes_paws(self, segment: Segment, seq: int, now: float) -> bool:
        """RFC 7323 §5.3 R1 to R3; what comes without a stamp is dropped (§3.2)."""
        stamps = self._stamps
        if stamps is None:
            return True
        if segment.stamp is None:
            return False
        if stamps.is_old(segment.stamp, now):
            self.receiver.ack_now = True
            return False
        if seq <= self.receiver.last_ack:
            stamps.came(segment.stamp, now)
        return True

    def _receive_unacceptable(self, segment: Segment, seq: int, now: float) -> None:
        """First check failed: answer with what we have, within limits."""
        receiver = self.receiver
        if segment.flags & RST:
            return
        if self._handshake is not None and segment.flags & SYN:
            self._handshake.at = now  # the peer has not seen our answer
        elif self._handshake is not None:
            if self._challenges.take(now):
                number = self._handshake.initial + 1
                window = min(self._capacity, 0xFFFF)
                self._add_stray(self.template.segment(number, receiver.nxt, ACK, window))
        elif segment.payload and receiver.nxt - self._capacity <= seq < receiver.nxt:
            receiver.accept(seq, segment.payload, False, now)  # it has not seen our ACK
        else:
            self._challenge(now)

    def _receive_reset(self, seq: int, now: float) -> None:
        """RFC 5961 §3.2: only the very next number resets."""
        if seq != self.receiver.nxt:
            if seq < self.receiver.edge:
                self._challenge(now)
        elif self.state is State.SYN_RECEIVED:
            self._finish(End.REFUSED)
        else:
            self._finish(End.RESET)

    def _receive_syn_again(
        self, handshake: Handshake, segment: Segment, seq: int, now: float
    ) -> None:
        """The peer's SYN once more, or its SYN and ACK after both opened at once."""
        same = seq == self.receiver.nxt - 1
        if same and segment.flags & ACK and handshake.answers(segment.ack):
            self._establish(handshake, segment.window, now)
            self.receiver.ack_now = True
        else:
            handshake.at = now

    def _receive_last_of_handshake(
        self, handshake: Handshake, segment: Segment, now: float
    ) -> bool:
        """Fifth check in SYN-RECEIVED."""
        if not handshake.answers(segment.ack):
            self._add_stray(self.template.segment(segment.ack, 0, RST, 0))
            return False
        self._establish(handshake, segment.window << self._scale, now)
        return True

    def _receive_acknowledged(self, segment: Segment, seq: int, now: float) -> None:
        """Fifth check, and what follows it."""
        sender = self.sender
        ack = unwrap(segment.ack, sender.una)
        if ack > sender.nxt or ack < sender.una - sender.max_window:
            self._challenge(now)  # RFC 5961 §5.2
            return
        window = segment.window << self._scale
        edge = ack + window
        duplicate = ack == sender.una and not segment.length and edge == sender.edge
        if ack >= sender.una and (seq, ack) >= self._update:
            self._update = seq, ack
            sender.window_is(edge, window)
        blocks = tuple(
            (unwrap(left, sender.una), unwrap(right, sender.una)) for left, right in segment.blocks
        )
        sender.acknowledge(max(ack, sender.una), blocks, now, duplicate=duplicate)
        self._after_acknowledgement()
        if self.end is None:
            self._take_payload(segment, seq, now)

    def _after_acknowledgement(self) -> None:
        """What follows when the peer has taken more, or everything with our FIN."""
        sender = self.sender
        if self._wants_room and sender.is_roomy and not sender.outbox.fin:
            self._wants_room = False
            self._announce(Notice.WRITABLE)
        if not sender.is_done:
            return
        if self.state is State.FIN_WAIT_1:
            self.state = State.FIN_WAIT_2
        elif self.state is State.CLOSING:
            self._wait()
        elif self.state is State.LAST_ACK:
            self._finish(End.FINISHED)

    def _take_payload(self, segment: Segment, seq: int, now: float) -> None:
        """Seventh and eighth: data and FIN, where the state still allows them."""
        fin = bool(segment.flags & FIN)
        receiver = self.receiver
        if not segment.payload and not fin:
            return
        if self.state not in READING:
            receiver.ack_now = True
            return
        if self._released and seq + len(segment.payload) > receiver.nxt:
            self.abort()  # nobody is left to read it (RFC 9293 §3.6.1)
            return
        was_empty = not receiver.readable
        grew = receiver.accept(seq, segment.payload, fin, now)
        if receiver.finished or (grew and was_empty):
            self._announce(Notice.READABLE)
        if receiver.finished:
            self._receive_fin()

    def _receive_fin(self) -> None:
        if self.state is State.ESTABLISHED:
            self.state = State.CLOSE_WAIT
        elif self.state is State.FIN_WAIT_2 or self.sender.is_done:
            self.receiver.ack_now = True
            self._wait()
        else:
            self.state = State.CLOSING

    # -- ends

    def abort(self) -> None:
        """End at once with a reset; what was queued is lost."""
        if self.end:
            return
        if self.state is not State.SYN_SENT:
            self._stray = [self._reset()]
        self._finish(End.ABORTED)

    def _wait(self) -> None:
        """Both directions are over and we closed first: the stack waits in our name (§3.6)."""
        self.state = State.TIME_WAIT
        self._over(End.FINISHED)

    def _finish(self, end: End) -> None:
        self.state = State.CLOSED
        self._over(end)

    def _over(self, end: End) -> None:
        if self.end is not None:
            return
        self.end = end
        self._touch()
        if self.was_open and end in (End.RESET, End.TIMED_OUT):
            self._announce(Notice.READABLE)
        self._announce(Notice.CLOSED)

    def _reset(self) -> bytes:
        return self.template.segment(self.sender.nxt, self.receiver.nxt, RST | ACK, 0)

    def _challenge(self, now: float) -> None:
        """Answer with what we know; a forger learns nothing, and not often (RFC 5961 §7)."""
        if self._challenges.take(now):
            self.receiver.ack_now = True

    def _add_stray(self, packet: bytes) -> None:
        if len(self._stray) < MAX_STRAY:
            self._stray.append(packet)

    def _is_stamped(self, packet: bytes, now: float) -> bool:
        """Whether a packet has the options that plain ones of this connection have."""
        stamps = self._stamps
        if stamps is None:
            return True
        if packet[60:64] != PREFIX or len(packet) < self.template.overhead:
            return False
        return not stamps.is_old(int.from_bytes(packet[64:68], "big"), now)

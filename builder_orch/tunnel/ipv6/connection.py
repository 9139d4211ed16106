"""One TCP connection: the states of RFC 9293 §3.3.2, joining the two halves.

Read `Sender` and `Receiver` first. Below `receive_run`, the fast path, everything follows the order
of §3.10.7. The stack calls in with the time; the application's calls have none and only leave marks
for the next `transmit`.
"""

from math import inf
from typing import Protocol, Self

from builder_orch.tunnel.ipv6.allowance import Allowance
from builder_orch.tunnel.ipv6.congestion import Cubic
from builder_orch.tunnel.ipv6.handshake import Handshake
from builder_orch.tunnel.ipv6.keepalive import Keepalive
from builder_orch.tunnel.ipv6.receiver import CAPACITY, Receiver, scale_for
from builder_orch.tunnel.ipv6.segment import (
    ACK,
    DEFAULT_MSS,
    FIN,
    PACKET_OVERHEAD,
    RST,
    SYN,
    Segment,
    Template,
    read_run,
    sack_option,
)
from builder_orch.tunnel.ipv6.sender import FLOOR_MSS, USER_TIMEOUT, Sender
from builder_orch.tunnel.ipv6.seq import MASK, unwrap
from builder_orch.tunnel.ipv6.state import End, Notice, State
from builder_orch.tunnel.machine import Address, Train

CONNECT_TIMEOUT = 180.0
"""RFC 9293 §3.8.3: R2 of a SYN is at least three minutes, unless the user says less."""
ACCEPT_TIMEOUT = 60.0
FIN_WAIT_2_TIMEOUT = 60.0
"""How long a connection that nobody reads any more waits for the peer's FIN."""
TIME_WAIT = 60.0
"""2 MSL with an MSL of 30 s."""
MINIMUM_MSS = 64
"""A peer that asks for less would make us send headers only."""
CHALLENGES_PER_SECOND = 10
MAX_STRAY = 8

_FAST = frozenset({State.ESTABLISHED, State.FIN_WAIT_2, State.CLOSE_WAIT})
_READING = frozenset({State.ESTABLISHED, State.FIN_WAIT_1, State.FIN_WAIT_2})


class Host(Protocol):
    """What a connection asks of the stack that holds it."""

    def touch(self, connection: "Connection") -> None:
        """Something was done to it: ask it to transmit."""
        ...

    def announce(self, connection: "Connection", notice: Notice) -> None:
        """Tell whoever uses it."""
        ...


class Connection:
    """A stream each way.

    Applications use `write`, `read`, `close`, `abort`, `release`, `keep_alive` and the fields up to
    `end`, which is None while it lives; everything else belongs to the stack.
    """

    def __init__(
        self,
        host: Host,
        local: Address,
        remote: Address,
        *,
        initial: int,
        mtu: int,
        give_up_at: float,
        capacity: int = CAPACITY,
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
        self._host = host
        self._template = Template(local, remote)
        self._mss = mtu - PACKET_OVERHEAD
        self._capacity = capacity
        self._handshake: Handshake | None = Handshake(initial, self._mss, capacity)
        self.sender = Sender(
            initial + 1,
            mss=self._mss,
            template=self._template,
            congestion=Cubic(self._mss),
            capacity=capacity,
        )
        self.receiver = Receiver(0, self._mss, capacity)
        self._scale = 0
        self._update: tuple[int, int] = (0, 0)
        self._give_up_at: float | None = give_up_at
        self._linger_at: float | None = None
        self._keepalive = Keepalive()
        self._challenges = Allowance(CHALLENGES_PER_SECOND)
        self._stray: list[bytes] = []
        self._wants_room = False
        self._released = False

    @classmethod
    def accept(
        cls,
        host: Host,
        local: Address,
        remote: Address,
        syn: Segment,
        *,
        initial: int,
        mtu: int,
        now: float,
        capacity: int = CAPACITY,
    ) -> Self:
        """The passive side of a handshake that `syn` began."""
        made = cls(
            host,
            local,
            remote,
            initial=initial,
            mtu=mtu,
            give_up_at=now + ACCEPT_TIMEOUT,
            capacity=capacity,
        )
        made.is_passive = True
        made.state = State.SYN_RECEIVED
        made._learn(syn)
        return made

    def __repr__(self) -> str:
        return f"<Connection {self.local[1]} to {self.remote[1]} {self.state.value}>"

    # -- the application's side

    @property
    def readable(self) -> int:
        """Octets that wait to be read."""
        return self.receiver.readable

    @property
    def at_eof(self) -> bool:
        """The peer's FIN has come and everything before it was read."""
        return self.receiver.finished and not self.receiver.readable

    def room(self) -> int:
        """How many octets `write` would take now."""
        return 0 if self.end else self.sender.room()

    def write(self, data: bytes) -> int:
        """Queue what fits; how many octets were taken. 0 after `close` and after the end."""
        taken = 0 if self.end else self.sender.write(data)
        if taken < len(data):
            self._wants_room = True
        if taken:
            self._host.touch(self)
        return taken

    def read(self, limit: int) -> bytes:
        """Up to `limit` octets in order, b"" when nothing is there; opens the window again."""
        data = self.receiver.read(limit)
        if data and self.state in _READING and self.receiver.update_due():
            self.receiver.ack_now = True
            self._host.touch(self)
        return data

    def close(self) -> None:
        """FIN after everything that was written; the other direction goes on."""
        if self.end or self.sender.outbox.fin:
            return
        self.sender.outbox.fin = True
        if self.state is State.ESTABLISHED:
            self.state = State.FIN_WAIT_1
        elif self.state is State.CLOSE_WAIT:
            self.state = State.LAST_ACK
        self._host.touch(self)

    def abort(self) -> None:
        """End at once with a reset; what was queued is lost."""
        if self.end:
            return
        if self.state is not State.SYN_SENT:
            self._stray = [self._reset()]
        self._finish(End.ABORTED)

    def release(self) -> None:
        """Nobody will read any more: what was written is still delivered, what arrives is reset.

        With something left unread it is reset at once (RFC 2525 §2.17), and so is an attempt that
        nothing was written to.
        """
        if self.receiver.readable or not (self.was_open or self.sender.holds_data):
            self.abort()
            return
        self._released = True
        self.close()
        self._host.touch(self)

    def keep_alive(self, interval_s: float | None) -> None:
        """Ask a quiet peer each `interval_s`; without answers it ends as TIMED_OUT."""
        self._keepalive.interval_s = interval_s
        self._host.touch(self)

    # -- the stack's side

    def receive_run(self, packets: list[bytes], index: int, now: float) -> int:
        """Take `packets[index:]` as far as they are plain segments in order, all in one update.

        Returns the index of the first packet that is not; `receive` takes that.
        """
        sender, receiver = self.sender, self.receiver
        if self.state not in _FAST:
            return index
        reads = self.state is not State.CLOSE_WAIT and receiver.in_order and not self._released
        room = receiver.edge - receiver.nxt if reads else 0
        run = read_run(packets, index, receiver.nxt, sender.una, sender.nxt - sender.una, room)
        if run is None:
            return index
        self._keepalive.heard(now)
        if run.octets:
            was_empty = not receiver.readable
            receiver.extend(run.payloads, run.octets, now)
            if was_empty:
                self._host.announce(self, Notice.READABLE)
        ack = sender.una + run.acked
        self._update = receiver.nxt - (len(run.payloads[-1]) if run.payloads else 0), ack
        edge = ack + (run.window << self._scale)
        if edge != sender.edge:
            sender.window_is(edge)
        if run.acked or edge == ack:
            sender.acknowledge(ack, (), now)
            self._after_acknowledgement()
        return run.after

    def receive(self, segment: Segment, now: float) -> None:
        """Take any segment (RFC 9293 §3.10.7)."""
        self._keepalive.heard(now)
        if self.state is State.SYN_SENT:
            self._receive_in_syn_sent(segment, now)
        elif self.end is None:
            self._receive_synchronized(segment, now)

    def deadline(self) -> float | None:
        """When to ask `transmit` again."""
        if self.end:
            return None
        sender = self.sender
        since = sender.waiting_since
        earliest = inf if since is None else since + USER_TIMEOUT
        timers: tuple[float | None, ...] = (self._give_up_at, self._linger_at)
        if not self.held:
            if self._handshake is not None:
                timers += (self._handshake.at,)
            else:
                timers += (sender.deadline(), self.receiver.ack_at, self._keepalive_at())
        for at in timers:
            if at is not None and at < earliest:
                earliest = at
        return None if earliest == inf else earliest

    def transmit(self, now: float, path: bool) -> list[Train]:
        """Whatever may go now; nothing while `path` is closed, which holds the connection."""
        self._expire(now)
        if not path:
            self.held = self._wants_to_send(now)
            return []
        if self.held:
            self.held = False
            self._resume(now)
        trains = [[packet] for packet in self._stray]
        self._stray = []
        if self.end and self.state is not State.TIME_WAIT:
            return trains
        if self._handshake is not None:
            if self._handshake.at <= now:
                trains.append([self._syn(self._handshake, now)])
            return trains
        receiver = self.receiver
        window = receiver.window()
        sent = self.sender.transmit(now, receiver.nxt, window)
        if self._keepalive_due(now):
            self._keepalive.asked(now)
            self.sender.outbox.emit_probe(sent, self.sender.una, receiver.nxt, window)
        if (receiver.has_blocks or not sent) and receiver.ack_due(now):
            options = sack_option(receiver.blocks()) if self.sender.selective else b""
            sent.append(
                [self._template.segment(self.sender.nxt, receiver.nxt, ACK, window, b"", options)]
            )
        if sent:
            receiver.announced(window)
        return trains + sent

    def kick(self, now: float) -> None:
        """A new session began below: try again at once, and forget about back-off."""
        if self._handshake is not None:
            self._handshake.again(self.sender.rtt, now)
        else:
            self.sender.nudge(now)

    def unreachable(self, end: End, position: int) -> None:
        """An ICMPv6 error about our SYN ends the attempt; later ones are soft (RFC 5927 §5.2)."""
        if self.state is State.SYN_SENT and position == (self.sender.una - 1) & MASK:
            self._finish(end)

    def too_big(self, position: int, mtu: int) -> None:
        """A Packet Too Big about a segment in flight lowers the segment size, not below 1280."""
        if self._handshake is None and not self.end:
            mss = max(mtu - PACKET_OVERHEAD, FLOOR_MSS)
            self.sender.too_big(unwrap(position, self.sender.una), mss)

    # -- handshake

    def _learn(self, syn: Segment) -> None:
        """Take what the peer's SYN says."""
        sender = self.sender
        mss = max(min(self._mss, syn.mss or DEFAULT_MSS), MINIMUM_MSS)
        if mss < sender.mss:
            sender.peer_takes(mss)
            sender.congestion = Cubic(mss)
        sender.selective = syn.sack_permitted
        self._scale = syn.scale or 0
        if self._handshake is not None:
            self._handshake.scales = syn.scale is not None
        self.receiver = Receiver(syn.seq + 1, self._mss, self._capacity)
        self._update = syn.seq, 0

    def _syn(self, handshake: Handshake, now: float) -> bytes:
        answers = self.state is State.SYN_RECEIVED
        receiver = self.receiver if answers else None
        selective = self.sender.selective or not answers
        return handshake.syn(self._template, receiver, self.sender.rtt, selective, now)

    def _receive_in_syn_sent(self, segment: Segment, now: float) -> None:
        """§3.10.7.3."""
        flags = segment.flags
        handshake = self._handshake
        assert handshake is not None
        if flags & ACK and not handshake.answers(segment.ack):
            if not flags & RST:
                self._add_stray(self._template.segment(segment.ack, 0, RST, 0))
            return
        if flags & RST:
            if flags & ACK:
                self._finish(End.REFUSED)
            return
        if not flags & SYN:
            return
        self._learn(segment)
        if flags & ACK:
            self.receiver.edge = self.receiver.nxt + min(self._capacity, 0xFFFF)
            self.receiver.ack_now = True
            self._establish(handshake, segment.window, now)
            self._take_payload(segment, self.receiver.nxt, now)
        else:
            self.state = State.SYN_RECEIVED  # both opened at once (§3.5 figure 7)
            handshake.at = now

    def _establish(self, handshake: Handshake, window: int, now: float) -> None:
        """The handshake is over."""
        handshake.finish(self.sender.rtt, now)
        self._handshake = self._give_up_at = None
        self.receiver.scale = scale_for(self._capacity) if handshake.scales else 0
        self.sender.opened(window)
        self.state = State.FIN_WAIT_1 if self.sender.outbox.fin else State.ESTABLISHED
        self.was_open = True
        self._host.announce(self, Notice.OPENED)

    # -- synchronized states

    def _receive_synchronized(self, segment: Segment, now: float) -> None:
        """§3.10.7.4 in its order: acceptability, RST, SYN, ACK, payload, FIN."""
        receiver = self.receiver
        seq = unwrap(segment.seq, receiver.nxt)
        flags = segment.flags
        handshake = self._handshake
        if seq > receiver.edge or seq + segment.length < receiver.nxt:
            self._receive_unacceptable(segment, seq, now)
        elif flags & RST:
            self._receive_reset(seq, now)
        elif flags & SYN:
            if handshake is None:
                self._challenge(now)  # RFC 5961 §4.2
            else:
                self._receive_syn_again(handshake, segment, seq, now)
        elif flags & ACK and (
            handshake is None or self._receive_last_of_handshake(handshake, segment, now)
        ):
            self._receive_acknowledged(segment, seq, now)

    def _receive_unacceptable(self, segment: Segment, seq: int, now: float) -> None:
        """First check failed: answer with what we have, within limits."""
        receiver = self.receiver
        if segment.flags & RST:
            return
        if self._handshake is not None and segment.flags & SYN:
            self._handshake.at = now  # the peer has not seen our answer
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
            self._add_stray(self._template.segment(segment.ack, 0, RST, 0))
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
        edge = ack + (segment.window << self._scale)
        duplicate = ack == sender.una and not segment.length and edge == sender.edge
        if ack >= sender.una and (seq, ack) >= self._update:
            self._update = seq, ack
            sender.window_is(edge)
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
            self._host.announce(self, Notice.WRITABLE)
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
        if self.state not in _READING:
            receiver.ack_now = True
            return
        if self._released and seq + len(segment.payload) > receiver.nxt:
            self.abort()  # nobody is left to read it (RFC 9293 §3.6.1)
            return
        was_empty = not receiver.readable
        grew = receiver.accept(seq, segment.payload, fin, now)
        if receiver.finished or (grew and was_empty):
            self._host.announce(self, Notice.READABLE)
        if receiver.finished:
            self._receive_fin()

    def _receive_fin(self) -> None:
        if self.state is State.ESTABLISHED:
            self.state = State.CLOSE_WAIT
        elif self.state is State.FIN_WAIT_2 or self.sender.is_done:
            self._wait()
        else:
            self.state = State.CLOSING

    # -- timers and ends

    def _expire(self, now: float) -> None:
        if self.end:
            return
        if self._released and self.state is State.FIN_WAIT_2 and self._linger_at is None:
            self._linger_at = now + FIN_WAIT_2_TIMEOUT
        since = self.sender.waiting_since
        if self._give_up_at is not None and self._give_up_at <= now:
            self._finish(End.TIMED_OUT)
        elif self._linger_at is not None and self._linger_at <= now:
            self._finish(End.FINISHED)
        elif (since is not None and since + USER_TIMEOUT <= now) or self._is_gone(now):
            self._stray = [self._reset()]
            self._finish(End.TIMED_OUT)

    def _keepalive_at(self) -> float | None:
        """When to ask, or to give up; while data is outstanding the sender asks by itself."""
        if self._handshake is not None:
            return None
        if self.sender.una < self.sender.nxt:
            return self._keepalive.limit()
        return self._keepalive.deadline()

    def _is_gone(self, now: float) -> bool:
        if self.held or not self._keepalive_due(now):
            return False
        return self.sender.una < self.sender.nxt or self._keepalive.is_hopeless

    def _keepalive_due(self, now: float) -> bool:
        at = self._keepalive_at()
        return at is not None and at <= now

    def _wants_to_send(self, now: float) -> bool:
        if self._handshake is not None or self.end:
            # A reset that cannot go now is not worth a session of its own.
            self._stray = []
            return self.end is None or self.state is State.TIME_WAIT
        sender, receiver = self.sender, self.receiver
        acknowledges = receiver.ack_now or receiver.ack_at is not None
        asks = bool(self._stray) or self._keepalive_due(now)
        return sender.una < sender.outbox.last or acknowledges or asks

    def _resume(self, now: float) -> None:
        """The path is open again after a hold."""
        self._keepalive.heard(now)
        if self._handshake is not None:
            self._handshake.again(self.sender.rtt, now)
        else:
            self.sender.restart(now)

    def _wait(self) -> None:
        """Both directions are over and we closed first: the stack waits in our name (§3.6)."""
        self.state = State.TIME_WAIT
        self.receiver.ack_now = True
        self._over(End.FINISHED)

    def _finish(self, end: End) -> None:
        self.state = State.CLOSED
        self._over(end)

    def _over(self, end: End) -> None:
        if self.end is not None:
            return
        self.end = end
        self._host.touch(self)
        if self.was_open and end in (End.RESET, End.TIMED_OUT):
            self._host.announce(self, Notice.READABLE)
        self._host.announce(self, Notice.CLOSED)

    def _reset(self) -> bytes:
        return self._template.segment(self.sender.nxt, self.receiver.nxt, RST | ACK, 0)

    def _challenge(self, now: float) -> None:
        """Answer with what we know; a forger learns nothing, and not often (RFC 5961 §7)."""
        if self._challenges.take(now):
            self.receiver.ack_now = True

    def _add_stray(self, packet: bytes) -> None:
        if len(self._stray) < MAX_STRAY:
            self._stray.append(packet)

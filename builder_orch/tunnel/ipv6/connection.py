"""One TCP connection: the states of RFC 9293 §3.3.2, joining the two halves.

The stack calls in with the time; the application's calls have none and only leave marks for the
next `transmit`. What arrives is the business of `ControlBlock`.
"""

from collections.abc import Callable
from math import inf
from typing import Protocol, Self

from builder_orch.tunnel.ipv6.bbr import Bbr
from builder_orch.tunnel.ipv6.congestion import Congestion
from builder_orch.tunnel.ipv6.handshake import Handshake
from builder_orch.tunnel.ipv6.pacer import GRAIN
from builder_orch.tunnel.ipv6.receiver import CAPACITY, MAX_BLOCKS
from builder_orch.tunnel.ipv6.repair import FLOOR_MTU
from builder_orch.tunnel.ipv6.segment import ACK, Segment, sack_option
from builder_orch.tunnel.ipv6.sender import USER_TIMEOUT
from builder_orch.tunnel.ipv6.seq import MASK, unwrap
from builder_orch.tunnel.ipv6.state import End, Notice, State
from builder_orch.tunnel.ipv6.tcb import CHALLENGES_PER_SECOND, READING, ControlBlock
from builder_orch.tunnel.machine import Address, Train

__all__ = ["CHALLENGES_PER_SECOND", "Connection", "Host"]

CONNECT_TIMEOUT = 180.0
"""RFC 9293 §3.8.3: R2 of a SYN is at least three minutes, unless the user says less."""
ACCEPT_TIMEOUT = 60.0
FIN_WAIT_2_TIMEOUT = 60.0
"""How long a connection that nobody reads any more waits for the peer's FIN."""
LEAST_TRIES = 3
"""R1 of RFC 9293 §3.8.3: nobody is given up before he was asked so often."""
TIME_WAIT = 60.0
"""2 MSL with an MSL of 30 s."""


class Host(Protocol):
    """What a connection asks of the stack that holds it."""

    def touch(self, connection: "Connection") -> None:
        """Something was done to it: ask it to transmit."""
        ...

    def announce(self, connection: "Connection", notice: Notice) -> None:
        """Tell whoever uses it."""
        ...


class Connection(ControlBlock):
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
        congestion: Callable[[int], Congestion] = Bbr,
        timestamps: bool = False,
    ) -> None:
        super().__init__(
            local,
            remote,
            initial=initial,
            mtu=mtu,
            give_up_at=give_up_at,
            capacity=capacity,
            congestion=congestion,
            timestamps=timestamps,
        )
        self._host = host

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
        congestion: Callable[[int], Congestion] = Bbr,
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
            congestion=congestion,
        )
        made.is_passive = True
        made.state = State.SYN_RECEIVED
        made._learn(syn, now)
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
            self._touch()
        return taken

    def read(self, limit: int) -> bytes:
        """Up to `limit` octets in order, b"" when nothing is there; opens the window again."""
        data = self.receiver.read(limit)
        if data and self.state in READING and self.receiver.update_due():
            self.receiver.ack_now = True
            self._touch()
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
        self._touch()

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
        self._touch()

    def keep_alive(self, interval_s: float | None) -> None:
        """Ask a quiet peer each `interval_s`; without answers it ends as TIMED_OUT."""
        self._keepalive.interval_s = interval_s
        self._touch()

    # -- the stack's side

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
                timers += (self._confirmation_at(),)
        for at in timers:
            if at is not None and at < earliest:
                earliest = at
        return None if earliest == inf else earliest

    def only_waits_for_rate(self, now: float) -> bool:
        """Whether `transmit` would do nothing, and the deadline is what it was.

        With many streams half of all acknowledgements come at such a time.
        """
        if self._handshake is not None or self.end or self.held or self._stray:
            return False
        return not self.receiver.ack_due(now) and self.sender.only_waits_for_rate(now)

    def transmit(self, now: float, path: bool, grain: float = GRAIN) -> list[Train]:
        """Whatever may go now; nothing while `path` is closed, which holds the connection.

        `grain` is of `Pacer`.
        """
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
                if self._stamps is not None:
                    self.template.stamp(self._stamps.option(now))
                trains.append([self._syn(self._handshake, now)])
            return trains
        receiver = self.receiver
        if self._stamps is not None:
            self.template.stamp(self._stamps.option(now))
        window = receiver.window()
        sent = self.sender.transmit(now, receiver.nxt, window, grain)
        if self._keepalive_due(now):
            self._keepalive.asked(now)
            self.sender.outbox.emit_probe(sent, self.sender.una, receiver.nxt, window)
        limit = MAX_BLOCKS if self._stamps is None else MAX_BLOCKS - 1
        if (receiver.has_blocks or not sent) and receiver.ack_due(now):
            options = sack_option(receiver.blocks(limit)) if self.sender.selective else b""
            sent.append(
                [self.template.segment(self.sender.nxt, receiver.nxt, ACK, window, b"", options)]
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
            mss = max(mtu, FLOOR_MTU) - self.template.overhead
            self.sender.too_big(unwrap(position, self.sender.una), mss)

    def _syn(self, handshake: Handshake, now: float) -> bytes:
        answers = self.state is State.SYN_RECEIVED
        receiver = self.receiver if answers else None
        selective = self.sender.selective or not answers
        return handshake.syn(self.template, receiver, self.sender.rtt, selective, now)

    # -- timers and ends

    def _expire(self, now: float) -> None:
        if self.end:
            return
        confirmation_at = self._confirmation_at()
        if confirmation_at is not None and confirmation_at <= now:
            self._confirm_at = None
            self.receiver.ack_now = True
        if self._released and self.state is State.FIN_WAIT_2 and self._linger_at is None:
            self._linger_at = now + FIN_WAIT_2_TIMEOUT
        since = self.sender.waiting_since
        if self._give_up_at is not None and self._give_up_at <= now:
            self._finish(End.TIMED_OUT)
        elif self._linger_at is not None and self._linger_at <= now:
            self._finish(End.FINISHED)
        elif (since is not None and since + USER_TIMEOUT <= now) or self._is_gone(now):
            if not self.held and since is not None and self.sender.tries < LEAST_TRIES:
                # The machine slept: time has passed, but nobody was asked in it.
                self.sender.waiting_since = now
                self._keepalive.heard(now)
                return
            self._stray = [self._reset()]
            self._finish(End.TIMED_OUT)

    def _confirmation_at(self) -> float | None:
        """When to repeat the last word of the handshake; data has it in itself."""
        return self._confirm_at if self.sender.una == self.sender.nxt else None

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

    def _touch(self) -> None:
        self._host.touch(self)

    def _announce(self, notice: Notice) -> None:
        self._host.announce(self, notice)

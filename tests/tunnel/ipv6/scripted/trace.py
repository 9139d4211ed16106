"""Plays a trace against a stack: what the peer sends, what we must send, what time it is.

A trace is text, a step a line. Numbers are relative: 0 is the SYN of whoever counts, 1 the first
octet of data; windows are in octets whatever the scale. `a:b` stands for the octets from a up to b.

    < SA 0 ack 1 win 9000 mss 1360      the peer sends this
    > A 1:101 ack 1                     this is what we send next
    >> A 1:5001 ack 1                   these octets, in order, in segments of any size
    ~> A 1:101 ack 1                    this, whatever else goes out before it
    silence                             we send nothing
    drain                               whatever we sent is of no interest
    take 5001 win 9000                  the peer lost what it has not acknowledged so far, and takes
                                        and acknowledges what comes from now on, up to here
    too-big 1400 about 1                ICMPv6 errors about our segment that began at 1
    write 100; close                    what the application does, at one stroke
    state FIN-WAIT-1                    what it sees: state, end, events, readable, eof, idle

Before a step there may be a time, always counted from the step before: `+1` lets a second pass
(in which nothing may be sent unless the step is `drain`); `+0.2..1` before `>` says that
it must happen then, `..1` that it must happen by then, no time that it must happen at once.
Once more is said by `open` and `accept`, which stand for handshakes over a path of 20 ms.
"""

from collections.abc import Callable
from ipaddress import IPv6Address
from random import Random
from re import compile as pattern
from typing import NamedTuple, Self

from builder_orch.tunnel.ipv6.connection import Connection
from builder_orch.tunnel.ipv6.events import Accepted
from builder_orch.tunnel.ipv6.stack import Stack
from builder_orch.tunnel.ipv6.state import End, State
from tests.tunnel.ipv6.scripted import wire

US = IPv6Address("fd00::1")
PEER = IPv6Address("fd00::2")
ROUTER = IPv6Address("fd00::3")
PORT = 80
PEER_PORT = 40_000
PEER_INITIAL = 4_294_960_000
"""Near the top, so that a few thousand octets of the peer's go over it."""
MTU = 1420
MSS = 1360
ROUND_TRIP = 0.02
SLACK = 0.01
"""How much later than at once data may go, when pacing wants it so."""
CAPACITY = 1 << 18
LENGTH = 1 << 20

_TIME = pattern(r"(?:\+(?P<after>\d+(?:\.\d+)?))?(?:\.\.(?P<until>\d+(?:\.\d+)?))?")
_FIELDS = {"ack", "win", "mss", "scale", "sackok", "sack", "raw", "urgent", "reserved"}
_GRAIN = 1e-6
_MSS, _SCALE, _SACK_OK, _SACK = 2, 3, 4, 5
_EXPECTATIONS = (">", ">>", "~>")
_ERRORS = {"unreachable": 1, "too-big": 2, "exceeded": 3, "problem": 4}

OURS = Random("ours").randbytes(LENGTH)
THEIRS = Random("theirs").randbytes(LENGTH)


class Wanted(NamedTuple):
    """A segment as a trace writes it; None for what it does not say."""

    flags: str
    seq: int
    end: int
    fields: dict[str, list[str]]

    @classmethod
    def parse(cls, words: list[str]) -> Self:
        """Read `FLAGS SEQ[:END] [name value ..]..`."""
        flags, position = words[0], words[1]
        first, _, last = position.partition(":")
        fields: dict[str, list[str]] = {}
        values: list[str] = []
        for word in words[2:]:
            if word in _FIELDS:
                values = fields.setdefault(word, [])
            else:
                values.append(word)
        return cls(flags, int(first), int(last or first), fields)

    def number(self, name: str, default: int) -> int:
        """The value of a field."""
        return int(self.fields[name][0]) if name in self.fields else default

    def options(self, base: int) -> bytes:
        """The options it names; SACK blocks count from `base`."""
        fields = self.fields
        octets = b""
        if "mss" in fields:
            octets += bytes((_MSS, 4)) + self.number("mss", 0).to_bytes(2, "big")
        if "sackok" in fields:
            octets += bytes((_SACK_OK, 2))
        if "scale" in fields:
            octets += bytes((_SCALE, 3, self.number("scale", 0)))
        if "sack" in fields:
            edges = [int(edge) for block in fields["sack"] for edge in block.split(":")]
            packed = b"".join(((base + edge) & 0xFFFFFFFF).to_bytes(4, "big") for edge in edges)
            octets += bytes((_SACK, 2 + len(packed))) + packed
        if "raw" in fields:
            octets += bytes.fromhex(fields["raw"][0])
        return octets


class Sent(NamedTuple):
    """A segment that we sent, its numbers relative and its window in octets."""

    at: float
    flags: str
    seq: int
    end: int
    ack: int
    window: int
    options: dict[int, bytes]
    blocks: list[str]
    ahead: int
    """Octets from the peer's last acknowledgement to `end`."""

    def __str__(self) -> str:
        said = f"{self.flags} {self.seq}:{self.end} ack {self.ack} win {self.window}"
        return f"{said} sack {' '.join(self.blocks)}" if self.blocks else said


class Trace:
    """A stack at US and a peer at PEER; `sent` is everything we ever sent."""

    def __init__(self, *, capacity: int = CAPACITY, seed: int = 0) -> None:
        entropy = Random(f"scripted {seed}").randbytes
        self.stack = Stack([US], mtu=MTU, entropy=entropy, capacity=capacity)
        self.now = 1000.0
        self.ports = (0, PORT)
        self.initial = 0
        self.initials: list[int] = []
        self.sent: list[Sent] = []
        self.written = self.taken = 0
        self._connection: Connection | None = None
        self._names: list[str] = []
        self._pending: list[Sent] = []
        self._scales = [0, 0]  # ours, the peer's
        self._scaled = False
        self._acked = 0
        self._step = ""

    @property
    def connection(self) -> Connection:
        """The one that was begun or accepted last."""
        assert self._connection is not None
        return self._connection

    def play(self, text: str) -> Self:
        """Take every step; AssertionError names the one that failed."""
        for line in text.splitlines():
            step = line.split("#")[0].rstrip()
            if step.strip():
                self._step = step.strip()
                self._take(step)
        self._transmit()
        self._step = "the end"
        self._nothing_pending()
        return self

    # -- steps

    def _take(self, step: str) -> None:
        words = step.split()
        match = _TIME.fullmatch(words[0])
        after, until = 0.0, None
        if match:
            words.pop(0)
            after = float(match["after"] or 0)
            until = float(match["until"]) if match["until"] else None
        if words[0] in _EXPECTATIONS:
            self._expect(words, after, until)
            return
        self._advance(self.now + after)
        if words[0] == "drain":
            self._pending.clear()
            return
        if words[0] == "take":
            self._oblige(int(words[1]), words[2:])
            return
        self._nothing_pending()
        for action in " ".join(words).split(";"):
            self._do(action.split())
        self._transmit()

    def _do(self, words: list[str]) -> None:
        verb, *rest = words
        if verb == "<":
            self.inject(Wanted.parse(rest))
        elif verb in _ERRORS:
            self._fail(verb, rest)
        elif verb in ("open", "accept"):
            self._shake_hands(verb, rest)
        else:
            action: Callable[[list[str]], None] = getattr(self, f"do_{verb}")
            action(rest)

    # What the application does and sees: a method for each verb.

    def do_connect(self, words: list[str]) -> None:
        """`connect [timeout]`."""
        timeout = float(words[0]) if words else 180.0
        self._connection = self.stack.connect((PEER.packed, PORT), self.now, timeout_s=timeout)

    def do_listen(self, words: list[str]) -> None:
        """`listen`: connections from the peer to our port 80."""
        self.stack.listen(PORT)
        self.ports = (PORT, PEER_PORT)

    def do_write(self, words: list[str]) -> None:
        """`write octets [taken]`."""
        size, taken = int(words[0]), int(words[-1])
        assert self.connection.write(OURS[self.written : self.written + size]) == taken, self._step
        self.written += taken

    def do_read(self, words: list[str]) -> None:
        """`read octets`: so many are there, and they are the right ones."""
        size = int(words[0])
        got = self.connection.read(size)
        assert len(got) == size, f"{self._step}: {len(got)} were there"
        assert got == THEIRS[self.taken : self.taken + size], f"{self._step}: wrong octets"
        self.taken += size

    def do_close(self, words: list[str]) -> None:
        """`close`."""
        self.connection.close()

    def do_abort(self, words: list[str]) -> None:
        """`abort`."""
        self.connection.abort()

    def do_release(self, words: list[str]) -> None:
        """`release`."""
        self.connection.release()

    def do_keepalive(self, words: list[str]) -> None:
        """`keepalive seconds`."""
        self.connection.keep_alive(float(words[0]))

    def do_state(self, words: list[str]) -> None:
        """`state NAME`."""
        assert self.connection.state is State(words[0]), f"{self._step}: {self.connection.state}"

    def do_end(self, words: list[str]) -> None:
        """`end how`, `end none` while it lives."""
        end = None if words == ["none"] else End(" ".join(words))
        assert self.connection.end is end, f"{self._step}: {self.connection.end}"

    def do_events(self, words: list[str]) -> None:
        """`events name ..`: exactly these since the last time."""
        self._collect()
        names, self._names = self._names, []
        assert names == words, f"{self._step}: {names}"

    def do_readable(self, words: list[str]) -> None:
        """`readable octets`."""
        assert self.connection.readable == int(words[0]), self._step

    def do_eof(self, words: list[str]) -> None:
        """`eof`: everything has been read and the peer's FIN has come."""
        assert self.connection.at_eof, self._step

    def do_idle(self, words: list[str]) -> None:
        """`idle`: no timer is set."""
        assert self.stack.deadline() is None, self._step

    def do_silence(self, words: list[str]) -> None:
        """`silence`: that nothing is pending was checked on the way."""
        self._transmit()
        self._nothing_pending()

    # -- packets

    def inject(self, wanted: Wanted) -> None:
        """One segment from the peer."""
        self.stack.receive([self.packet(wanted)], self.now)

    def packet(self, wanted: Wanted) -> bytes:
        """The packet that a segment of the peer's travels in."""
        self._acked = wanted.number("ack", self._acked)
        ours, theirs = self.ports
        window = wanted.number("win", 0xFFFF)
        if "S" not in wanted.flags:
            window >>= self._scales[1]
        else:
            self._scaled = "scale" in wanted.fields
            self._scales[1] = min(wanted.number("scale", 0), 14)
        payload = THEIRS[wanted.seq - 1 : wanted.end - 1] if wanted.end > wanted.seq else b""
        assert len(payload) == wanted.end - wanted.seq, "the peer has nothing more to say"
        return wire.tcp(
            (PEER.packed, theirs),
            (US.packed, ours),
            wanted.flags,
            PEER_INITIAL + wanted.seq,
            self.initial + wanted.number("ack", 0) if "A" in wanted.flags else 0,
            min(window, 0xFFFF),
            options=wanted.options(self.initial),
            payload=payload,
            urgent=wanted.number("urgent", 0),
            reserved=wanted.number("reserved", 0),
        )

    def deliver(self, packets: list[bytes]) -> None:
        """A whole train, whatever it carries."""
        self.stack.receive(packets, self.now)
        self._transmit()

    def about(self, seq: int) -> bytes:
        """The beginning of a packet of ours, as an ICMPv6 error quotes it."""
        ours, theirs = (US.packed, self.ports[0]), (PEER.packed, self.ports[1])
        return wire.tcp(ours, theirs, "A", self.initial + seq, 0, 0, payload=bytes(100))

    def _fail(self, verb: str, words: list[str]) -> None:
        """`too-big mtu about seq`, `unreachable code about seq`."""
        value, cause = int(words[0]), self.about(int(words[2]))
        kind = _ERRORS[verb]
        code, word = (0, value) if kind == 2 else (value, 0)
        packet = wire.icmp(ROUTER.packed, US.packed, kind, code, word, cause)
        self.stack.receive([packet], self.now)

    def _transmit(self) -> None:
        for train in self.stack.transmit(self.now):
            for packet in train:
                sent = self._read(packet)
                self.sent.append(sent)
                self._pending.append(sent)
        self._collect()
        after = self.stack.deadline()
        assert after is None or after > self.now, "a machine may not ask for now again"

    def _read(self, packet: bytes) -> Sent:
        ip, got = wire.read_ipv6(packet), wire.read_tcp(packet)
        assert (ip.source, ip.destination) == (US.packed, PEER.packed)
        assert len(packet) <= MTU
        if "S" in got.flags:
            self.initial = got.seq
            self.initials.append(got.seq)
            self.ports = (got.source_port, got.destination_port)
            self._scales[0] = got.options[_SCALE][0] if _SCALE in got.options else 0
        assert (got.source_port, got.destination_port) == self.ports
        seq = (got.seq - self.initial) & 0xFFFFFFFF
        end = seq + len(got.payload)
        assert got.payload == (OURS[seq - 1 : end - 1] if got.payload else b""), "wrong octets"
        scale = 0 if "S" in got.flags or not self._scaled else self._scales[0]
        edges = got.options.get(_SACK, b"")
        numbers = [
            (int.from_bytes(edges[at : at + 4], "big") - PEER_INITIAL) & 0xFFFFFFFF
            for at in range(0, len(edges), 4)
        ]
        blocks = [f"{a}:{b}" for a, b in zip(numbers[::2], numbers[1::2], strict=True)]
        ack = (got.ack - PEER_INITIAL) & 0xFFFFFFFF if "A" in got.flags else 0
        window, ahead = got.window << scale, end - self._acked
        return Sent(self.now, got.flags, seq, end, ack, window, got.options, blocks, ahead)

    # -- handshakes

    def _shake_hands(self, verb: str, words: list[str]) -> None:
        """`open` and `accept`, with fields of the peer's SYN in place of the usual ones."""
        usual = {"mss": "mss 1360", "sackok": "sackok", "scale": "scale 0"}
        left_out = {"nosack": "sackok", "noscale": "scale", "nomss": "mss"}
        for word in words:
            usual.pop(left_out.get(word, word), None)
        said = " ".join([*(word for word in words if word not in left_out), *usual.values()])
        window = Wanted.parse(["A", "1", *said.split()]).number("win", 0xFFFF)
        if verb == "open":
            self.play(
                f"""
                connect
                > S 0
                +{ROUND_TRIP} < SA 0 ack 1 {said}
                > A 1 ack 1
                state ESTABLISHED
                events opened
                """
            )
        else:
            self.play(
                f"""
                listen
                < S 0 {said}
                > SA 0 ack 1
                +{ROUND_TRIP} < A 1 ack 1 win {window}
                silence
                events accepted
                state ESTABLISHED
                """
            )

    # -- what we sent

    def _expect(self, words: list[str], after: float, until: float | None) -> None:
        how, wanted = words[0], Wanted.parse(words[1:])
        since = self.now
        if until is None:
            until = SLACK if wanted.end > wanted.seq or "F" in wanted.flags else after
        covered = wanted.seq
        while True:
            sent = self._next(since + until)
            assert sent is not None, f"{self._step}: nothing was sent by {until} s"
            if how == "~>" and not _differs(sent, wanted):
                break
            if how == "~>":
                continue
            if how == ">":
                difference = _differs(sent, wanted)
                assert not difference, f"{self._step}: {difference}; sent was {sent}"
                break
            piece = wanted._replace(seq=covered, end=sent.end)
            difference = _differs(sent, piece)
            assert not difference, f"{self._step}: {difference}; sent was {sent}"
            assert covered < sent.end <= wanted.end, f"{self._step}: sent was {sent}"
            covered = sent.end
            if covered == wanted.end:
                break
        assert sent.at >= since + after - _GRAIN, f"{self._step}: too early: {sent}"

    def _oblige(self, end: int, fields: list[str]) -> None:
        """Acknowledge 20 ms after each segment whatever has come without a hole."""
        came: set[tuple[int, int]] = set()
        limit = self.now + 120.0
        while self._acked < end:
            sent = self._next(limit)
            assert sent is not None, f"{self._step}: nothing came after {self._acked}"
            came.add((sent.seq, sent.end))
            upto = self._acked
            for first, last in sorted(came):
                upto = max(upto, last) if first <= upto else upto
            self.now = max(self.now, sent.at + ROUND_TRIP)
            self.inject(Wanted.parse(["A", str(sent.ack), "ack", str(upto), *fields]))
            self._transmit()
        self._pending = [sent for sent in self._pending if sent.end > end]

    def _next(self, until: float) -> Sent | None:
        """The next segment, if it goes out by then."""
        while not self._pending:
            at = self.stack.deadline()
            if at is None or at > until + _GRAIN:
                return None
            self.now = max(self.now, at)
            self._transmit()
        return self._pending.pop(0)

    def _advance(self, until: float) -> None:
        """Let time pass, waking the stack whenever it asks for it."""
        while (at := self.stack.deadline()) is not None and at <= until + _GRAIN:
            self.now = max(self.now, at)
            self._transmit()
        self.now = max(self.now, until)

    def _nothing_pending(self) -> None:
        said = ", ".join(f"{sent} at {sent.at - self.now:+.3f} s" for sent in self._pending)
        assert not self._pending, f"before {self._step}: nobody expected {said}"

    def _collect(self) -> None:
        for event in self.stack.events():
            self._names.append(type(event).__name__.lower())
            if isinstance(event, Accepted):
                self._connection = event.connection


def _differs(sent: Sent, wanted: Wanted) -> str:
    """In what a segment is not the wanted one, "" when it is; PSH counts only when named."""
    fields = wanted.fields
    if sent.flags.replace("P", "") != wanted.flags.replace("P", ""):
        return "flags"
    if "P" in wanted.flags and "P" not in sent.flags:
        return "not pushed"
    if (sent.seq, sent.end) != (wanted.seq, wanted.end):
        return "numbers"
    if "ack" in fields and sent.ack != wanted.number("ack", 0):
        return "ack"
    if "win" in fields and sent.window != wanted.number("win", 0):
        return "win"
    if "sack" in fields and sent.blocks != fields["sack"]:
        return "sack"
    for name, kind in (("mss", _MSS), ("scale", _SCALE)):
        if name in fields and sent.options.get(kind) != _option(name, fields[name]):
            return name
    if "sackok" in fields and _SACK_OK not in sent.options:
        return "sackok"
    return ""


def _option(name: str, values: list[str]) -> bytes | None:
    """The option's octets, None for one that must be absent."""
    if values == ["none"]:
        return None
    return int(values[0]).to_bytes(2 if name == "mss" else 1, "big")


def play(text: str, *, capacity: int = CAPACITY) -> Trace:
    """Play a trace from the beginning against a new stack."""
    return Trace(capacity=capacity).play(text)

"""Transport data under one pair of keys (WireGuard paper, 5.4.6), by the train.

`seal` and `open` are the two loops the whole data path runs through. They take a train at a time
because everything but the AEAD call itself can then be done once or in C: about 1.6 us a packet of
1420 octets where the bare AEAD costs 1.4.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import repeat
from struct import Struct
from typing import Any, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from builder_orch.tunnel.machine import Laid, Rejected, Train
from builder_orch.tunnel.wireguard.message import HEADER_LEN, TAG_LEN, TRANSPORT, TRANSPORT_LEN
from builder_orch.tunnel.wireguard.noise import Keys
from builder_orch.tunnel.wireguard.replay import Window
from builder_orch.tunnel.wireguard.timers import (
    REJECT_AFTER_MESSAGES,
    REJECT_AFTER_TIME,
    REKEY_AFTER_MESSAGES,
    REKEY_AFTER_TIME,
    REKEY_ON_RECEIVE_TIME,
)

OVERHEAD = HEADER_LEN + TAG_LEN
"""Octets by which a sealed packet is longer than the padded one."""
PADDING = 16
RUN = 2
"""How many datagrams make it worth to take them apart all at once."""
PLACES = 16
"""Sizes of datagrams whose places are remembered."""

_HEADER = Struct("<QQ").pack
_NONCE = Struct("<4xQ").pack
_WORDS = Struct("<QQ").unpack_from


@lru_cache(maxsize=512)
def _apart(segment: int, count: int) -> Callable[[memoryview, int], tuple[Any, ...]]:
    """Takes `count` datagrams apart: name, counter and sealed packet of each in turn."""
    return Struct("<" + f"QQ{segment - HEADER_LEN}s" * count).unpack_from


@lru_cache(maxsize=512)
def _heads(segment: int, count: int) -> Callable[..., None]:
    """Lays out the headers of `count` datagrams, name and counter of each; zeros between them."""
    return Struct("<" + f"QQ{segment - HEADER_LEN}x" * count).pack_into


@lru_cache(maxsize=64)
def _nonces_of(count: int) -> tuple[Callable[..., bytes], Callable[[bytes], tuple[Any, ...]]]:
    return Struct("<" + "4xQ" * count).pack, Struct("12s" * count).unpack


def _nonces(counters: range) -> tuple[bytes, ...]:
    pack, cut = _nonces_of(len(counters))
    return cut(pack(*counters))


class Slate:
    """Room that trains are sealed and opened in, and their places there; one thread's at a time.

    What is made is copied out of it: nobody can hold what the next train is written over.
    """

    __slots__ = ("_places", "octets")

    def __init__(self) -> None:
        self.octets = bytearray()
        self._places: dict[tuple[int, int], list[memoryview]] = {}

    def places(self, step: int, count: int, *, skip: int = 0) -> list[memoryview]:
        """At least `count` places, one each `step` octets, without the first `skip` of them."""
        places = self._places.get((step, skip))
        if places is not None and len(places) >= count:
            return places
        if len(self._places) >= PLACES or len(self.octets) < step * count:
            self._places.clear()
        if len(self.octets) < step * count:
            self.octets = bytearray(step * count)
        view = memoryview(self.octets)
        starts = range(0, step * count, step)
        places = [view[start + skip : start + step] for start in starts]
        self._places[step, skip] = places
        return places


class Aead(Protocol):
    """What a session needs of a cipher; RFC 8439 with a nonce of 12 octets."""

    def encrypt(self, nonce: bytes, data: bytes, associated_data: bytes | None) -> bytes:
        """Ciphertext and tag."""

    def encrypt_into(
        self, nonce: bytes, data: bytes, associated_data: bytes | None, buf: memoryview
    ) -> int:
        """The same, written to `buf`, which has exactly that length."""

    def decrypt(
        self, nonce: bytes, data: bytes | memoryview, associated_data: bytes | None
    ) -> bytes:
        """Plaintext, or InvalidTag."""

    def decrypt_into(
        self,
        nonce: bytes,
        data: bytes | memoryview,
        associated_data: bytes | None,
        buf: memoryview,
    ) -> int:
        """The same, written to `buf`, which has exactly that length."""


class Session:
    """One direction's key to seal with, the other's to open with, and the counters of both.

    `local` and `remote` are the indices by which either side names the session, `born` when the
    handshake ended. `sent` is the next counter: the one place it is taken is `seal`.
    """

    __slots__ = (
        "_cipher",
        "_incoming",
        "_opener",
        "_outgoing",
        "_slate",
        "_window",
        "born",
        "initiator",
        "local",
        "sent",
    )

    def __init__(
        self,
        keys: Keys,
        *,
        local: int,
        remote: int,
        born: float,
        initiator: bool,
        slate: Slate | None = None,
    ) -> None:
        self._cipher = self.cipher(keys.send)
        self._opener = self.cipher(keys.receive)
        self._slate = slate or Slate()
        self._outgoing = TRANSPORT | remote << 32
        self._incoming = TRANSPORT | local << 32
        self._window = Window()
        self.local = local
        self.born = born
        self.initiator = initiator
        self.sent = 0

    def cipher(self, key: bytes) -> Aead:
        """What seals or opens with `key`."""
        return ChaCha20Poly1305(key)

    def is_usable(self, now: float, packets: int = 1) -> bool:
        """Whether `packets` more may be sealed."""
        return now - self.born < REJECT_AFTER_TIME and self.sent + packets <= REJECT_AFTER_MESSAGES

    def is_stale(self, now: float) -> bool:
        """Whether whoever sends on it should ask for its successor."""
        return self.sent > REKEY_AFTER_MESSAGES or (
            self.initiator and now - self.born >= REKEY_AFTER_TIME
        )

    def is_ending(self, now: float) -> bool:
        """Whether an initiator who only receives on it should ask for its successor."""
        return self.initiator and now - self.born >= REKEY_ON_RECEIVE_TIME

    def seal(self, train: Train, mtu: int) -> tuple[bytes, int]:
        """A train as datagrams laid end to end and the length of each but the last.

        Packets are padded to 16 octets, but never beyond `mtu`. Rejected when the counters have run
        out. Costs about 0.1 us a packet above the AEAD.
        """
        size = len(train[0])
        padding = min(-size % PADDING, mtu - size)
        if padding > 0 or len(train[-1]) != size:
            train = [packet + bytes(min(-len(packet) % 16, mtu - len(packet))) for packet in train]
        counter, count = self.sent, len(train)
        if counter + count > REJECT_AFTER_MESSAGES:
            raise Rejected("counters exhausted")
        self.sent += count
        segment = HEADER_LEN + len(train[0]) + TAG_LEN
        if count == 1:
            head = _HEADER(self._outgoing, counter)
            return head + self._cipher.encrypt(_NONCE(counter), train[0], None), segment
        counters = range(counter, self.sent)
        names = [self._outgoing] * (2 * count)
        names[1::2] = counters
        places = self._slate.places(segment, count, skip=HEADER_LEN)
        octets, end = self._slate.octets, segment * count
        _heads(segment, count)(octets, 0, *names)
        if len(train[-1]) != len(train[0]):
            end -= len(train[0]) - len(train[-1])
            places = [*places[: count - 1], places[count - 1][: len(train[-1]) + TAG_LEN]]
        list(map(self._cipher.encrypt_into, _nonces(counters), train, repeat(None), places))
        return bytes(memoryview(octets)[:end]), segment

    def open(
        self, octets: memoryview, start: int, segment: int, drops: Counter[str]
    ) -> tuple[Sequence[bytes], int]:
        """Open the datagrams from `start` on for as long as they name this session.

        Returns the padded packets that are authentic and new, keepalives as empty ones, and where
        the first datagram that is not of this session begins. The rest is counted in `drops`.
        Costs about 0.1 us a packet above the AEAD, 0.5 where counters are not in order.
        """
        laid = self._open_run(octets, start, segment)
        if laid is not None:
            end = start + len(laid) * segment
            if end > len(octets) - TRANSPORT_LEN:
                return laid, end
            opened, end = self._open_each(octets, end, segment, drops)
            return [*laid, *opened], end
        return self._open_each(octets, start, segment, drops)

    def _open_each(
        self, octets: memoryview, start: int, segment: int, drops: Counter[str]
    ) -> tuple[list[bytes], int]:
        """One at a time, whatever they are."""
        decrypt, words, nonce, incoming = self._opener.decrypt, _WORDS, _NONCE, self._incoming
        opened: list[bytes] = []
        add = opened.append
        at, begin, expected, first = start, 0, 0, 0
        while at <= len(octets) - TRANSPORT_LEN:
            named, counter = words(octets, at)
            if named != incoming:
                break
            if counter != expected:
                self._settle(opened, begin, first, drops)
                begin = len(opened)
                first = expected = counter
            try:
                add(decrypt(nonce(counter), octets[at + HEADER_LEN : at + segment], None))
                expected += 1
            except InvalidTag:
                # The counter is still expected, and perhaps comes: whoever forged one does not
                # take it away from the true packet.
                drops["forged"] += 1
            at += segment
        self._settle(opened, begin, first, drops)
        return opened, at

    def _open_run(self, octets: memoryview, start: int, segment: int) -> Laid | None:
        """The case that nearly all are of, in C: whole datagrams of this session in order, newer
        than any before. None where it is another; then each is looked at by itself.
        """
        count = (len(octets) - start) // segment
        if count < RUN or segment <= TRANSPORT_LEN:
            return None
        parts = _apart(segment, count)(octets, start)
        first, size = parts[1], segment - TRANSPORT_LEN
        counters = range(first, first + count)
        if parts[1::3] != tuple(counters) or parts[::3].count(self._incoming) != count:
            return None
        slate = self._slate
        places = slate.places(size, count)
        open_into = self._opener.decrypt_into
        try:
            list(map(open_into, _nonces(counters), parts[2::3], repeat(None), places))
        except InvalidTag:
            return None
        if not self._window.advance(first, count):
            return None
        return Laid(bytes(memoryview(slate.octets)[: size * count]), size)

    def _settle(self, opened: list[bytes], begin: int, first: int, drops: Counter[str]) -> None:
        """Ask the window about a run of consecutive counters; strike out what it refuses."""
        count = len(opened) - begin
        if not count or self._window.advance(first, count):
            return
        admit = self._window.admit
        fresh = [packet for number, packet in enumerate(opened[begin:], first) if admit(number)]
        drops["replayed"] += count - len(fresh)
        opened[begin:] = fresh


class Slots:
    """The sessions of one peer: previous, current and next (WireGuard paper, 6.3).

    Everything is sent on `current`. What displaces a session returns it, so that its index can be
    given back.
    """

    __slots__ = ("current", "next", "previous")

    def __init__(self) -> None:
        self.previous: Session | None = None
        self.current: Session | None = None
        self.next: Session | None = None

    def find(self, index: int) -> Session | None:
        """The session we call `index`."""
        for session in (self.current, self.next, self.previous):
            if session is not None and session.local == index:
                return session
        return None

    def initiated(self, session: Session) -> list[Session]:
        """The responder has proved that it has the keys, so they may be used at once."""
        if self.next is None:
            dropped = [self.previous]
            self.previous = self.current
        else:
            # Both sides called at the same time: the peer may be sending on the other one.
            dropped = [self.previous, self.current]
            self.previous, self.next = self.next, None
        self.current = session
        return [old for old in dropped if old is not None]

    def responded(self, session: Session) -> list[Session]:
        """The initiator has not proved anything yet: its old message may have been replayed."""
        dropped = [self.previous, self.next]
        self.previous, self.next = None, session
        return [old for old in dropped if old is not None]

    def confirmed(self) -> list[Session]:
        """The first packet came on `next`: from now on it is the one to send on."""
        dropped = self.previous
        self.previous, self.current, self.next = self.current, self.next, None
        return [] if dropped is None else [dropped]

    def clear(self) -> list[Session]:
        """Forget all keys."""
        dropped = [self.previous, self.current, self.next]
        self.previous = self.current = self.next = None
        return [old for old in dropped if old is not None]

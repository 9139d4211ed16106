"""The constants of the WireGuard paper (section 6) and each peer's timers, as data.

Names and order are the paper's; the numbers it leaves open are those of the Linux implementation.
"""

from enum import IntEnum
from heapq import heappop, heappush
from math import inf
from typing import Generic, Protocol, TypeVar

from builder_orch.tunnel.machine import Entropy

REKEY_AFTER_MESSAGES = 2**60
REJECT_AFTER_MESSAGES = 2**64 - 2**13 - 1
REKEY_AFTER_TIME = 120.0
REJECT_AFTER_TIME = 180.0
REKEY_ATTEMPT_TIME = 90.0
REKEY_TIMEOUT = 5.0
KEEPALIVE_TIMEOUT = 10.0

REKEY_ON_RECEIVE_TIME = REJECT_AFTER_TIME - KEEPALIVE_TIMEOUT - REKEY_TIMEOUT
"""Age from which an initiator that only receives asks for a new session: the last minute."""
ZERO_KEYS_TIME = 3 * REJECT_AFTER_TIME
HANDSHAKE_ATTEMPTS = 2 + int(REKEY_ATTEMPT_TIME / REKEY_TIMEOUT)
"""Initiations without an answer before giving up: retries begun within REKEY_ATTEMPT_TIME."""
INITIATION_SPACING = 0.020
"""Seconds between two initiations of one peer that a responder will work on."""
JITTER_MS = 334


class Timer(IntEnum):
    """What a peer waits for."""

    RETRANSMIT_HANDSHAKE = 0
    """An initiation of ours is unanswered."""
    SEND_KEEPALIVE = 1
    """We received data and sent nothing since: the peer should hear that we are alive."""
    NEW_HANDSHAKE = 2
    """We sent data and heard nothing since: perhaps the peer has lost the session."""
    ZERO_KEYS = 3
    """No new session for long: the old keys must not lie about."""
    SESSION_ENDS = 4
    """Nothing more may be sent on the current session: `has_session` must be told the time."""
    PERSISTENT_KEEPALIVE = 5
    """The configured interval passed in silence."""


class Timers:
    """When each timer is due; nobody is called back."""

    __slots__ = ("_at",)

    def __init__(self) -> None:
        self._at = [inf] * len(Timer)

    def set(self, timer: Timer, at: float) -> None:
        """Due at `at`, whatever was set before."""
        self._at[timer] = at

    def stop(self, timer: Timer) -> None:
        """Not due any more."""
        self._at[timer] = inf

    def is_set(self, timer: Timer) -> bool:
        """Whether it will be due."""
        return self._at[timer] < inf

    def deadline(self) -> float | None:
        """When the earliest is due."""
        earliest = min(self._at)
        return earliest if earliest < inf else None

    def take_due(self, now: float) -> Timer | None:
        """The earliest one due by `now`, which is stopped; None when there is none.

        One at a time, because what is done about one may stop or set another.
        """
        earliest = min(self._at)
        if earliest > now or earliest == inf:
            return None
        timer = Timer(self._at.index(earliest))
        self._at[timer] = inf
        return timer

    def clear(self) -> None:
        """Nothing is due any more."""
        self._at = [inf] * len(Timer)


class Due(Protocol):
    """Something that wants to be asked again."""

    def deadline(self) -> float | None:
        """When, if at all."""


Item = TypeVar("Item", bound=Due)


class Agenda(Generic[Item]):
    """Who of many is due first, without asking all of them each time.

    `note` must be called after anything that may have moved an item's deadline. One that moved
    later keeps its old entry until that comes up: peers put their timers off with every packet, and
    this must cost nothing. So `deadline` may be early, never late.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Item]] = []
        self._noted: dict[Item, float] = {}
        self._serial = 0

    def note(self, item: Item) -> None:
        """Enter the item's deadline if it is earlier than the one known."""
        at = item.deadline()
        if at is not None and at < self._noted.get(item, inf):
            self._noted[item] = at
            # The serial number decides between equals; items have no order.
            self._serial += 1
            heappush(self._heap, (at, self._serial, item))

    def deadline(self) -> float | None:
        """No item is due before this."""
        heap = self._heap
        # What an item said before it said something earlier no longer counts.
        while heap and self._noted.get(heap[0][2]) != heap[0][0]:
            heappop(heap)
        return heap[0][0] if heap else None

    def take_due(self, now: float) -> list[Item]:
        """Those due by `now`, earliest first. Each must be noted again afterwards."""
        due: list[Item] = []
        while (noted := self.deadline()) is not None and noted <= now:
            item = heappop(self._heap)[2]
            del self._noted[item]
            at = item.deadline()
            if at is not None and at <= now:
                due.append(item)
            else:
                self.note(item)
        return due


def jitter(entropy: Entropy) -> float:
    """0 to 333 ms, so that peers that lost each other at the same instant do not collide."""
    return int.from_bytes(entropy(4), "little") % JITTER_MS / 1000

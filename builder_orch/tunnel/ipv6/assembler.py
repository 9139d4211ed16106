"""Which octets have arrived ahead of a hole, and in which blocks to report them (RFC 2018)."""

from bisect import bisect_left
from operator import attrgetter

MAX_ISLANDS = 2048
"""More holes than a window of full segments can have; beyond it new ones are refused."""
MAX_PIECES = 16_384
"""Bounds the objects that tiny segments would make of a window."""
REMEMBERED = 8

_start = attrgetter("start")


class Island:
    """Octets [start, end) in pieces that touch."""

    __slots__ = ("end", "pieces", "start")

    def __init__(self, start: int, end: int, pieces: list[bytes]) -> None:
        self.start = start
        self.end = end
        self.pieces = pieces


class Assembler:
    """Holds what came out of order, within bounds of the caller; an octet's first copy wins."""

    __slots__ = ("_islands", "_pieces", "_recent", "held")

    def __init__(self) -> None:
        self._islands: list[Island] = []
        self._recent: list[Island] = []
        self._pieces = 0
        self.held = 0

    def __bool__(self) -> bool:
        return bool(self._islands)

    def insert(self, start: int, payload: bytes) -> int:
        """Keep what is new of [start, start + len(payload)); how many octets that was."""
        end = start + len(payload)
        before = self.held
        at = start
        island: Island | None = None
        index = self._first_reaching(start)
        while at < end:
            following = self._islands[index] if index < len(self._islands) else None
            if following is not None and following.start <= at:
                island = following
                at = max(at, following.end)
                index += 1
                continue
            stop = end if following is None else min(end, following.start)
            island = self._fill(index, at, payload[at - start : stop - start])
            if island is None:
                break
            at = stop
            index = self._first_reaching(at)
        if island is not None:
            self._remember(island)
        return self.held - before

    def take(self, position: int) -> list[bytes]:
        """Remove and return everything that continues at `position` without a hole."""
        taken: list[bytes] = []
        while self._islands and self._islands[0].start <= position:
            island = self._islands.pop(0)
            if island in self._recent:
                self._recent.remove(island)
            self.held -= island.end - island.start
            self._pieces -= len(island.pieces)
            if island.end <= position:
                continue
            skip = position - island.start
            for piece in island.pieces:
                if skip >= len(piece):
                    skip -= len(piece)
                else:
                    taken.append(piece[skip:] if skip else piece)
                    skip = 0
            position = island.end
        return taken

    def blocks(self, limit: int) -> tuple[tuple[int, int], ...]:
        """Up to `limit` blocks, that of the last arrival first (RFC 2018 §4)."""
        return tuple((island.start, island.end) for island in self._recent[:limit])

    def islands(self) -> list[tuple[int, int]]:
        """All blocks by position."""
        return [(island.start, island.end) for island in self._islands]

    def _first_reaching(self, position: int) -> int:
        """Index of the first island whose end is at or behind `position`."""
        index = bisect_left(self._islands, position, key=_start)
        if index and self._islands[index - 1].end >= position:
            return index - 1
        return index

    def _fill(self, index: int, start: int, piece: bytes) -> Island | None:
        """Put `piece` into the gap before the island at `index`; None without room."""
        if self._pieces >= MAX_PIECES:
            return None
        end = start + len(piece)
        before = self._islands[index - 1] if index else None
        behind = self._islands[index] if index < len(self._islands) else None
        if before is not None and before.end == start:
            before.pieces.append(piece)
            before.end = end
            island = before
        elif behind is not None and behind.start == end:
            behind.pieces.insert(0, piece)
            behind.start = start
            island = behind
        elif len(self._islands) >= MAX_ISLANDS:
            return None
        else:
            island = Island(start, end, [piece])
            self._islands.insert(index, island)
        if island is before and behind is not None and behind.start == end:
            before.pieces += behind.pieces
            before.end = behind.end
            del self._islands[index]
            if behind in self._recent:
                self._recent.remove(behind)
        self.held += len(piece)
        self._pieces += 1
        return island

    def _remember(self, island: Island) -> None:
        if island in self._recent:
            self._recent.remove(island)
        self._recent.insert(0, island)
        del self._recent[REMEMBERED:]

"""What the application wrote and the peer has not acknowledged, and the packets cut out of it.

Data rests as the immutable chunks that were written, indexed by position. A packet is sliced out of
its chunk each time it is sent and not kept, so there is nothing that could be changed under it.
"""

from bisect import bisect_right

from builder_orch.tunnel.ipv6.segment import ACK, FIN, PSH, Template
from builder_orch.tunnel.ipv6.train import couple, train_limit
from builder_orch.tunnel.machine import Train

SMALL_WRITE = 4096
"""Writes are gathered into chunks of this size; larger ones are kept as they are."""


class Outbox:
    """Octets [first unacknowledged, end); `fin` follows them at position `end`."""

    __slots__ = ("_chunks", "_starts", "_template", "end", "fin")

    def __init__(self, start: int, template: Template) -> None:
        self.end = start
        self.fin = False
        self._template = template
        self._chunks: list[bytes] = []
        self._starts: list[int] = []

    @property
    def last(self) -> int:
        """The position after everything there is to send, FIN included."""
        return self.end + self.fin

    def put(self, data: bytes) -> None:
        """Append octets; the caller bounds them."""
        if self._chunks and len(self._chunks[-1]) + len(data) <= SMALL_WRITE:
            self._chunks[-1] += data
        else:
            self._chunks.append(data)
            self._starts.append(self.end)
        self.end += len(data)

    def free(self, una: int) -> None:
        """Let go of the chunks that end before `una`."""
        done = len(self._chunks) if una >= self.end else bisect_right(self._starts, una) - 1
        if done > 0:
            del self._chunks[:done]
            del self._starts[:done]

    def whole(self, start: int, octets: int, train: int) -> int:
        """So many of `octets`, more than a train, from `start` as end where a train does.

        Trains are counted from the start of each chunk, so that none lies across two of them.
        """
        stop = start + octets
        chunk = bisect_right(self._starts, stop) - 1
        return octets - (stop - self._starts[chunk]) % train

    def emit(
        self, trains: list[Train], start: int, stop: int, size: int, ack: int, window: int
    ) -> None:
        """Packets for [start, stop): full ones of `size`, perhaps a shorter one, perhaps a FIN."""
        end = min(stop, self.end)
        index = bisect_right(self._starts, start) - 1
        limit = train_limit(size + self._template.overhead)
        at = start
        while at < end:
            chunk = self._chunks[index]
            offset = at - self._starts[index]
            if offset == len(chunk):
                index += 1
                continue
            count = min(len(chunk) - offset, end - at) // size
            if count:
                count = min(count, limit)
                packets = self._template.train(chunk, offset, size, count, at, ack, window)
                at += count * size
                if at == self.end:
                    last = chunk[offset + (count - 1) * size : offset + count * size]
                    packets[-1] = self._template.segment(at - size, ack, ACK | PSH, window, last)
            else:
                payload = self._slice(index, offset, min(size, end - at))
                flags = ACK | PSH if at + len(payload) == self.end else ACK
                packets = [self._template.segment(at, ack, flags, window, payload)]
                at += len(payload)
                while index + 1 < len(self._starts) and self._starts[index + 1] <= at:
                    index += 1
            couple(trains, packets)
        if stop > self.end:
            couple(trains, [self._template.segment(self.end, ack, ACK | FIN, window)])

    def emit_probe(self, trains: list[Train], una: int, ack: int, window: int) -> None:
        """A segment outside the peer's window, which has to be answered."""
        couple(trains, [self._template.segment(una - 1, ack, ACK, window)])

    def _slice(self, index: int, offset: int, size: int) -> bytes:
        """`size` octets from `offset` of chunk `index`, perhaps across the border of chunks."""
        piece = self._chunks[index][offset : offset + size]
        while len(piece) < size:
            index += 1
            piece += self._chunks[index][: size - len(piece)]
        return piece

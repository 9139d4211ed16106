"""WebSocket frames (RFC 6455) and, inside them, what wgtcpd carries: a stream of datagrams.

    stream    2F AC ED 77 once, from the client; then for each datagram its length (u32, big-endian)
              and its octets. Length 0 is a keepalive.
    messages  one for each item of the stream, of kind TEXT although the octets are no text; a
              receiver goes by the stream alone, however it is cut into messages.

aiohttp's own WebSocket is not used on this path. It takes one call and one write to the TLS layer
for each message and gives one awaited object for each, which is for each packet: 38 MB/s were
measured for its framing alone, half of what the whole tunnel moves over UDP. Here a train becomes
one string of octets, and what arrives becomes trains again. No I/O, no clock.
"""

from struct import Struct

from builder_orch.tunnel.machine import Datagrams, Entropy, Malformed

MAGIC = bytes.fromhex("2faced77")
DATAGRAM_LIMIT = 65535
"""A UDP datagram cannot be longer; a length beyond it is no length."""
FRAME_LIMIT = 1 << 18
"""Octets of one frame that are waited for; an honest one holds a datagram, or a few."""
CONTROL_LIMIT = 125

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
GOING_AWAY, PROTOCOL_ERROR, TOO_BIG = 1001, 1002, 1009

_FIN = 0x80
_MASKED = 0x80
_LENGTH = Struct("!I")
_SHORT = Struct("!BB")
_MEDIUM = Struct("!BBH")
_LONG = Struct("!BBQ")
_NO_KEY = b""


class TooLong(Malformed):
    """A length that no datagram has."""


def masked(octets: bytes, key: bytes) -> bytes:
    """Octets XORed with the four of `key` over and over; the same again undoes it."""
    # Most tunnels never get here, and would pay 27 ms when they start.
    try:
        from websockets.speedups import apply_mask
    except ImportError:
        # Installed without its compiled part: the same, by integers.
        from websockets.utils import apply_mask
    return apply_mask(octets, key)


class Framer:
    """Makes frames; a client masks them (RFC 6455, section 5.3), a server must not."""

    def __init__(self, entropy: Entropy | None = None) -> None:
        self._entropy = entropy

    def message(self, opcode: int, payload: bytes) -> bytes:
        """One frame that is a whole message."""
        key = _NO_KEY if self._entropy is None else self._entropy(4)
        body = masked(payload, key) if key else payload
        return _head(opcode, len(payload), key) + body

    def magic(self) -> bytes:
        """What a client says first."""
        return self.message(TEXT, MAGIC)

    def keepalive(self) -> bytes:
        """What is said so that nobody on the way takes the connection for dead."""
        return self.message(TEXT, bytes(4))

    def close(self, code: int) -> bytes:
        """The last frame."""
        return self.message(CLOSE, code.to_bytes(2, "big"))

    def train(self, datagrams: Datagrams) -> bytes:
        """A message for each datagram, laid end to end."""
        octets, segment, _ = datagrams
        total = len(octets)
        # One key for the frames of a train: it is as unpredictable as one for each would be.
        key = _NO_KEY if self._entropy is None else self._entropy(4)
        full = total - total % segment
        parts: list[bytes | memoryview] = []
        view = memoryview(octets)
        if full:
            parts += self._equal(view[:full], segment, key)
        if full < total:
            parts += self._equal(view[full:], total - full, key)
        return b"".join(parts)

    def _equal(self, octets: memoryview, segment: int, key: bytes) -> list[bytes | memoryview]:
        head = _head(TEXT, 4 + segment, key)
        length = _LENGTH.pack(segment)
        parts: list[bytes | memoryview] = []
        if not key:
            for at in range(0, len(octets), segment):
                parts += (head, length, octets[at : at + segment])
        elif segment % 4:
            # The key begins anew with each frame, so they cannot be masked together.
            for at in range(0, len(octets), segment):
                parts += (head, masked(length + octets[at : at + segment], key))
        else:
            for at in range(0, len(octets), segment):
                parts += (length, octets[at : at + segment])
            step = segment + 4
            view = memoryview(masked(b"".join(parts), key))
            parts = []
            for at in range(0, len(view), step):
                parts += (head, view[at : at + step])
        return parts


def _head(opcode: int, length: int, key: bytes) -> bytes:
    bit = _MASKED if key else 0
    if length < 126:
        return _SHORT.pack(_FIN | opcode, bit | length) + key
    if length < 1 << 16:
        return _MEDIUM.pack(_FIN | opcode, bit | 126, length) + key
    return _LONG.pack(_FIN | opcode, bit | 127, length) + key


class Frames:
    """Takes octets from a WebSocket connection, gives what the messages said, end to end.

    `from_client` says who is at the other end, and so whether its frames have to be masked. What
    the other end said beside data is in `pings` (to be answered and cleared) and `closed`.
    """

    def __init__(self, *, from_client: bool) -> None:
        self._from_client = from_client
        self._rest = b""
        self._inside = False
        self.pings: list[bytes] = []
        self.closed = False

    def receive(self, octets: bytes) -> bytes:
        """The payload of the frames that are whole now. Malformed ends the connection."""
        data = self._rest + octets if self._rest else octets
        at, size = 0, len(data)
        given: list[bytes] = []
        run: list[bytes] = []
        run_key = _NO_KEY
        while not self.closed:
            head = self._head(data, at, size)
            if head is None:
                break
            begin, end = head
            if end > size:
                break
            opcode = data[at] & 0x0F
            key = data[begin - 4 : begin] if self._from_client else _NO_KEY
            payload = data[begin:end]
            if opcode >= CLOSE:
                self._control(data[at], masked(payload, key) if key else payload)
            else:
                self._follow(data[at])
                # Frames of one key whose lengths let it begin anew are unmasked together.
                if key != run_key or (run and len(run[-1]) % 4):
                    given.append(_joined(run, run_key))
                    run, run_key = [], key
                run.append(payload)
                if data[at] & _FIN and opcode and not len(payload) % 4:
                    # The others of a train have the same head, which is found to be good.
                    first, skip, step = data[at:begin], begin - at, end - at
                    while data.startswith(first, end) and end + step <= size:
                        run.append(data[end + skip : end + step])
                        end += step
            at = end
        given.append(_joined(run, run_key))
        self._rest = data[at:]
        return b"".join(given)

    def _head(self, data: bytes, at: int, size: int) -> tuple[int, int] | None:
        """Where the payload of the frame at `at` begins and ends; None: its head is not there."""
        if size - at < 2:
            return None
        if data[at] & 0x70:
            raise Malformed("reserved bits")
        second = data[at + 1]
        if (second >= _MASKED) != self._from_client:
            raise Malformed("masked" if second >= _MASKED else "not masked")
        length, begin = second & 0x7F, at + 2
        if length == 126:
            begin += 2
        elif length == 127:
            begin += 8
        if size < begin:
            return None
        if length > CONTROL_LIMIT:
            length = int.from_bytes(data[at + 2 : begin], "big")
            if data[at] & 0x08:
                raise Malformed("a control frame is short")
            if length > FRAME_LIMIT:
                raise TooLong(f"a frame of {length} octets")
        if self._from_client:
            begin += 4
            if size < begin:
                return None
        return begin, begin + length

    def _follow(self, first: int) -> None:
        """Check that fragments of messages come in order (RFC 6455, section 5.4)."""
        opcode = first & 0x0F
        if opcode > BINARY:
            raise Malformed(f"opcode {opcode}")
        if (opcode == CONTINUATION) != self._inside:
            raise Malformed("fragments out of order")
        self._inside = not first & _FIN

    def _control(self, first: int, payload: bytes) -> None:
        opcode = first & 0x0F
        if not first & _FIN:
            raise Malformed("a control frame in fragments")
        if opcode == CLOSE:
            self.closed = True
        elif opcode == PING:
            # Only the last one has to be answered (RFC 6455, section 5.5.3).
            self.pings = [payload]
        elif opcode != PONG:
            raise Malformed(f"opcode {opcode}")


def _joined(run: list[bytes], key: bytes) -> bytes:
    octets = b"".join(run)
    return masked(octets, key) if key and octets else octets


class Stream:
    """Cuts the stream inside the messages into datagrams again, by the train."""

    def __init__(self, *, magic: bool) -> None:
        self._rest = b""
        self._magic = magic
        self.begun = not magic

    def receive(self, octets: bytes) -> list[tuple[bytes, int]]:
        """Runs of datagrams: octets laid end to end and the size to cut them by, the last one
        perhaps shorter. Keepalives are passed over. Malformed ends the connection.
        """
        stream = self._rest + octets if self._rest else octets
        at, size = 0, len(stream)
        if not self.begun:
            if size < 4:
                self._rest = stream
                return []
            if stream[:4] != MAGIC:
                raise Malformed("not a wgtcpd stream")
            self.begun, at = True, 4
        runs: list[tuple[bytes, int]] = []
        run: list[bytes] = []
        segment, ended = 0, True
        unpack = _LENGTH.unpack_from
        while size - at >= 4:
            length = unpack(stream, at)[0]
            if length > DATAGRAM_LIMIT:
                raise TooLong(f"a datagram of {length} octets")
            end = at + 4 + length
            if end > size:
                break
            if length:
                if ended or length > segment:
                    if run:
                        runs.append((b"".join(run), segment))
                    run, segment = [], length
                run.append(stream[at + 4 : end])
                ended = length < segment
            at = end
        if run:
            runs.append((b"".join(run), segment))
        self._rest = stream[at:]
        return runs

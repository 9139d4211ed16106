"""A relay that makes a way dirty: late, lossy, out of order, doubled and corrupted, by a seed.

`python -m tests.system.relay TARGET_HOST TARGET_PORT DELAY_MS LOSS REORDER DUPLICATE CORRUPT SEED
[LATE_MS LATEST_MS]` listens at a free UDP port, prints it and carries datagrams between whoever
called last and the target; reordered ones are so much late, by default up to 3 ms. It ends with its
standard input.
"""

import heapq
import random
import select
import socket
import sys
import time

LATE_MS = (0.0, 3.0)
BUFFER = 4 << 20
BURST = 64
GONE = (BlockingIOError, ConnectionRefusedError)
"""What a full buffer or an absent program say; on such a way it is one loss more."""


class Relay:
    """Two sockets and what is still under way between them."""

    def __init__(
        self, target: tuple[str, int], shares: list[float], seed: int, late_ms: tuple[float, float]
    ) -> None:
        self.late_s = late_ms[0] / 1e3, late_ms[1] / 1e3
        self.delay_s = shares[0] / 1e3
        self.loss, self.reorder, self.duplicate, self.corrupt = shares[1:]
        self.chance = random.Random(seed)
        self.outside = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.inside = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        for sock in (self.outside, self.inside):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
            sock.setblocking(False)
        self.outside.bind(("0.0.0.0", 0))
        self.inside.connect(target)
        self.caller: tuple[str, int] | None = None
        self.held: list[tuple[float, int, bool, bytes]] = []
        self.number = 0

    def run(self) -> None:
        """Carry datagrams until standard input ends."""
        while True:
            self.release(time.monotonic())
            wait = max(0.0, self.held[0][0] - time.monotonic()) if self.held else None
            ready = select.select([self.outside, self.inside, sys.stdin], [], [], wait)[0]
            if sys.stdin in ready:
                return
            for sock in (self.outside, self.inside):
                if sock in ready:
                    self.take(sock)

    def release(self, now: float) -> None:
        """Send what is due."""
        while self.held and self.held[0][0] <= now:
            _, _, outward, octets = heapq.heappop(self.held)
            try:
                if outward:
                    self.inside.send(octets)
                elif self.caller is not None:
                    self.outside.sendto(octets, self.caller)
            except GONE:
                continue

    def take(self, sock: socket.socket) -> None:
        """Take what has come, and decide its fate."""
        for _ in range(BURST):
            try:
                octets, source = sock.recvfrom(65535)
            except GONE:
                return
            if sock is self.outside:
                self.caller = source
            if self.chance.random() >= self.loss:
                self.hold(octets, sock is self.outside)

    def hold(self, octets: bytes, outward: bool) -> None:
        """Keep a datagram until it is due."""
        due = time.monotonic() + self.delay_s
        if self.chance.random() < self.reorder:
            due += self.chance.uniform(*self.late_s)
        if self.chance.random() < self.corrupt:
            at = self.chance.randrange(len(octets))
            octets = octets[:at] + bytes([octets[at] ^ 0x5A]) + octets[at + 1 :]
        for _ in range(2 if self.chance.random() < self.duplicate else 1):
            self.number += 1
            heapq.heappush(self.held, (due, self.number, outward, octets))


if __name__ == "__main__":
    late = (float(sys.argv[9]), float(sys.argv[10])) if len(sys.argv) > 9 else LATE_MS
    shares = list(map(float, sys.argv[3:8]))
    relay = Relay((sys.argv[1], int(sys.argv[2])), shares, int(sys.argv[8]), late)
    sys.stdout.write(f"{relay.outside.getsockname()[1]}\n")
    sys.stdout.flush()
    relay.run()

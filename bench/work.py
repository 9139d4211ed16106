"""The work that every subject does, and the server at the far end that all of them meet.

A stream begins with nine octets: the work ('u' up, 'd' down, 'b' both, 'e' echo) and a count.
"""

import json
import os
import socket
import statistics
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

HEADER = struct.Struct("!cQ")
BLOCK = 1 << 21
"""As much as goes through while a busy thread keeps Python to itself for its 5 ms."""
ECHO = 64

Dial = Callable[[], socket.socket]


def serve(address: str) -> None:
    """Serve for ever at a free port of `address`; prints the port. Ends with its process."""
    listener = socket.create_server((address, 0), family=socket.AF_INET6, backlog=128)
    print(listener.getsockname()[1], flush=True)
    while True:
        caller, _ = listener.accept()
        threading.Thread(target=_attend, args=(caller,), daemon=True).start()


def _attend(caller: socket.socket) -> None:
    with caller:
        caller.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            work, count = HEADER.unpack(_exactly(caller, HEADER.size))
            if work == b"u":
                caller.sendall(struct.pack("!Q", _drain(caller)))
            elif work == b"d":
                _send(caller, count)
            elif work == b"b":
                sender = threading.Thread(target=_send, args=(caller, count))
                sender.start()
                _drain(caller)
                sender.join()
            elif work == b"e":
                while octets := caller.recv(ECHO):
                    caller.sendall(octets)
        except OSError as error:
            print(f"server: {error}", file=sys.stderr)


def _exactly(sock: socket.socket, size: int) -> bytes:
    octets = b""
    while len(octets) < size:
        more = sock.recv(size - len(octets))
        if not more:
            raise ConnectionError("closed early")
        octets += more
    return octets


def _drain(sock: socket.socket, expected: int | None = None) -> int:
    buffer, total = bytearray(BLOCK), 0
    while expected is None or total < expected:
        got = sock.recv_into(buffer)
        if not got:
            break
        total += got
    if expected is not None and total != expected:
        raise ConnectionError(f"{total} of {expected} octets arrived")
    return total


def _send(sock: socket.socket, count: int) -> None:
    # Not zeros, which some ways to sum them find easier than real data.
    block = memoryview(os.urandom(BLOCK))
    for start in range(0, count, BLOCK):
        sock.sendall(block[: count - start])


def one(dial: Dial, work: str, count: int) -> float:
    """One stream's work; for 'echo' the median round trip in seconds, else 0."""
    with dial() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(HEADER.pack(work[0].encode(), count))
        if work == "up":
            _send(sock, count)
            sock.shutdown(socket.SHUT_WR)
            (heard,) = struct.unpack("!Q", _exactly(sock, 8))
            if heard != count:
                raise ConnectionError(f"{heard} of {count} octets arrived")
        elif work == "down":
            _drain(sock, count)
        elif work == "both":
            sender = threading.Thread(target=_send, args=(sock, count))
            sender.start()
            _drain(sock, count)
            sender.join()
        else:
            return _round_trips(sock, count)
    return 0.0


def _round_trips(sock: socket.socket, count: int) -> float:
    times = []
    for _ in range(count):
        began = time.perf_counter()
        sock.sendall(bytes(ECHO))
        _exactly(sock, ECHO)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def processor(host: int | None) -> float:
    """CPU seconds of this process and of the host, by its CPU-time clock (clock_getcpuclockid)."""
    return time.process_time() + (0.0 if host is None else time.clock_gettime((~host << 3) | 2))


def _memory(process: int | str) -> int:
    """Peak resident set in octets (proc(5): VmHWM)."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no VmHWM of process {process}")


def measure(
    began: float, dial: Dial, work: str, octets: int, streams: int, host: int | None = None
) -> None:
    """Do the work and print its figures as JSON; `began` is when the tunnel was begun.

    The process `host` carries the tunnel, if another one does: its figures count as ours.
    """
    with dial() as sock:
        sock.sendall(HEADER.pack(b"d", 1))
        _exactly(sock, 1)
    first_byte_s = time.perf_counter() - began
    round_trips: list[float] = []
    threads = [
        threading.Thread(target=lambda: round_trips.append(one(dial, work, octets // streams)))
        for _ in range(streams)
    ]
    before, begun = processor(host), time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begun
    if len(round_trips) != streams:
        raise SystemExit("a stream failed")
    tell(seconds, processor(host) - before, first_byte_s, round_trips[0], host)


def tell(
    seconds: float, cpu_s: float, first_byte_s: float, round_trip_s: float, host: int | None = None
) -> None:
    """Print the figures of one subject as JSON, with the memory of its processes."""
    figures = {
        "seconds": seconds,
        "cpu_s": cpu_s,
        "first_byte_s": first_byte_s,
        "rss_bytes": _memory("self") + (0 if host is None else _memory(host)),
        "round_trip_s": round_trip_s,
    }
    print(json.dumps(figures), flush=True)

"""Inner packets into a pcap file, as tcpdump(8) or Wireshark read it.

The one place where scapy stands beside the data path: it parses a packet in about 100 us, so it
only writes octets here and is imported when a capture is asked for.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

LINKTYPE_RAW = 101
"""Packets begin with the IP header (https://www.tcpdump.org/linktypes.html)."""


class PacketWriter(Protocol):
    """The one method of scapy's writer that is used."""

    def write_packet(self, packet: bytes, *, sec: int, usec: int) -> None: ...


class Capture:
    """Writes packets with the wall-clock time at which the tunnel handled them."""

    def __init__(self, writer: PacketWriter) -> None:
        self._writer = writer
        self.packets = 0

    def record(self, packets: Iterable[bytes]) -> None:
        """Append packets as they are; OSError if the file cannot take them."""
        seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
        for packet in packets:
            self._writer.write_packet(packet, sec=seconds, usec=nanoseconds // 1000)
            self.packets += 1


@contextmanager
def capturing(path: Path) -> Iterator[Capture]:
    """A capture into a new file that only its owner can read: it holds what the tunnel hides."""
    from scapy.utils import RawPcapWriter

    path.touch(mode=0o600)
    with RawPcapWriter(str(path), linktype=LINKTYPE_RAW, sync=False) as writer:
        writer.write_header(None)
        yield Capture(writer)

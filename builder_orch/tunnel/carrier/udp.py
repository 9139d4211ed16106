"""UDP on a non-blocking socket, by the train where the kernel can (UDP_SEGMENT, UDP_GRO).

One `sendmsg` carries up to 44 datagrams and one `recvmsg` returns as many: without them each packet
costs a system call of its own, which is more than sealing it (5 us against 2).
"""

import asyncio
import errno
import socket
import struct
import sys
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Self

from builder_orch.tunnel.carrier import BARRED, REFUSED, SILENT, Deliver, Route, Sign
from builder_orch.tunnel.carrier.upgrade import authority
from builder_orch.tunnel.machine import TRAIN_PACKETS, Datagrams, Endpoint

SOL_UDP = 17
UDP_SEGMENT = 103
UDP_GRO = 104
MAY_BE_CUT = {
    socket.AF_INET: (socket.IPPROTO_IP, 10, 0),
    socket.AF_INET6: (socket.IPPROTO_IPV6, 23, 0),
}
"""IP_MTU_DISCOVER and IPV6_MTU_DISCOVER with IP_PMTUDISC_DONT (ip(7), ipv6(7))."""
SOCKET_BUFFER = 4 << 20
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33
"""socket(7): for whoever may have more than net.core.wmem_max and rmem_max, 208 KiB as a rule."""
LARGEST_RECEIVE = 1 << 16
RECEIVE_BUFFER = 2 * LARGEST_RECEIVE
RECEIVES_PER_WAKEUP = 64
OCTETS_PER_WAKEUP = 1 << 20
"""So much of what waits is taken before anything is sent. The acknowledgements of many streams come
one by one: fewer at a time, and they wait for half a second in the socket; many more, and all that
they allow goes out in one burst, which the peer has no room for."""
QUEUE_LIMIT = 256
"""Trains that wait for a full socket buffer; more would only be delay."""
LOOK_S = 1.0
"""How often a connected socket asks from which of our addresses the gateway is reached now."""

_TRUNCATED = int(socket.MSG_TRUNC)
"""A plain number: flags of an enumeration cost as much as a packet."""
_ANCILLARY = socket.CMSG_SPACE(4)
_SEGMENT = struct.Struct("=H")
_GRO = struct.Struct("=i")
_REFUSED = {
    errno.ECONNREFUSED: "refuses datagrams (the gateway is not running there)",
    errno.EHOSTUNREACH: "is not reachable from here",
    errno.ENETUNREACH: "is not reachable from here",
    errno.EPERM: "is forbidden by this machine's firewall",
    errno.EACCES: "is forbidden by the network",
}
"""Errors that say at once what silence would say later."""
_STRANDED = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EINVAL, errno.EADDRNOTAVAIL}
"""What a socket hears whose address is no longer one of ours, or leads nowhere."""
_OFFLOAD_REFUSED = {errno.EIO, errno.EINVAL, errno.EMSGSIZE, errno.EOPNOTSUPP, errno.ENOPROTOOPT}


class UdpCarrier:
    """One UDP socket; connected when there is one gateway, so that its refusals are heard.

    A connected socket keeps the address that it began with, which is of no use on the next network.
    With `reopen`, which makes such a socket anew, one takes its place then, and `relocated` is
    called: who only listens should tell the gateway where to.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        offload: bool = True,
        reopen: Callable[[], socket.socket] | None = None,
    ) -> None:
        self._connected = _is_connected(sock)
        self._offload = offload
        self._reopen = reopen
        self._look_timer: asyncio.TimerHandle | None = None
        self.relocated: Callable[[], None] = lambda: None
        self._queue: deque[Datagrams] = deque()
        self._view = memoryview(bytearray(RECEIVE_BUFFER))
        self._begin = self._end = self._unit = 0
        self._source: Endpoint = ("", 0)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._deliver: Deliver | None = None
        self._settled: Callable[[], None] | None = None
        self.drops: Counter[str] = Counter()
        self.refusals = 0
        self._refusal = ""
        self._is_barred = False
        self._take(sock)

    @classmethod
    def connect(cls, endpoint: Endpoint) -> Self:
        """A socket for one gateway at a numeric address; OSError where there is no route to it."""
        return cls(_towards(endpoint), reopen=partial(_towards, endpoint))

    @classmethod
    def bind(cls, host: str, port: int) -> Self:
        """A socket that peers call at; OSError (EADDRINUSE) where the port is taken."""
        sock = socket.socket(_family(host), socket.SOCK_DGRAM)
        try:
            sock.bind((host, port))
        except OSError:
            sock.close()
            raise
        return cls(sock)

    @property
    def endpoint(self) -> Endpoint:
        """The local address and port."""
        host, port = self._socket.getsockname()[:2]
        return host, port

    @property
    def far(self) -> Endpoint | None:
        """The gateway of a connected socket."""
        if not self._connected:
            return None
        host, port = self._socket.getpeername()[:2]
        return host, port

    def route(self) -> Route:
        """Where a connected socket leads."""
        return Route("udp", authority(*self.far) if self.far else "", "")

    def waiting(self, attempt: int) -> str:
        """Refused, or no answer yet."""
        where = self.route().endpoint or "(the peer calls us)"
        if self.refusals:
            return f"udp {where} {self._refusal}"
        return f"udp {where} handshake attempt {attempt} unanswered"

    def signs(self) -> tuple[Sign, ...]:
        """One, of what the network said of our datagrams, if it said anything."""
        state = (BARRED if self._is_barred else REFUSED) if self.refusals else SILENT
        return (Sign("udp", state, self.route().endpoint, self._refusal),)

    @property
    def blocked(self) -> bool:
        """Whether the kernel's send buffer is full."""
        return bool(self._queue)

    def start(self, deliver: Deliver, settled: Callable[[], None]) -> None:
        """Begin to deliver on the running loop."""
        self._deliver, self._settled = deliver, settled
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket, self._on_readable)
        if self._reopen is not None:
            self._look_timer = self._loop.call_later(LOOK_S, self._look)

    def close(self) -> None:
        """Leave the loop and close the socket."""
        if self._look_timer is not None:
            self._look_timer.cancel()
        if self._loop is not None:
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._loop = None
        self._queue.clear()
        self._socket.close()

    def send(self, datagrams: Datagrams) -> None:
        """Send at once, or queue behind what is queued already."""
        if self._queue:
            if len(self._queue) >= QUEUE_LIMIT:
                self.drops["queue full"] += 1
                return
            self._queue.append(datagrams)
        elif not self._try(datagrams):
            self._queue.append(datagrams)
            if self._loop is not None:
                self._loop.add_writer(self._socket, self._on_writable)

    def _try(self, datagrams: Datagrams) -> bool:
        """Whether the datagrams need no further attention (sent, or dropped for good)."""
        try:
            self._send(datagrams)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            if error.errno in _STRANDED and self._follow():
                return self._try(datagrams)
            self._count(error)
        return True

    def _take(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        for option, force in (
            (socket.SO_RCVBUF, SO_RCVBUFFORCE),
            (socket.SO_SNDBUF, SO_SNDBUFFORCE),
        ):
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)
            if sys.platform == "linux":
                with suppress(PermissionError):
                    sock.setsockopt(socket.SOL_SOCKET, force, SOCKET_BUFFER)
        if sys.platform == "linux" and sock.family in MAY_BE_CUT:
            # By default a lone datagram must not be cut to pieces on its way, where a train's may:
            # one that is too big would be lost each time where nobody tells. As the kernel's own
            # WireGuard has it, whoever has the narrow link cuts; pieces are checked as a whole.
            with suppress(OSError):
                sock.setsockopt(*MAY_BE_CUT[sock.family])
        self._segmenting = self._offload and _allows(sock, UDP_SEGMENT, 0)
        if self._offload:
            _allows(sock, UDP_GRO, 1)
        self._socket = sock

    def _follow(self) -> bool:
        """Move to another address of ours if the gateway is reached from there; whether it is."""
        if self._reopen is None or self._loop is None:
            return False
        try:
            fresh = self._reopen()
        except OSError:
            # No way there at all, now; the next look may find one.
            return False
        if fresh.getsockname()[0] == self.endpoint[0]:
            fresh.close()
            return False
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        self._take(fresh)
        self._loop.add_reader(fresh, self._on_readable)
        # Finds out by itself whether there is anything to write.
        self._loop.add_writer(fresh, self._on_writable)
        return True

    def _look(self) -> None:
        assert self._loop is not None
        self._look_timer = self._loop.call_later(LOOK_S, self._look)
        if self._follow():
            self.relocated()

    def _send(self, datagrams: Datagrams) -> None:
        octets, segment, endpoint = datagrams
        to = () if self._connected else (endpoint,)
        if len(octets) <= segment:
            self._socket.sendmsg([octets], (), 0, *to)
            return
        if self._segmenting:
            cut = [(SOL_UDP, UDP_SEGMENT, _SEGMENT.pack(segment))]
            try:
                self._socket.sendmsg([octets], cut, 0, *to)
            except OSError as error:
                if error.errno not in _OFFLOAD_REFUSED:
                    raise
                # Some devices take no segmentation; one refusal is reason enough to cut by hand.
                self._segmenting = False
            else:
                return
        view = memoryview(octets)
        for start in range(0, len(view), segment):
            try:
                self._socket.sendmsg([view[start : start + segment]], (), 0, *to)
            except (BlockingIOError, InterruptedError):
                # The rest waits; what went is not sent twice.
                rest = Datagrams(bytes(view[start:]), segment, endpoint)
                self._queue.appendleft(rest)
                if self._loop is not None:
                    self._loop.add_writer(self._socket, self._on_writable)
                return

    def _count(self, error: OSError) -> None:
        if error.errno in _REFUSED:
            self.refusals += 1
            self._refusal = _REFUSED[error.errno]
            self._is_barred = error.errno != errno.ECONNREFUSED
        self.drops[errno.errorcode.get(error.errno or 0, "send")] += 1

    def _on_writable(self) -> None:
        while self._queue:
            datagrams = self._queue.popleft()
            before = len(self._queue)
            if not self._try(datagrams):
                self._queue.appendleft(datagrams)
                return
            if len(self._queue) > before:
                return
        if self._loop is not None:
            self._loop.remove_writer(self._socket)
        if self._settled is not None:
            self._settled()

    def _on_readable(self) -> None:
        sock = self._socket
        assert self._settled is not None
        left = OCTETS_PER_WAKEUP
        self._begin = self._end = 0
        for _ in range(RECEIVES_PER_WAKEUP):
            try:
                size, ancillary, flags, address = sock.recvmsg_into(
                    [self._view[self._end :]], _ANCILLARY
                )
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                self._count(error)
                continue
            if flags & _TRUNCATED:
                self.drops["truncated"] += 1
                continue
            segment = size
            for level, kind, data in ancillary:
                if level == SOL_UDP and kind == UDP_GRO:
                    segment = _GRO.unpack_from(data)[0] or size
            if size:
                self._gather(size, segment, address[:2])
            if self._loop is None:
                return
            left -= size
            if left <= 0 or self._socket is not sock:
                break
        self._hand_up()
        if self._loop is not None:
            self._settled()

    def _gather(self, size: int, segment: int, source: Endpoint) -> None:
        """Lay what came behind what is of one kind with it, as far as that makes a train.

        The kernel does so with datagrams that come together; acknowledgements, and what many
        streams bring, come one by one, and cost above as much as a train does.
        """
        if segment != self._unit or source != self._source:
            self._hand_up()
            self._unit, self._source = segment, source
        self._end += size
        is_last = size % segment or self._end - self._begin >= segment * TRAIN_PACKETS
        if is_last or self._end > RECEIVE_BUFFER - LARGEST_RECEIVE:
            self._hand_up()
            self._begin = self._end = 0

    def _hand_up(self) -> None:
        if self._begin < self._end and self._deliver is not None:
            octets = self._view[self._begin : self._end]
            self._begin = self._end
            self._deliver(octets, self._unit, self._source)


def _towards(endpoint: Endpoint) -> socket.socket:
    sock = socket.socket(_family(endpoint[0]), socket.SOCK_DGRAM)
    try:
        sock.connect(endpoint)
    except OSError:
        sock.close()
        raise
    return sock


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _is_connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def _allows(sock: socket.socket, option: int, value: int) -> bool:
    try:
        sock.setsockopt(SOL_UDP, option, value)
    except OSError:
        return False
    return True

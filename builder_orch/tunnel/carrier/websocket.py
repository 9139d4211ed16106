"""WebSocket to a gateway's wgtcpd: for networks that let nothing but HTTPS out.

TLS is camouflage here: whoever answers is not verified, because WireGuard's keys do that inside,
and nothing but WireGuard's datagrams is ever said (no token, no cookie, no password). A platform
that tells its gateway's key by another way may have it pinned.
"""

import asyncio
import errno
import hashlib
import os
import ssl
import time
from base64 import b64encode
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_exponential_jitter

from builder_orch.tunnel.carrier import (
    BARRED,
    FAILED,
    OPEN,
    REFUSED,
    SILENT,
    Deliver,
    Route,
    Sign,
)
from builder_orch.tunnel.carrier.link import Clock, Link
from builder_orch.tunnel.carrier.proxy import Outside, reach
from builder_orch.tunnel.carrier.upgrade import Head, authority, check_answer, request
from builder_orch.tunnel.machine import Datagrams, Endpoint, Malformed

OPEN_S = 15.0
"""For TCP, proxy, TLS and the upgrade together."""
TICK_S = 1.0
STEADY_S = 10.0
"""A connection that lived as long was a good one: the next is tried for soon."""
EARLY_TRAINS = 64
"""What is kept until the connection is there."""

Pause = Callable[[float], Awaitable[None]]

_NO_WAY = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EPERM, errno.EACCES}
"""Errors of somebody who does not let us on our way."""


class WrongKey(Exception):
    """Whoever answered does not have the key that was pinned."""


@dataclass(frozen=True, slots=True)
class Gate:
    """Where wgtcpd is; `pin` is the SHA-256 of its public key (SubjectPublicKeyInfo), if known."""

    host: str
    port: int
    pin: bytes | None = None

    def __str__(self) -> str:
        return f"wss://{authority(self.host, self.port)}"


def unverified() -> ssl.SSLContext:
    """TLS to whoever answers."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def spki_sha256(certificate: bytes) -> bytes:
    """What a pin is compared with, from a certificate in DER."""
    # Only who calls by WebSocket and has a pin pays for this.
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    key = x509.load_der_x509_certificate(certificate).public_key()
    spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).digest()


class Calling(Link):
    """The client's end."""

    def __init__(self, owner: "WebSocketCarrier", gate: Gate, clock: Clock) -> None:
        super().__init__(owner, clock, os.urandom)
        self._gate = gate
        self._key = b64encode(os.urandom(16)).decode()
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def greet(self, transport: asyncio.Transport) -> None:
        if self._gate.pin is not None:
            certificate = transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
            if spki_sha256(certificate) != self._gate.pin:
                self.opened.set_exception(WrongKey(f"{self._gate} has another key than expected"))
                transport.abort()
                return
        self.write(request(self._gate.host, self._gate.port, self._key))

    def negotiate(self, head: Head) -> bool:
        check_answer(head, self._key)
        self.start_stream()
        if not self.opened.done():
            self.opened.set_result(None)
        return True


class WebSocketCarrier:
    """One connection to one gate, made when it is needed first, and made again when it is lost.

    `source` is what datagrams that come this way are said to come from. `drops` counts by reason.
    Set `probe` to something that sends: the gateway learns where we are by what it hears, and after
    a new connection it may be its turn to speak.
    """

    def __init__(
        self,
        gate: Gate,
        outside: Outside,
        *,
        why: str = "",
        clock: Clock = time.monotonic,
        pause: Pause = asyncio.sleep,
    ) -> None:
        self.gate = gate
        self.source: Endpoint = (f"websocket/{gate.host}", gate.port)
        self.drops: Counter[str] = Counter()
        self.refusals = 0
        self.trouble = ""
        self._failed = SILENT
        self._outside = outside
        self._why = why
        self._clock = clock
        self._pause = pause
        self._early: deque[Datagrams] = deque(maxlen=EARLY_TRAINS)
        self._link: Calling | None = None
        self._task: asyncio.Task[None] | None = None
        self._ticker: asyncio.TimerHandle | None = None
        self._lost: asyncio.Future[str] | None = None
        self._deliver: Deliver | None = None
        self._settled: Callable[[], None] | None = None
        self._was_up = False
        self.probe: Callable[[], None] = lambda: None

    # -- as a carrier ---------------------------------------------------------------------------

    @property
    def blocked(self) -> bool:
        """Whether the connection takes no more at the moment."""
        return self._link is not None and self._link.paused_at is not None

    @property
    def is_up(self) -> bool:
        """Whether there is a connection."""
        return self._link is not None

    @property
    def is_begun(self) -> bool:
        """Whether a connection was asked for."""
        return self._task is not None

    def start(self, deliver: Deliver, settled: Callable[[], None]) -> None:
        """Deliver to these from now on; nothing is connected before it is needed."""
        self._deliver, self._settled = deliver, settled

    def open(self) -> None:
        """Connect now, if that is not under way."""
        if self._task is None and self._deliver is not None:
            self._task = asyncio.get_running_loop().create_task(self._stay_connected())

    def send(self, datagrams: Datagrams) -> None:
        """Send, or keep until there is a connection."""
        if self._link is not None:
            self._link.send(datagrams)
            return
        if len(self._early) == EARLY_TRAINS:
            self.drops["websocket not connected"] += 1
        self._early.append(datagrams)
        self.open()

    def close(self) -> None:
        """End the connection and do not make another."""
        self._deliver = None
        if self._ticker is not None:
            self._ticker.cancel()
        if self._task is not None:
            self._task.cancel()
        if self._link is not None:
            link, self._link = self._link, None
            link.fail("ended here")
            # The farewell is on its way if it could be; nobody waits for more.
            link.abort("ended here")
        self._early.clear()

    def route(self) -> Route:
        """How and why."""
        return Route("websocket", str(self.gate), self._why)

    def waiting(self, attempt: int) -> str:
        """What is being waited for."""
        if self._link is not None:
            return f"websocket {self.gate} handshake attempt {attempt} unanswered"
        if self.trouble:
            return f"websocket {self.gate} {self.trouble}"
        return f"websocket {self.gate} is being connected"

    def signs(self) -> tuple[Sign, ...]:
        """One, once a connection was asked for."""
        if self._link is not None:
            return (Sign("websocket", OPEN, str(self.gate)),)
        if not self.is_begun:
            return ()
        return (Sign("websocket", self._failed, str(self.gate), self.trouble),)

    # -- as the owner of a link -----------------------------------------------------------------

    def opened(self, link: Link) -> None:
        """The stream may begin."""
        assert isinstance(link, Calling)
        self._link = link
        # Whatever the address says: there may be a proxy between.
        link.endpoint = self.source
        self.trouble = ""
        while self._early:
            link.send(self._early.popleft())
        self._tick()
        if self._was_up:
            self.probe()
        self._was_up = True

    def deliver(self, octets: memoryview, segment: int, source: Endpoint) -> None:
        """Pass on what came."""
        if self._deliver is not None:
            self._deliver(octets, segment, source)

    def settled(self) -> None:
        """Pass on that there is a pause."""
        if self._settled is not None and self._deliver is not None:
            self._settled()

    def lost(self, link: Link, reason: str) -> None:
        """The link is gone, or did not come to be."""
        assert isinstance(link, Calling)
        if not link.opened.done():
            link.opened.set_exception(ConnectionResetError(reason))
        if self._link is link:
            self._link = None
            if self._lost is not None and not self._lost.done():
                self._lost.set_result(reason)
            # What a full connection held back may go another way now.
            self.settled()

    # -- connecting -----------------------------------------------------------------------------

    def _tick(self) -> None:
        if self._ticker is not None:
            self._ticker.cancel()
        self._ticker = None
        if self._link is not None:
            self._link.tick(self._clock())
            self._ticker = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    async def _stay_connected(self) -> None:
        try:
            while True:
                async for attempt in AsyncRetrying(
                    wait=wait_exponential_jitter(initial=1, max=30, jitter=1),
                    retry=retry_if_exception_type((OSError, Malformed)),
                    before_sleep=self._note,
                    sleep=self._pause,
                ):
                    with attempt:
                        await self._connection()
                # It was a good one, but many may have lost theirs at the same moment.
                await self._pause(1 + os.urandom(1)[0] / 256)
        except WrongKey as error:
            # For good: trying again would only give whoever it is more chances.
            self.trouble, self._failed = str(error), FAILED
            self.refusals += 1
            self.settled()

    def _note(self, state: RetryCallState) -> None:
        assert state.outcome is not None
        error = state.outcome.exception()
        self._failed = _state(error)
        self.trouble = "did not answer in time" if type(error) is TimeoutError else str(error)
        self.settled()

    async def _connection(self) -> None:
        """A connection, from its beginning to its end; OSError or Malformed unless it was long."""
        self._lost = asyncio.get_running_loop().create_future()
        links: list[Calling] = []

        def made() -> Calling:
            links.append(Calling(self, self.gate, self._clock))
            return links[-1]

        try:
            async with asyncio.timeout(OPEN_S):
                link = await reach(
                    self.gate.host, self.gate.port, unverified(), self._outside, made
                )
                await link.opened
        except BaseException:
            for link in links:
                if not link.opened.cancel() and not link.opened.cancelled():
                    # Looked at, so that nobody reports it as forgotten.
                    link.opened.exception()
                link.abort("given up")
            raise
        began = self._clock()
        reason = await self._lost
        if self._clock() - began < STEADY_S:
            raise ConnectionResetError(reason)
        self.trouble = reason


def _state(error: BaseException | None) -> str:
    """What a connection that did not come to be says of the way there."""
    if type(error) is TimeoutError:
        return SILENT
    if isinstance(error, ConnectionRefusedError):
        return REFUSED
    if isinstance(error, OSError) and error.errno in _NO_WAY:
        return BARRED
    return FAILED

"""Waiting for a gateway that does not know our peer yet, and telling why it does not answer.

One policy: WireGuard begins a handshake every 5 s, so at that pace it is looked whether one was
answered, until the limit. Meanwhile a second witness, the platform, is asked what it knows; `judge`
puts both together. Nothing here disturbs the handshake itself, which goes on in the tunnel.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv6Address

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception

from builder_orch.errors import (
    BuilderOrchError,
    GatewayDown,
    PeerNotInstalled,
    PeerUnknown,
    TunnelNotUp,
    UdpBlocked,
)
from builder_orch.pipeline.outside import Platform, Tunnel
from builder_orch.tunnel.carrier import BARRED, FAILED, OPEN, REFUSED, SILENT, Sign

PACE_S = 5.4
"""WireGuard's REKEY_TIMEOUT with its jitter: by then the next initiation is on its way."""
INSTALL_S = 100.0
"""A peer that is older than this has been installed at its gateway."""
LAST_WORD_S = 3.0
"""How long the platform may take to answer when the time for waiting is over."""
DENIALS = 2
"""Times that the platform must disown a peer before we believe it."""

MORE_TIME = (
    "Give it more time with --tunnel-timeout: a new peer may take 95 s. If that does not help, the "
    "gateway has another key than the platform says."
)

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the platform says; None where it says nothing, and `trouble` is why.

    `installed` is whether the gateway was told of the peer, which few platforms know.
    """

    knows_peer: bool | None = None
    has_gateway: bool | None = None
    trouble: str = ""
    installed: bool | None = None

    def __str__(self) -> str:
        if self.knows_peer is False:
            return "the platform does not know the peer"
        if self.has_gateway is False:
            return "the platform says its gateway is not available"
        if self.installed is not None:
            told = "so does its gateway" if self.installed else "its gateway was not told of it yet"
            return f"the platform knows the peer, {told}"
        if self.knows_peer:
            return "the platform knows the peer, and does not say whether its gateway does"
        return f"the platform cannot be asked ({self.trouble})" if self.trouble else ""


@dataclass(frozen=True, slots=True)
class Witness:
    """Asks the platform about one peer."""

    platform: Platform
    address: IPv6Address

    async def ask(self) -> Evidence:
        """What it knows now."""
        try:
            unknown = await self.platform.validate_peers([self.address])
            region = await self.platform.nearest_region()
            installed = await self.platform.is_installed(self.address)
        except BuilderOrchError as error:
            return Evidence(trouble=str(error))
        known = self.address not in unknown
        return Evidence(known, region.available, installed=installed if known else None)


class Readiness:
    """One wait for one tunnel, at most `limit_s` long. Without a witness only the way is judged."""

    def __init__(
        self, tunnel: Tunnel, witness: Witness | None, limit_s: float, report: Report
    ) -> None:
        self._tunnel = tunnel
        self._witness = witness
        self._limit_s = limit_s
        self._report = report
        self._clock = asyncio.get_running_loop().time
        self._began = self._clock()
        self._tried_at = self._began
        self._asking: asyncio.Task[Evidence] | None = None
        self._evidence = Evidence()
        self._denials = 0
        self._said = ""

    async def wait(self) -> float:
        """Seconds until the gateway answered; a kind of TunnelNotUp if it did not."""
        tries = AsyncRetrying(
            retry=retry_if_exception(self._may_come_yet),
            stop=self._is_over,
            wait=self._pace,
            before_sleep=self._look_around,
            reraise=True,
        )
        try:
            await tries(self._try)
        except TunnelNotUp:
            signs = await self._tunnel.signs()
            raise judge(signs, await self._last_word(), self._limit_s, self._said) from None
        finally:
            if self._asking is not None:
                self._asking.cancel()
        return self._elapsed

    @property
    def _elapsed(self) -> float:
        return self._clock() - self._began

    async def _try(self) -> None:
        self._tried_at = self._clock()
        left_s = max(0.0, self._limit_s - self._elapsed)
        await self._tunnel.ready(timeout_s=min(PACE_S, left_s), report=self._hear)

    def _may_come_yet(self, error: BaseException) -> bool:
        return isinstance(error, TunnelNotUp) and self._denials < DENIALS

    def _is_over(self, _: RetryCallState) -> bool:
        return self._elapsed >= self._limit_s

    def _pace(self, _: RetryCallState) -> float:
        # The try itself took that long, unless it could not even begin.
        next_at = min(self._tried_at + PACE_S, self._began + self._limit_s)
        return max(0.0, next_at - self._clock())

    def _hear(self, said: str) -> None:
        # Each try begins by saying what the one before said last.
        if said != self._said:
            self._said = said
            self._tell()

    def _tell(self) -> None:
        parts = [self._said, str(self._evidence), f"{self._elapsed:.0f} of {self._limit_s:.0f} s"]
        self._report("; ".join(part for part in parts if part))

    def _look_around(self, _: RetryCallState) -> None:
        """Ask the witness beside the next try, so that nobody waits for an API."""
        if self._witness is None or (self._asking is not None and not self._asking.done()):
            return
        self._asking = asyncio.create_task(self._witness.ask())
        self._asking.add_done_callback(self._note)

    def _note(self, asked: asyncio.Task[Evidence]) -> None:
        if asked.cancelled():
            return
        told = asked.result()
        self._denials = self._denials + 1 if told.knows_peer is False else 0
        if str(told) != str(self._evidence):
            self._evidence = told
            self._tell()

    async def _last_word(self) -> Evidence:
        if self._witness is None or self._denials >= DENIALS:
            return self._evidence
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORD_S):
                return await self._witness.ask()
        return self._evidence


def judge(signs: Sequence[Sign], evidence: Evidence, limit_s: float, said: str = "") -> TunnelNotUp:
    """Why there was no answer within `limit_s`, from what the way and the platform show.

    `said` is what was waited for, where the evidence is not enough for more.
    """
    within = f"within {limit_s:g} s"
    if evidence.knows_peer is False:
        return PeerUnknown(
            "the platform does not know this peer any more, so its gateway will not answer",
            hint="Make another: fly-build wireguard reset; a deploy takes a new one by itself.",
        )
    udp, websocket = _best(signs, "udp"), _best(signs, "websocket")
    where = " and ".join(f"{sign.kind} {sign.where}" for sign in signs)
    if evidence.has_gateway is False:
        return GatewayDown(
            f"no answer from the gateway ({where}) {within}: the platform says it is not available",
            hint="Wait and run it again; it is for those who run the platform to mend.",
        )
    if websocket is not None and websocket.state == OPEN:
        return _reached(where, evidence, within)
    states = {sign.state for sign in (udp, websocket) if sign is not None}
    if states == {REFUSED}:
        return GatewayDown(
            f"the gateway's host refuses us ({where}): the gateway does not run there",
            hint="Wait and run it again; on a platform of your own: fly-build selfhost status.",
        )
    if evidence.installed is False:
        return PeerNotInstalled(
            f"no answer {within} over {where or 'any way'}; {evidence}. Whether it would answer "
            "this way cannot be seen before",
            hint=MORE_TIME,
        )
    if udp is not None and websocket is not None:
        return UdpBlocked(
            f"neither way to the gateway leads there {within}: {_each(signs)}; {evidence}",
            hint="Let UDP or HTTPS to that address out of this network, or set HTTPS_PROXY. If "
            "others do not get there either, the gateway is down.",
        )
    waited = evidence.installed or (evidence.knows_peer and limit_s >= INSTALL_S)
    if udp is not None and (udp.state == BARRED or waited):
        return UdpBlocked(
            f"UDP does not get to the gateway and back {within}: {_each(signs)}; {evidence}",
            hint="Take another way: --carrier auto goes over HTTPS where UDP is blocked, and shows "
            "whether it is the gateway that does not answer.",
        )
    known = f"; {evidence}" if evidence != Evidence() else ""
    return TunnelNotUp(
        f"the gateway did not answer {within}: {said or where or 'no way to it was tried'}{known}. "
        "A network that blocks this way and a peer that is not installed yet look the same from "
        "here",
        hint="Give it more time with --tunnel-timeout, and more ways with --carrier auto: those "
        "tell one from the other.",
    )


def _reached(where: str, evidence: Evidence, within: str) -> TunnelNotUp:
    """Why a gateway that certainly hears us does not answer."""
    if evidence.installed:
        return TunnelNotUp(
            f"the gateway is reached ({where}) but does not answer this peer {within}, though it "
            f"knows it; {evidence}",
            hint="The gateway may have another key than the platform says, or another machine a "
            "copy of this peer and a later clock: fly-build wireguard reset.",
        )
    return PeerNotInstalled(
        f"the gateway is reached ({where}) but does not know this peer {within}; {evidence}",
        hint=MORE_TIME,
    )


def _best(signs: Sequence[Sign], kind: str) -> Sign | None:
    """Of several ways of a kind (UDP by IPv4 and by IPv6) the one that promises most."""
    order = (OPEN, SILENT, REFUSED, FAILED, BARRED)
    found = [sign for sign in signs if sign.kind == kind]
    return min(found, key=lambda sign: order.index(sign.state), default=None)


def _each(signs: Sequence[Sign]) -> str:
    words = {SILENT: "does not answer", FAILED: "fails", BARRED: "is barred", REFUSED: "is refused"}
    return ", ".join(
        f"{sign.kind} {sign.where} {sign.said or words.get(sign.state, sign.state)}"
        for sign in signs
    )

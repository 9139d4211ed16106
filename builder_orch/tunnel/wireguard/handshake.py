"""One peer's handshakes: what WireGuard adds to Noise (WireGuard paper, 5.4).

Identifier, timestamps, indices and MACs. A handshake that we began is kept apart from those that
the peer begins, so two sides that call each other at the same instant both succeed.
"""

from math import inf

from builder_orch.tunnel.config import PublicKey
from builder_orch.tunnel.machine import Entropy, Malformed, Rejected
from builder_orch.tunnel.wireguard import noise, tai64n
from builder_orch.tunnel.wireguard.cookie import Jar
from builder_orch.tunnel.wireguard.message import CookieReply, Initiation, Response
from builder_orch.tunnel.wireguard.timers import INITIATION_SPACING

IDENTIFIER = b"WireGuard v1 zx2c4 Jason@zx2c4.com"


def read_name(own: noise.Key, initiation: Initiation) -> noise.Named:
    """Who claims to have sent this; the peer of that key must `answer`. Rejected."""
    return noise.read_name(own, initiation.noise, IDENTIFIER)


class Handshake:
    """Both roles towards one peer; ValueError for a public key of low order."""

    def __init__(
        self, own: noise.Key, remote: PublicKey, psk: bytes, entropy: Entropy, epoch: float
    ) -> None:
        self._own = own
        self._remote = remote
        self._entropy = entropy
        self._epoch = epoch
        try:
            self._static_static = own.exchange(remote)
        except Rejected:
            raise ValueError("a public key of low order would agree on no secret") from None
        self._jar = Jar(remote)
        self._pending: tuple[int, noise.Sent] | None = None
        self._last_stamp = bytes(tai64n.STAMP_LEN)
        self._newest_stamp = bytes(tai64n.STAMP_LEN)
        self._answered_at = -inf
        self.psk = psk

    def initiate(self, index: int, now: float) -> bytes:
        """A new initiation under our `index`; whatever was pending is forgotten."""
        stamp = tai64n.stamp(self._epoch + now)
        if stamp <= self._last_stamp:
            stamp = tai64n.after(self._last_stamp)
        self._last_stamp = stamp
        ephemeral = noise.Key(self._entropy(noise.KEY_LEN))
        sent, octets = noise.write_initiation(
            self._own, self._remote, ephemeral, self._static_static, stamp, IDENTIFIER
        )
        self._pending = (index, sent)
        return self._jar.stamp(Initiation(index, octets).emit(), now)

    def finish(self, response: Response) -> noise.Keys:
        """The keys our pending initiation led to. Rejected, and then it stays pending."""
        if self._pending is None or self._pending[0] != response.receiver:
            raise Rejected("unexpected response")
        keys, payload = noise.read_response(self._pending[1], response.noise, self.psk)
        if payload:
            raise Malformed("response with payload")
        self._pending = None
        return keys

    def answer(
        self, named: noise.Named, receiver: int, index: int, now: float
    ) -> tuple[noise.Keys, bytes]:
        """Keys and response for the peer's initiation; Rejected when forged, old or too soon."""
        received = noise.read_payload(named, self._static_static)
        stamp = received.payload
        if len(stamp) != tai64n.STAMP_LEN:
            raise Malformed("initiation without timestamp")
        if stamp <= self._newest_stamp:
            raise Rejected("initiation replayed")
        if now - self._answered_at < INITIATION_SPACING:
            raise Rejected("initiation too soon")
        self._newest_stamp = stamp
        self._answered_at = now
        ephemeral = noise.Key(self._entropy(noise.KEY_LEN))
        keys, octets = noise.write_response(received, ephemeral, self.psk, b"")
        return keys, self._jar.stamp(Response(index, receiver, octets).emit(), now)

    def keep_cookie(self, reply: CookieReply, now: float) -> None:
        """Use the peer's cookie from the next message on. Rejected."""
        self._jar.keep(reply, now)

    def pending(self) -> int | None:
        """The index of our unanswered initiation."""
        return None if self._pending is None else self._pending[0]

    def forget(self) -> None:
        """Drop the unanswered initiation and its keys."""
        self._pending = None

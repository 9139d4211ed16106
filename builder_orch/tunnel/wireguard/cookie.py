"""MACs and cookies: how a busy responder makes callers prove their address.

WireGuard paper, 5.3 and 5.4.7. Three parts: `Jar` stamps what we send, `Door` checks what arrives
and hands out cookies under load, `Limiter` bounds how much one address may ask for.
All of it is slow path.
"""

import hmac
from collections import OrderedDict
from hashlib import blake2s
from ipaddress import IPv6Address, ip_address
from struct import Struct

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from builder_orch.tunnel.machine import Endpoint, Entropy, Rejected
from builder_orch.tunnel.wireguard.message import MAC_LEN, CookieReply

LABEL_MAC1 = b"mac1----"
LABEL_COOKIE = b"cookie--"
COOKIE_REFRESH_TIME = 120.0
"""Seconds for which a cookie, and the secret it was made with, is good."""
NONCE_LEN = 24

SOURCE_RATE = 20.0
"""Handshakes a second that one source may start under load."""
SOURCE_BURST = 5.0
SWEEP_S = 1.0
SOURCES = 16384
"""Sources remembered at once; the longest silent one is forgotten first."""

_WORDS = Struct("<16I")
_FOUR_WORDS = Struct("<4I")


def mac(key: bytes, octets: bytes) -> bytes:
    """Keyed BLAKE2s of 16 octets."""
    return blake2s(octets, key=key, digest_size=MAC_LEN).digest()


def label_key(label: bytes, public: bytes) -> bytes:
    """The key, known to all who know `public`, for mac1 or for sealing a cookie."""
    return blake2s(label + public).digest()


def hchacha20(key: bytes, nonce: bytes) -> bytes:
    """A subkey of 32 octets from a nonce of 16 (draft-irtf-cfrg-xchacha-03, section 2.2).

    It is the ChaCha20 block function without the final addition of the initial state, so it can be
    had from one block of key stream by subtracting the words of that state again.
    """
    block = Cipher(ChaCha20(key, nonce), mode=None).encryptor().update(bytes(_WORDS.size))
    words = _WORDS.unpack(block)
    before = _FOUR_WORDS.unpack(b"expand 32-byte k") + _FOUR_WORDS.unpack(nonce)
    after = words[:4] + words[12:]
    mixed = [(late - early) % 2**32 for late, early in zip(after, before, strict=True)]
    return _FOUR_WORDS.pack(*mixed[:4]) + _FOUR_WORDS.pack(*mixed[4:])


def xchacha_seal(key: bytes, nonce: bytes, octets: bytes, associated: bytes) -> bytes:
    """XChaCha20-Poly1305 with a nonce of 24 octets."""
    aead = ChaCha20Poly1305(hchacha20(key, nonce[:16]))
    return aead.encrypt(bytes(4) + nonce[16:], octets, associated)


def xchacha_open(key: bytes, nonce: bytes, sealed: bytes, associated: bytes) -> bytes:
    """The inverse of `xchacha_seal`; Rejected when the tag is wrong."""
    aead = ChaCha20Poly1305(hchacha20(key, nonce[:16]))
    try:
        return aead.decrypt(bytes(4) + nonce[16:], sealed, associated)
    except InvalidTag:
        raise Rejected("forged cookie") from None


class Jar:
    """The sender's side, one per peer: both MACs for what we send, and the peer's last cookie."""

    def __init__(self, remote: bytes) -> None:
        self._mac1_key = label_key(LABEL_MAC1, remote)
        self._cookie_key = label_key(LABEL_COOKIE, remote)
        self._last_mac1: bytes | None = None
        self._cookie = b""
        self._cookie_at = 0.0

    def stamp(self, octets: bytes, now: float) -> bytes:
        """`octets` with mac1 and, while the peer's cookie is fresh, mac2."""
        mac1 = self._last_mac1 = mac(self._mac1_key, octets)
        octets += mac1
        if self._cookie and now - self._cookie_at < COOKIE_REFRESH_TIME:
            return octets + mac(self._cookie, octets)
        return octets + bytes(MAC_LEN)

    def keep(self, reply: CookieReply, now: float) -> None:
        """Take the cookie for the next attempt; Rejected unless it answers our last message."""
        if self._last_mac1 is None:
            raise Rejected("unexpected cookie")
        self._cookie = xchacha_open(self._cookie_key, reply.nonce, reply.sealed, self._last_mac1)
        self._cookie_at = now
        # One message, one cookie: a repeated reply must not make an old cookie look young.
        self._last_mac1 = None


class Door:
    """The receiver's side, one per interface."""

    def __init__(self, own: bytes, entropy: Entropy) -> None:
        self._mac1_key = label_key(LABEL_MAC1, own)
        self._cookie_key = label_key(LABEL_COOKIE, own)
        self._entropy = entropy
        self._secret = b""
        self._secret_at = 0.0

    def is_addressed(self, octets: bytes) -> bool:
        """Whether mac1 is right: the sender knows our public key. No DH is done before this."""
        expected = mac(self._mac1_key, octets[: -2 * MAC_LEN])
        return hmac.compare_digest(expected, octets[-2 * MAC_LEN : -MAC_LEN])

    def is_reachable(self, octets: bytes, source: Endpoint, now: float) -> bool:
        """Whether mac2 is right: the sender has read a cookie that we sent to `source`."""
        if not self._secret or now - self._secret_at >= COOKIE_REFRESH_TIME:
            return False
        expected = mac(self._cookie(source), octets[:-MAC_LEN])
        return hmac.compare_digest(expected, octets[-MAC_LEN:])

    def reply(self, octets: bytes, sender: int, source: Endpoint, now: float) -> CookieReply:
        """A cookie for `source`, sealed so that only the sender of `octets` can read it."""
        if not self._secret or now - self._secret_at >= COOKIE_REFRESH_TIME:
            self._secret, self._secret_at = self._entropy(32), now
        nonce = self._entropy(NONCE_LEN)
        mac1 = octets[-2 * MAC_LEN : -MAC_LEN]
        sealed = xchacha_seal(self._cookie_key, nonce, self._cookie(source), mac1)
        return CookieReply(sender, nonce, sealed)

    def _cookie(self, source: Endpoint) -> bytes:
        host, port = source
        return mac(self._secret, f"{host} {port}".encode())


class Limiter:
    """A token bucket for each source: an IPv4 address, or an IPv6 /64 as one host may own it."""

    def __init__(self) -> None:
        self._buckets: OrderedDict[bytes, tuple[float, float]] = OrderedDict()
        self._swept_at = 0.0

    def __len__(self) -> int:
        return len(self._buckets)

    def allow(self, host: str, now: float) -> bool:
        """Take one token of `host` if it has one."""
        self.sweep(now)
        source = _source(host)
        tokens, at = self._buckets.pop(source, (SOURCE_BURST, now))
        tokens = min(SOURCE_BURST, tokens + (now - at) * SOURCE_RATE)
        allowed = tokens >= 1
        self._buckets[source] = (tokens - 1 if allowed else tokens, now)
        if len(self._buckets) > SOURCES:
            self._buckets.popitem(last=False)
        return allowed

    def sweep(self, now: float) -> None:
        """Forget, at most once a second, the sources that have been silent for as long."""
        if now - self._swept_at < SWEEP_S:
            return
        self._swept_at = now
        while self._buckets:
            oldest = next(iter(self._buckets))
            if now - self._buckets[oldest][1] < SWEEP_S:
                break
            del self._buckets[oldest]


def _source(host: str) -> bytes:
    try:
        address = ip_address(host)
    except ValueError:
        # A carrier that is no UDP socket may name its far end otherwise.
        return host.encode()
    return address.packed[:8] if isinstance(address, IPv6Address) else address.packed

"""Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s (Noise revision 34, section 5; WireGuard paper, 5.4).

Both sides as functions from a transcript to the next one. Prologue and payloads are parameters, so
that vectors of Noise itself can be run; WireGuard fixes them in `handshake`.
"""

import hmac
from dataclasses import dataclass
from hashlib import blake2s
from typing import Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from builder_orch.tunnel.machine import Malformed, Rejected

CONSTRUCTION = b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s"
KEY_LEN = 32
TAG_LEN = 16
_NONCE = bytes(12)
"""Every handshake key seals exactly one message, so the nonce never moves."""


def kdf(key: bytes, material: bytes, count: int) -> tuple[bytes, ...]:
    """HKDF over HMAC-BLAKE2s: the first `count` (1 to 3) outputs of 32 octets."""
    secret = _hmac(key, material)
    outputs: list[bytes] = []
    last = b""
    for number in range(1, count + 1):
        last = _hmac(secret, last + bytes([number]))
        outputs.append(last)
    return tuple(outputs)


def _hmac(key: bytes, octets: bytes) -> bytes:
    return hmac.new(key, octets, blake2s).digest()


class Key:
    """An X25519 private key that keeps its octets to itself."""

    __slots__ = ("_private", "public")

    def __init__(self, private: bytes) -> None:
        self._private = X25519PrivateKey.from_private_bytes(private)
        self.public = self._private.public_key().public_bytes_raw()

    def exchange(self, public: bytes) -> bytes:
        """The shared secret; Rejected for a point of low order, whose secret everybody knows."""
        try:
            return self._private.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError:
            raise Rejected("low order point") from None


@dataclass(frozen=True, slots=True, repr=False)
class Transcript:
    """Chaining key and hash (Noise `SymmetricState`) between two tokens."""

    chaining: bytes
    digest: bytes

    @classmethod
    def begin(cls, responder: bytes, prologue: bytes) -> Self:
        """Pre-message of IK: the initiator knows the responder's static public key."""
        chaining = blake2s(CONSTRUCTION).digest()
        start = cls(chaining, chaining)
        return start.absorb(prologue).absorb(responder)

    def absorb(self, octets: bytes) -> Self:
        """MixHash."""
        return type(self)(self.chaining, blake2s(self.digest + octets).digest())

    def stir(self, material: bytes) -> Self:
        """MixKey where the key that comes with it is not used: psk-mode `e` tokens."""
        (chaining,) = kdf(self.chaining, material, 1)
        return type(self)(chaining, self.digest)

    def mix(self, material: bytes) -> tuple[Self, bytes]:
        """MixKey: the next transcript and the key for one sealed field."""
        chaining, key = kdf(self.chaining, material, 2)
        return type(self)(chaining, self.digest), key

    def mix_psk(self, psk: bytes) -> tuple[Self, bytes]:
        """MixKeyAndHash."""
        chaining, temporary, key = kdf(self.chaining, psk, 3)
        return type(self)(chaining, self.digest).absorb(temporary), key

    def seal(self, key: bytes, octets: bytes) -> tuple[Self, bytes]:
        """EncryptAndHash."""
        sealed = ChaCha20Poly1305(key).encrypt(_NONCE, octets, self.digest)
        return self.absorb(sealed), sealed

    def open(self, key: bytes, sealed: bytes) -> tuple[Self, bytes]:
        """DecryptAndHash; Rejected when the tag is wrong."""
        try:
            octets = ChaCha20Poly1305(key).decrypt(_NONCE, sealed, self.digest)
        except InvalidTag:
            raise Rejected("forged handshake") from None
        return self.absorb(sealed), octets

    def split(self, *, initiator: bool) -> "Keys":
        """The transport keys."""
        first, second = kdf(self.chaining, b"", 2)
        send, receive = (first, second) if initiator else (second, first)
        return Keys(send, receive, self.digest)


@dataclass(frozen=True, slots=True, repr=False)
class Keys:
    """What a finished handshake leaves: a key for each direction and the handshake hash."""

    send: bytes
    receive: bytes
    digest: bytes


@dataclass(frozen=True, slots=True, repr=False)
class Sent:
    """The initiator's side between the two messages."""

    transcript: Transcript
    own: Key
    ephemeral: Key


@dataclass(frozen=True, slots=True, repr=False)
class Named:
    """The responder's side once it knows who calls, before it believes it."""

    transcript: Transcript
    remote: bytes
    remote_ephemeral: bytes
    sealed_payload: bytes


@dataclass(frozen=True, slots=True, repr=False)
class Received:
    """The responder's side after the whole initiation was authentic."""

    transcript: Transcript
    remote: bytes
    remote_ephemeral: bytes
    payload: bytes


def write_initiation(
    own: Key, remote: bytes, ephemeral: Key, static_static: bytes, payload: bytes, prologue: bytes
) -> tuple[Sent, bytes]:
    """`-> e, es, s, ss`. `static_static` is `own.exchange(remote)`, which callers keep per peer."""
    transcript = Transcript.begin(remote, prologue).absorb(ephemeral.public).stir(ephemeral.public)
    transcript, key = transcript.mix(ephemeral.exchange(remote))
    transcript, sealed_static = transcript.seal(key, own.public)
    transcript, key = transcript.mix(static_static)
    transcript, sealed_payload = transcript.seal(key, payload)
    octets = ephemeral.public + sealed_static + sealed_payload
    return Sent(transcript, own, ephemeral), octets


def read_name(own: Key, octets: bytes, prologue: bytes) -> Named:
    """The first half of the initiation, as far as the caller's static key; one DH. Rejected."""
    if len(octets) < 2 * KEY_LEN + 2 * TAG_LEN:
        raise Malformed("short initiation")
    remote_ephemeral = octets[:KEY_LEN]
    sealed_static = octets[KEY_LEN : 2 * KEY_LEN + TAG_LEN]
    transcript = Transcript.begin(own.public, prologue)
    transcript = transcript.absorb(remote_ephemeral).stir(remote_ephemeral)
    transcript, key = transcript.mix(own.exchange(remote_ephemeral))
    transcript, remote = transcript.open(key, sealed_static)
    return Named(transcript, remote, remote_ephemeral, octets[2 * KEY_LEN + TAG_LEN :])


def read_payload(named: Named, static_static: bytes) -> Received:
    """The other half: proves that the caller owns the static key it named. Rejected."""
    transcript, key = named.transcript.mix(static_static)
    transcript, payload = transcript.open(key, named.sealed_payload)
    return Received(transcript, named.remote, named.remote_ephemeral, payload)


def write_response(
    received: Received, ephemeral: Key, psk: bytes, payload: bytes
) -> tuple[Keys, bytes]:
    """`<- e, ee, se, psk`: the responder's keys and the octets that give the initiator the same."""
    transcript = received.transcript.absorb(ephemeral.public).stir(ephemeral.public)
    transcript = transcript.stir(ephemeral.exchange(received.remote_ephemeral))
    transcript = transcript.stir(ephemeral.exchange(received.remote))
    transcript, key = transcript.mix_psk(psk)
    transcript, sealed = transcript.seal(key, payload)
    return transcript.split(initiator=False), ephemeral.public + sealed


def read_response(sent: Sent, octets: bytes, psk: bytes) -> tuple[Keys, bytes]:
    """The initiator's keys and the response's payload. Rejected."""
    remote_ephemeral, sealed = octets[:KEY_LEN], octets[KEY_LEN:]
    if len(sealed) < TAG_LEN:
        raise Malformed("short response")
    transcript = sent.transcript.absorb(remote_ephemeral).stir(remote_ephemeral)
    transcript = transcript.stir(sent.ephemeral.exchange(remote_ephemeral))
    transcript = transcript.stir(sent.own.exchange(remote_ephemeral))
    transcript, key = transcript.mix_psk(psk)
    transcript, payload = transcript.open(key, sealed)
    return transcript.split(initiator=True), payload

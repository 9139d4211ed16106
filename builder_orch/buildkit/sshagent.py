"""SSH agents that a build may ask to sign: one that listens on a socket, or one made of key files.

The agent protocol (draft-ietf-sshm-ssh-agent): a length in 4 octets, a type in one, then strings.
The one made here lists its keys and signs with them, and refuses whatever else is asked.
"""

import asyncio
import base64
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    SECP256R1,
    SECP384R1,
    SECP521R1,
    EllipticCurvePrivateKey,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512, HashAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
)

from builder_orch.tunnel.machine import Malformed

FAILURE, REQUEST_IDENTITIES, IDENTITIES_ANSWER, SIGN_REQUEST, SIGN_RESPONSE = 5, 11, 12, 13, 14
RSA_SHA2_256, RSA_SHA2_512 = 2, 4
"""Flags of a SIGN_REQUEST. Without either SHA-1 is meant, which nobody should be given any more."""
LONGEST = 256 * 1024
"""Octets of one message, as OpenSSH has it."""
READ = 32 * 1024

_CURVES: dict[str, tuple[bytes, type[HashAlgorithm]]] = {
    SECP256R1.name: (b"nistp256", SHA256),
    SECP384R1.name: (b"nistp384", SHA384),
    SECP521R1.name: (b"nistp521", SHA512),
}

PrivateKey = Ed25519PrivateKey | RSAPrivateKey | EllipticCurvePrivateKey
Incoming = AsyncGenerator[bytes, None]
Answer = Callable[[bytes], Awaitable[None]]


class Unusable(Exception):
    """A key file cannot be used; the text says why, and holds nothing of it."""


class Agent(Protocol):
    """Whatever answers an ssh client inside a build."""

    async def converse(self, incoming: Incoming, answer: Answer) -> None:
        """Take octets until there are no more; OSError when the agent is not there."""
        ...


@dataclass(frozen=True, slots=True)
class SocketAgent:
    """An agent that runs already, as ssh-agent or gpg-agent do."""

    path: Path

    async def converse(self, incoming: Incoming, answer: Answer) -> None:
        reader, writer = await asyncio.open_unix_connection(self.path)

        async def back() -> None:
            while octets := await reader.read(READ):
                await answer(octets)

        answering = asyncio.create_task(back())
        try:
            async for octets in incoming:
                writer.write(octets)
                await writer.drain()
            writer.write_eof()
            await answering
        finally:
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)
            writer.close()


@dataclass(frozen=True, slots=True)
class Key:
    """A private key, and its public half in the form of the protocol."""

    private: PrivateKey = field(repr=False)
    public: bytes
    comment: str

    @classmethod
    def read(cls, path: Path) -> Self:
        """An OpenSSH or PEM file; Unusable for any other, and for one behind a passphrase."""
        try:
            octets = path.read_bytes()
        except OSError as error:
            raise Unusable(f"it cannot be read: {error.strerror}") from None
        load = load_ssh_private_key if b"OPENSSH PRIVATE KEY" in octets else load_pem_private_key
        try:
            private = load(octets, password=None)
        except TypeError:
            raise Unusable("it is behind a passphrase, which nobody could be asked for") from None
        except (ValueError, UnsupportedAlgorithm):
            raise Unusable("it is no private key of a kind that is known here") from None
        if not isinstance(private, Ed25519PrivateKey | RSAPrivateKey | EllipticCurvePrivateKey):
            raise Unusable("it is a key of a kind that is not used for logins any more")
        if isinstance(private, EllipticCurvePrivateKey) and private.curve.name not in _CURVES:
            raise Unusable(f"its curve {private.curve.name} is none of ssh's")
        line = private.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        return cls(private, base64.b64decode(line.split()[1]), path.name)

    def sign(self, content: bytes, flags: int) -> bytes:
        """A signature with its name before it."""
        match self.private:
            case Ed25519PrivateKey():
                return string(b"ssh-ed25519") + string(self.private.sign(content))
            case RSAPrivateKey():
                if flags & RSA_SHA2_512:
                    signed = self.private.sign(content, PKCS1v15(), SHA512())
                    return string(b"rsa-sha2-512") + string(signed)
                if flags & RSA_SHA2_256:
                    signed = self.private.sign(content, PKCS1v15(), SHA256())
                    return string(b"rsa-sha2-256") + string(signed)
                raise Malformed("a signature with SHA-1")
            case EllipticCurvePrivateKey():
                curve, kind = _CURVES[self.private.curve.name]
                pair = decode_dss_signature(self.private.sign(content, ECDSA(kind())))
                blob = b"".join(map(_mpint, pair))
                return string(b"ecdsa-sha2-" + curve) + string(blob)


@dataclass(frozen=True, slots=True)
class KeyAgent:
    """An agent with some keys, as long as a build lasts."""

    keys: tuple[Key, ...]

    @classmethod
    def of(cls, paths: Iterable[Path]) -> Self:
        """From files; Unusable names the one that is wrong."""
        return cls(tuple(map(_read, paths)))

    async def converse(self, incoming: Incoming, answer: Answer) -> None:
        pending = bytearray()
        async for octets in incoming:
            pending += octets
            while len(pending) >= 4:
                size = int.from_bytes(pending[:4], "big")
                if size > LONGEST:
                    raise ConnectionAbortedError(f"a message of {size} octets")
                if len(pending) < 4 + size:
                    break
                request = bytes(pending[4 : 4 + size])
                del pending[: 4 + size]
                await answer(string(self.reply(request)))

    def reply(self, request: bytes) -> bytes:
        """To one message."""
        try:
            if request[:1] == bytes([REQUEST_IDENTITIES]):
                return self._identities()
            if request[:1] == bytes([SIGN_REQUEST]):
                return self._signature(request[1:])
            return bytes([FAILURE])
        except Malformed:
            return bytes([FAILURE])

    def _identities(self) -> bytes:
        listed = [string(key.public) + string(key.comment.encode()) for key in self.keys]
        return bytes([IDENTITIES_ANSWER]) + len(listed).to_bytes(4, "big") + b"".join(listed)

    def _signature(self, rest: bytes) -> bytes:
        public, rest = _cut(rest)
        content, rest = _cut(rest)
        if len(rest) != 4:
            raise Malformed("no flags")
        for key in self.keys:
            if key.public == public:
                signed = key.sign(content, int.from_bytes(rest, "big"))
                return bytes([SIGN_RESPONSE]) + string(signed)
        raise Malformed("a key that is not here")


def string(octets: bytes) -> bytes:
    """With its length before it."""
    return len(octets).to_bytes(4, "big") + octets


def _cut(octets: bytes) -> tuple[bytes, bytes]:
    size = int.from_bytes(octets[:4], "big")
    if len(octets) < 4 + size:
        raise Malformed("a string that ends before its end")
    return octets[4 : 4 + size], octets[4 + size :]


def _mpint(number: int) -> bytes:
    return string(number.to_bytes(number.bit_length() // 8 + 1, "big"))


def _read(path: Path) -> Key:
    try:
        return Key.read(path)
    except Unusable as error:
        raise Unusable(f"{path}: {error}") from None

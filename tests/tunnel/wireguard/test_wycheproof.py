"""Project Wycheproof's vectors through what the tunnel computes with.

FLY_BUILD_WYCHEPROOF names the folder `testvectors_v1` of a copy of github.com/C2SP/wycheproof. It
is read in place: the vectors are not ours, and no package of `cryptography` carries them.
"""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidTag

from builder_orch.tunnel.machine import Rejected
from builder_orch.tunnel.wireguard.message import HEADER_LEN, TAG_LEN
from builder_orch.tunnel.wireguard.noise import KEY_LEN, Key, Keys, read_name
from builder_orch.tunnel.wireguard.session import Aead, Session

FOLDER = os.environ.get("FLY_BUILD_WYCHEPROOF")
"""Asked for here, because tests run without variables of this name."""
NONCE_LEN = 12
REST = bytes(KEY_LEN + 2 * TAG_LEN)
"""What follows the point of an initiation; no key opens it."""

pytestmark = pytest.mark.skipif(
    not FOLDER, reason="FLY_BUILD_WYCHEPROOF does not name a folder with Wycheproof's vectors"
)


def vectors(name: str) -> list[dict[str, Any]]:
    """All vectors of a file."""
    assert FOLDER
    document = json.loads((Path(FOLDER) / name).read_text(encoding="utf-8"))
    tests = [test for group in document["testGroups"] for test in group["tests"]]
    assert len(tests) == document["numberOfTests"] > 0
    return tests


def octets(vector: dict[str, Any], *names: str) -> list[bytes]:
    return [bytes.fromhex(vector[name]) for name in names]


def test_shared_secrets() -> None:
    """RFC 7748 §5: twisted and non-canonical points count, but none that gives zero (§6.1)."""
    seen: Counter[str] = Counter()
    for vector in vectors("x25519_test.json"):
        private, point, shared = octets(vector, "private", "public", "shared")
        assert ("ZeroSharedSecret" in vector["flags"]) is not any(shared), vector
        key = Key(private)
        if any(shared):
            assert key.exchange(point) == shared, vector
            # As far as the exchange the handshake takes it.
            with pytest.raises(Rejected, match="forged handshake"):
                read_name(key, point + REST, b"")
        else:
            with pytest.raises(Rejected, match="low order point"):
                key.exchange(point)
            with pytest.raises(Rejected, match="low order point"):
                read_name(key, point + REST, b"")
        seen.update(["agreed" if any(shared) else "refused", *vector["flags"]])
    assert seen["agreed"] > seen["refused"] > 0
    assert seen["NonCanonicalPublic"]
    assert seen["Twist"]
    print(dict(seen))  # noqa: T201


class Told:
    """A cipher that takes a vector's nonce and associated data for those of whoever calls."""

    def __init__(self, cipher: Aead, nonce: bytes, associated: bytes) -> None:
        self._cipher = cipher
        self._told = nonce, associated

    def encrypt(self, nonce: bytes, data: bytes, associated_data: bytes | None) -> bytes:
        told, associated = self._told
        return self._cipher.encrypt(told, data, associated)

    def encrypt_into(
        self, nonce: bytes, data: bytes, associated_data: bytes | None, buf: memoryview
    ) -> int:
        told, associated = self._told
        return self._cipher.encrypt_into(told, data, associated, buf)

    def decrypt(
        self, nonce: bytes, data: bytes | memoryview, associated_data: bytes | None
    ) -> bytes:
        told, associated = self._told
        return self._cipher.decrypt(told, data, associated)

    def decrypt_into(
        self,
        nonce: bytes,
        data: bytes | memoryview,
        associated_data: bytes | None,
        buf: memoryview,
    ) -> int:
        told, associated = self._told
        return self._cipher.decrypt_into(told, data, associated, buf)


def session(key: bytes, nonce: bytes, associated: bytes) -> Session:
    """A session that sends to itself, told what a counter cannot express."""

    class Fixed(Session):
        def cipher(self, key: bytes) -> Aead:
            return Told(super().cipher(key), nonce, associated)

    return Fixed(Keys(key, key, b""), local=7, remote=7, born=0.0, initiator=True)


def through_a_session(
    told: Session, text: bytes, sealed: bytes, *, count: int
) -> tuple[bool, list[bytes], Counter[str]]:
    """Whether `count` texts are sealed to this, what opening as many gives, and what is dropped."""
    train, segment = told.seal([text] * count, len(text))
    size = HEADER_LEN + len(sealed)
    heads = [train[at : at + HEADER_LEN] for at in range(0, len(train), segment)]
    wire = b"".join(head + sealed for head in heads)
    drops: Counter[str] = Counter()
    opened, end = told.open(memoryview(wire), 0, size, drops)
    assert end == len(wire)
    return train == wire, list(opened), drops


def test_ciphers() -> None:
    """RFC 8439 §2.8: forged ones become a drop, one at a time and in a train."""
    seen: Counter[str] = Counter()
    for vector in vectors("chacha20_poly1305_test.json"):
        key, nonce, associated, text, sealed, tag = octets(
            vector, "key", "iv", "aad", "msg", "ct", "tag"
        )
        cipher = Session(Keys(key, key, b""), local=7, remote=7, born=0.0, initiator=True).cipher(
            key
        )
        sealed += tag
        seen.update([vector["result"], *vector["flags"]])
        if len(nonce) != NONCE_LEN:
            # A counter always makes twelve octets of nonce.
            assert vector["result"] == "invalid"
            with pytest.raises(ValueError, match=r"[Nn]once"):
                cipher.encrypt(nonce, text, associated)
            with pytest.raises(ValueError, match=r"[Nn]once"):
                cipher.decrypt(nonce, sealed, associated)
            continue
        seen["of a counter"] += nonce.startswith(bytes(4))
        is_valid = vector["result"] == "valid"
        if is_valid:
            assert cipher.encrypt(nonce, text, associated) == sealed, vector
            assert cipher.decrypt(nonce, memoryview(sealed), associated) == text, vector
        else:
            with pytest.raises(InvalidTag):
                cipher.decrypt(nonce, memoryview(sealed), associated)
        for count in (1, 3):
            same, opened, drops = through_a_session(
                session(key, nonce, associated), text, sealed, count=count
            )
            assert same is is_valid, vector
            assert opened == ([text] * count if is_valid else []), vector
            assert drops == ({} if is_valid else {"forged": count}), vector
    assert seen["valid"] > seen["invalid"] > 0
    assert seen["of a counter"]
    print(dict(seen))  # noqa: T201

"""SSH certificates: the platform's authority signs a user's key for some names and some hours."""

from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    SSHCertificateBuilder,
    SSHCertificateType,
    load_ssh_public_key,
)

from builder_orch.selfhost.database import Code, Refused
from builder_orch.selfhost.rows import OrganizationRow, TokenRow
from builder_orch.selfhost.store import Store

SHORTEST_H: Final = 1
LONGEST_H: Final = 72
USUAL_H: Final = 24
BACKDATED_S: Final = 60
"""Clocks differ: a certificate is good already this long before it was issued."""
PRINCIPAL_LIMIT: Final = 64
EXTENSIONS: Final = (b"permit-port-forwarding", b"permit-pty")
APPS_EXTENSION: Final = b"app-names@builder-orch"
"""Which apps' machines should let the holder in, joined by commas; empty for all."""

_PURPOSE: Final = "ssh-user"


def authority(store: Store) -> Ed25519PrivateKey:
    """The key that signs; made once and kept in the store."""
    octets = store.authority(_PURPOSE, lambda: Ed25519PrivateKey.generate().private_bytes_raw())
    return Ed25519PrivateKey.from_private_bytes(octets)


def authority_line(store: Store) -> str:
    """Its public half as an authorized_keys line, for TrustedUserCAKeys."""
    public = authority(store).public_key()
    return public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode("ascii")


def issue(
    store: Store,
    token: TokenRow,
    organization: OrganizationRow,
    *,
    public_key: str,
    principals: list[str],
    apps: list[str],
    hours: int | None,
    now: float,
) -> str:
    """A user certificate as an authorized_keys line; `now` is Unix seconds."""
    wanted_h = USUAL_H if hours is None else hours
    if not SHORTEST_H <= wanted_h <= LONGEST_H:
        raise Refused(Code.INVALID, f"validHours is {SHORTEST_H} to {LONGEST_H}")
    if not principals:
        raise Refused(Code.INVALID, "principals are missing: a certificate without is everybody's")
    for principal in principals:
        if not _is_principal(principal):
            raise Refused(Code.INVALID, "a principal is 1 to 64 letters, digits and . _ - @")
    key = _key(public_key)
    valid_from, valid_until = now - BACKDATED_S, now + wanted_h * 3600
    serial = store.record_certificate(
        token,
        organization,
        principals=principals,
        apps=apps,
        public_key=public_key,
        valid_from=valid_from,
        valid_until=valid_until,
    )
    builder = (
        SSHCertificateBuilder()
        .public_key(key)
        .serial(serial)
        .type(SSHCertificateType.USER)
        .key_id(f"{token.owner}@{organization.slug}".encode())
        .valid_principals([principal.encode() for principal in principals])
        .valid_after(int(valid_from))
        .valid_before(int(valid_until))
    )
    for name in EXTENSIONS:
        builder = builder.add_extension(name, b"")
    builder = builder.add_extension(APPS_EXTENSION, _string(",".join(apps).encode()))
    return builder.sign(authority(store)).public_bytes().decode("ascii")


def _string(octets: bytes) -> bytes:
    """An SSH string (RFC 4251 section 5), which the value of an extension has inside its own."""
    return len(octets).to_bytes(4, "big") + octets


def _is_principal(text: str) -> bool:
    plain = text.replace(".", "").replace("_", "").replace("-", "").replace("@", "")
    return plain.isascii() and plain.isalnum() and len(text) <= PRINCIPAL_LIMIT


def _key(line: str) -> Ed25519PublicKey | EllipticCurvePublicKey:
    try:
        key = load_ssh_public_key(line.encode())
    except (ValueError, UnsupportedAlgorithm):
        raise Refused(Code.INVALID, "publicKey is not an authorized_keys line") from None
    if not isinstance(key, Ed25519PublicKey | EllipticCurvePublicKey):
        raise Refused(Code.INVALID, "publicKey is neither ed25519 nor ecdsa")
    return key

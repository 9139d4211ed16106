"""The Noise pattern against vectors of others, and what it refuses."""

import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from builder_orch.tunnel.machine import Malformed, Rejected
from builder_orch.tunnel.wireguard.noise import (
    Key,
    Keys,
    kdf,
    read_name,
    read_payload,
    read_response,
    write_initiation,
    write_response,
)
from tests.tunnel.wireguard.lab import vectors

LOW_ORDER = [
    bytes(32),
    bytes([1]) + bytes(31),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    bytes.fromhex("ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    bytes.fromhex("edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    bytes.fromhex("eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
]


def shake(*, psk: bytes = bytes(32), responder_psk: bytes | None = None) -> tuple[Keys, Keys]:
    """A whole handshake between two fixed sides."""
    left, right = Key(bytes([1]) * 32), Key(bytes([2]) * 32)
    secret = left.exchange(right.public)
    sent, octets = write_initiation(left, right.public, Key(bytes([3]) * 32), secret, b"hi", b"p")
    received = read_payload(read_name(right, octets, b"p"), right.exchange(left.public))
    assert (received.remote, received.payload) == (left.public, b"hi")
    other = psk if responder_psk is None else responder_psk
    theirs, answer = write_response(received, Key(bytes([4]) * 32), other, b"")
    ours, payload = read_response(sent, answer, psk)
    assert payload == b""
    return ours, theirs


def test_cacophony_vector_both_sides() -> None:
    vector = vectors()["noise_ikpsk2_cacophony"]["vector"]
    prologue = bytes.fromhex(vector["init_prologue"])
    psk = bytes.fromhex(vector["init_psks"][0])
    left = Key(bytes.fromhex(vector["init_static"]))
    right = Key(bytes.fromhex(vector["resp_static"]))
    assert right.public.hex() == vector["init_remote_static"]
    messages = [
        (bytes.fromhex(message["payload"]), bytes.fromhex(message["ciphertext"]))
        for message in vector["messages"]
    ]

    ephemeral = Key(bytes.fromhex(vector["init_ephemeral"]))
    sent, octets = write_initiation(
        left, right.public, ephemeral, left.exchange(right.public), messages[0][0], prologue
    )
    assert octets == messages[0][1]
    named = read_name(right, octets, prologue)
    assert named.remote == left.public
    received = read_payload(named, right.exchange(left.public))
    assert received.payload == messages[0][0]

    ephemeral = Key(bytes.fromhex(vector["resp_ephemeral"]))
    theirs, octets = write_response(received, ephemeral, psk, messages[1][0])
    assert octets == messages[1][1]
    ours, payload = read_response(sent, octets, psk)
    assert payload == messages[1][0]
    assert ours.digest.hex() == theirs.digest.hex() == vector["handshake_hash"]

    # The transport messages alternate, the initiator first; each direction counts by itself.
    for number, (plain, sealed) in enumerate(messages[2:]):
        keys, other = (ours, theirs) if number % 2 == 0 else (theirs, ours)
        nonce = bytes(4) + (number // 2).to_bytes(8, "little")
        assert ChaCha20Poly1305(keys.send).encrypt(nonce, plain, None) == sealed
        assert ChaCha20Poly1305(other.receive).decrypt(nonce, sealed, None) == plain


def test_kdf_vectors() -> None:
    for case in vectors()["kdf"]["cases"]:
        key, material = bytes.fromhex(case["key"]), bytes.fromhex(case["input"])
        expected = tuple(bytes.fromhex(case[name]) for name in ("t0", "t1", "t2"))
        for count in (1, 2, 3):
            assert kdf(key, material, count) == expected[:count]


def test_x25519_of_rfc_7748_section_5_2() -> None:
    scalar = "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4"
    point = "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c"
    product = "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"
    assert Key(bytes.fromhex(scalar)).exchange(bytes.fromhex(point)).hex() == product


@pytest.mark.parametrize(
    ("times", "result"),
    [
        (1, "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079"),
        (1000, "684cf59ba83309552800ef566f2f4d3c1c3887c49360e3875f2eb94d99532c51"),
    ],
)
def test_x25519_again_and_again(times: int, result: str) -> None:
    """RFC 7748, section 5.2: the result becomes the scalar, the scalar the point."""
    scalar = point = bytes([9]) + bytes(31)
    for _ in range(times):
        scalar, point = Key(scalar).exchange(point), scalar
    assert scalar.hex() == result


@pytest.mark.parametrize("point", LOW_ORDER, ids=bytes.hex)
def test_points_of_low_order_are_rejected(point: bytes) -> None:
    key = Key(bytes([7]) * 32)
    with pytest.raises(Rejected, match="low order"):
        key.exchange(point)
    with pytest.raises(Rejected, match="low order"):
        read_name(key, point + bytes(76), b"")


def test_both_sides_agree_crosswise() -> None:
    ours, theirs = shake()
    assert (ours.send, ours.receive, ours.digest) == (theirs.receive, theirs.send, theirs.digest)
    assert ours.send != ours.receive


def test_another_preshared_key_is_rejected() -> None:
    with pytest.raises(Rejected, match="forged"):
        shake(psk=bytes([5]) * 32, responder_psk=bytes([6]) * 32)


def test_every_flipped_bit_of_an_initiation_is_rejected() -> None:
    left, right = Key(bytes([1]) * 32), Key(bytes([2]) * 32)
    secret = left.exchange(right.public)
    _, octets = write_initiation(left, right.public, Key(bytes([3]) * 32), secret, b"hi", b"")
    # The top bit of a public key is ignored by X25519, but it is in the hash.
    for place in range(len(octets)):
        broken = bytearray(octets)
        broken[place] ^= 0x80
        with pytest.raises(Rejected):
            read_payload(read_name(right, bytes(broken), b""), secret)


def test_too_little_is_malformed() -> None:
    left, right = Key(bytes([1]) * 32), Key(bytes([2]) * 32)
    secret = left.exchange(right.public)
    sent, octets = write_initiation(left, right.public, Key(bytes([3]) * 32), secret, b"", b"")
    with pytest.raises(Malformed):
        read_name(right, octets[:-1], b"")
    with pytest.raises(Malformed):
        read_response(sent, bytes(47), bytes(32))


def test_no_secret_shows_in_a_repr() -> None:
    ours, _ = shake()
    left, right = Key(bytes([1]) * 32), Key(bytes([2]) * 32)
    sent, octets = write_initiation(
        left, right.public, Key(bytes([3]) * 32), left.exchange(right.public), b"", b""
    )
    named = read_name(right, octets, b"")
    for thing in (ours, left, sent, named, sent.transcript):
        assert "\\x" not in repr(thing)
        assert "b'" not in repr(thing)

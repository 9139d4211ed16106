"""MACs, cookies and the limiter."""

from ipaddress import IPv6Address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder_orch.tunnel.machine import Rejected
from builder_orch.tunnel.wireguard.cookie import (
    COOKIE_REFRESH_TIME,
    SOURCES,
    Door,
    Jar,
    Limiter,
    hchacha20,
    label_key,
    xchacha_open,
    xchacha_seal,
)
from builder_orch.tunnel.wireguard.message import CookieReply
from tests.tunnel.wireguard.lab import LEFT_AT, RIGHT_AT, dice

OWN = bytes(range(32))
BODY = b"everything before the MACs"


def pair() -> tuple[Jar, Door]:
    return Jar(OWN), Door(OWN, dice(1))


def test_hchacha20_of_the_draft() -> None:
    nonce = bytes.fromhex("000000090000004a0000000031415927")
    expected = "82413b4227b27bfed30e42508a877d73a0f9e4d58a74a853c12ec41326d3ecdc"
    assert hchacha20(bytes(range(32)), nonce).hex() == expected


def test_xchacha20_poly1305_of_the_draft() -> None:
    plain = (
        b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the "
        b"future, sunscreen would be it."
    )
    key, nonce = bytes(range(0x80, 0xA0)), bytes(range(0x40, 0x58))
    associated = bytes.fromhex("50515253c0c1c2c3c4c5c6c7")
    sealed = xchacha_seal(key, nonce, plain, associated)
    assert sealed.hex() == (
        "bd6d179d3e83d43b9576579493c0e939572a1700252bfaccbed2902c21396cbb"
        "731c7f1b0b4aa6440bf3a82f4eda7e39ae64c6708c54c216cb96b72e1213b452"
        "2f8c9ba40db5d945b11b69b982c1bb9e3f3fac2bc369488f76b2383565d3fff9"
        "21f9664c97637da9768812f615c68b13b52e"
        "c0875924c1c7987947deafd8780acf49"
    )
    assert xchacha_open(key, nonce, sealed, associated) == plain
    with pytest.raises(Rejected):
        xchacha_open(key, nonce, sealed, b"")


def test_the_hash_is_that_of_rfc_7693_appendix_b() -> None:
    digest = "508c5e8c327c14e2e1a72ba34eeb452f37458b209ed63a294d999b4c86675982"
    assert label_key(b"a", b"bc").hex() == digest


def test_mac1_admits_what_is_addressed_to_us_and_nothing_that_was_touched() -> None:
    jar, door = pair()
    message = jar.stamp(BODY, 0.0)
    assert len(message) == len(BODY) + 32
    assert door.is_addressed(message)
    assert not Door(bytes(32), dice(1)).is_addressed(message)
    for place in range(len(message) - 16):
        broken = bytearray(message)
        broken[place] ^= 1
        assert not door.is_addressed(bytes(broken))


def test_without_a_cookie_mac2_is_zero_and_not_taken() -> None:
    jar, door = pair()
    message = jar.stamp(BODY, 0.0)
    assert message[-16:] == bytes(16)
    assert not door.is_reachable(message, LEFT_AT, 0.0)
    door.reply(message, 7, LEFT_AT, 0.0)
    assert not door.is_reachable(message, LEFT_AT, 0.0)


def test_a_cookie_makes_mac2_right_for_its_address_alone() -> None:
    jar, door = pair()
    reply = door.reply(jar.stamp(BODY, 5.0), 7, LEFT_AT, 5.0)
    assert reply.receiver == 7
    jar.keep(CookieReply.parse(reply.emit()), 5.1)
    message = jar.stamp(BODY, 10.0)
    assert door.is_addressed(message)
    assert door.is_reachable(message, LEFT_AT, 10.1)
    assert not door.is_reachable(message, RIGHT_AT, 10.1)
    assert not door.is_reachable(message, (LEFT_AT[0], LEFT_AT[1] + 1), 10.1)
    assert not door.is_reachable(message[:-1] + bytes([message[-1] ^ 1]), LEFT_AT, 10.1)


def test_cookies_and_secrets_grow_old_at_120_seconds() -> None:
    jar, door = pair()
    jar.keep(door.reply(jar.stamp(BODY, 0.0), 7, LEFT_AT, 0.0), 0.0)
    young = jar.stamp(BODY, COOKIE_REFRESH_TIME - 0.1)
    assert door.is_reachable(young, LEFT_AT, COOKIE_REFRESH_TIME - 0.1)
    assert not door.is_reachable(young, LEFT_AT, COOKIE_REFRESH_TIME), "the secret is to change"
    assert jar.stamp(BODY, COOKIE_REFRESH_TIME)[-16:] == bytes(16), "the cookie is forgotten"
    door.reply(young, 7, LEFT_AT, COOKIE_REFRESH_TIME)
    assert not door.is_reachable(young, LEFT_AT, COOKIE_REFRESH_TIME), "the secret has changed"


def test_a_reply_answers_one_message_only() -> None:
    jar, door = pair()
    with pytest.raises(Rejected, match="unexpected"):
        jar.keep(CookieReply(7, bytes(24), bytes(32)), 0.0)
    first = jar.stamp(BODY, 0.0)
    reply = door.reply(first, 7, LEFT_AT, 0.0)
    jar.stamp(BODY + b"!", 1.0)
    with pytest.raises(Rejected, match="forged cookie"):
        jar.keep(reply, 1.0)
    jar.stamp(BODY, 2.0)
    jar.keep(reply, 2.0)
    with pytest.raises(Rejected, match="unexpected"):
        jar.keep(reply, 3.0)


@settings(deadline=None)
@given(st.binary(min_size=24, max_size=24), st.binary(min_size=32, max_size=32))
def test_forged_replies_leave_the_jar_as_it_was(nonce: bytes, sealed: bytes) -> None:
    jar, door = pair()
    first = jar.stamp(BODY, 0.0)
    with pytest.raises(Rejected, match="forged cookie"):
        jar.keep(CookieReply(7, nonce, sealed), 0.0)
    assert jar.stamp(BODY, 0.0)[-16:] == bytes(16)
    jar.keep(door.reply(first, 7, LEFT_AT, 0.0), 0.0)


def test_five_at_once_then_twenty_a_second() -> None:
    limiter = Limiter()
    assert [limiter.allow("192.0.2.1", 10.0) for _ in range(6)] == [True] * 5 + [False]
    assert limiter.allow("192.0.2.2", 10.0), "each source has its own bucket"
    assert not limiter.allow("192.0.2.1", 10.04)
    assert limiter.allow("192.0.2.1", 10.051)
    taken = sum(limiter.allow("192.0.2.1", 10.051 + step / 100) for step in range(1000))
    assert 195 <= taken <= 205


def test_ipv6_sources_count_by_their_64() -> None:
    limiter = Limiter()
    hosts = [str(IPv6Address("2001:db8::") + step) for step in range(6)]
    assert [limiter.allow(host, 0.0) for host in hosts] == [True] * 5 + [False]
    assert limiter.allow("2001:db8:0:1::", 0.0)
    assert limiter.allow("a carrier's own name", 0.0)


def test_silent_sources_are_forgotten() -> None:
    limiter = Limiter()
    for step in range(100):
        limiter.allow(f"192.0.2.{step}", step / 100)
    assert len(limiter) == 100
    limiter.allow("198.51.100.1", 1.5)
    assert len(limiter) == 50
    limiter.sweep(9.0)
    assert len(limiter) == 0


def test_the_table_is_bounded() -> None:
    limiter = Limiter()
    base = int(IPv6Address("2001:db8::"))
    for step in range(SOURCES + 100):
        limiter.allow(str(IPv6Address(base + (step << 64))), 0.5)
    assert len(limiter) == SOURCES

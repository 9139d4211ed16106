"""What is no WireGuard, or no longer quite, has no effect but a count."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder_orch.tunnel.wireguard.message import (
    COOKIE_REPLY,
    INITIATION,
    RESPONSE,
    TRANSPORT,
)
from tests.tunnel.wireguard.lab import (
    LEFT_AT,
    LEFT_HOST,
    RIGHT_AT,
    RIGHT_HOST,
    Duo,
    kinds,
    reply,
)
from tests.tunnel.wireguard.test_load import busy

ELSEWHERE = ("198.51.100.9", 999)


SHAPED = st.builds(
    lambda kind, size, rest: (bytes([kind, 0, 0, 0]) + rest).ljust(size, b"\x5a")[:size],
    st.sampled_from([INITIATION, RESPONSE, COOKIE_REPLY, TRANSPORT]),
    st.sampled_from([4, 16, 31, 32, 64, 92, 148, 300]),
    st.binary(max_size=60),
)

QUIET = Duo()
QUIET.connect()
QUIET.left.events()


def undisturbed(duo: Duo) -> None:
    """The session goes on and nothing has come of what was received."""
    assert duo.fetch(duo.left) == []
    assert duo.left.events() == []
    assert duo.left.status(duo.now)[0].endpoint == RIGHT_AT


@settings(max_examples=3500, deadline=None)
@given(st.binary(max_size=60) | SHAPED, st.integers(-1, 500))
def test_garbage_has_no_effect_but_a_count(octets: bytes, segment: int) -> None:
    before = QUIET.left.drops.total()
    assert QUIET.left.receive(octets, segment, ELSEWHERE, QUIET.now) == []
    undisturbed(QUIET)
    assert (QUIET.left.drops.total() > before) == bool(octets)


def good() -> list[tuple[bytes, Duo]]:
    """A fresh message of each kind and the pair of which left is about to receive it."""
    made = []
    duo = Duo(mutual=True)
    duo.right.summon(LEFT_HOST, duo.now)
    made.append((bytes(duo.fetch(duo.right)[0].octets), duo))
    duo = Duo()
    duo.left.summon(RIGHT_HOST, duo.now)
    (call,) = duo.fetch(duo.left)
    duo.right.receive(call.octets, call.segment, LEFT_AT, duo.now)
    made.append((bytes(duo.fetch(duo.right)[0].octets), duo))
    duo = Duo()
    busy(duo)
    duo.left.summon(RIGHT_HOST, duo.now)
    (call,) = duo.fetch(duo.left)
    duo.right.receive(call.octets, call.segment, LEFT_AT, duo.now)
    made.append((bytes(duo.fetch(duo.right)[0].octets), duo))
    duo = Duo()
    duo.connect()
    duo.right.send([reply(b"fine")], duo.now)
    made.append((bytes(duo.fetch(duo.right)[0].octets), duo))
    for _, each in made:
        each.left.events()
    return made


@pytest.mark.parametrize("which", range(4), ids=["initiation", "response", "cookie", "data"])
def test_good_messages_with_any_bit_flipped_or_cut_anywhere_have_no_effect(which: int) -> None:
    octets, duo = good()[which]
    broken = [octets[:length] for length in range(1, len(octets))]
    # mac2 means nothing to one who is not busy: a call with another one is still a good call.
    judged = len(octets) - 16 if which < 2 else len(octets)
    for bit in range(8 * judged):
        flipped = bytearray(octets)
        flipped[bit // 8] ^= 1 << bit % 8
        broken.append(bytes(flipped))
    for each in broken:
        assert duo.left.receive(each, len(each), ELSEWHERE, duo.now) == []
        undisturbed(duo)
    assert duo.left.drops.total() == len(broken)


def test_the_same_messages_untouched_do_have_an_effect() -> None:
    (call, called), (response, caller), (cookie, waiting), (data, receiver) = good()
    assert called.left.receive(call, len(call), RIGHT_AT, called.now) == []
    assert kinds(called.fetch(called.left)) == [RESPONSE]
    assert caller.left.receive(response, len(response), RIGHT_AT, caller.now) == []
    assert caller.left.has_session(RIGHT_HOST)
    assert waiting.left.receive(cookie, len(cookie), RIGHT_AT, waiting.now) == []
    (again,) = waiting.at(waiting.now + 5.334).fetch(waiting.left)
    assert again.octets[-16:] != bytes(16)
    assert receiver.left.receive(data, len(data), RIGHT_AT, receiver.now) == [reply(b"fine")]

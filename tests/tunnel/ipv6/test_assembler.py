"""The assembler against a set of positions."""

from hypothesis import given
from hypothesis import strategies as st

from builder_orch.tunnel.ipv6.assembler import MAX_ISLANDS, MAX_PIECES, Assembler

TEXT = bytes(i * 7 % 251 for i in range(400))


def islands_of(positions: set[int]) -> list[tuple[int, int]]:
    starts = sorted(p for p in positions if p - 1 not in positions)
    ends = sorted(p + 1 for p in positions if p + 1 not in positions)
    return list(zip(starts, ends, strict=True))


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 60)), max_size=40))
def test_it_knows_what_a_set_knows(arrivals: list[tuple[int, int]]) -> None:
    assembler, model = Assembler(), set[int]()
    for start, length in arrivals:
        span = set(range(start, start + length))
        assert assembler.insert(start, TEXT[start : start + length]) == len(span - model)
        model |= span
        assert assembler.islands() == islands_of(model)
        assert assembler.held == len(model)
        first = assembler.blocks(4)[0]
        assert first[0] <= start < first[1] or not span <= set(range(*first))
        assert set(assembler.blocks(8)) <= set(assembler.islands())
    position = 1
    while position not in model and position < 400:
        position += 1
    taken = b"".join(assembler.take(position))
    assert taken == TEXT[position : position + len(taken)]
    assert position + len(taken) not in model
    rest = {p for p in model if p > position + len(taken)}
    assert assembler.islands() == islands_of(rest)
    assert assembler.held == len(rest)


def test_the_block_of_the_last_arrival_comes_first() -> None:
    # The worked case of RFC 2018 §4: every second segment of 500 octets is lost.
    assembler = Assembler()
    for start in (5500, 6500, 7500):
        assembler.insert(start, bytes(500))
    assert assembler.blocks(4) == ((7500, 8000), (6500, 7000), (5500, 6000))
    assembler.insert(6000, bytes(500))
    assert assembler.blocks(4) == ((5500, 7000), (7500, 8000))


def test_the_first_copy_of_an_octet_stays() -> None:
    assembler = Assembler()
    assembler.insert(10, b"aaa")
    assert assembler.insert(8, b"bbbbbbb") == 4
    assert b"".join(assembler.take(8)) == b"bbaaabb"


def test_what_lies_before_the_position_is_dropped() -> None:
    assembler = Assembler()
    assembler.insert(10, b"abcdef")
    assembler.insert(16, b"gh")
    assert b"".join(assembler.take(13)) == b"defgh"
    assert not assembler
    assembler.insert(1, b"xyz")
    assert assembler.take(50) == []
    assert assembler.held == 0


def test_holes_and_pieces_are_bounded() -> None:
    assembler = Assembler()
    taken = sum(assembler.insert(at * 2, b"x") for at in range(MAX_ISLANDS + 10))
    assert taken == MAX_ISLANDS == len(assembler.islands())
    assembler = Assembler()
    for at in range(MAX_PIECES + 10):
        assembler.insert(1 + at, b"x")
    assert assembler.held == MAX_PIECES

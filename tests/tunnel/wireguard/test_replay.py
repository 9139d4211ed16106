"""The replay window against a list of steps known to others and against a set."""

import ast
from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder_orch.tunnel.wireguard.replay import WINDOW, Window
from builder_orch.tunnel.wireguard.timers import REJECT_AFTER_MESSAGES
from tests.tunnel.wireguard.lab import vectors


class Model:
    """The rule in words: below the limit, not seen, and newer or at most WINDOW behind."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.newest = -1

    def admit(self, counter: int) -> bool:
        if counter >= REJECT_AFTER_MESSAGES or counter in self.seen:
            return False
        if counter < self.newest - WINDOW:
            return False
        self.seen.add(counter)
        self.newest = max(self.newest, counter)
        return True


def number(expression: int | str) -> int:
    """A counter written with L, one more than the window, and R, the limit: `L*4-(L-1)`."""

    def value(node: ast.AST) -> int:
        match node:
            case ast.Name(id="L"):
                return WINDOW + 1
            case ast.Name(id="R"):
                return REJECT_AFTER_MESSAGES
            case ast.Constant(value=int(constant)):
                return constant
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return value(left) + value(right)
            case ast.BinOp(left=left, op=ast.Sub(), right=right):
                return value(left) - value(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return value(left) * value(right)
            case _:
                raise AssertionError(expression)

    return value(ast.parse(str(expression), mode="eval").body)


def test_the_34_steps() -> None:
    steps = vectors()["replay_window_8128"]["steps"]
    assert len(steps) == 34
    window = Window()
    for counter, accepted in steps:
        assert window.admit(number(counter)) == bool(accepted), counter


COUNTERS = st.one_of(
    st.integers(0, 40),
    st.integers(0, 3 * WINDOW),
    st.integers(WINDOW - 3, WINDOW + 3),
    st.integers(REJECT_AFTER_MESSAGES - 3, REJECT_AFTER_MESSAGES + 3),
    st.integers(0, 2**64 - 1),
)


@settings(max_examples=500, deadline=None)
@given(st.lists(COUNTERS, max_size=60))
def test_single_counters_follow_the_model(counters: list[int]) -> None:
    window, model = Window(), Model()
    for counter in counters:
        assert window.admit(counter) == model.admit(counter)


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-200, 400), st.integers(1, 64), st.integers(0, 9)), max_size=40)
)
def test_runs_follow_the_model(runs: list[tuple[int, int, int]]) -> None:
    """`advance` is `admit` of each when all are newer, and changes nothing otherwise."""
    window, model = Window(), Model()
    for offset, count, leap in runs:
        first = max(0, model.newest + offset + (WINDOW if leap == 0 else 0))
        if first > model.newest:
            assert window.advance(first, count)
            assert all(model.admit(first + step) for step in range(count))
        else:
            assert not window.advance(first, count)
            for step in range(count):
                assert window.admit(first + step) == model.admit(first + step)


def test_a_run_may_end_at_the_limit_but_not_pass_it() -> None:
    window = Window()
    assert not window.advance(REJECT_AFTER_MESSAGES - 3, 4)
    assert window.advance(REJECT_AFTER_MESSAGES - 3, 3)
    assert not window.admit(REJECT_AFTER_MESSAGES)


def test_bulk_orders() -> None:
    rising = list(range(1, WINDOW + 2))
    shuffled = list(rising)
    Random(5).shuffle(shuffled)
    for order in (rising, rising[::-1], shuffled, rising[::2] + rising[1::2]):
        window = Window()
        assert all(window.admit(counter) for counter in order)
        assert not any(window.admit(counter) for counter in order)
    window = Window()
    assert window.admit(WINDOW + 1)
    assert not window.admit(0), "one further behind than the window reaches"


def arrivals(dice: Random, count: int) -> Iterator[int]:
    """Counters as a bad network brings them: in order, late, doubled, after a leap, far back."""
    newest = 0
    for _ in range(count):
        match dice.randrange(16):
            case 0:
                yield max(0, newest - dice.randrange(2 * WINDOW))
            case 1:
                yield max(0, newest - dice.randrange(16))
            case 2:
                yield max(0, newest - WINDOW + dice.randrange(-2, 3))
            case 3:
                newest += dice.choice([2, 64, WINDOW, 3 * WINDOW])
                yield newest
            case _:
                newest += 1
                yield newest


@pytest.mark.parametrize("count", [150_000, pytest.param(1_000_000, marks=pytest.mark.long)])
def test_a_million_counters_follow_the_model(count: int) -> None:
    window, model = Window(), Model()
    for counter in arrivals(Random(count), count):
        assert window.admit(counter) == model.admit(counter), counter
    assert count / 2 < len(model.seen) < count

"""The scoreboard against sets of positions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder_orch.tunnel.ipv6.scoreboard import Scoreboard

Steps = list[tuple[str, int, int]]


class Model:
    """One fate per octet."""

    def __init__(self) -> None:
        self.una = self.nxt = 0
        self.sacked: set[int] = set()
        self.lost: set[int] = set()
        self.delivered = 0

    @property
    def outstanding(self) -> set[int]:
        return set(range(self.una, self.nxt))

    @property
    def flying(self) -> set[int]:
        return self.outstanding - self.sacked - self.lost


def play(step: tuple[str, int, int], board: Scoreboard, model: Model, now: float) -> None:
    """One step on both."""
    verb, first, second = step
    board.begin()
    if verb == "send":
        board.sent(model.nxt, model.nxt + 1 + first, now)
        model.nxt += 1 + first
    elif verb == "acknowledge" and model.una < model.nxt:
        una = model.una + 1 + first % (model.nxt - model.una)
        model.delivered += len(set(range(model.una, una)) - model.sacked)
        board.acknowledge(una, now, 0.0)
        model.una = una
        model.sacked &= model.outstanding
        model.lost &= model.outstanding
    elif verb == "select" and model.una < model.nxt:
        left = model.una + first % (model.nxt - model.una)
        right = min(left + 1 + second, model.nxt)
        span = set(range(left, right))
        model.delivered += len(span - model.sacked)
        board.select(left, right, now, 0.0)
        model.sacked |= span
        model.lost -= span
    elif verb == "lose" and model.una not in model.sacked:
        board.lose_all()
        model.lost = model.outstanding - model.sacked
    elif verb == "resend":
        index = next((i for i, run in enumerate(board.runs) if run.lost), None)
        if index is not None:
            run = board.runs[index]
            upto = min(run.end, run.start + 1 + first)
            model.lost -= set(range(run.start, upto))
            board.resent(index, upto, now)


def step() -> st.SearchStrategy[tuple[str, int, int]]:
    verbs = st.sampled_from(["send", "acknowledge", "select", "select", "lose", "resend"])
    return st.tuples(verbs, st.integers(0, 40), st.integers(0, 40))


@given(st.lists(step(), max_size=60))
def test_it_knows_what_sets_know(steps: Steps) -> None:
    board, model = Scoreboard(), Model()
    for number, one in enumerate(steps):
        play(one, board, model, number / 2)
        spans: dict[str, set[int]] = {"flying": set(), "sacked": set(), "lost": set()}
        position = model.una
        for run in board.runs:
            assert run.start == position < run.end
            position = run.end
            kind = "sacked" if run.sacked else "lost" if run.lost else "flying"
            spans[kind] |= set(range(run.start, run.end))
        assert position == model.nxt
        assert spans == {"flying": model.flying, "sacked": model.sacked, "lost": model.lost}
        assert (board.in_flight, board.sacked, board.lost) == tuple(map(len, spans.values()))
        assert board.delivered == model.delivered


def test_a_train_is_one_run_and_so_is_what_was_selected() -> None:
    board = Scoreboard()
    for at in range(0, 10_000, 1000):
        board.sent(at, at + 1000, 1.0)
    assert len(board.runs) == 1
    for at in (3000, 5000, 4000):
        board.select(at, at + 1000, 2.0, 0.0)
    assert [(run.start, run.end, run.sacked) for run in board.runs] == [
        (0, 3000, False),
        (3000, 6000, True),
        (6000, 10_000, False),
    ]


def test_what_was_sent_before_something_delivered_is_lost_after_the_tolerance() -> None:
    board = Scoreboard()
    for number in range(4):
        board.sent(number * 1000, number * 1000 + 1000, number / 1000)
    board.begin()
    board.select(3000, 4000, 0.103, 0.1)
    wait = board.detect_losses(0.103, 0.025)
    # The youngest in doubt was sent 1 ms before the one delivered.
    assert wait == pytest.approx(0.024)
    assert board.lost == 0
    assert board.detect_losses(0.103 + 0.0235, 0.025) == pytest.approx(0.0005)
    assert board.lost == 2000
    assert board.detect_losses(0.103 + 0.024, 0.025) is None
    assert board.lost == 3000


def test_what_was_sent_after_it_is_not_in_doubt() -> None:
    board = Scoreboard()
    board.sent(0, 2000, 0.0)
    board.sent(2000, 3000, 0.01)
    board.begin()
    board.select(1000, 2000, 0.1, 0.0)
    assert board.detect_losses(10.0, 0.0) is None
    assert [(run.start, run.lost) for run in board.runs if not run.sacked] == [
        (0, True),
        (2000, False),
    ]


def test_only_the_first_copy_measures_a_round_trip() -> None:
    board = Scoreboard()
    board.sent(0, 1000, 0.0)
    board.sent(1000, 2000, 0.1)
    board.begin()
    board.acknowledge(1000, 0.3, 0.0)
    assert board.rtt == pytest.approx(0.3)
    board.lose_all()
    board.resent(0, 2000, 0.5)
    board.begin()
    board.acknowledge(2000, 0.6, 0.0)
    assert board.rtt is None


def test_what_is_selected_beside_a_repair_measures_a_round_trip() -> None:
    board = Scoreboard()
    board.sent(0, 1000, 0.0)
    board.lose_all()
    board.resent(0, 1000, 0.3)
    board.sent(1000, 2000, 0.31)
    board.sent(2000, 3000, 0.32)
    board.begin()
    board.acknowledge(2000, 0.4, 0.0)
    assert board.rtt is None
    board.begin()
    board.resent(0, 2500, 0.4)
    board.acknowledge(2500, 0.5, 0.0)
    board.select(2500, 3000, 0.5, 0.0)
    assert board.rtt == pytest.approx(0.18)


def test_what_was_given_up_measures_no_round_trip() -> None:
    """It may have arrived before an outage and be reported after it."""
    board = Scoreboard()
    board.sent(0, 3000, 0.0)
    board.lose_all()
    board.begin()
    board.select(1000, 2000, 60.0, 0.0)
    board.acknowledge(500, 60.0, 0.0)
    assert board.rtt is None
    assert board.newly == 1500


def test_a_hole_filled_by_a_first_copy_is_reordering() -> None:
    board = Scoreboard()
    board.sent(0, 3000, 0.0)
    board.begin()
    board.select(1000, 2000, 0.1, 0.0)
    assert board.tolerance(0.1, 0.2, 300, False) == 0.0
    board.begin()
    board.acknowledge(2000, 0.11, 0.0)
    assert board.reordering
    assert board.tolerance(0.1, 0.2, 300, False) == pytest.approx(0.025)
    board.repeated(2000, 3000)
    board.repeated(2000, 3000)
    assert board.tolerance(0.1, 0.2, 300, False) == pytest.approx(0.05)
    for _ in range(16):
        board.recovered()
    assert board.tolerance(0.1, 0.2, 300, False) == pytest.approx(0.025)


def test_what_was_resent_too_early_tells_how_late_its_first_copy_came() -> None:
    board = Scoreboard()
    board.sent(0, 1000, 0.0)
    board.sent(1000, 4000, 0.001)
    board.begin()
    board.select(1000, 4000, 0.101, 0.1)
    assert board.detect_losses(0.101, 0.0) is None
    assert board.lost == 1000
    board.resent(0, 1000, 0.101)
    board.begin()
    board.acknowledge(4000, 0.16, 0.1)  # sooner than a second copy could have been
    assert board.needless == 1000
    assert 0.06 <= board.tolerance(0.1, 0.2, 300, False) <= 0.085


def test_selected_octets_that_are_never_acknowledged_are_sent_again() -> None:
    board = Scoreboard()
    board.sent(0, 2000, 0.0)
    board.begin()
    board.select(0, 1000, 0.1, 0.0)  # the peer has, and does not acknowledge: it reneges
    board.lose_all()
    assert board.lost == 2000


def test_the_delivery_rate_is_that_of_the_path() -> None:
    board = Scoreboard()
    board.sent(0, 1000, 0.0)
    for number in range(1, 50):
        board.sent(number * 1000, number * 1000 + 1000, number / 100)
    for number in range(10, 50):
        board.begin()
        board.acknowledge((number - 9) * 1000, number / 100 + 0.001, 0.0)
    rate = board.rate(0.491, 0.01)
    assert rate is not None
    assert 50_000 <= rate <= 101_000
    assert board.newest is not None
    assert not board.newest.app_limited


def test_nonsense_blocks_change_nothing() -> None:
    board = Scoreboard()
    board.select(5, 10, 0.0, 0.0)
    board.sent(100, 200, 0.0)
    board.begin()
    for left, right in ((0, 100), (50, 150), (150, 201), (200, 300)):
        board.select(left, right, 0.1, 0.0)
    assert board.in_flight == 100
    assert board.newly == 0

"""Timers as a table, and the agenda over many of them."""

from hypothesis import given, settings
from hypothesis import strategies as st

from builder_orch.tunnel.wireguard.timers import Agenda, Timer, Timers, jitter


def test_due_timers_come_out_once_and_earliest_first() -> None:
    timers = Timers()
    timers.set(Timer.ZERO_KEYS, 3.0)
    timers.set(Timer.SEND_KEEPALIVE, 1.0)
    timers.set(Timer.NEW_HANDSHAKE, 9.0)
    assert timers.deadline() == 1.0
    assert timers.take_due(0.5) is None
    assert timers.take_due(3.0) is Timer.SEND_KEEPALIVE
    assert timers.take_due(3.0) is Timer.ZERO_KEYS
    assert timers.take_due(3.0) is None
    assert timers.deadline() == 9.0


def test_setting_replaces_and_stopping_removes() -> None:
    timers = Timers()
    timers.set(Timer.ZERO_KEYS, 3.0)
    timers.set(Timer.ZERO_KEYS, 5.0)
    assert timers.deadline() == 5.0
    assert timers.is_set(Timer.ZERO_KEYS)
    timers.stop(Timer.ZERO_KEYS)
    assert not timers.is_set(Timer.ZERO_KEYS)
    assert timers.deadline() is None
    assert timers.take_due(1e9) is None


@settings(deadline=None)
@given(st.binary(min_size=4, max_size=4))
def test_jitter_stays_within_a_third_of_a_second(octets: bytes) -> None:
    assert 0 <= jitter(lambda count: octets[:count]) <= 0.333


class Wish:
    """Something with a deadline that the test moves."""

    def __init__(self) -> None:
        self.at: float | None = None

    def deadline(self) -> float | None:
        return self.at


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 3), st.none() | st.integers(1, 50), st.sampled_from([0, 0, 0, 5, 20])
        ),
        max_size=60,
    )
)
def test_the_agenda_is_never_late_and_gives_exactly_what_is_due(
    steps: list[tuple[int, int | None, int]],
) -> None:
    wishes = [Wish() for _ in range(4)]
    agenda: Agenda[Wish] = Agenda()
    now = 0.0
    for which, wait_s, passing in steps:
        wishes[which].at = None if wait_s is None else now + wait_s
        agenda.note(wishes[which])
        now += passing
        expected = {wish for wish in wishes if wish.at is not None and wish.at <= now}
        due = agenda.take_due(now)
        assert set(due) == expected
        assert len(due) == len(expected)
        for wish in due:
            wish.at = None
            agenda.note(wish)
        first = min((wish.at for wish in wishes if wish.at is not None), default=None)
        deadline = agenda.deadline()
        assert deadline is None or deadline > now
        if first is not None:
            assert deadline is not None
            assert deadline <= first

"""The race as stories on a fake clock: who is asked, when the other is, and who carries on."""

from dataclasses import dataclass, field

import pytest

from builder_orch.tunnel.carrier.race import (
    DEAF_S,
    HEAD_START_S,
    PROBE_AGAIN_S,
    PROBE_FIRST_S,
    PROBE_LIMIT_S,
    Deed,
    Kind,
    Race,
)

UDP, WEBSOCKET = Kind.UDP, Kind.WEBSOCKET


@dataclass
class Story:
    """A race, the clock, and what was done when."""

    race: Race = field(default_factory=Race)
    now: float = 100.0
    done: list[tuple[float, Deed]] = field(default_factory=list)

    def wait(self, seconds: float) -> None:
        """Let time pass, doing what is due when it is."""
        until = self.now + seconds
        while (at := self.race.deadline()) is not None and at <= until:
            self.now = max(self.now, at)
            for deed in self.race.take_due(self.now):
                self.done.append((self.now - 100.0, deed))
            after = self.race.deadline()
            assert after is None or after > self.now, "nothing may be due twice"
        self.now = until

    def initiate(self, *, connected: bool = False) -> Kind:
        way = self.race.initiation(self.now, connected=connected)
        self.wait(0)
        return way

    def answer(self, kind: Kind, *, session: bool = True) -> bool:
        self.race.arrived(kind)
        return self.race.heard(kind, self.now, session=session)

    def deeds(self) -> list[Deed]:
        return [deed for _, deed in self.done]


def on_websocket() -> Story:
    story = Story()
    story.initiate()
    story.wait(HEAD_START_S)
    story.answer(WEBSOCKET)
    story.done.clear()
    return story


def test_where_udp_answers_websocket_is_never_tried() -> None:
    story = Story()
    assert story.initiate() is UDP
    story.wait(0.03)
    assert story.answer(UDP)
    story.wait(60)
    assert story.done == []
    assert (story.race.active, story.race.why) == (UDP, "it answered first")


def test_after_the_head_start_the_same_initiation_goes_the_other_way() -> None:
    story = Story()
    story.initiate()
    story.wait(5)
    assert story.done == [(HEAD_START_S, Deed.COPY)]
    assert story.race.copy_through is WEBSOCKET
    assert story.answer(WEBSOCKET)
    assert (story.race.active, story.race.why) == (WEBSOCKET, "UDP did not answer")


def test_a_refusal_ends_the_head_start() -> None:
    story = Story()
    story.initiate()
    story.wait(0.2)
    story.race.refused(story.now)
    story.wait(0)
    ((at, deed),) = story.done
    assert deed is Deed.COPY
    assert at == pytest.approx(0.2)
    story.answer(WEBSOCKET)
    assert story.race.why == "UDP was refused"


def test_a_refusal_that_came_before_costs_no_time_at_all() -> None:
    story = Story()
    story.race.refused(story.now)
    story.initiate()
    assert story.deeds() == [Deed.COPY]


def test_where_answers_get_lost_on_their_way_back_the_other_way_is_first_for_once() -> None:
    story = Story()
    assert story.initiate(connected=True) is UDP
    story.wait(5)
    assert story.initiate(connected=True) is WEBSOCKET
    story.wait(5)
    assert story.initiate(connected=True) is UDP
    assert story.race.copy_through is WEBSOCKET


def test_a_way_that_is_not_connected_is_not_waited_for() -> None:
    story = Story()
    story.initiate()
    story.wait(5)
    assert story.initiate() is UDP


def test_what_answered_here_before_is_first() -> None:
    story = Story(Race(WEBSOCKET))
    assert story.initiate() is WEBSOCKET
    story.wait(HEAD_START_S)
    assert story.deeds() == [Deed.COPY]
    assert story.race.copy_through is UDP
    assert story.answer(UDP)
    assert story.race.active is UDP


def test_a_handshake_every_two_minutes_is_no_race() -> None:
    story = Story()
    story.initiate()
    story.answer(UDP)
    for _ in range(10):
        story.wait(120)
        assert story.initiate() is UDP
        story.wait(0.05)
        assert not story.answer(UDP)
    assert story.done == []


def test_silence_makes_the_other_ready_and_the_next_handshake_goes_both_ways_at_once() -> None:
    story = Story()
    story.initiate()
    story.answer(UDP)
    story.race.sent(story.now)
    story.wait(15)
    assert story.done == [(DEAF_S, Deed.READY)]
    story.initiate(connected=True)
    assert story.done[1:] == [(15.0, Deed.COPY)]
    assert story.answer(WEBSOCKET)
    assert (story.race.active, story.race.why) == (WEBSOCKET, "UDP went silent")


def test_an_answer_ends_the_suspicion() -> None:
    story = Story()
    story.initiate()
    story.answer(UDP)
    for _ in range(20):
        story.race.sent(story.now)
        story.wait(DEAF_S / 2)
        story.race.arrived(UDP)
    assert story.done == []


def test_octets_that_are_not_authentic_move_nothing() -> None:
    story = on_websocket()
    story.race.arrived(UDP)
    assert story.race.active is WEBSOCKET


def test_udp_is_trusted_again_after_three_answers_in_a_row() -> None:
    story = on_websocket()
    began = story.now
    for number in range(3):
        while not story.done:
            story.wait(0.5)
        assert story.done.pop()[1] is Deed.PROBE
        assert story.answer(UDP, session=False) is (number == 2)
    assert (story.race.active, story.race.why) == (UDP, "UDP answers again (3 probes)")
    assert story.now - began <= PROBE_FIRST_S + 2 * PROBE_AGAIN_S + 1
    story.wait(300)
    assert story.done == [], "there is nothing to ask any more"


def test_a_probe_without_an_answer_begins_the_count_anew_and_is_asked_less_often() -> None:
    story = on_websocket()
    for _ in range(2):
        while not story.done:
            story.wait(0.5)
        story.done.clear()
        assert not story.answer(UDP, session=False)
    story.wait(300)
    gaps = [
        after - before for (before, _), (after, _) in zip(story.done, story.done[1:], strict=False)
    ]
    assert gaps[0] == PROBE_FIRST_S
    assert gaps[-1] == PROBE_LIMIT_S
    assert gaps == sorted(gaps)
    assert not story.answer(UDP, session=False), "one in a row"


def test_an_answer_that_nobody_asked_for_counts_for_nothing() -> None:
    story = on_websocket()
    for _ in range(5):
        assert not story.answer(UDP, session=False)
    assert story.race.active is WEBSOCKET


def test_new_keys_over_udp_are_one_good_probe_while_the_websocket_works() -> None:
    story = on_websocket()
    story.initiate(connected=True)
    story.wait(HEAD_START_S)
    assert not story.answer(UDP)
    assert story.race.active is WEBSOCKET


def test_a_websocket_that_went_silent_gives_way_to_udp_at_once() -> None:
    story = on_websocket()
    story.race.sent(story.now)
    story.wait(DEAF_S)
    story.initiate(connected=True)
    assert story.answer(UDP)
    assert (story.race.active, story.race.why) == (UDP, "the WebSocket connection went silent")


def test_back_and_forth() -> None:
    story = Story()
    for _ in range(5):
        story.initiate(connected=True)
        story.answer(story.race.way)
        story.race.sent(story.now)
        story.wait(15)
        story.initiate(connected=True)
        story.answer(story.race.way.other)
    assert story.race.active is WEBSOCKET

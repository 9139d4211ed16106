"""What is said when this machine's clock and the platform's differ."""

import time
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder_orch.api.client import Platform
from builder_orch.api.clock import SKEW_LIMIT_S, explained, is_skewed, skew, told
from builder_orch.api.models import Secret
from builder_orch.errors import NotLoggedIn
from builder_orch.events import Event, Warned
from tests.api.rig import CANARY, Step, Waits, answer, octets, scripted

NOW = 1_800_000_000.0
EXPIRED = {"message": "The token has expired.", "extensions": {"code": "UNAUTHORIZED"}}
REGION = {"nearestRegion": {"code": "ams", "name": "Amsterdam", "gatewayAvailable": True}}


def dated(ahead_s: float) -> str:
    """The header of a platform over whose clock ours is so much ahead."""
    return f"Date: {formatdate(time.time() - ahead_s, usegmt=True)}\r\n"


@pytest.mark.parametrize("minutes", [-5, -4, 0, 4, 5])
def test_five_minutes_explain_nothing(minutes: int) -> None:
    skew_s = skew(formatdate(NOW - 60 * minutes, usegmt=True), NOW)
    assert skew_s == 60 * minutes
    assert not is_skewed(skew_s)
    failure = NotLoggedIn("expired", hint="log in")
    assert explained(failure, skew_s) is failure


@pytest.mark.parametrize(
    ("skew_s", "says"),
    [
        (301, "5 minutes ahead of"),
        (-3600, "60 minutes behind"),
        (7200, "2 hours ahead of"),
        (-10 * 365.25 * 86400, "3652 days behind"),
    ],
)
def test_more_is_said_in_words(skew_s: float, says: str) -> None:
    assert f"clock is {says} the platform's" in told(skew_s)
    failure = explained(NotLoggedIn("expired", hint="log in"), skew_s)
    assert str(failure).startswith("expired (clock skew: ")
    assert "timedatectl" in failure.hint
    assert "log in" in failure.hint


@pytest.mark.parametrize("text", [None, "", "soon", "Mon, 99 Foo 2026", "-1"])
def test_a_date_that_is_none_explains_nothing(text: str | None) -> None:
    assert skew(text, NOW) is None
    assert not is_skewed(None)


@given(st.text() | st.from_regex(r"\w{3}, [0-9]{1,3} Jan [0-9]{1,5} [0-9]{2}:00:00 GMT"))
def test_no_date_of_a_platform_upsets_us(text: str) -> None:
    assert isinstance(skew(text, NOW), float | None)


async def refused(*steps: Step) -> tuple[NotLoggedIn, list[Event]]:
    events: list[Event] = []
    async with scripted(*steps) as server:
        platform = Platform(server.url, Secret(CANARY), sleep=Waits(), emit=events.append)
        async with platform:
            with pytest.raises(NotLoggedIn) as caught:
                await platform.nearest_region()
    return caught.value, events


@pytest.mark.parametrize(
    "step",
    [
        lambda headers: answer(None, errors=[EXPIRED], headers=headers),
        lambda headers: octets(b"the token has expired", status=401, headers=headers),
    ],
    ids=["GraphQL", "HTTP"],
)
async def test_a_token_that_looks_expired_may_be_a_clock_that_is_wrong(step: object) -> None:
    assert callable(step)
    failure, events = await refused(step(dated(2 * 3600)))
    assert "expired" in str(failure)
    assert "clock skew: this machine's clock is 2 hours ahead of the platform's" in str(failure)
    (warned,) = [event for event in events if isinstance(event, Warned)]
    assert warned.id == "clock-skew"
    failure, events = await refused(step(dated(SKEW_LIMIT_S - 60)))
    assert "clock" not in str(failure)
    assert events == []


async def test_a_clock_that_is_wrong_is_told_once_though_all_goes_well() -> None:
    events: list[Event] = []
    good = answer(REGION, headers=dated(-3 * 86400))
    async with (
        scripted(good, good) as server,
        Platform(server.url, Secret(CANARY), emit=events.append) as platform,
    ):
        await platform.nearest_region()
        await platform.nearest_region()
    (warned,) = [event for event in events if isinstance(event, Warned)]
    assert "3 days behind" in warned.message

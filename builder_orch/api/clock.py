"""This machine's clock beside the platform's, which dates each of its answers (RFC 9110 6.6.1)."""

from email.utils import parsedate_to_datetime
from typing import Final

from builder_orch.errors import NotLoggedIn

SKEW_LIMIT_S: Final = 300.0
"""What clocks may differ before it explains tokens and certificates that look out of their time."""
SET_CLOCK: Final = "set this machine's date and time, best by the network: timedatectl set-ntp true"

_UNITS: Final = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"))


def skew(date: str | None, now: float) -> float | None:
    """Seconds that our clock, at `now` Unix seconds, is ahead of an answer's Date.

    None for a date that is none. An answer takes its time, so a little behind is nothing.
    """
    if date is None:
        return None
    try:
        return now - parsedate_to_datetime(date).timestamp()
    except (ValueError, OverflowError, TypeError, OSError):
        return None


def is_skewed(skew_s: float | None) -> bool:
    """Is it enough to explain anything?"""
    return skew_s is not None and abs(skew_s) > SKEW_LIMIT_S


def told(skew_s: float) -> str:
    """The difference in words."""
    size_s = abs(skew_s)
    unit_s, unit = next((one for one in _UNITS if size_s >= 2 * one[0]), (60.0, "minutes"))
    way = "ahead of" if skew_s > 0 else "behind"
    return f"clock skew: this machine's clock is {size_s / unit_s:.0f} {unit} {way} the platform's"


def explained(failure: NotLoggedIn, skew_s: float | None) -> NotLoggedIn:
    """A refused token, with the clocks as a possible cause where they differ."""
    if skew_s is None or not is_skewed(skew_s):
        return failure
    return NotLoggedIn(f"{failure} ({told(skew_s)})", hint=f"{SET_CLOCK}; else {failure.hint}")

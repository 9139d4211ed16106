"""Whether somebody else uses our key, told from what our own sessions come to.

A gateway answers a key where it heard it last, with the keys of its latest handshake. Two machines
with one key therefore take each other's session away: each hears nothing, begins anew after 15 s of
silence, is answered at once, and the other one goes deaf. A session lives for REKEY_AFTER_TIME; one
that has to be begun anew much earlier was lost. Only answered handshakes count, so nobody without
the key can feign a twin.
"""

from collections import deque

from builder_orch.tunnel.wireguard.timers import REKEY_AFTER_TIME

LOSSES = 3
WINDOW_S = 70.0
"""Two twins that both talk lose a session every 30 s each (15 s of silence, jitter, twice)."""


class Twin:
    """Counts sessions of one peer that were lost before their time."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._lost: deque[float] = deque(maxlen=LOSSES)

    def began(self, now: float) -> bool:
        """A handshake that we began was answered; whether that makes it too many in a row."""
        previous, self._began = self._began, now
        if previous is None or now - previous >= REKEY_AFTER_TIME:
            return False
        self._lost.append(now)
        if len(self._lost) < LOSSES or now - self._lost[0] > WINDOW_S:
            return False
        self._lost.clear()
        return True

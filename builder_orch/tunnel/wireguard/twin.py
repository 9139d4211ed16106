"""Whether somebody else uses our key, told from what our own sessions come to.

A gateway answers a key where it heard it last, with the keys of its latest handshake. Two machines
with one key therefore take each other's session away: each hears nothing, begins anew after some
silence, is answered at once, and the other one goes deaf. A session lives for REKEY_AFTER_TIME; one
that has to be begun anew much earlier was lost. Only handshakes answered at the first asking count:
nobody without the key can feign a twin, and a network that was away rarely comes back at the moment
of the first initiation.

By the protocol's own timers alone three losses take more than a minute. WireGuard begins anew
KEEPALIVE_TIMEOUT + REKEY_TIMEOUT = 15 s after what it sent was left unanswered, later by up to
333 ms of jitter and by the time until something is sent. From our first loss to our third the twin
waits twice and we do, so that is 4 * 15 = 60 s and more: WINDOW_S has to be longer. Who wants to
know earlier asks for an echo each second and has the handshake begun when SILENT in a row are lost
(the driver does): then it is 2 * (5 + 15) = 40 s and a little even if the twin only keeps to the
timers, and the third loss is known within a minute of the first.
"""

from collections import deque

from builder_orch.tunnel.wireguard.timers import REKEY_AFTER_TIME

LOSSES = 3
WINDOW_S = 70.0
SILENT = 5
"""Echoes lost in a row, of one second each, after the session had brought some back."""


class Twin:
    """Counts sessions of one peer that were lost before their time."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._lost: deque[float] = deque(maxlen=LOSSES)

    def began(self, now: float, attempt: int) -> bool:
        """The `attempt`-th initiation of ours in a row was answered: are too many sessions lost?"""
        previous, self._began = self._began, now
        if previous is None or now - previous >= REKEY_AFTER_TIME or attempt > 1:
            return False
        self._lost.append(now)
        if len(self._lost) < LOSSES or now - self._lost[0] > WINDOW_S:
            return False
        self._lost.clear()
        return True

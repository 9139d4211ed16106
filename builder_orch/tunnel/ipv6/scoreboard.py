"""What is in flight, by runs of octets that share a fate (RFC 2018, RFC 6675, RFC 8985).

A run is what was sent at one moment, however many packets that made; it is split only when a
selective acknowledgement, a loss or a retransmission cuts it. The runs are sorted, touch each other
and cover SND.UNA to SND.NXT exactly. So the work for an acknowledgement grows with the number of
trains in flight, not with the number of packets.
"""

from bisect import bisect_right
from math import ceil, inf
from operator import attrgetter

MAX_RUNS = 16_384
"""Beyond this, selective acknowledgements that would split further are passed over."""
DUP_THRESH = 3
SPREAD_FOR = 16
"""For how many recoveries a wider tolerance is kept."""
MAX_SPREAD = 64
PROVEN_TOLERANCE = 0.05
"""As far as duplicates prove that reordering takes longer than a round trip, seconds."""
TIMER_GRAIN = 1e-6

_start = attrgetter("start")


class Run:
    """Octets [start, end), sent first at `born` and last at `sent_at`.

    The last six fields are the connection's state by then.
    """

    __slots__ = (
        "app_limited",
        "born",
        "delivered",
        "delivered_at",
        "end",
        "first_sent_at",
        "flight",
        "losses",
        "lost",
        "resent",
        "sacked",
        "sent_at",
        "start",
    )

    def __init__(self, start: int, end: int, sent_at: float) -> None:
        self.start = start
        self.end = end
        self.born = self.sent_at = sent_at
        self.sacked = False
        self.lost = False
        self.resent = False
        self.delivered = 0
        self.delivered_at = 0.0
        self.first_sent_at = 0.0
        self.app_limited = False
        self.flight = 0
        self.losses = 0

    def cut(self, at: int) -> "Run":
        """Keep [start, at) and return a run with the same past for the rest."""
        rest = Run(at, self.end, self.sent_at)
        rest.born = self.born
        rest.sacked, rest.lost, rest.resent = self.sacked, self.lost, self.resent
        rest.delivered, rest.delivered_at = self.delivered, self.delivered_at
        rest.first_sent_at, rest.app_limited = self.first_sent_at, self.app_limited
        rest.flight, rest.losses = self.flight, self.losses
        self.end = at
        return rest


class Scoreboard:
    """The runs in flight, RACK's view of time (RFC 8985 §6), and one acknowledgement's samples.

    Octets are in one of three sums: `in_flight` (the pipe of RFC 6675), `sacked` or `lost`.
    `delivered` only grows; `losses` counts what RACK found lost and nothing proved to have arrived
    after all. `rtt`, `newly`, `needless` (sent twice, but the first copy arrived) and
    `newest` are about the acknowledgement begun last.
    """

    __slots__ = (
        "_fack",
        "_fastest",
        "_first_sent_at",
        "_limited_until",
        "_rack_end",
        "_rack_resent",
        "_rack_sent_at",
        "_repaired",
        "_round_end",
        "_selected",
        "_spread",
        "_spread_for",
        "delivered",
        "delivered_at",
        "in_flight",
        "losses",
        "lost",
        "needless",
        "newest",
        "newly",
        "rack_rtt",
        "reordering",
        "runs",
        "sacked",
    )

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self.in_flight = 0
        self.sacked = 0
        self.lost = 0
        self.losses = 0
        self.delivered = 0
        self.delivered_at = 0.0
        self.reordering = False
        self.newly = 0
        self.needless = 0
        self.newest: Run | None = None
        self.rack_rtt = 0.0
        self._rack_sent_at = -1.0
        self._rack_end = 0
        self._rack_resent = False
        self._fack = 0
        self._first_sent_at = 0.0
        self._limited_until = -1
        self._fastest = inf
        self._selected = inf
        self._repaired = False
        self._round_end = 0
        self._spread = 1
        self._spread_for = 0

    def sent(self, start: int, end: int, now: float) -> None:
        """[start, end) went out for the first time, following everything before it."""
        runs = self.runs
        if not runs:
            self._first_sent_at = self.delivered_at = now
        length = end - start
        self.in_flight += length
        if runs:
            last = runs[-1]
            if last.sent_at == now and not (last.resent or last.sacked or last.lost):
                last.end = end
                last.flight = self.in_flight
                return
        run = Run(start, end, now)
        self._stamp(run)
        runs.append(run)

    def resent(self, index: int, upto: int, now: float) -> None:
        """The lost run at `index` went out again, as far as `upto`."""
        run = self.runs[index]
        if upto < run.end:
            self.runs.insert(index + 1, run.cut(upto))
        length = run.end - run.start
        if run.lost:
            run.lost = False
            self.lost -= length
            self.in_flight += length
        run.resent = True
        run.sent_at = now
        self._stamp(run)

    def begin(self) -> None:
        """The next calls belong to one acknowledgement."""
        self.newly = 0
        self.needless = 0
        self.newest = None
        self._fastest = self._selected = inf
        self._repaired = False

    def acknowledge(self, una: int, now: float, min_rtt: float) -> None:
        """Everything before `una` has been acknowledged for good."""
        runs = self.runs
        done = 0
        for run in runs:
            if run.start >= una:
                break
            upto = min(run.end, una)
            if run.sacked:
                self.sacked -= upto - run.start
            else:
                self._deliver(run, run.start, upto, now, min_rtt)
            if run.end > una:
                run.start = una
                break
            done += 1
        del runs[:done]

    def select(self, left: int, right: int, now: float, min_rtt: float) -> None:
        """A SACK block: [left, right) has arrived. Kept until acknowledged: reneging is legal."""
        runs = self.runs
        if not runs or left < runs[0].start or right > runs[-1].end:
            return
        first = bisect_right(runs, left, key=_start) - 1
        if (runs[first].sacked and runs[first].end >= right) or len(runs) >= MAX_RUNS:
            return
        if not runs[first].sacked and runs[first].start < left:
            runs.insert(first + 1, runs[first].cut(left))
            first += 1
        after = first
        while after < len(runs) and runs[after].start < right:
            run = runs[after]
            if not run.sacked:
                if run.end > right:
                    runs.insert(after + 1, run.cut(right))
                if not (run.resent or run.lost):
                    self._selected = min(self._selected, now - run.sent_at)
                self._deliver(run, run.start, run.end, now, min_rtt)
                self.sacked += run.end - run.start
                run.sacked, run.lost = True, False
            after += 1
        if first and runs[first - 1].sacked:
            first -= 1
        if after < len(runs) and runs[after].sacked:
            after += 1
        runs[first].end = runs[after - 1].end
        del runs[first + 1 : after]

    def repeated(self, una: int, nxt: int) -> None:
        """The peer got something twice: tolerate more, once a round trip (§6.2 step 4)."""
        if una >= self._round_end:
            self._round_end = nxt
            self._spread = min(self._spread + 1, MAX_SPREAD)
            self._spread_for = SPREAD_FOR

    def _learn_lateness(self, late: float, min_rtt: float) -> None:
        """What was taken for lost came so much later than others: that much is to be tolerated.

        RFC 8985 widens by a quarter of a round trip at a time, and repairs needlessly until then.
        """
        steps = ceil(min(4 * late / min_rtt, MAX_SPREAD))
        if steps > self._spread:
            self._spread = steps
            self._spread_for = SPREAD_FOR

    def recovered(self) -> None:
        """A window with losses has been repaired."""
        self._spread_for -= 1
        if self._spread_for <= 0:
            self._spread = 1

    def tolerance(self, min_rtt: float, srtt: float, mss: int, recovering: bool) -> float:
        """How much reordering in time to allow for: RACK.reo_wnd in seconds."""
        if not self.reordering and (recovering or self.sacked >= DUP_THRESH * mss):
            return 0.0
        return min(self._spread * min_rtt / 4, max(srtt, PROVEN_TOLERANCE))

    def detect_losses(self, now: float, window: float) -> float | None:
        """Mark as lost what was sent long enough before something delivered (RFC 8985 §6.2).

        `window` is how much reordering in time is tolerated. Returns in how many seconds to look
        again, None when nothing is in doubt.
        """
        if not self.sacked and not self._rack_resent:
            return None
        wait = 0.0
        mark_at, mark_end = self._rack_sent_at, self._rack_end
        limit = now - self.rack_rtt - window
        for run in self.runs:
            if run.sacked or run.lost or run.sent_at > mark_at:
                continue
            if run.sent_at == mark_at and run.end >= mark_end:
                continue
            remaining = run.sent_at - limit
            if remaining <= TIMER_GRAIN:
                self._lose(run)
                self.losses += run.end - run.start
            else:
                wait = max(wait, remaining)
        return wait or None

    def lose_all(self) -> None:
        """Nothing that is not known to have arrived counts as in flight any more.

        Nor does what a peer selected and then did not acknowledge: it reneged (RFC 2018 §8).
        """
        if self.runs and self.runs[0].sacked:
            for run in self.runs:
                if run.sacked:
                    run.sacked = False
                    self.in_flight += run.end - run.start
            self.sacked = 0
        for run in self.runs:
            if not run.sacked and not run.lost:
                self._lose(run)

    def lose_first(self, octets: int) -> None:
        """The first `octets` in flight are lost (RFC 6582, for peers without SACK)."""
        if not self.runs:
            return
        run = self.runs[0]
        if run.lost or run.sacked:
            return
        if run.end - run.start > octets:
            self.runs.insert(1, run.cut(run.start + octets))
        self._lose(run)

    def lose_last(self, octets: int) -> int:
        """Prepare the last `octets` to be sent again as a probe (RFC 8985 §7.3); their index."""
        run = self.runs[-1]
        if not run.sacked and run.end - run.start > octets:
            self.runs.append(run.cut(run.end - octets))
        return len(self.runs) - 1

    def limited_by_application(self) -> None:
        """What is in flight was all there was: rates measured until it is delivered lie low."""
        self._limited_until = self.delivered + self.in_flight

    @property
    def rtt(self) -> float | None:
        """The round trip this acknowledgement measured, None if it measured none.

        What was sent twice tells nothing (Karn), and nor does what it held back until it was
        repaired. What is selected before it counted as lost has waited for neither.
        """
        fastest = self._selected if self._repaired else self._fastest
        return None if fastest == inf else fastest

    def rate(self, now: float, min_rtt: float) -> float | None:
        """Delivery rate of the acknowledgement begun last, octets per second.

        draft-ietf-ccwg-bbr §4.1: the slower of the rate sent and the rate acknowledged; nothing
        can be said of less than a round trip.
        """
        run = self.newest
        if run is None:
            return None
        interval = max(run.sent_at - run.first_sent_at, now - run.delivered_at)
        if interval <= 0 or interval < min_rtt:
            return None
        return (self.delivered - run.delivered) / interval

    def _stamp(self, run: Run) -> None:
        run.delivered = self.delivered
        run.delivered_at = self.delivered_at
        run.first_sent_at = self._first_sent_at
        run.app_limited = self.delivered <= self._limited_until
        run.flight = self.in_flight
        run.losses = self.losses

    def _lose(self, run: Run) -> None:
        length = run.end - run.start
        run.lost = True
        self.in_flight -= length
        self.lost += length

    def _deliver(self, run: Run, start: int, end: int, now: float, min_rtt: float) -> None:
        """[start, end), a part of `run` that was not known to have arrived, has."""
        length = end - start
        if run.lost:
            self.lost -= length
            self.losses = max(0, self.losses - length)
        else:
            self.in_flight -= length
        self.delivered += length
        self.delivered_at = now
        self.newly += length
        elapsed = now - run.sent_at
        if run.resent:
            self._repaired = True
            if elapsed < min_rtt:
                self.needless += length  # too early to be about the second copy
                self.losses = max(0, self.losses - length)
                self.reordering = True
                self._learn_lateness(now - run.born - self.rack_rtt, min_rtt)
                return
        else:
            if end < self._fack:
                self.reordering = True
            if not run.lost:  # one given up in an outage may have waited for the path
                self._fastest = min(self._fastest, elapsed)
        self._fack = max(self._fack, end)
        if self.newest is None or run.sent_at >= self.newest.sent_at:
            self.newest = run
            self._first_sent_at = run.sent_at
        if (run.sent_at, end) > (self._rack_sent_at, self._rack_end):
            self._rack_sent_at, self._rack_end = run.sent_at, end
            self._rack_resent = run.resent
            self.rack_rtt = elapsed

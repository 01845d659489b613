"""When the memory of a study's trials has stopped growing: after so many reports, as its own trials have shown.

Other people's objectives do not say that their memory is flat, and in many it comes late: a forest has 90 % of its
growth at 92 % of its CPU time, boosting at half. So a reservation is tightened at a report only where every trial that
this study has completed lately had all of its growth behind it by then. Covers no kill and no first guess: a trial that
goes over what was left to it is charged more (`reservation`). Pure.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from scheduler.core.reservation import tightened

LEARN_FROM = 8  # whole trials, as for the regression of peaks
KEPT = 64  # the latest; one odd trial is forgotten after so many
NOTED = 1.01  # a peak is noted when it is so many times the last one noted: some hundred numbers for any trial


@dataclass(slots=True)
class Growth:
    """One attempt: how many reports it has made, and the peak at those where it had grown."""

    reports: int = 0
    _peaks: list[tuple[int, int]] = field(default_factory=list)

    def reported(self, peak_bytes: int) -> None:
        """Note a report, and the most that the attempt had held by then."""
        self.reports += 1
        if not self._peaks or peak_bytes >= self._peaks[-1][1] * NOTED:
            self._peaks.append((self.reports, peak_bytes))

    def over_after(self, peak_bytes: int) -> int:
        """Return the first report at which a tightened reservation would have held the attempt's peak; one more than
        it made when there was none."""
        enough = (report for report, seen in self._peaks if tightened(seen) >= peak_bytes)
        return next(enough, self.reports + 1)


class GrowthHistory:
    """What a study's completed trials have shown, in the order in which they ended."""

    def __init__(self) -> None:
        self._over_after: deque[int] = deque(maxlen=KEPT)

    def learn(self, over_after: int) -> None:
        """Take in a whole trial (`Growth.over_after`)."""
        self._over_after.append(over_after)

    def is_over(self, reports: int) -> bool:
        """Whether growth is over at this report. Never, where one of these trials has grown after it."""
        return len(self._over_after) >= LEARN_FROM and max(self._over_after) <= reports

"""How fast a quantity moves, and how long what is left lasts: a robust slope over the last seconds.

Covers memory that is available on the host (it runs out) and what one trial holds (it grows). Theil-Sen, the median of
all pairs' slopes: one odd reading in four does not move it, where least squares would take it for a trend. Knows no
thresholds and judges nothing: `policy.pressure` and `policy.trial_watch` do.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median

NEWEST_S = 0.5  # what happened in the last half second must agree: a burst that is over is no trend
MIN_POINTS = 4  # at one reading a second: three seconds of the same story
MIN_SPAN_SHARE = 0.5  # of the window: four looks at ten a second are 0.3 s, in which a program loads its data


@dataclass(slots=True)
class Trend:
    """The readings of the last `window_s` seconds of something that is counted in bytes."""

    window_s: float
    points: deque[tuple[float, int]] = field(default_factory=deque)

    def add(self, at: float, value: int) -> None:
        """One more reading; those older than the window go, but never below MIN_POINTS: slow readings count too."""
        if self.points and at <= self.points[-1][0]:
            return
        self.points.append((at, value))
        while len(self.points) > MIN_POINTS and self.points[0][0] < at - self.window_s:
            self.points.popleft()
        while self.points and self.points[0][0] < at - 2 * self.window_s:
            self.points.popleft()

    def clear(self) -> None:
        """Forget what was seen: a gap in sampling, or a kill that gave memory back, makes it say nothing about now."""
        self.points.clear()

    @property
    def slope(self) -> float | None:
        """Bytes a second, below zero when it falls; None before MIN_POINTS over half a window. The slope nearer to zero
        of two: that of the window and that of its newest part, so that neither an old nor a passing movement counts."""
        points = list(self.points)
        if len(points) < MIN_POINTS or points[-1][0] - points[0][0] < MIN_SPAN_SHARE * self.window_s:
            return None
        whole = median(
            (value - before) / (at - since) for i, (since, before) in enumerate(points) for at, value in points[i + 1 :]
        )
        at, value = points[-1]
        since, before = next(p for p in reversed(points[:-1]) if at - p[0] >= NEWEST_S or p is points[0])
        newest = (value - before) / (at - since)
        if whole * newest <= 0:
            return 0.0
        return min(whole, newest, key=abs)

    def left_s(self) -> float | None:
        """Seconds until the value reaches zero at this pace; None when it does not fall or nothing can be said."""
        slope = self.slope
        if slope is None or slope >= 0:
            return None
        return max(0, self.points[-1][1]) / -slope

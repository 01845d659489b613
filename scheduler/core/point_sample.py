"""Some of the points that were seen, so that what is learnt from them costs the same after 10^5 as after 500.

Which are kept depends on the points alone, not on their order or number of readings: a run that is started again reads
them from its studies in another one.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import Counter

Point = tuple[float, float]  # predicted, observed: bytes above the runtime
LIMIT = 512  # five of them above a quantile of 99 %


class PointSample:
    """At most `limit` of all points, drawn evenly, and what holds for all."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.points: list[Point] = []  # ascending
        self.capped = True  # none was observed above its prediction
        self._limit = limit
        self._times: Counter[Point] = Counter()
        self._kept: list[tuple[int, Point]] = []  # heap: the one to go first, first

    def add(self, point: Point) -> bool:
        """Take in one more; return whether the sample is another one now."""
        was_capped = self.capped
        self.capped &= point[1] <= point[0]
        self._times[point] += 1
        # The same numbers give the same hash in every process: Python salts those of strings only. Equal points are
        # told apart by how many there were, or all of them would be kept, or none.
        entry = -hash((*point, self._times[point])), point
        if len(self._kept) < self._limit:
            heapq.heappush(self._kept, entry)
            insort(self.points, point)
            return True
        gone = heapq.heappushpop(self._kept, entry)
        if gone != entry:
            del self.points[bisect_left(self.points, gone[1])]
            insort(self.points, point)
        return gone != entry or was_capped != self.capped

"""What is kept of many observations: some, evenly, whatever their order."""

from __future__ import annotations

import random

from scheduler.core.correction import Corrections
from scheduler.core.point_sample import LIMIT, PointSample
from tests.builders import observation

FAMILY = "patchtst/cpu/glibc"


def test_the_same_points_in_any_order_leave_the_same_sample() -> None:
    """Also where many are equal: of a point that makes up half of all, about half of the sample is."""
    source = random.Random(1)
    points = [(100.0, 90.0)] * 2000 + [(source.uniform(1, 9), source.uniform(1, 9)) for _ in range(2000)]
    first, second = PointSample(), PointSample()
    for point in points:
        first.add(point)
    source.shuffle(points)
    for point in points:
        second.add(point)
    assert first.points == second.points == sorted(first.points)
    assert len(first.points) == LIMIT
    assert 0.4 < first.points.count((100.0, 90.0)) / LIMIT < 0.6


def test_ten_thousand_observations_are_covered_as_five_hundred_are_and_seldom_change_anything() -> None:
    """Of new ones 1 % lie above the correction (at most 3 % here), and it is learnt anew for one in several."""
    source, found = random.Random(2), Corrections()

    def peak(predicted: int) -> int:
        return int(predicted * source.lognormvariate(0, 0.05))

    changes, before = 0, found.of(FAMILY)
    for _ in range(10_000):
        predicted = source.randrange(2**28, 2**32)
        found.observe(observation(predicted, peak(predicted)))
        changes += (after := found.of(FAMILY)) is not before
        before = after
    assert changes < 2500
    fresh = [source.randrange(2**28, 2**32) for _ in range(2000)]
    under = sum(peak(predicted) > before.host_bytes(predicted, 0) for predicted in fresh)
    assert under < 60

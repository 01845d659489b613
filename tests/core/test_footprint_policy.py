"""Tightening and growth of a reservation."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from scheduler.core.reservation import grown, tightened

MIB, GIB = 2**20, 2**30


@given(st.integers(1, 200 * GIB))
def test_tightening_keeps_little(peak: int) -> None:
    """Reserved minus used: at most 3 % of used or 48 MiB, and never nothing."""
    margin = tightened(peak) - peak
    assert 0 < margin <= max(0.03 * peak, 48 * MIB)


@given(st.integers(1, 200 * GIB))
def test_growth_is_above_use_and_in_proportion(used: int) -> None:
    """An attempt over its reservation gets what it holds, and room to be seen again: of a small one a quarter of it,
    of a larger one more than after tightening."""
    assert used < grown(used) <= used + max(used / 4 + 1, 1)
    assert used < 256 * MIB or grown(used) > tightened(used)


def test_growth_of_small_trials_does_not_fill_the_budget() -> None:
    """Eight that were promised 30 MB and take 35 leave room for others in 800 MB."""
    assert 8 * grown(35_200_000) < 400_000_000

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
def test_growth_is_above_use_and_more_than_tightening(used: int) -> None:
    """An attempt over its reservation gets what it holds, and room to be seen again."""
    assert grown(used) > tightened(used) > used

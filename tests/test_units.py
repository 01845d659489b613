"""Durations as people read them."""

from __future__ import annotations

import pytest

from scheduler.units import duration


@pytest.mark.parametrize(
    ("seconds", "text", "wide"),
    [
        (-3.0, "0s", "0 s"),
        (0.4, "0s", "0 s"),
        (59.9, "59s", "59 s"),
        (60, "1m00s", "1 min 00 s"),
        (185, "3m05s", "3 min 05 s"),
        (3725, "1h02m", "1 h 02 min"),
        (273600, "3d04h", "3 d 04 h"),
    ],
)
def test_durations_have_two_units(seconds: float, text: str, wide: str) -> None:
    """The console's short form and the page's wide one are of one making."""
    assert (duration(seconds), duration(seconds, wide=True)) == (text, wide)

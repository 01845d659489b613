"""Reading one field of what somebody else wrote: of its type and bounded, or refused in one line. Pure."""

from __future__ import annotations

import math
from typing import Any


class BadMessage(ValueError):
    """No message of the protocol: which field, and the value seen."""


def finite(value: Any) -> float | None:
    """The number as a finite float; None for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None

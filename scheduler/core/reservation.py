"""What a running attempt's reservation becomes: tightened once its memory is flat, grown when it is over.

What is reserved at first is the formula's answer (training/footprint.py), corrected (`correction`). Pure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Margins:
    """Room kept above what was seen: the larger of a share of it and a floor, which itself is at most floor_share."""

    share: float
    floor_bytes: int
    floor_share: float = math.inf

    def above(self, seen_bytes: int) -> int:
        """`seen_bytes` and the room above it."""
        floor = math.ceil(min(seen_bytes * self.floor_share, self.floor_bytes))
        return seen_bytes + max(math.ceil(seen_bytes * self.share), floor)


# Memory is flat after the first optimizer step and the first validation; what still comes (a checkpoint, heap chunks)
# was at most 2 % in the measurements.
TIGHTENING = Margins(share=0.025, floor_bytes=40 * MIB)
# It is looked at every second. (Without a share for the floor: eight processes of 35 MB that had been promised 30 held
# 100 each, two thirds of a budget of 800 MB in which nothing was.)
GROWTH = Margins(share=0.05, floor_bytes=64 * MIB, floor_share=0.25)


def tightened(peak_bytes: int, margins: Margins = TIGHTENING) -> int:
    """Return the reservation of an attempt whose memory has gone flat at `peak_bytes` (the largest ever seen of it)."""
    return margins.above(peak_bytes)


def grown(used_bytes: int, margins: Margins = GROWTH) -> int:
    """Return the reservation of an attempt that went over its own: what it holds now and room to be seen again."""
    return margins.above(used_bytes)

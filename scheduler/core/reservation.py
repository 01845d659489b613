"""What a running attempt's reservation becomes: tightened once its memory is flat, grown when it is over.

What is reserved at first is the formula's answer (training/footprint.py), corrected (`correction`). Pure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Margins:
    """Room kept above what was seen: the larger of a share of it and a floor."""

    share: float
    floor_bytes: int

    def above(self, seen_bytes: int) -> int:
        """`seen_bytes` and the room above it."""
        return seen_bytes + max(math.ceil(seen_bytes * self.share), self.floor_bytes)


# Memory is flat after the first optimizer step and the first validation; what still comes (a checkpoint, heap chunks)
# was at most 2 % in the measurements.
TIGHTENING = Margins(share=0.025, floor_bytes=40 * MIB)
GROWTH = Margins(share=0.05, floor_bytes=64 * MIB)


def tightened(peak_bytes: int, margins: Margins = TIGHTENING) -> int:
    """Return the reservation of an attempt whose memory has gone flat at `peak_bytes` (the largest ever seen of it)."""
    return margins.above(peak_bytes)


def grown(used_bytes: int, margins: Margins = GROWTH) -> int:
    """Return the reservation of an attempt that went over its own: what it holds now and room to be seen again."""
    return margins.above(used_bytes)

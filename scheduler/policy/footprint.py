"""What observed peaks teach: the correction of the formula, and what a running attempt's reservation becomes.

Covers `Corrections` (per family: allocator, device) and the sizes a reservation is tightened and grown to. The
formula itself is training/footprint.py. Pure: no clock, no I/O; the same observations in any order, whether live or
read back from a study, give the same factor.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import insort
from collections import defaultdict
from dataclasses import dataclass

from scheduler.model import Footprint, FootprintSource, Observation

MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Caution:
    """How careful the correction is.

    miss_rate: how often a trial may be above its corrected estimate, once that many were observed that a quantile can
        tell (1/miss_rate - 1 of them); below that the largest ratio seen counts.
    spread: added to that largest ratio, divided by the number of samples + 1: a ninth trial can be worse than eight.
    trusted_samples: from this many on the observations alone count; before, the prior's factor 1 is mixed in, so that
        one small trial cannot talk the estimate of a large one down.
    kill_growth: a trial killed for memory needed more than it had reached: this much more is assumed.
    """

    miss_rate: float = 0.01
    spread: float = 0.05
    trusted_samples: int = 16
    kill_growth: float = 1.1


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


class Corrections:
    """Observed/predicted per family, and the factor that follows. Order of observation does not matter."""

    def __init__(self, caution: Caution | None = None) -> None:
        self._caution = caution or Caution()
        self._ratios: dict[str, list[float]] = defaultdict(list)
        self._at_least: dict[str, list[float]] = defaultdict(list)
        self._known: dict[str, tuple[float, int]] = {}  # family -> (factor, samples): each placement asks for them

    def observe(self, observation: Observation) -> None:
        """Take in one finished or killed attempt. One without a prediction or a peak teaches nothing."""
        if observation.predicted_bytes <= 0 or observation.observed_bytes <= 0:
            return
        kind = self._at_least if observation.at_least else self._ratios
        # Kept sorted, so that `factor` sorts what is sorted: linear, which tells after some ten thousand trials.
        insort(kind[observation.family], observation.observed_bytes / observation.predicted_bytes)
        self._known.pop(observation.family, None)

    def samples(self, family: str) -> int:
        """How many observations stand behind `factor(family)`."""
        return len(self._ratios.get(family, ())) + len(self._raising_kills(family))

    def factor(self, family: str) -> float:
        """What a prediction of this family is multiplied with; 1 while nothing was observed."""
        c = self._caution
        ratios = sorted(self._ratios.get(family, []) + self._raising_kills(family))
        if not ratios:
            return 1.0
        n = len(ratios)
        # The split-conformal rank: of n + 1 exchangeable ratios the new one is above this with miss_rate at most.
        rank = math.ceil((n + 1) * (1 - c.miss_rate))
        bound = ratios[rank - 1] if rank <= n else ratios[-1] + c.spread / (n + 1)
        doubt = max(0.0, 1 - n / c.trusted_samples)
        return max(bound, bound + (1 - bound) * doubt)

    def correct(self, footprint: Footprint, family: str) -> Footprint:
        """The footprint times the family's factor, with where it comes from. An unknown one stays unknown.

        `footprint` may be corrected already: `prior_bytes` is the base.
        """
        if not footprint.is_known:
            return footprint
        if family not in self._known:
            self._known[family] = (self.factor(family), self.samples(family))
        factor, samples = self._known[family]
        prior = footprint.prior_bytes or footprint.host_bytes
        scale = factor * prior / footprint.host_bytes if footprint.host_bytes else factor
        return dataclasses.replace(
            footprint,
            host_bytes=math.ceil(prior * factor),
            device_bytes=math.ceil(footprint.device_bytes * scale),
            prior_bytes=prior,
            source=FootprintSource.CORRECTED if samples else FootprintSource.PRIOR,
            samples=samples,
        )

    def _raising_kills(self, family: str) -> list[float]:
        """Kills that say more than the finished trials do: one killed below what others reached teaches nothing."""
        kills = self._at_least.get(family, ())
        most = max(self._ratios.get(family, ()), default=1.0)
        return [ratio * self._caution.kill_growth for ratio in kills if ratio * self._caution.kill_growth > most]


def tightened(peak_bytes: int, margins: Margins = TIGHTENING) -> int:
    """The reservation of an attempt whose memory has gone flat at `peak_bytes` (the largest ever seen of it)."""
    return margins.above(peak_bytes)


def grown(used_bytes: int, margins: Margins = GROWTH) -> int:
    """The reservation of an attempt that went over its own: what it holds now and room to be seen again."""
    return margins.above(used_bytes)

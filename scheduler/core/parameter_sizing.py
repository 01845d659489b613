"""The peak of an arbitrary objective's next trial, learnt from its study's parameters: one `ParameterSizing` a study.

A guess, for placing trials. It must never be used to reject a trial, to kill one, or to teach the sampler: one of some
hundred trials is above it, on rare occasions by a factor of two. `Prediction` says what it rests on and how it has
fared, so that a caller can run a trial alone. Covers the first trials, the bound above the regression, kills for
memory and the user's own number; not when memory may be given back, nor what a host has. Pure: observations in the
same order, live or read back from the study, give the same state.
"""

from __future__ import annotations

import enum
import math
from collections import deque
from dataclasses import dataclass, field

from scheduler.core.parameter_space import Embedding
from scheduler.core.peak_regression import LEARN_FROM, PeakRegression
from scheduler.model.parameters import Parameters, PeakObservation, Space

MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Caution:
    """How careful the bound is; chosen on the development streams of tests/benchmarks/data.

    first_margin, first_doubt: below `LEARN_FROM` observations the largest peak seen is charged, first_margin +
        first_doubt / observations times: of the next trials of the development streams, in any order, 98 % stay within
        that after 1, 2, 3 ... 7 of them. (1.5 times: 90 % after the first, 95 % after the third.)
    deviations: of the regression, above its mean; times 1 + few / observations, since with few of them the deviation
        is itself a guess; and times how far the study's peaks were off so far, as if `patience` more had been off by 1.
    surprise: the most one trial counts for in that, in deviations.
    margin: on top of all, what two runs of one trial differ by.
    farthest: never more than this many times the largest peak seen.
    most: nor more than this many times the expected peak, unless as much was seen: how far a model may doubt itself.
    kill_growth: a trial killed for memory needed more than it had: this many times is assumed.
    floor: growth below this share of the warm process is noise; added before the logarithm is taken.
    """

    first_margin: float = 1.5
    first_doubt: float = 2.0
    deviations: float = 2.0
    few: float = 8.0
    patience: float = 20.0
    surprise: float = 5.0
    margin: float = 1.02
    farthest: float = 3.0
    most: float = 2.5
    kill_growth: float = 1.1
    floor: float = 0.03


class PeakSource(enum.Enum):
    """What a prediction rests on."""

    UNKNOWN = "unknown"  # nothing seen, nothing given: the whole room
    GIVEN = "given"  # the user's number
    LARGEST = "largest"  # the largest seen
    LEARNT = "learnt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Bytes to reserve for a trial. `deviations`: of the bound above the expected peak, 0 where there is no model.

    samples: observations behind it. judged, covered: earlier trials that the model had sized, and how many of them
    stayed within. is_new: a parameter or option that no trial before had, so that the model knows nothing of it.
    """

    peak_bytes: int
    source: PeakSource
    samples: int
    deviations: float = 0.0
    judged: int = 0
    covered: int = 0
    is_new: bool = False


@dataclass(slots=True)
class Record:
    """How the model's bounds have fared, each judged before its trial was learnt from."""

    judged: int = 0
    covered: int = 0
    squares: float = 0.0


@dataclass(slots=True)
class ParameterSizing:
    """What one study has taught. `given_bytes` below: what the user's `memory=` says of this very trial."""

    caution: Caution = field(default_factory=Caution)
    _embedding: Embedding = field(default_factory=Embedding)
    _regression: PeakRegression = field(default_factory=PeakRegression)
    _record: Record = field(default_factory=Record)
    _largest: int = 0
    _observed: int = 0
    _kills: deque[PeakObservation] = field(default_factory=lambda: deque(maxlen=64))
    _peaks: deque[tuple[Parameters, int]] = field(default_factory=lambda: deque(maxlen=64))

    def predict(
        self,
        parameters: Parameters,
        space: Space,
        *,
        base_bytes: int,
        room_bytes: int,
        given_bytes: int | None = None,
    ) -> Prediction:
        """Predict the peak to reserve for, at most `room_bytes` (the largest worker's). The given number stands."""
        is_new = self._embedding.is_new(parameters, space)
        deviations = 0.0
        if given_bytes is not None:
            source, peak = PeakSource.GIVEN, float(given_bytes)
        elif self._observed >= LEARN_FROM:
            source, deviations = PeakSource.LEARNT, self._deviations()
            peak = self._bound(self._embedding.point(parameters), base_bytes)
        elif self._largest:
            margin = self.caution.first_margin + self.caution.first_doubt / self._observed
            source, peak = PeakSource.LARGEST, self._largest * margin
        else:
            source, peak = PeakSource.UNKNOWN, float(room_bytes)
        peak = max(peak, self._same(parameters), base_bytes)
        return Prediction(
            peak_bytes=min(math.ceil(peak), room_bytes),
            source=source,
            samples=self._observed,
            deviations=deviations,
            judged=self._record.judged,
            covered=self._record.covered,
            is_new=is_new,
        )

    def observe(self, seen: PeakObservation) -> None:
        """Take in a trial's end. One without a peak teaches nothing; nor does a kill below what was expected."""
        if seen.peak_bytes <= 0:
            return
        peak = seen.peak_bytes * self.caution.kill_growth if seen.at_least else float(seen.peak_bytes)
        target = self._target(peak, seen.base_bytes)
        if seen.at_least:
            self._kills.append(seen)
            # Only what ran is expected to be a lower bound: it tells nothing where the model expects more anyway.
            if self._observed >= LEARN_FROM:
                expected, _ = self._regression.predict(self._embedding.point(seen.parameters))
                if expected >= target:
                    return
        else:
            self._peaks.append((dict(seen.parameters), seen.peak_bytes))
        if self._observed >= LEARN_FROM:
            self._judge(seen, target)
        if absent := self._embedding.learn(seen.parameters, seen.space):
            self._regression.extend(self._embedding.owners, absent)
        self._regression.observe(self._embedding.point(seen.parameters), target)
        self._largest = max(self._largest, seen.peak_bytes)
        self._observed += 1

    def _target(self, peak_bytes: float, base_bytes: int) -> float:
        """Return what the regression learns: the logarithm of the growth and the floor."""
        return math.log(max(peak_bytes - base_bytes, 0.0) + self._floor(base_bytes))

    def _floor(self, base_bytes: int) -> float:
        return max(self.caution.floor * base_bytes, float(MIB))

    def _deviations(self) -> float:
        """How many of the regression's deviations the bound is above its mean now."""
        c = self.caution
        off = (c.patience + self._record.squares) / (c.patience + self._record.judged)
        return c.deviations * (1 + c.few / self._observed) * math.sqrt(off)

    def _bound(self, point: list[float], base_bytes: int) -> float:
        """Return the model's bound in bytes."""
        mean, deviation = self._regression.predict(point)
        # The exponent of a hopeless case (all peaks alike, then something else) would overflow.
        c, floor = self.caution, self._floor(base_bytes)
        growth = math.exp(min(mean + self._deviations() * deviation, 60.0)) - floor
        expected = base_bytes + math.exp(min(mean, 60.0))
        return min(
            (base_bytes + growth) * c.margin,
            max(expected * c.most, self._largest),
            self._largest * c.farthest,
        )

    def _judge(self, seen: PeakObservation, target: float) -> None:
        """Compare with what would have been predicted, before it is learnt from."""
        point = self._embedding.point(seen.parameters)
        mean, deviation = self._regression.predict(point)
        self._record.covered += seen.peak_bytes <= max(self._bound(point, seen.base_bytes), self._same(seen.parameters))
        self._record.judged += 1
        self._record.squares += min(abs(target - mean) / deviation, self.caution.surprise) ** 2

    def _same(self, parameters: Parameters) -> float:
        """Return the most a trial with these very parameters has needed; a retry after a kill needs more than it
        had."""
        kills = (kill.peak_bytes * self.caution.kill_growth for kill in self._kills if kill.parameters == parameters)
        peaks = (float(peak) for known, peak in self._peaks if known == parameters)
        return max([*kills, *peaks], default=0.0)

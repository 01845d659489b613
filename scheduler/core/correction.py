"""What observed peaks teach: the correction of a formula's answer, one for each family and environment.

The formula itself is training/footprint.py; what a running attempt's reservation becomes is `reservation`. Pure:
no clock, no I/O; the same observations in any order, whether live or read back from a study, give the same correction.

A correction is a line through what was observed: offset and slope. Both are needed: what a formula forgets of the
process itself (a library, a cache) costs every trial the same bytes, what it forgets of the tensors grows with them; a
ratio alone, learnt where 100 bytes are missing from 200, adds 50 % to the largest trials for good. Few observations, or
many of one size, do not tell the two apart. Then both explanations are kept, and the higher counts.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import pstdev

from scheduler.core.point_sample import Point, PointSample
from scheduler.model import Correction, Environment, Footprint, FootprintSource, Observation

MIB = 2**20
Key = tuple[str, str]  # family, environment
Line = tuple[float, float]  # offset in bytes, slope
LEAST_SLOPE = 0.05  # a larger trial never needs less


@dataclass(frozen=True, slots=True, kw_only=True)
class Caution:
    """How careful the correction is.

    miss_rate: how often a trial may be above its corrected estimate, once that many were observed that a quantile can
        tell (1/miss_rate - 1 of them); below that the worst seen counts.
    spread: added to that worst, divided by the number of samples + 1, since they may happen to agree too well.
    trusted_samples: from this many on the observations alone count; before, the formula's own answer is mixed in, so
        that one small trial cannot talk the estimate of a large one down.
    kill_growth: a trial killed for memory needed more than it had reached: this much more is assumed.
    noise: of a peak around its line, at least, as a part of it: three points that happen to lie on one are no proof.
    slope_errors: how many standard errors from the fitted one a slope still is plausible.
    even_bytes: misses are taken relative to the prediction plus this, so that those of tiny trials do not rule.
    """

    miss_rate: float = 0.01
    spread: float = 0.04
    trusted_samples: int = 16
    kill_growth: float = 1.1
    noise: float = 0.01
    slope_errors: float = 2.0
    even_bytes: int = 128 * MIB


class Corrections:
    """Observed beside predicted, by family and environment, and the correction that follows, whatever their order."""

    def __init__(self, caution: Caution | None = None) -> None:
        self._caution = caution or Caution()
        self._seen: defaultdict[Key, PointSample] = defaultdict(PointSample)
        self._at_least: defaultdict[Key, PointSample] = defaultdict(PointSample)
        self._known: dict[Key, Correction] = {}  # each placement asks for them
        self._here: dict[tuple[str, Environment | None], Correction] = {}

    def observe(self, observation: Observation) -> None:
        """Take in one finished or killed attempt. One without a prediction or a peak teaches nothing."""
        growth = self._caution.kill_growth if observation.at_least else 1.0
        predicted = observation.predicted_bytes - observation.runtime_bytes
        observed = observation.observed_bytes * growth - observation.runtime_bytes
        if predicted <= 0 or observed <= 0:
            return
        key = observation.family, observation.environment
        points = (self._at_least if observation.at_least else self._seen)[key]
        if points.add((predicted, observed)):
            self._known.pop(key, None)
            self._here.clear()

    def of(self, family: str, environment: Environment | None = None) -> Correction:
        """Return what a prediction of this family is corrected with there: not at all while nothing was observed.

        The same object while it is the same correction.
        """
        found = self._here.get((family, environment))
        if found is None:
            known = self._learnt((family, "" if environment is None else environment.name))
            runtime_bytes = 0 if environment is None else environment.runtime_bytes
            found = dataclasses.replace(known, runtime_bytes=runtime_bytes)
            self._here[family, environment] = found
        return found

    def _learnt(self, key: Key) -> Correction:
        if key not in self._known:
            seen, killed = self._seen.get(key, PointSample()), self._at_least.get(key, PointSample())
            found = learnt(seen.points, self._caution)
            # One killed below what others reached, a victim of somebody else's memory, teaches nothing.
            raising = [(x, y) for x, y in killed.points if y > found.host_bytes(int(x), 0)]
            if raising:
                found = learnt(sorted(seen.points + raising), self._caution)
            self._known[key] = dataclasses.replace(found, capped=found.capped and seen.capped)
        return self._known[key]


def observed(
    family: str,
    prior_bytes: int,
    assumed_bytes: int,
    peak_bytes: int,
    *,
    environment: str | None,
    ready_bytes: int | None,
    at_least: bool,
) -> Observation:
    """Put a peak beside the prediction it should have had: with what the very process held when it was ready.

    assumed_bytes: the runtime in `prior_bytes`, 0 when the formula does not tell it apart. environment, ready_bytes:
    what the process said of itself, None when nobody heard it.
    """
    runtime_bytes = assumed_bytes and (ready_bytes or assumed_bytes)
    return Observation(
        family=family,
        environment=environment or "",
        predicted_bytes=prior_bytes - assumed_bytes + runtime_bytes,
        observed_bytes=peak_bytes,
        runtime_bytes=runtime_bytes,
        at_least=at_least,
    )


def correct(footprint: Footprint, correction: Correction) -> Footprint:
    """Return the footprint as corrected, with where it comes from. An unknown one stays unknown.

    `footprint` may be corrected already: `prior_bytes` is the base. Of a device's own pool no peaks are learnt; where
    it is unified its bytes are the host's, and are corrected with them.
    """
    if not footprint.is_known:
        return footprint
    prior = footprint.prior_bytes or footprint.host_bytes
    host_bytes = correction.host_bytes(prior, footprint.runtime_bytes)
    return dataclasses.replace(
        footprint,
        host_bytes=host_bytes,
        device_bytes=host_bytes if footprint.device_bytes == footprint.host_bytes else footprint.device_bytes,
        prior_bytes=prior,
        source=FootprintSource.CORRECTED if correction.samples else FootprintSource.PRIOR,
        samples=correction.samples,
    )


def learnt(seen: Sequence[Point], caution: Caution) -> Correction:
    """Return the correction that the next (predicted, observed) will lie below. seen: the former ones, in ascending
    order."""
    if not seen:
        return Correction()
    n = len(seen)
    lines = [_lifted(seen, line, caution) for line in _plausible(seen, caution)]
    # Left of what was seen a line with a negative offset leads to nothing: there a part of the prediction counts.
    lines.append((0.0, min(*(slope for _, slope in lines), *(y / x for x, y in seen))))
    doubt = max(0.0, 1 - n / caution.trusted_samples)
    lines += [(offset * (1 - doubt), slope + (1 - slope) * doubt) for offset, slope in lines]
    # A formula that has kept its promise to those that came is no reason to promise more to the next.
    return Correction(lines=tuple(sorted(set(lines))), capped=all(y <= x for x, y in seen), samples=n)


def _plausible(seen: Sequence[Point], caution: Caution) -> list[Line]:
    """Return the lines of least and greatest slope through the centre of what was seen that may still be the true one.

    An offset explains it all by the slope 1, a ratio by that of the centre: between the two lies the truth, unless a
    weighted least-squares fit, once there are three points, says more.
    """
    weights = [1 / (x + caution.even_bytes) ** 2 for x, _ in seen]
    total = sum(weights)
    mid_x = sum(w * x for w, (x, _) in zip(weights, seen, strict=True)) / total
    mid_y = sum(w * y for w, (_, y) in zip(weights, seen, strict=True)) / total
    low, high = sorted((1.0, mid_y / mid_x))
    breadth = sum(w * (x - mid_x) ** 2 for w, (x, _) in zip(weights, seen, strict=True))
    if len(seen) >= 3 and breadth > 0:
        fitted = sum(w * (x - mid_x) * (y - mid_y) for w, (x, y) in zip(weights, seen, strict=True)) / breadth
        misses = (w * (y - mid_y - fitted * (x - mid_x)) ** 2 for w, (x, y) in zip(weights, seen, strict=True))
        noise = max(caution.noise, math.sqrt(sum(misses) / (len(seen) - 2)))
        few = 1 + 5 / (len(seen) - 2) ** 2  # about what Student's t asks above a normal distribution
        reach = few * caution.slope_errors * noise / math.sqrt(breadth)
        least, most = fitted - reach, fitted + reach
        low, high = (max(low, least), min(high, most)) if least <= high and low <= most else (least, most)
    return [(mid_y - slope * mid_x, slope) for slope in (max(low, LEAST_SLOPE), max(high, LEAST_SLOPE))]


def _lifted(seen: Sequence[Point], line: Line, caution: Caution) -> Line:
    """Raise the line above what was seen, by a part of the prediction."""
    offset, slope = line
    misses = sorted((y - offset - slope * x) / (x + caution.even_bytes) for x, y in seen)
    n = len(misses)
    # The split-conformal rank: of n + 1 exchangeable misses the new one is above this with miss_rate at most.
    rank = math.ceil((n + 1) * (1 - caution.miss_rate))
    if rank <= n:
        lift = misses[rank - 1]
    else:
        # A new one is above the worst of n at a rate of 1/(n + 1), and past that by half a deviation in the mean.
        beyond = pstdev(misses) / 2 * math.log(1 / (caution.miss_rate * (n + 1)))
        lift = misses[-1] + beyond + caution.spread / (n + 1)
    return offset + lift * caution.even_bytes, max(LEAST_SLOPE, slope + lift)

"""How long trials will take, as draws: from those that have ended and how far those that run have come.

Covers a study's pace (seconds an epoch) and how many epochs its trials make before they stop, early or not, and what
one study says of another. Does not cover who runs when: that is `forecast`. Pure: chance comes in as an argument.

A trial takes pace x epochs. Both are drawn from the study's own trials, the more often the more there are, else from
what is believed: pace is log-normal within a study, and after each epoch a trial may stop. Mean, spread and hazard are
drawn anew for each possible future, so that little evidence makes a wide range. The mean of a study without evidence
comes from the others', by the memory they need. Trials that still run count, too, as "at least so
many": those that end first are the short ones, and would make all others look short.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist, fmean
from typing import TypeVar

T = TypeVar("T")
Uniform = Callable[[], float]  # the next number of a source of chance: 0 <= x < 1

_NORMAL = NormalDist()
# What is believed before anything is seen: trials of one study differ by a factor of e^0.4, studies of equal memory by
# e^0.6; twice the memory is twice the time, give or take. Each counts as so many observations.
_SPREAD, _SPREAD_COUNTS = 0.4, 6.0
_APART, _APART_COUNTS = 0.6, 3.0
_SLOPE, _SLOPE_SD = 0.9, 0.4
_SHARE = 0.5  # of their bound of epochs that trials make
# What is to come differs from what was: samplers and pruners move on, neighbours come and go. A factor of e^0.2 for a
# study, of e^0.1 for all; one in the mean, since the end is a sum of many trials.
_SHIFT, _SHIFT_ALL = 0.2, 0.1
_BELIEVED = 3.0  # so many trials of its own, and a study's are drawn from as often as from what is believed


@dataclass(frozen=True, slots=True, kw_only=True)
class Took:
    """A trial that has ended. seconds: that it held its slots. epochs: 0 when it failed or was ended before its first.

    size_bytes: that were reserved for it.
    """

    epochs: int
    seconds: float
    size_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Under:
    """A trial under way. ran_s: so far. pace_s: of the epochs it has made, None before the first; behind_s: since the
    last of them."""

    epochs: int
    ran_s: float
    pace_s: float | None = None
    behind_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What is known of one study. size_bytes: of its typical trial. max_epochs: None where there is no bound."""

    ended: Sequence[Took] = ()
    running: Sequence[Under] = ()
    size_bytes: int = 0
    max_epochs: int | None = None

    @property
    def log_paces(self) -> list[float]:
        """Of every trial that made an epoch, the running ones too."""
        paces = [took.seconds / took.epochs for took in self.ended if took.epochs]
        paces += [under.pace_s for under in self.running if under.pace_s is not None]
        return [math.log(max(pace, 1e-3)) for pace in paces]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """One possible truth about a study: the mean and the spread of the logarithm of its trials' seconds an epoch."""

    mean: float
    spread: float

    def draw(self, chance: Uniform, above_s: float = 0.0) -> float:
        """Return the pace of one trial, given that it is more than `above_s`."""
        low = 0.0 if above_s <= 0 else _NORMAL.cdf((math.log(above_s) - self.mean) / self.spread)
        if low > 1 - 1e-6:  # far slower than any
            return above_s * math.exp(0.2 * self.spread * _exponential(chance))
        place = low + (1 - low) * chance()
        return math.exp(self.mean + self.spread * _NORMAL.inv_cdf(min(1 - 1e-9, max(1e-9, place))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """One possible truth about the epochs that a study's trials make: a bag to draw from, and beyond it the chance to
    stop after each epoch (hazard). failed_s: how long those lasted that made none, failing: their share.
    """

    bag: Sequence[int]
    hazard: float
    max_epochs: int | None
    failed_s: Sequence[float] = ()
    failing: float = 0.0

    def draw(self, chance: Uniform, above: int = 0) -> int:
        """Return how many epochs one trial makes in all, given that it makes more than `above`.

        The fewer of those seen came so far, the more the hazard counts.
        """
        longer = [epochs for epochs in self.bag if epochs > above]
        if longer and chance() * (1 + len(longer)) >= 1:
            return _pick(longer, chance)
        found = above + 1 + int(_exponential(chance) / self.hazard)
        return found if self.max_epochs is None else max(above + 1, min(found, self.max_epochs))


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """One possible truth about a study: what `trial` and `rest` draw from."""

    pace: Pace
    lengths: Lengths
    seen: Sequence[tuple[float, int]] = ()  # (pace, epochs) of its own trials
    shift: float = 1.0  # of what is to come against what was

    def trial(self, chance: Uniform) -> tuple[float, float]:
        """Return (seconds in all, seconds an epoch) of a trial that has not begun."""
        seconds, pace_s = self._like_those_before(chance)
        return seconds * self.shift, pace_s * self.shift

    def _like_those_before(self, chance: Uniform) -> tuple[float, float]:
        lengths = self.lengths
        if lengths.failed_s and chance() < lengths.failing:
            lasted = _pick(lengths.failed_s, chance)
            return lasted, lasted
        if chance() * (len(self.seen) + _BELIEVED) < len(self.seen):  # as they were: slow ones may also be short ones
            pace_s, epochs = _pick(self.seen, chance)
            return pace_s * epochs, pace_s
        pace_s = self.pace.draw(chance)
        return pace_s * lengths.draw(chance), pace_s

    def rest(self, under: Under, chance: Uniform) -> tuple[float, float]:
        """Return (seconds until its end, seconds an epoch) of a trial under way."""
        epochs = self.lengths.draw(chance, above=under.epochs)
        if under.pace_s is not None:
            return max(0.0, under.pace_s * (epochs - under.epochs) - under.behind_s), under.pace_s
        left = epochs - under.epochs  # resumed, and no epoch since
        pace_s = self.pace.draw(chance, above_s=under.ran_s)
        return max(0.0, pace_s * left - under.ran_s), pace_s


class Beliefs:
    """What all studies together say. `truth` draws one possible truth about each."""

    def __init__(self, studies: Mapping[str, Evidence]) -> None:
        self._studies = studies
        self._paces = {name: each.log_paces for name, each in studies.items()}
        shares = [t.epochs / each.max_epochs for each in studies.values() if each.max_epochs for t in each.ended]
        self._usual_share = (fmean(shares) * len(shares) + _SHARE) / (len(shares) + 1) if shares else _SHARE
        residuals = [value - fmean(paces) for paces in self._paces.values() if len(paces) > 1 for value in paces]
        freedom = len(residuals) - sum(len(paces) > 1 for paces in self._paces.values())
        squares = sum(value * value for value in residuals)
        self._spread = math.sqrt((_SPREAD_COUNTS * _SPREAD**2 + squares) / (_SPREAD_COUNTS + freedom))

    @property
    def is_empty(self) -> bool:
        """Nothing is known of any study's pace."""
        return not any(self._paces.values())

    def truths(self, chance: Uniform) -> dict[str, Truth]:
        """Draw one possible truth about all studies."""
        line, common = self._line(chance), _SHIFT_ALL * _gauss(chance) - (_SHIFT**2 + _SHIFT_ALL**2) / 2
        found = {name: self._truth(name, evidence, line, chance) for name, evidence in self._studies.items()}
        shifts = {name: math.exp(common + _SHIFT * _gauss(chance)) for name in found}
        return {name: replace(truth, shift=shifts[name]) for name, truth in found.items()}

    def _line(self, chance: Uniform) -> Callable[[int], tuple[float, float]]:
        """Draw how the mean pace grows with the size: size -> (mean, how far a study may be from it)."""
        points = [(_log(self._studies[name].size_bytes), fmean(paces)) for name, paces in self._paces.items() if paces]
        centre, middle = fmean(x for x, _ in points), fmean(y for _, y in points)
        across = sum((x - centre) ** 2 for x, _ in points) / _APART**2
        along = sum((x - centre) * (y - middle) for x, y in points) / _APART**2
        precision = across + 1 / _SLOPE_SD**2
        slope = (along + _SLOPE / _SLOPE_SD**2) / precision
        squares = sum((y - middle - slope * (x - centre)) ** 2 for x, y in points)
        apart = math.sqrt((_APART_COUNTS * _APART**2 + squares) / (_APART_COUNTS + max(0, len(points) - 1)))
        drawn = slope + _gauss(chance) / math.sqrt(precision)
        height = middle + _gauss(chance) * apart / math.sqrt(len(points))
        return lambda size: (height + drawn * (_log(size) - centre), apart)

    def _truth(
        self, name: str, evidence: Evidence, line: Callable[[int], tuple[float, float]], chance: Uniform
    ) -> Truth:
        paces, (expected, apart) = self._paces[name], line(evidence.size_bytes)
        count = len(paces)
        own = fmean(paces) if paces else 0.0
        squares = sum((value - own) ** 2 for value in paces)
        freedom = _SPREAD_COUNTS + max(0, count - 1)
        scale = (_SPREAD_COUNTS * self._spread**2 + squares) / freedom
        spread = max(0.01, math.sqrt(scale * freedom / _chi_square(freedom, chance)))
        precision = count / spread**2 + 1 / apart**2
        mean = (count * own / spread**2 + expected / apart**2) / precision + _gauss(chance) / math.sqrt(precision)
        return self._with_lengths(evidence, Pace(mean=mean, spread=spread), chance)

    def _with_lengths(self, evidence: Evidence, pace: Pace, chance: Uniform) -> Truth:
        bound = evidence.max_epochs
        seen = [(took.seconds / took.epochs, took.epochs) for took in evidence.ended if took.epochs]
        failed = [took.seconds for took in evidence.ended if not took.epochs]
        stopped = sum(bound is None or epochs < bound for _, epochs in seen)
        made = sum(epochs for _, epochs in seen) + sum(under.epochs for under in evidence.running)
        # One trial's worth of belief: as long as others', in parts of their bound.
        usual = bound * self._usual_share if bound else max(1.0, made / max(1, len(seen)))
        drawn = 0.5 * _chi_square(2 * (stopped + 1.0), chance)
        hazard = min(1.0, max(1e-6, drawn / (made + usual)))
        known = Lengths(bag=[epochs for _, epochs in seen], hazard=hazard, max_epochs=bound)
        # Those that run, at a length they may come to: "longer than so much" is what they say.
        running = [under for under in evidence.running if under.pace_s is not None]
        seen += [(under.pace_s or 0.0, known.draw(chance, above=under.epochs)) for under in running]
        seen = [_pick(seen, chance) for _ in seen]  # a bootstrap: few trials say little
        total = len(seen) + len(failed)
        failing = sum(chance() < len(failed) / total for _ in range(total)) / total if total else 0.0
        bag = [epochs for _, epochs in seen]
        lengths = Lengths(bag=bag, hazard=hazard, max_epochs=bound, failed_s=failed, failing=failing)
        return Truth(pace=pace, lengths=lengths, seen=seen)


def _pick(items: Sequence[T], chance: Uniform) -> T:
    return items[int(chance() * len(items))]


def _exponential(chance: Uniform) -> float:
    return -math.log(1 - chance())


def _gauss(chance: Uniform) -> float:
    return _NORMAL.inv_cdf(min(1 - 1e-12, max(1e-12, chance())))


def _chi_square(freedom: float, chance: Uniform) -> float:
    """Draw from the chi-square distribution (Wilson and Hilferty's cube, 1931)."""
    step = 2 / (9 * freedom)
    return float(max(0.05, freedom * max(0.0, 1 - step + _gauss(chance) * math.sqrt(step)) ** 3))


def _log(size_bytes: int) -> float:
    return math.log(max(1, size_bytes))

"""How well peaks are predicted from parameters: real streams in order, each prediction before its observation.

Prints, from the 9th trial on, the share of trials above their prediction, the worst observed / predicted, and all bytes
reserved / all peaks; a stream a line for ours, then all of them for each rule, apart for the streams that the method
was chosen on and for those kept back. `python -m tests.benchmarks.sizing`. Covers no packing and no time: what the
predictions alone are worth. Streams and their origin: data/README.md.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from scheduler.core.parameter_sizing import ParameterSizing
from scheduler.core.parameter_space import Embedding
from scheduler.model.parameters import Choice, Distribution, PeakObservation, Range, Value

Points: TypeAlias = NDArray[np.float64]
DATA = Path(__file__).parent / "data"
FIRST = 8
ROOM = 2**40
# Drawn at random before any of them was run, to be judged on and never to be chosen on (data/README.md).
KEPT_BACK = frozenset(
    {"autoencoder", "catboost", "clustering", "cnn", "conditional-mlp", "images"}
    | {"kernel-ridge", "monte-carlo", "pandas", "svc", "text", "walks"}
)
# The three given streams came without their distributions: what their authors may have written, from the values seen.
ASSUMED: dict[str, dict[str, Distribution]] = {
    "lightgbm-random": {
        "num_leaves": Range(low=4, high=2048, log=True),
        "max_bin": Range(low=15, high=4095, log=True),
        "min_data_in_leaf": Range(low=1, high=100, log=True),
        "feature_fraction": Range(low=0.3, high=1),
        "learning_rate": Range(low=1e-3, high=0.3, log=True),
        "boosting": Choice(options=("gbdt", "dart")),
        "rounds": Range(low=2, high=20, log=True),
        "drop_rate": Range(low=0.01, high=0.3),
    },
    "random-forest-tpe": {
        "n_estimators": Range(low=4, high=400, log=True),
        "max_depth": Range(low=2, high=40),
        "min_samples_leaf": Range(low=1, high=64, log=True),
        "criterion": Choice(options=("gini", "entropy")),
        "bootstrap": Choice(options=("True", "False")),
        "max_samples": Range(low=0.2, high=1),
    },
    "torch-mlp-tpe": {
        "depth": Range(low=1, high=5),
        "width": Range(low=32, high=2048, log=True),
        "batch": Range(low=16, high=1024, log=True),
        "activation": Choice(options=("relu", "gelu")),
        "dropout": Range(low=0, high=0.5),
        "optimizer": Choice(options=("adam", "sgd")),
        "lr": Range(low=1e-5, high=0.1, log=True),
        "momentum": Range(low=0, high=0.99),
    },
}


@dataclass(frozen=True, slots=True)
class Stream:
    """A study's trials in order."""

    name: str
    space: dict[str, Distribution]
    trials: list[PeakObservation]

    @property
    def is_kept_back(self) -> bool:
        """Whether nothing was chosen on it."""
        return self.name.rpartition("-")[0] in KEPT_BACK


@dataclass(frozen=True, slots=True)
class Score:
    """The three figures, and of how many predictions."""

    count: int
    under: float
    worst: float
    total: float


class Rule(Protocol):
    """Predicts a trial's peak, then learns it."""

    def predict(self, trial: PeakObservation) -> float: ...

    def observe(self, trial: PeakObservation) -> None: ...


def distribution(found: dict[str, dict[str, Any]]) -> Distribution:
    """Optuna's JSON as ours."""
    attributes = found["attributes"]
    if "choices" in attributes:
        return Choice(options=tuple(attributes["choices"]))
    return Range(low=attributes["low"], high=attributes["high"], log=bool(attributes["log"]))


def value(text: str, drawn_from: Distribution) -> Value:
    """A CSV field as it was suggested."""
    if isinstance(drawn_from, Choice):
        return next(option for option in drawn_from.options if str(option) == text)
    return float(text)


def streams() -> Iterator[Stream]:
    """All that are committed."""
    for path in sorted(DATA.glob("peaks-*.csv")):
        name, described = path.stem.removeprefix("peaks-"), path.with_suffix(".json")
        if described.exists():
            space = {key: distribution(found) for key, found in json.loads(described.read_text()).items()}
        else:
            space = ASSUMED[name]
        with path.open() as file:
            trials = [
                PeakObservation(
                    parameters={key: value(row["p." + key], space[key]) for key in space if row["p." + key]},
                    space=space,
                    base_bytes=int(row["base"]),
                    peak_bytes=int(row["peak"]),
                )
                for row in csv.DictReader(file)
            ]
        yield Stream(name, space, trials)


class Ours:
    """The product's."""

    def __init__(self, stream: Stream) -> None:
        self._sizing = ParameterSizing()

    def predict(self, trial: PeakObservation) -> float:
        return self._sizing.predict(
            trial.parameters, trial.space, base_bytes=trial.base_bytes, room_bytes=ROOM
        ).peak_bytes

    def observe(self, trial: PeakObservation) -> None:
        self._sizing.observe(trial)


class Largest:
    """Today's: the largest seen, and half as much again."""

    def __init__(self, stream: Stream) -> None:
        self._largest = 0

    def predict(self, trial: PeakObservation) -> float:
        return self._largest * 1.5

    def observe(self, trial: PeakObservation) -> None:
        self._largest = max(self._largest, trial.peak_bytes)


class WorstCase:
    """A number that a user who knew the whole stream would write down."""

    def __init__(self, stream: Stream) -> None:
        self._largest = max(trial.peak_bytes for trial in stream.trials)

    def predict(self, trial: PeakObservation) -> float:
        return self._largest

    def observe(self, trial: PeakObservation) -> None:
        """Knows all."""


class Learner:
    """What the rules from the literature share: their coordinates, and the largest x 1.5 while little is seen."""

    least = 8

    def __init__(self, stream: Stream) -> None:
        self._embedding, self._seen = Embedding(), list[PeakObservation]()

    def predict(self, trial: PeakObservation) -> float:
        largest = max((each.peak_bytes for each in self._seen), default=0)
        if len(self._seen) < self.least:
            return 1.5 * largest
        points = np.array([self._embedding.point(each.parameters) for each in self._seen])
        targets = np.log([max(each.peak_bytes - each.base_bytes, 2**20) for each in self._seen])
        bound = self.bound(points, targets, np.array(self._embedding.point(trial.parameters)))
        return min(trial.base_bytes + float(np.exp(min(bound, 60.0))), 3.0 * largest)

    def bound(self, points: Points, targets: Points, at: Points) -> float:
        """An upper bound of the logarithm of the growth at a point."""
        raise NotImplementedError

    def observe(self, trial: PeakObservation) -> None:
        self._embedding.learn(trial.parameters, trial.space)
        self._seen.append(trial)


class Process(Learner):
    """A Gaussian process as one would take it off the shelf: one length for all coordinates, the likeliest of a few;
    mean + 3 deviations, times 1.1."""

    lengths = (0.5, 1.0, 2.0, 4.0, 8.0)
    noise = 1e-3

    def bound(self, points: Points, targets: Points, at: Points) -> float:
        middle, spread = targets.mean(), targets.std() + 0.05
        y = (targets - middle) / spread
        best = (-math.inf, 0.0, 1.0)
        for length in self.lengths:
            lower = np.linalg.cholesky(self._kernel(points, points, length) + self.noise * np.eye(len(y)))
            half = np.linalg.solve(lower, y)
            likelihood = float(-0.5 * half @ half - np.log(np.diag(lower)).sum())
            if likelihood > best[0]:
                row = np.linalg.solve(lower, self._kernel(points, at[None], length)[:, 0])
                best = (likelihood, float(row @ half), math.sqrt(max(1 + self.noise - float(row @ row), 1e-9)))
        _, mean, deviation = best
        return float(middle + spread * (mean + 3 * deviation) + np.log(1.1))

    @staticmethod
    def _kernel(left: Points, right: Points, length: float) -> Points:
        distance = np.sqrt(5 * ((left[:, None] - right[None]) ** 2).sum(axis=2)) / length
        found: Points = (1 + distance + distance**2 / 3) * np.exp(-distance)
        return found


class RidgeConformal(Learner):
    """Ridge regression of the logarithm, and above it the 95 % quantile of its own left-out errors."""

    ridge = 1.0

    def bound(self, points: Points, targets: Points, at: Points) -> float:
        middle = targets.mean()
        inner = points.T @ points + self.ridge * np.eye(points.shape[1])
        weights = np.linalg.solve(inner, points.T @ (targets - middle))
        leverage = np.einsum("ij,ji->i", points, np.linalg.solve(inner, points.T)) + 1 / len(targets)
        errors = (targets - middle - points @ weights) / np.maximum(1 - leverage, 1e-3)
        rank = min(len(errors), math.ceil(0.95 * (len(errors) + 1)))
        return float(middle + at @ weights + np.sort(errors)[rank - 1])


RULES: dict[str, Callable[[Stream], Rule]] = {
    "largest seen x 1.5": Largest,
    "constant worst case": WorstCase,
    "Gaussian process + 3 s": Process,
    "ridge + conformal": RidgeConformal,
    "ours": Ours,
}


def replay(stream: Stream, rule: Rule) -> list[tuple[float, int]]:
    """(predicted, observed) from the 9th trial on."""
    pairs = []
    for number, trial in enumerate(stream.trials):
        if number >= FIRST:
            pairs.append((rule.predict(trial), trial.peak_bytes))
        rule.observe(trial)
    return pairs


def score(pairs: list[tuple[float, int]]) -> Score:
    """The figures of some predictions."""
    return Score(
        len(pairs),
        sum(peak > bound for bound, peak in pairs) / len(pairs),
        max(peak / bound for bound, peak in pairs),
        sum(bound for bound, _ in pairs) / sum(peak for _, peak in pairs),
    )


def line(name: str, found: Score) -> str:
    """One row of the report."""
    return f"{name:24} {found.count:5} {found.under:8.2%} {found.worst:6.2f} {found.total:6.3f}"


def main() -> None:
    """Print the tables."""
    for title, kept_back in (("chosen on", False), ("kept back", True)):
        found = [stream for stream in streams() if stream.is_kept_back is kept_back]
        if not found:
            continue
        print(f"{f'{title}: {len(found)} streams':24} {'n':>5} {'under':>8} {'worst':>6} {'total':>6}")
        for stream in found:
            print(line(stream.name, score(replay(stream, Ours(stream)))))
        for name, make in RULES.items():
            print(line(name, score([pair for stream in found for pair in replay(stream, make(stream))])))


if __name__ == "__main__":
    main()

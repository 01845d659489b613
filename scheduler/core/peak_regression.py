"""A Gaussian process from a trial's coordinates to the logarithm of its growth, small enough for plain Python.

One weight a parameter says how much it matters. Weights, amplitudes and noise follow the largest posterior probability,
a few steps with each observation. What that costs is bounded, since at most `KEPT` observations are held. What it is
for, and how far to believe it, is `parameter_sizing`. Pure and deterministic: the same observations in the same order
give the same answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul

Vector = list[float]
Matrix = list[Vector]

# Observations held. One step of learning costs 6 ms of plain Python with 48 of 20 coordinates, and grows with the cube.
# With the last 48 of up to 90 the benchmark's reservations were 0.5 % larger than with all; longer ones untried.
KEPT = 48
# Any parameter may matter while few observations say that it does not: DOUBT / observations² is added to its weight.
# Without it a search over 12 weights finds an explanation of 10 peaks that leaves no doubt, and the 11th is twice it.
DOUBT = 10.0
# What is learnt, as a logarithm, has a normal prior (mean, standard deviation), in units of the targets' spread. Most
# parameters do not matter (learning rate, dropout). Moving these by 1 traded bytes for misses, little else.
WEIGHT_PRIOR = (-3.0, 2.0)
OTHER_PRIORS = ((0.0, 1.5), (0.0, 1.5), (-5.0, 2.0))  # of the local and the linear part, and of the noise
LOWEST, HIGHEST = -12.0, 4.0
MEAN_VARIANCE = 1.0
LEAST_SPREAD = 0.05  # targets may be all the same
LEARN_FROM = 8
FIRST_ROUNDS = 28
FIRST_STEP, LEAST_STEP, MOST_STEP = 0.3, 0.02, 1.0


def dot(left: Sequence[float], right: Sequence[float]) -> float:
    """Inner product, over the length of the shorter."""
    product: float = sum(map(mul, left, right))
    return product


def cholesky(matrix: Matrix) -> Matrix:
    """Compute the lower triangle L of a positive definite matrix L Lᵀ; row i has i + 1 numbers.

    Reads the lower triangle.
    """
    rows: Matrix = []
    for wanted in matrix:
        row: Vector = []
        for value, above in zip(wanted, rows, strict=False):
            row.append((value - dot(row, above)) / above[-1])
        row.append(math.sqrt(max(wanted[len(row)] - dot(row, row), 1e-12)))
        rows.append(row)
    return rows


def forward(lower: Matrix, right: Sequence[float]) -> Vector:
    """x of L x = right."""
    found: Vector = []
    for row, value in zip(lower, right, strict=True):
        found.append((value - dot(row, found)) / row[-1])
    return found


def backward(lower: Matrix, right: Sequence[float]) -> Vector:
    """x of Lᵀ x = right."""
    left, found = list(right), [0.0] * len(right)
    for i in range(len(left) - 1, -1, -1):
        row = lower[i]
        found[i] = x = left[i] / row[-1]
        left = [value - x * factor for value, factor in zip(left[:i], row, strict=False)]
    return found


def inverse(lower: Matrix) -> Matrix:
    """Compute the lower triangle of (L Lᵀ)⁻¹."""
    count = len(lower)
    columns: Matrix = []  # of L⁻¹, each from its diagonal down
    for j in range(count):
        column = [1 / lower[j][-1]]
        for row in lower[j + 1 :]:
            column.append(-dot(row[j:], column) / row[-1])
        columns.append(column)
    return [[dot(columns[j][i - j :], columns[i]) for j in range(i + 1)] for i in range(count)]


@dataclass(frozen=True, slots=True)
class Kernel:
    """How alike two points are: a local part (Matérn 5/2) and a linear one, both weighted alike, and a common mean.

    The linear part lets a product of powers be carried beyond what was seen; the local one follows maxima, plateaus
    and whatever else.
    """

    roots: Vector
    """coordinate -> square root of its weight"""
    local: float
    linear: float
    noise: float

    @classmethod
    def of(cls, logs: Sequence[float], owners: Sequence[int], doubt: float) -> Kernel:
        """From what was learnt; `doubt` is added to each weight."""
        weights = [math.sqrt(math.exp(log) + doubt) for log in logs[:-3]]
        local, linear, noise = map(math.exp, logs[-3:])
        return cls([weights[owner] for owner in owners], local, linear, noise)

    def scaled(self, point: Sequence[float]) -> Vector:
        """Return a point in the kernel's own units, what `between` takes."""
        return list(map(mul, self.roots, point))

    def between(self, left: Sequence[float], right: Sequence[float], norms: float) -> tuple[float, float, float]:
        """Covariance, distance in units of the local part, and inner product. `norms`: |left|² + |right|²."""
        inner = dot(left, right)
        distance = math.sqrt(5 * max(norms - 2 * inner, 0.0))
        alike = (1 + distance + distance * distance / 3) * math.exp(-distance)
        return self.local * alike + self.linear * inner + MEAN_VARIANCE, distance, inner


@dataclass(frozen=True, slots=True)
class Fitted:
    """The process given its observations: what answers predictions."""

    kernel: Kernel
    points: Matrix  # scaled
    norms: Vector
    lower: Matrix
    answers: Vector
    middle: float
    spread: float

    @classmethod
    def to(cls, kernel: Kernel, points: Sequence[Sequence[float]], targets: Sequence[float]) -> Fitted:
        """Condition on observations."""
        middle, spread = standard(targets)
        scaled = [kernel.scaled(point) for point in points]
        norms = [dot(point, point) for point in scaled]
        rows: Matrix = []
        for i, (left, norm) in enumerate(zip(scaled, norms, strict=True)):
            row = [kernel.between(left, scaled[j], norm + norms[j])[0] for j in range(i + 1)]
            row[-1] += kernel.noise
            rows.append(row)
        lower = cholesky(rows)
        answers = backward(lower, forward(lower, [(target - middle) / spread for target in targets]))
        return cls(kernel, scaled, norms, lower, answers, middle, spread)

    def predict(self, point: Sequence[float]) -> tuple[float, float]:
        """Mean and standard deviation of a new target."""
        at = self.kernel.scaled(point)
        norm = dot(at, at)
        row = [
            self.kernel.between(at, point, norm + other)[0]
            for point, other in zip(self.points, self.norms, strict=True)
        ]
        half = forward(self.lower, row)
        variance = self.kernel.local + self.kernel.linear * norm + MEAN_VARIANCE - dot(half, half)
        deviation = math.sqrt(max(variance, 0.0) + self.kernel.noise)
        return self.middle + dot(row, self.answers) * self.spread, deviation * self.spread


def rounds(held: int) -> int:
    """Return the steps of learning with each observation, fewer the more they cost: some 8 ms in all."""
    return 8 if held < 16 else 4 if held < 24 else 2 if held < 32 else 1


def standard(targets: Sequence[float]) -> tuple[float, float]:
    """Mean and spread that bring targets to about 0 and 1."""
    middle = sum(targets) / len(targets)
    return middle, LEAST_SPREAD + math.sqrt(sum((target - middle) ** 2 for target in targets) / len(targets))


def misfit(
    logs: Vector, owners: Sequence[int], points: Sequence[Sequence[float]], targets: Vector
) -> tuple[float, Vector]:
    """Compute the negative logarithm of the posterior probability of `logs`, and its slopes. Targets are
    standardised."""
    kernel, count = Kernel.of(logs, owners, 0.0), len(targets)
    scaled = [kernel.scaled(point) for point in points]
    norms = [dot(point, point) for point in scaled]
    rows, distances, inners = [], [], []
    for i, (left, norm) in enumerate(zip(scaled, norms, strict=True)):
        found = [kernel.between(left, scaled[j], norm + norms[j]) for j in range(i + 1)]
        rows.append([each[0] for each in found])
        distances.append([each[1] for each in found])
        inners.append([each[2] for each in found])
        rows[i][i] += kernel.noise
    lower = cholesky(rows)
    answers = backward(lower, forward(lower, targets))
    value = 0.5 * dot(targets, answers) + sum(math.log(row[-1]) for row in lower)

    # d misfit / d covariance, chained through local part, linear part and noise; symmetric, so built from one half.
    pulls: Matrix = [[0.0] * count for _ in range(count)]  # on the inner products, the distances' share among them
    near = [0.0] * count  # on the squared norms
    local = linear = noise = 0.0
    for i, row in enumerate(inverse(lower)):
        for j, entry in enumerate(row):
            pull = 0.5 * (entry - answers[i] * answers[j])
            distance, fade = distances[i][j], math.exp(-distances[i][j])
            by_distance = -pull * kernel.local * (5 / 6) * (1 + distance) * fade
            both = 1 if i == j else 2
            local += both * pull * (1 + distance + distance * distance / 3) * fade
            linear += both * pull * inners[i][j]
            noise += pull if i == j else 0.0
            near[i] += by_distance
            if i != j:
                near[j] += by_distance
            pulls[i][j] = pulls[j][i] = kernel.linear * pull - 2 * by_distance
    slopes = [0.0] * (len(logs) - 3)
    for owner, column in zip(owners, zip(*scaled, strict=True), strict=True):
        if any(column):  # not so for what is never absent
            pulled = [dot(pull, column) for pull in pulls]
            slopes[owner] += dot(pulled, column) + 2 * dot(near, tuple(map(mul, column, column)))
    slopes += [local * kernel.local, linear * kernel.linear, noise * kernel.noise]
    for i, (middle, spread) in enumerate([WEIGHT_PRIOR] * (len(logs) - 3) + list(OTHER_PRIORS)):
        off = (logs[i] - middle) / spread
        value, slopes[i] = value + 0.5 * off * off, slopes[i] + off / spread
    return value, slopes


class PeakRegression:
    """Mean and standard deviation of a target at a point, learnt from points and their targets."""

    def __init__(self) -> None:
        self.points: Matrix = []
        """Those it still holds."""
        self._targets: Vector = []
        self._owners: list[int] = []
        self._seen = 0
        self._logs: Vector = [middle for middle, _ in OTHER_PRIORS]
        self._steps: Vector = [FIRST_STEP] * len(OTHER_PRIORS)
        self._slopes: Vector = [0.0] * len(OTHER_PRIORS)
        self._fitted: Fitted | None = None

    def extend(self, owners: Sequence[int], absent: Sequence[float]) -> None:
        """Parameters have come to be known: `owners` as before and more at the end, `absent` for the points held."""
        self.points = [[*point, *absent] for point in self.points]
        new = len(set(owners)) - len(set(self._owners))
        self._owners = list(owners)
        for values, first in ((self._logs, WEIGHT_PRIOR[0]), (self._steps, FIRST_STEP), (self._slopes, 0.0)):
            values[-3:-3] = [first] * new

    def observe(self, point: Sequence[float], target: float) -> None:
        """Take in one more, learn from `LEARN_FROM` on, and be ready to predict."""
        self.points.append(list(point))
        self._targets.append(target)
        self._seen += 1
        if len(self.points) > KEPT:
            del self.points[0], self._targets[0]
        if self._seen >= LEARN_FROM:
            self._learn(FIRST_ROUNDS if self._seen == LEARN_FROM else rounds(len(self.points)))
            self._fitted = Fitted.to(
                Kernel.of(self._logs, self._owners, DOUBT / self._seen**2), self.points, self._targets
            )

    def predict(self, point: Sequence[float]) -> tuple[float, float]:
        """Mean and standard deviation of the target at a point, once `LEARN_FROM` were observed."""
        if self._fitted is None:
            raise ValueError(f"predict after {self._seen} observations, {LEARN_FROM} are needed")
        return self._fitted.predict(point)

    def _learn(self, count: int) -> None:
        """Take some steps of resilient propagation: each setting goes against its slope, by a step of its own.

        A step grows while the slope keeps its sign and shrinks where it turns. The best settings met are kept.
        """
        middle, spread = standard(self._targets)
        targets = [(target - middle) / spread for target in self._targets]
        best = (math.inf, self._logs)
        for _ in range(count):
            value, slopes = misfit(self._logs, self._owners, self.points, targets)
            best = min(best, (value, list(self._logs)))
            for i, slope in enumerate(slopes):
                turned = slope * self._slopes[i]
                factor = 1.3 if turned > 0 else 0.5 if turned < 0 else 1.0
                self._steps[i] = max(LEAST_STEP, min(MOST_STEP, self._steps[i] * factor))
                self._slopes[i] = 0.0 if turned < 0 else slope
                self._logs[i] -= math.copysign(self._steps[i], slope) if self._slopes[i] else 0.0
                self._logs[i] = max(LOWEST, min(HIGHEST, self._logs[i]))
        if misfit(self._logs, self._owners, self.points, targets)[0] > best[0]:
            self._logs = best[1]

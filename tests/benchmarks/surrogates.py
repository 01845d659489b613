"""Functions that stand in for a training in the search benchmark: parameters of a trial -> loss, known everywhere.

`smooth` and `cliff` are formulas over the project's real search space: a valley whose best learning rate falls with
depth, and a plateau of diverged trainings beside a narrow good region in which the size of a head decides. `drawn` is a
random bowl, another one for each seed. `real` is fitted to short real trainings of the 2M budget (data/short-2M.csv,
`short_trainings`): a radial basis function whose kernel and smoothing have the smallest leave-one-out error, with the
noise that seeds make there.
"""

from __future__ import annotations

import csv
import functools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pvariance
from typing import Any

import numpy as np
from scipy.interpolate import RBFInterpolator
from scipy.stats import spearmanr

from training import hpo, search_space

DATA = Path(__file__).parent / "data" / "short-2M.csv"
SPACE = search_space.load()["training_search_space"]
Params = Mapping[str, Any]
FLOOR = 0.41  # under the lowest real value; what lies above it is fitted as its logarithm, since it is skewed


@dataclass(frozen=True, slots=True, kw_only=True)
class Surrogate:
    """loss(params): without noise. noise: standard deviation of one training. budget: whose architectures it has."""

    name: str
    budget: str
    loss: Callable[[Params], float]
    noise: float

    def trained(self, params: Params, seed: int) -> float:
        """What a training shows: the same parameters and seed, the same value."""
        key = f"{seed} {sorted((k, v) for k, v in params.items() if isinstance(v, (int, float)))}"
        return self.loss(params) + random.Random(key).gauss(0, self.noise)


def log_share(params: Params, name: str) -> float:
    """Where a parameter lies in its range, 0 to 1, on its own scale."""
    entry, value = SPACE[name], params[name]
    if entry["type"] == "categorical":
        return float(entry["choices"].index(value) / (len(entry["choices"]) - 1))
    low, high = entry["low"], entry["high"]
    if entry["type"] == "log_uniform":
        low, high, value = math.log(low), math.log(high), math.log(value)
    return float((value - low) / (high - low))


def smooth(params: Params) -> float:
    """A valley: wide and shallow is a little better, and the best learning rate falls with depth."""
    aspect = math.log2(params["d_model"] / params["n_layers"]) / 8  # -0.1 to 1 within 2M
    rate = log_share(params, "learning_rate") - 0.75 + 0.5 * math.log2(params["n_layers"]) / 6
    heads = math.log2(params["n_heads"]) / 5 - 0.6
    dropout = log_share(params, "dropout") - 0.6
    decay = log_share(params, "weight_decay") - 0.4
    warmup = log_share(params, "warmup_steps") - 0.5
    return (
        0.43
        + 0.12 * (aspect - 0.7) ** 2
        + 0.18 * rate**2
        + 0.045 * heads**2
        + 0.03 * dropout**2
        + 0.02 * decay**2
        + 0.01 * warmup**2
    )


def cliff(params: Params) -> float:
    """Deep models diverge at large rates; heads narrower than 64 cost; the rest slopes down to the cliff's edge."""
    depth = math.log2(params["n_layers"]) / 8
    rate = log_share(params, "learning_rate")
    diverged = 1 / (1 + math.exp(-25 * (rate + 1.2 * depth - 1.05 - 0.15 * log_share(params, "warmup_steps"))))
    narrow_head = max(0.0, math.log2(64 / (params["d_model"] / params["n_heads"])))
    slow = 0.05 * (1 - rate) ** 2
    shape = 0.03 * abs(depth - 0.45) + (0.004 if params["d_ff"] == 2 * params["d_model"] else 0.0)
    rest = 0.01 * (log_share(params, "dropout") - 0.3) ** 2 + 0.01 * (log_share(params, "weight_decay") - 0.7) ** 2
    return 0.42 + slow + shape + rest + 0.008 * min(narrow_head, 3) + 0.2 * diverged


# -- from real trainings -----------------------------------------------------------------------------------------------


def features(params: Params) -> list[float]:
    """A trial as the interpolator sees it: eight numbers of about 0 to 1."""
    return [
        math.log2(params["d_model"]) / 2.6 - 2.3,
        math.log2(params["n_layers"]) / 5 - 0.2,
        params["d_ff"] / params["d_model"] / 2 - 1,
        math.log2(params["n_heads"]) / 4 - 0.25,
        *(log_share(params, name) for name in ("learning_rate", "weight_decay", "dropout", "warmup_steps")),
    ]


def rows() -> list[dict[str, float]]:
    """The trainings that were made; everything is a number."""
    with DATA.open() as file:
        return [
            {key: float(value) if "." in value or "e" in value else int(value) for key, value in row.items()}
            for row in csv.DictReader(file)
        ]


@functools.cache
def fitted() -> tuple[Any, float, str]:
    """The interpolator, the noise of one training (standard deviation), and a line that says how good the fit is."""
    by_point: dict[int, list[dict[str, float]]] = {}
    for row in rows():
        by_point.setdefault(int(row["point"]), []).append(row)
    x = np.array([features(same[0]) for same in by_point.values()])
    y = np.log(np.array([fmean(row["value"] for row in same) for same in by_point.values()]) - FLOOR)
    repeated = [same for same in by_point.values() if len(same) > 1]
    # Pooled over the points that were trained with several seeds.
    degrees = sum(len(same) - 1 for same in repeated)
    noise = math.sqrt(sum(len(s) * pvariance([row["value"] for row in s]) for s in repeated) / degrees)
    choices = [
        (kernel, smoothing)
        for kernel in ("linear", "thin_plate_spline")
        for smoothing in (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
    ]

    def error(choice: tuple[str, float]) -> float:
        return float(np.mean((leave_one_out(x, y, *choice) - y) ** 2))

    kernel, smoothing = min(choices, key=error)
    predicted = leave_one_out(x, y, kernel, smoothing)
    rank = float(spearmanr(predicted, y).statistic)
    says = (
        f"{len(x)} points, {len(rows())} trainings; {kernel}, smoothing {smoothing:g}; rank correlation of a point "
        f"with its prediction from the others {rank:.2f}; noise of a seed {noise:.4f}"
    )
    return RBFInterpolator(x, y, kernel=kernel, smoothing=smoothing), noise, says


def leave_one_out(x: Any, y: Any, kernel: str, smoothing: float) -> Any:
    """Each point, predicted from all others."""
    found = []
    for n in range(len(x)):
        rest = np.arange(len(x)) != n
        found.append(RBFInterpolator(x[rest], y[rest], kernel=kernel, smoothing=smoothing)(x[n : n + 1])[0])
    return np.array(found)


def real(params: Params) -> float:
    """The fitted loss of a short training."""
    return FLOOR + math.exp(float(fitted()[0](np.array([features(params)]))[0]))


# -- drawn -------------------------------------------------------------------------------------------------------------


@functools.cache
def bowl(seed: int) -> tuple[Any, Any]:
    """A point of the features' space and the positive definite matrix of a bowl around it."""
    source = np.random.default_rng(seed)
    axes, _ = np.linalg.qr(source.normal(size=(8, 8)))
    # Steep along a few directions, flat along most, as losses of hyperparameters are; half aligned with the axes.
    steepness = 0.25 * source.exponential(size=8) ** 2
    matrix = 0.5 * np.diag(steepness) + 0.5 * axes @ np.diag(source.permutation(steepness)) @ axes.T
    return source.uniform(0.1, 0.9, size=8), matrix / np.trace(matrix)


def drawn(params: Params, seed: int) -> float:
    """A bowl of its own for each seed: nothing about it was chosen."""
    centre, matrix = bowl(seed)
    away = np.array(features(params)) - centre
    return 0.43 + 0.4 * float(away @ matrix @ away)


NAMES = ("smooth", "cliff", "drawn", *(["real"] if DATA.exists() else []))


def surrogate(name: str, seed: int) -> Surrogate:
    """The surrogate of that name; the seed matters to `drawn` alone."""
    match name:
        case "smooth":
            return Surrogate(name=name, budget="2M", loss=smooth, noise=0.002)
        case "cliff":
            return Surrogate(name=name, budget="200M", loss=cliff, noise=0.002)
        case "drawn":
            return Surrogate(name=name, budget="2M", loss=functools.partial(drawn, seed=seed), noise=0.002)
        case "real":
            return Surrogate(name=name, budget="2M", loss=real, noise=fitted()[1])
    raise ValueError(name)


def best_loss(surrogate: Surrogate, fitting: Sequence[int] | None = None) -> float:
    """The lowest loss of the space, or of the architectures with these indices: many random points, then descent."""
    grid = hpo.candidates({"budget": surrogate.budget})
    allowed = [grid[n] for n in (range(len(grid)) if fitting is None else fitting)]
    source = random.Random(0)
    points = [{**source.choice(allowed), **training_params(source)} for _ in range(2000)]
    best = sorted((surrogate.loss(params), n) for n, params in enumerate(points))[:4]
    return min(descended(surrogate.loss, points[n], allowed, source) for _, n in best)


def training_params(source: random.Random) -> dict[str, Any]:
    """One draw from the search space."""
    found: dict[str, Any] = {}
    for name, entry in SPACE.items():
        if entry["type"] == "categorical":
            found[name] = source.choice(entry["choices"])
        elif entry["type"] == "log_uniform":
            found[name] = math.exp(source.uniform(math.log(entry["low"]), math.log(entry["high"])))
        else:
            found[name] = source.uniform(entry["low"], entry["high"])
    return found


def descended(
    loss: Callable[[Params], float], start: Params, allowed: Sequence[Params], source: random.Random
) -> float:
    """The loss after changing one thing at a time as long as that helps."""
    params, value, span = dict(start), loss(start), 1.0
    for _ in range(600):
        changed = dict(params)
        name = source.choice(["architecture", *SPACE])
        if name == "architecture":
            changed |= source.choice(allowed)
        elif SPACE[name]["type"] == "categorical":
            changed[name] = source.choice(SPACE[name]["choices"])
        else:
            low, high = SPACE[name]["low"], SPACE[name]["high"]
            move = span * source.gauss(0, 0.2)
            log = SPACE[name]["type"] == "log_uniform"
            value_now = params[name] * (high / low) ** move if log else params[name] + move * (high - low)
            changed[name] = min(max(value_now, low), high)
        found = loss(changed)
        if found < value:
            params, value = changed, found
        span *= 0.995
    return value

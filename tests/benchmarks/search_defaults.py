"""Which search is best by default: `python -m tests.benchmarks.search_defaults [--seeds 60] [--only shape]`.

Compares, on the surrogates and in the simulated time of `search`, how the architecture is put into parameters, how many
trials are drawn at random first and which ones, and what the best trials of a sibling study are worth at the start.
Plain Optuna in memory throughout: what the store does to a search is `search`'s to say.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import optuna

from scheduler.study.grid_sampler import GridSampler
from tests.benchmarks.search import TRIALS, Case, Job, context_of, interval, regret, simulate, spread
from tests.benchmarks.surrogates import NAMES, SPACE, Params, Surrogate, best_loss, surrogate, training_params
from training import hpo, search_space

Grid = Sequence[Mapping[str, Any]]
Choose = Callable[[Any, Grid], Mapping[str, Any]]


# -- the architecture as parameters ------------------------------------------------------------------------------------


def fields(trial: Any, grid: Grid) -> Mapping[str, Any]:
    """d_model, n_layers, n_heads, d_ff_ratio, drawn as one of the list: what the project does."""
    return hpo.sample_architecture(trial, grid)


def index(trial: Any, grid: Grid) -> Mapping[str, Any]:
    """One integer into the list sorted by d_model, n_layers, d_ff, n_heads."""
    chosen: int = trial.suggest_int("architecture", 0, len(grid) - 1)
    return grid[chosen]


def monotone(trial: Any, grid: Grid) -> Mapping[str, Any]:
    """One integer, heads slowest: within each number of heads from narrow and deep to wide and shallow."""
    ordered = sorted(grid, key=lambda a: (a["n_heads"], *_depth_order(a)))
    chosen: int = trial.suggest_int("architecture", 0, len(grid) - 1)
    return ordered[chosen]


def shape(trial: Any, grid: Grid) -> Mapping[str, Any]:
    """An integer for (d_model, n_layers, d_ff), from narrow and deep to wide and shallow, and one for the heads."""
    shapes, heads = _axes(grid)
    chosen = shapes[trial.suggest_int("shape", 0, len(shapes) - 1)]
    return _found(grid, chosen, heads[trial.suggest_int("heads", 0, len(heads) - 1)])


def shape_unordered_heads(trial: Any, grid: Grid) -> Mapping[str, Any]:
    """The same, the heads as a choice without an order."""
    shapes, heads = _axes(grid)
    chosen = shapes[trial.suggest_int("shape", 0, len(shapes) - 1)]
    return _found(grid, chosen, trial.suggest_categorical("n_heads", heads))


def aspect(trial: Any, grid: Grid) -> Mapping[str, Any]:
    """d_model / n_layers on a logarithmic scale (the nearest there is), the ratio of the feed-forward, the heads."""
    shapes, heads = _axes(grid)
    ratios = [a["d_model"] / a["n_layers"] for a in grid]
    wanted = trial.suggest_float("aspect", min(ratios), max(ratios), log=True)
    wide = trial.suggest_int("ff_ratio", 2, 4, step=2)
    near = [s for s in shapes if s[2] == wide * s[0]]
    chosen = min(near, key=lambda s: abs(math.log(s[0] / s[1] / wanted)))
    return _found(grid, chosen, heads[trial.suggest_int("heads", 0, len(heads) - 1)])


def width(trial: Any, grid: Grid) -> Mapping[str, Any]:
    """d_model, how deep among what the budget leaves at that width (0 to 1), the heads."""
    shapes, heads = _axes(grid)
    widths = sorted({s[0] for s in shapes})
    d_model = widths[trial.suggest_int("width", 0, len(widths) - 1)]
    here = sorted((s for s in shapes if s[0] == d_model), key=lambda s: (s[1], s[2]))
    chosen = here[min(int(trial.suggest_float("depth", 0, 1) * len(here)), len(here) - 1)]
    return _found(grid, chosen, heads[trial.suggest_int("heads", 0, len(heads) - 1)])


def _depth_order(a: Mapping[str, Any]) -> tuple[Any, ...]:
    return a["d_model"], -a["n_layers"], a["d_ff"]


def _axes(grid: Grid) -> tuple[list[tuple[int, int, int]], list[int]]:
    shapes = {(a["d_model"], a["n_layers"], a["d_ff"]) for a in grid}
    return sorted(shapes, key=lambda s: (s[0], -s[1], s[2])), sorted({a["n_heads"] for a in grid})


def _found(grid: Grid, chosen: tuple[int, int, int], heads: int) -> Mapping[str, Any]:
    return next(a for a in grid if (a["d_model"], a["n_layers"], a["d_ff"], a["n_heads"]) == (*chosen, heads))


# -- what comes first --------------------------------------------------------------------------------------------------


def extremes(grid: Grid) -> list[Mapping[str, Any]]:
    """Six architectures at the edges of the budget: narrowest, middle and widest, each with most and fewest heads."""
    shapes, heads = _axes(grid)
    edges = (shapes[0], shapes[len(shapes) // 2], shapes[-1])
    return [_found(grid, shape, count) for shape in edges for count in (heads[0], heads[-1])]


def sibling(of: Surrogate, seed: int, distance: float) -> Callable[[Params], float]:
    """The loss of a study nearby (another horizon or budget): the same function, its optimum moved by `distance` of the
    range of each parameter on average, in a direction of its own."""
    source = random.Random(f"sibling {seed}")
    moves = [source.gauss(0, distance) for _ in range(8)]

    def loss(params: Params) -> float:
        # Moved in the training parameters; the architectures stay, since they are a list.
        moved = dict(params)
        for move, name in zip(moves, ("learning_rate", "weight_decay", "dropout"), strict=False):
            low, high, log = SPACE[name]["low"], SPACE[name]["high"], SPACE[name]["type"] == "log_uniform"
            value = params[name] * (high / low) ** move if log else params[name] + move * (high - low)
            moved[name] = min(max(value, low), high)
        return of.loss(moved)

    return loss


# -- the comparison ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A way to search. startup: trials at random. extremes: six architectures first. warm: distance of a sibling study
    whose best three are asked first, None for no sibling. ahead: trials asked before there is a place for them."""

    name: str
    choose: Choose = fields
    startup: int = 10
    extremes: bool = False
    warm: float | None = None
    ahead: int = 0


VARIANTS = (
    Variant(name="fields"),
    Variant(name="asked one ahead", ahead=1),
    Variant(name="index", choose=index),
    Variant(name="index, heads slowest", choose=monotone),
    Variant(name="shape + heads", choose=shape),
    Variant(name="shape + heads unordered", choose=shape_unordered_heads),
    Variant(name="aspect + ff + heads", choose=aspect),
    Variant(name="width + depth + heads", choose=width),
    Variant(name="startup 5", startup=5),
    Variant(name="startup 15", startup=15),
    Variant(name="startup 20", startup=20),
    Variant(name="extremes first, startup 10", extremes=True),
    Variant(name="extremes first, startup 20", extremes=True, startup=20),
    Variant(name="sibling, same", warm=0.0),
    Variant(name="sibling, 0.15 away", warm=0.15),
    Variant(name="sibling, 0.3 away", warm=0.3),
    Variant(name="sibling, 1 away", warm=1.0),
)
FIELDS = ("d_model", "n_layers", "n_heads", "d_ff_ratio")


class Search:
    """A study in memory that searches as the variant says. first: trials that are asked before any is sampled."""

    def __init__(self, variant: Variant, stand_in: Surrogate, seed: int, first: Sequence[Params] = ()) -> None:
        self.variant, self.context, self.asked = variant, context_of(stand_in), 0
        self.grid = hpo.candidates(self.context)
        sampler: optuna.samplers.BaseSampler = optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=variant.startup, multivariate=True, constant_liar=True
        )
        if variant.choose is fields:
            sampler = GridSampler(sampler, self.grid, seed=seed)
        self.study = optuna.create_study(sampler=sampler)
        source = random.Random(f"extremes {seed}")
        edges = [{**a, **training_params(source)} for a in extremes(self.grid)] if variant.extremes else []
        for params in (*first, *edges):
            self.study.enqueue_trial({name: params[name] for name in (*FIELDS, *SPACE)})

    def ask(self) -> Job | None:
        if self.asked == TRIALS:
            return None
        self.asked += 1
        trial = self.study.ask()
        params = dict(self.variant.choose(trial, self.grid)) | search_space.sample(trial, SPACE)
        return Job(handle=trial, params=params)

    def complete(self, job: Job, value: float) -> None:
        self.study.tell(job.handle, value)

    def lose(self, job: Job) -> None: ...
    def restart(self) -> None: ...


def one(work: tuple[Variant, Case]) -> float:
    """The regret of a variant."""
    variant, case = work
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    stand_in = surrogate(case.surrogate, case.seed)
    first: list[Params] = []
    if variant.warm is not None:
        near = Surrogate(
            name=stand_in.name,
            budget=stand_in.budget,
            loss=sibling(stand_in, case.seed, variant.warm),
            noise=stand_in.noise,
        )
        found: list[tuple[float, Params]] = []
        before = Search(Variant(name="sibling"), near, case.seed + 10_000)
        while (job := before.ask()) is not None:
            value = near.trained(job.params, case.seed + 10_000)
            before.complete(job, value)
            found.append((value, job.params))
        first = [params for _, params in sorted(found, key=lambda pair: pair[0])[:3]]
    done = simulate(Search(variant, stand_in, case.seed, first), stand_in, case, disturbed=False, ahead=variant.ahead)
    return regret(done, best_loss(stand_in))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print, per variant and surrogate, the mean regret x 1000 and the paired difference to the first variant."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.search_defaults")
    parser.add_argument("--seeds", type=int, default=60)
    parser.add_argument("--parallel", default="2,8")
    parser.add_argument("--only", default="", help="a part of a variant's name; the first one is always there")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args(arguments)
    chosen = [v for n, v in enumerate(VARIANTS) if n == 0 or options.only in v.name]
    print(f"regret x 1000 at {TRIALS} trials, {options.seeds} seeds; difference to {chosen[0].name}, mean [95 %]")
    for name in NAMES:
        for parallel in map(int, options.parallel.split(",")):
            seeds = range(options.seeds)
            cases = [Case(surrogate=name, parallel=parallel, scenario="undisturbed", seed=seed) for seed in seeds]
            base: list[float] = []
            for variant in chosen:
                found = list(spread([(variant, case) for case in cases], one, options.jobs))
                base = base or found
                mean, low, high = (1000 * x for x in interval([f - b for f, b in zip(found, base, strict=True)]))
                line = f"{name:8}{parallel:>3} {variant.name:28}{1000 * fmean(found):8.2f}"
                print(f"{line}{mean:+9.2f} [{low:+.2f}, {high:+.2f}]", flush=True)


if __name__ == "__main__":
    main()

"""A sampler that proposes only combinations there are: parameters that are fields of candidates, as one of these.

Covers what cannot be chosen field by field, such as the architectures of a parameter budget: most pairs of d_model and
n_layers miss it. Another sampler proposes the fields as if they were free, and the nearest candidate takes the
proposal's place before Optuna stores it: so the study holds real values, and the sampler learns from what was run.
Parameters that are no fields of the candidates are left to the other sampler. What a field means is not known here.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from scheduler.study.optuna_private import FIXED_PARAMS

Candidate = Mapping[str, Any]


class GridSampler(optuna.samplers.BaseSampler):
    """Draws through `inner`. candidates: at least one; mappings with the same fields.

    What a trial has already (a retry's parameters, or some that a person enqueued) is kept: only candidates that agree
    with it are proposed; where none does, those that come nearest.
    """

    def __init__(self, inner: optuna.samplers.BaseSampler, candidates: Sequence[Candidate], *, seed: int) -> None:
        self.inner, self.candidates, self.random = inner, list(candidates), random.Random(seed)
        self.chosen: dict[int, Candidate] = {}  # by the trial's number: several may be asked at once

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.inner.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        params = self.inner.sample_relative(study, trial, search_space)
        wanted = {name: value for name, value in params.items() if name in self.candidates[0]}
        if not wanted:
            return params
        found = self.chosen[trial.number] = nearest(self._open_to(trial), wanted)
        return {**params, **{name: found[name] for name in wanted}}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        if param_name not in self.candidates[0]:
            return self.inner.sample_independent(study, trial, param_name, param_distribution)
        if trial.number not in self.chosen:
            self.chosen[trial.number] = self.random.choice(self._open_to(trial))
        return self.chosen[trial.number][param_name]

    def _open_to(self, trial: FrozenTrial) -> list[Candidate]:
        has = {**trial.system_attrs.get(FIXED_PARAMS, {}), **trial.params}
        has = {name: value for name, value in has.items() if name in self.candidates[0]}
        like = nearest(self.candidates, has)
        return [c for c in self.candidates if all(c[name] == like[name] for name in has)]

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self.inner.before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        self.chosen.pop(trial.number, None)
        self.inner.after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        self.random.seed()
        self.inner.reseed_rng()


def nearest(candidates: Sequence[Candidate], wanted: Mapping[str, Any]) -> Candidate:
    """Find the candidate at the smallest distance (the first of several): each field counts by the part of its range,
    numbers above 0 on a logarithmic scale; what is no number agrees or does not."""
    apart = [_distance(name, value, [c[name] for c in candidates]) for name, value in wanted.items()]
    return min(candidates, key=lambda c: sum(far(c) ** 2 for far in apart))


def _distance(name: str, wanted: Any, there: Sequence[Any]) -> Callable[[Candidate], float]:
    if not all(isinstance(value, int | float) for value in (wanted, *there)):
        return lambda c: float(c[name] != wanted)
    scale = math.log if min(wanted, *there) > 0 else float
    span = scale(max(there)) - scale(min(there)) or 1.0
    return lambda c: abs(scale(c[name]) - scale(wanted)) / span

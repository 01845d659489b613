"""Optuna's distributions in the words of everybody else: as text, as a question, and as the space of `core.sizing`.

Covers both directions of the text, and asking a trial for a parameter by its distribution through the public API.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
    json_to_distribution,
)

from scheduler.core.branches import Answered, Question
from scheduler.model.parameters import Choice, Distribution, Range


def to_json(distribution: BaseDistribution) -> dict[str, Any]:
    """As Optuna writes it. Raises TypeError for choices that no database can hold."""
    found: dict[str, Any] = json.loads(distribution_to_json(distribution))
    return found


def from_json(data: Mapping[str, Any]) -> BaseDistribution:
    """Read what `to_json` made. Raises ValueError."""
    return json_to_distribution(json.dumps(data))


def from_text(text: str) -> BaseDistribution:
    """Return the distribution of a `Question`."""
    return json_to_distribution(text)


def question(name: str, distribution: BaseDistribution) -> Question:
    """Return the suggest that asks for it."""
    is_discrete = isinstance(distribution, CategoricalDistribution | IntDistribution)
    return Question(name, distribution_to_json(distribution), is_discrete)


def answered(params: Mapping[str, Any], distributions: Mapping[str, BaseDistribution]) -> list[Answered]:
    """Return a trial's parameters in the order in which they were asked, which is the order in which Optuna gives
    them."""
    return [(question(name, distributions[name]), value) for name, value in params.items()]


def space(distributions: Mapping[str, BaseDistribution]) -> dict[str, Distribution]:
    """Return what sizing must know of them."""
    return {name: _plain(distribution) for name, distribution in distributions.items()}


def _plain(distribution: BaseDistribution) -> Distribution:
    if isinstance(distribution, CategoricalDistribution):
        return Choice(options=tuple(distribution.choices))
    assert isinstance(distribution, FloatDistribution | IntDistribution)  # Optuna has no other
    return Range(low=float(distribution.low), high=float(distribution.high), log=distribution.log)


def suggest(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:
    """Ask a trial for the parameter. Raises ValueError where it was asked before from another kind of distribution."""
    match distribution:
        case FloatDistribution(low=low, high=high, step=step, log=log):
            return trial.suggest_float(name, low, high, step=step, log=log)
        case IntDistribution(low=low, high=high, step=step, log=log):
            return trial.suggest_int(name, low, high, step=step, log=log)
        case CategoricalDistribution(choices=choices):
            return trial.suggest_categorical(name, choices)
    raise ValueError(f"{name}: unknown distribution {distribution}")

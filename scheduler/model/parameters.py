"""Hyperparameters and what a trial took with them: the nouns of sizing by parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Value = float | int | str | bool | None
"""What Optuna suggests: a number, or one of a choice's options."""
Parameters = Mapping[str, Value]
"""The parameters of one trial as suggested; what its branch did not ask for is absent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """A float or an integer between two bounds. `log`: it was drawn on a logarithmic scale."""

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One of several options."""

    options: tuple[Value, ...]


Distribution = Range | Choice
Space = Mapping[str, Distribution]
"""Parameter -> where it is drawn from. For those that a trial has; more do no harm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakObservation:
    """A trial that ended. `parameters`: as suggested, those its branch did not ask for absent; `space`: their
    distributions; `base_bytes`: of the warm process before the objective; `at_least`: it did not reach its peak (it was
    killed for memory, or pruned before its growth was over); `flat_after`: the report after which it grew no more, None
    when it was not seen from its beginning to its end.
    """

    parameters: Parameters
    space: Space
    base_bytes: int
    peak_bytes: int
    at_least: bool = False
    flat_after: int | None = None

"""What a study is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudySpec:
    """One Optuna study: one (budget, horizon). `quota`: trials that must reach a final state.

    context: handed unchanged to the objective (horizon, data, max_epochs, precision, optimizer, seed, ...).
    """

    name: str
    budget: str
    horizon: int
    quota: int
    slots: int
    context: Mapping[str, Any] = field(default_factory=dict)

"""What a study is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudySpec:
    """One Optuna study. `quota`: trials that must reach a final state.

    budget, horizon: of the built-in training's studies; "" and 0 in any other. directions: "minimize" or "maximize",
    one per value of the objective. define_by_run: its trials ask for their parameters while they run.
    context: handed unchanged to the objective (horizon, data, max_epochs, precision, optimizer, seed, ...).
    """

    name: str
    budget: str = ""
    horizon: int = 0
    quota: int
    slots: int
    directions: tuple[str, ...] = ("minimize",)
    define_by_run: bool = False
    context: Mapping[str, Any] = field(default_factory=dict)

    def is_better(self, value: float, other: float) -> bool:
        """Of two values of a study with one objective."""
        return value > other if self.directions[0] == "maximize" else value < other

"""What a study is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Presentation:
    """How a workload wants a study shown; no part of what is computed.

    labels: what tells it from its siblings, by column. columns: of a trial's parameters, in a reader's order. shape:
    heading -> parameter of the best trial in the table of results. value: heading of its value. smaller: what would
    need less memory, in words. size: the column against which its value follows a power law, if any does; compare: the
    label whose values are set beside each other in that.
    """

    labels: Mapping[str, str | int] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    shape: Mapping[str, str] = field(default_factory=dict)
    value: str = "best value"
    smaller: str = ""
    size: str = ""
    compare: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudySpec:
    """One Optuna study. `quota`: trials that must reach a final state.

    directions: "minimize" or "maximize", one per value of the objective. define_by_run: its trials ask for their
    parameters while they run. context: handed unchanged to the objective.
    """

    name: str
    quota: int
    slots: int
    directions: tuple[str, ...] = ("minimize",)
    define_by_run: bool = False
    context: Mapping[str, Any] = field(default_factory=dict)
    shown: Presentation = Presentation()

    def is_better(self, value: float, other: float) -> bool:
        """Of two values of a study with one objective."""
        return value > other if self.directions[0] == "maximize" else value < other

"""What a study says to each of its trials, as one value: every key the built-in training knows, with its default.

Crosses from the scheduler as a mapping (`task["context"]`), and is read once, here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """A study's context. Lengths count days.

    n_rows, n_columns: of the data file; None: those of the built-in sample. runtime_bytes: what a ready trial process
    holds where it will run; None: what one of the installed torch holds where it was measured. environments: names of
    the heaps and builds it may run in (`runtime.in_force`); none: one that was measured. checkpoint_every_minutes: None
    for one after each epoch; drain_timeout_s: what a trial that is asked to leave has for one.
    """

    budget: str = ""
    horizon: int = 1
    data: str | None = None
    max_epochs: int | None = None
    max_steps: int | None = None
    device: str = "cpu"
    recipe: str = "fp32_adamw"
    threads: int = 1
    allocator: str = "auto"
    target_effective_batch: int = 256
    seed: int = 0
    checkpoint_every_minutes: float | None = None
    drain_timeout_s: float | None = None
    context_length: int = 60
    patch_length: int = 10
    stride: int = 5
    n_features: int = 25
    head_dropout: float = 0.0
    training_search_space: Mapping[str, Any] = field(default_factory=dict)
    early_stopping: Mapping[str, Any] = field(default_factory=dict)
    n_rows: int | None = None
    n_columns: int | None = None
    runtime_bytes: int | None = None
    environments: tuple[str, ...] = ()

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Context:
        """Read a mapping. A key that is missing or null has its default; what is not known is somebody else's."""
        known = {each.name: given[each.name] for each in fields(cls) if given.get(each.name) is not None}
        if "environments" in known:
            known["environments"] = tuple(known["environments"])
        return cls(**known)

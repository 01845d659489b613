"""What a run is given by a program in the same process, beyond settings: see `cli.optimize`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from scheduler.study.choice import Choice
from scheduler.study.plain_storage import PlainStorage


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """choice: its sampler, pruner and sizes. storage: of its study, where that is no database.

    on_end: called with a trial's number once its final state is in the study, on the thread that runs the driver;
    says whether the study is to end. timeout_s: after that no further trial is asked for.
    """

    choice: Choice
    storage: PlainStorage | None = None
    on_end: Callable[[int], bool] = lambda number: False
    timeout_s: float | None = None

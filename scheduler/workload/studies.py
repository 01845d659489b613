"""The studies of a batch, whichever workload the settings name."""

from __future__ import annotations

from typing import Any

from scheduler.model import StudySpec
from scheduler.settings.schema import Settings
from scheduler.workload import objective, phase6a


def studies(settings: Settings) -> tuple[StudySpec, ...]:
    """Return every study of the batch, in order. Raises UsageError for one named twice."""
    return phase6a.studies(settings) if settings.objective is None else (objective.study(settings),)


def meaning(settings: Settings) -> dict[str, dict[str, Any]]:
    """Return per study what gives its trials their meaning: a resumed run must agree with it (see `run_folder`).

    Machine, threads, memory and quota are not in it: they may change between two starts.
    """
    return phase6a.meaning(settings) if settings.objective is None else objective.meaning(settings)

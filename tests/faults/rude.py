"""Objectives for the fault tests that disturb whoever runs them: which one follows from the study's horizon.

Everything else is `tests.faults.tiny`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests import hostile
from tests.faults import tiny

candidates, sample, estimate = tiny.candidates, tiny.sample, tiny.estimate
BY_HORIZON = dict(enumerate(hostile.NAMES, start=1))


def objective(task: Mapping[str, Any], progress: Any) -> Any:
    """Horizon n is the n-th hostile objective; the last one trains."""
    name = BY_HORIZON.get(task["context"]["horizon"])
    return tiny.objective(task, progress) if name is None else getattr(hostile, name)(task, progress)


def fails(task: Mapping[str, Any], progress: Any) -> Any:
    """Fail, every time."""
    raise ValueError("the learning rate\nwas silly")


def endless(task: Mapping[str, Any], progress: Any) -> Any:
    """Tick for ever without an epoch; leave when asked. Horizon 3 does not listen."""
    while not progress.stop_requested or task["context"]["horizon"] == 3:
        progress.tick()
        time.sleep(0.02)
    return {"value": None, "stop_reason": "interrupted"}


def waits_for_the_flag(task: Mapping[str, Any], progress: Any) -> Any:
    """Hold still at the second epoch until the file that CRASH_FLAG names is there; tell by a file that it does."""
    flag = Path(os.environ["CRASH_FLAG"])
    Path(f"{flag}.{task['attempt'].replace('/', '.')}").touch()
    while not flag.exists():
        progress.tick()
        time.sleep(0.02)
    return tiny.objective(task, progress)


def huge_20m(params: Mapping[str, Any], context: Mapping[str, Any]) -> dict[str, Any]:
    """An estimate by which no trial of 20M fits anywhere."""
    size = 2**50 if context["budget"] == "20M" else 60 * tiny.MIB
    return {**tiny.estimate(params, context), "host_bytes": size, "components": {"runtime": size}}

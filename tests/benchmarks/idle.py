"""A workload that does nothing, by dotted path: what `launch` runs. Imports nothing: each trial would pay for it."""

from __future__ import annotations

import time
from typing import Any


def candidates(context: dict[str, Any]) -> list[dict[str, Any]]:
    """One architecture."""
    return [{"d_model": 1, "n_layers": 1, "n_heads": 1, "d_ff": 1, "param_count": 1}]


def sample(trial: Any, context: dict[str, Any], architectures: list[dict[str, Any]], fit: Any) -> dict[str, Any]:
    """Two parameters."""
    return {**architectures[0], "x": trial.suggest_float("x", 0, 1), "y": trial.suggest_float("y", 0, 1)}


def estimate(params: dict[str, Any], context: dict[str, Any]) -> dict[str, Any]:
    """An interpreter."""
    return {"host_bytes": 64 * 2**20, "device_bytes": 0, "components": {}, "family": "idle/cpu"}


def objective(task: dict[str, Any], progress: Any) -> dict[str, Any]:
    """Nothing but one report."""
    progress.report(1, task["params"]["x"])
    return {"value": task["params"]["x"], "epochs": 1}


def nap(task: dict[str, Any], progress: Any) -> dict[str, Any]:
    """Half a second of nothing."""
    time.sleep(0.5)
    return objective(task, progress)


def long_nap(task: dict[str, Any], progress: Any) -> dict[str, Any]:
    """Five seconds of nothing."""
    time.sleep(5.0)
    return objective(task, progress)

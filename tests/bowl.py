"""A user's search without torch: a bowl over an architecture's index, a rate and a dropout, its lowest value known.

What tests of the search need of training functions; the value of a trial is computed, not trained.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

ARCHITECTURES = [{"d_model": d} for d in range(10, 210, 10)]
FUNCTIONS: dict[str, Any] = {
    "objective": "tests.bowl:objective",
    "sample": "tests.bowl:sample",
    "candidates": "tests.bowl:candidates",
    "estimate": "tests.bowl:estimate",
    "micro_batch": None,
    "check_data": None,
    "preload": [],
}


def candidates(context: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Twenty architectures of growing width."""
    return ARCHITECTURES


def sample(
    trial: Any, context: Mapping[str, Any], architectures: Sequence[Mapping[str, Any]], fit: Any
) -> dict[str, Any]:
    """Three parameters: an index, a rate on a logarithmic scale, a share."""
    index = trial.suggest_int("architecture", 0, len(architectures) - 1)
    rate = trial.suggest_float("rate", 1e-5, 1e-1, log=True)
    dropout = trial.suggest_float("dropout", 0.0, 0.5)
    return {**architectures[index], "architecture": index, "rate": rate, "dropout": dropout, "micro_batch": 1}


class Misfit(Exception):
    """What a sampler raises when no micro-batch fits."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        super().__init__("does not fit")
        self.params, self.needed_bytes = dict(params), 2**41


def sample_width(trial: Any, context: Mapping[str, Any], architectures: Any, fit: Any) -> dict[str, Any]:
    """The same three by a user who has no list of architectures."""
    width = trial.suggest_int("width", 0, 19)
    rate = trial.suggest_float("rate", 1e-5, 1e-1, log=True)
    dropout = trial.suggest_float("dropout", 0.0, 0.5)
    return {"width": width, "architecture": width, "rate": rate, "dropout": dropout, "micro_batch": 1}


def sample_what_fits(trial: Any, context: Mapping[str, Any], architectures: Any, fit: Any) -> dict[str, Any]:
    """The same where some widths do not fit."""
    params = sample_width(trial, context, architectures, fit)
    if fit(params) is None:
        raise Misfit(params)
    return params


def lower_half(params: Mapping[str, Any], context: Mapping[str, Any], limit_bytes: int, **_: Any) -> int | None:
    """The ten narrow ones fit, the ten wide ones, with the best among them, do not."""
    return 1 if params["width"] < 10 else None


def estimate(params: Mapping[str, Any], context: Mapping[str, Any]) -> dict[str, Any]:
    """What an interpreter takes."""
    return {"host_bytes": 60 * 2**20, "device_bytes": 0, "components": {"runtime": 60 * 2**20}, "family": "bowl/cpu"}


def value(params: Mapping[str, Any]) -> float:
    """0 at architecture 14, rate 1e-3, dropout 0.1; 1.9 on average."""
    at = ((params["architecture"] - 14) / 8, math.log10(params["rate"]) + 3, (params["dropout"] - 0.1) / 0.25)
    return sum(x * x for x in at)


def objective(task: Mapping[str, Any], progress: Any) -> float:
    """The value, after BOWL_TRIAL_S seconds of the environment (so that trials run side by side)."""
    progress.tick()
    time.sleep(float(os.environ.get("BOWL_TRIAL_S", "0")))
    return value(task["params"])

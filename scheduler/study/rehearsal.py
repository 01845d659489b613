"""One draw of each study's sampler before anything is written, on a study that lives in memory only.

A sampler of the user's that cannot work would otherwise fail every ask of a run that has already begun. What one of
their functions raises is `training_side`'s line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna

from scheduler.model import HeadroomError, UsageError
from scheduler.settings.schema import Settings
from scheduler.study.verbosity import quiet
from scheduler.workload import functions as training_side
from scheduler.workload.plan import Plan, StudyPlan, largest_micro_batch


def rehearse(settings: Settings, plan: Plan) -> None:
    """Sample and size a random trial of each study that can run. Raises UsageError."""
    functions = training_side.load(settings)
    for study in plan.studies:
        if study.refusal is not None:
            continue
        try:
            with quiet():
                _draw(study, plan, functions)
        except HeadroomError:
            raise
        except optuna.TrialPruned:
            continue  # its way to refuse a draw
        except Exception as error:
            if not hasattr(error, "needed_bytes"):  # a draw that does not fit; another one will
                words = f"{type(error).__name__}: {' '.join(str(error).split())}"
                raise UsageError(f"training.sample: {settings.training.sample} raised {words}") from error


def _draw(study: StudyPlan, plan: Plan, functions: Mapping[str, Any]) -> None:
    """As `StudyStore.ask` does it, for the largest worker."""
    room = max(plan.rooms, key=lambda room: room.trial_bytes)
    context, micro_batch = dict(study.spec.context), functions["micro_batch"]

    def fit(params: Mapping[str, Any]) -> int | None:
        if micro_batch is None:
            return int(context["target_effective_batch"])
        return largest_micro_batch(micro_batch, params, context, room)

    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=context["seed"])).ask()
    params = functions["sample"](trial, context, study.architectures, fit)
    if functions["estimate"] is not None:
        functions["estimate"](params, context)

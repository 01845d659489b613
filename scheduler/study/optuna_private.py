"""Everything of Optuna's that is not its public API and that this project rests on, in one place (release 5).

Covers: the tables of the RDB storage as classes, four methods of the storage that work inside a transaction of ours,
the storage's engine, and the keys under which Optuna keeps fixed parameters and constraints. Each is held by a test in
tests/study/test_optuna_private.py that compares it with what the public API does, and tests/test_imports.py sees to it
that no other module uses anything private. Everything else goes through the public API (`ask`).
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, TypeAlias, cast

import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState

StudyRow: TypeAlias = models.StudyModel
StudyAttr: TypeAlias = models.StudyUserAttributeModel
TrialRow: TypeAlias = models.TrialModel
TrialAttr: TypeAlias = models.TrialUserAttributeModel
TrialSystemAttr: TypeAlias = models.TrialSystemAttributeModel
TrialParam: TypeAlias = models.TrialParamModel
TrialReport: TypeAlias = models.TrialIntermediateValueModel
TrialValue: TypeAlias = models.TrialValueModel

COLUMNS: Mapping[Any, tuple[str, ...]] = {
    StudyRow: ("study_id",),
    StudyAttr: ("study_id", "key", "value_json"),
    TrialRow: ("trial_id", "study_id", "number", "state", "datetime_start", "datetime_complete"),
    TrialAttr: ("trial_id", "key", "value_json"),
    TrialSystemAttr: ("trial_id", "key", "value_json"),
    TrialParam: ("trial_id", "param_name", "param_value", "distribution_json"),
    TrialReport: ("trial_id", "step", "intermediate_value", "intermediate_value_type"),
    TrialValue: ("trial_id", "objective", "value", "value_type"),
}
METHODS = (
    "_get_prepared_new_trial",
    "_build_frozen_trial_from_trial_model",
    "_set_trial_attr_without_commit",
)

# Of a study and of a trial: its storage and key, and what `Study.optimize` and `Study.stop` tell each other.
MEMBERS = ("_storage", "_thread_local", "_stop_flag", "_trial_id")

FIXED_PARAMS = "fixed_params"  # a system attribute: name -> value, as `Study.enqueue_trial` leaves it
CONSTRAINT = "constraints:{}"  # a system attribute: a number above 0 is infeasible, as `Trial.set_constraint` leaves it


def missing() -> list[str]:
    """List what the installed Optuna no longer has; empty when it is a release that this project knows."""
    columns = [f"{row.__name__}.{name}" for row, names in COLUMNS.items() for name in names if not hasattr(row, name)]
    return columns + [f"RDBStorage.{name}" for name in METHODS if not hasattr(RDBStorage, name)]


def engine(storage: RDBStorage) -> sqlalchemy.engine.Engine:
    """Return the storage's connections."""
    return storage.engine


def add_trial(storage: RDBStorage, session: Any, study_id: int, template: FrozenTrial) -> TrialRow:
    """Add a new trial like the template, with the study's next number. As `create_new_trial`, in this session."""
    return storage._get_prepared_new_trial(study_id, template, session)


def trial_id(trial: TrialRow) -> int:
    """Return the row's key; Optuna declares its columns as those of the class."""
    return cast(int, trial.trial_id)


def number(trial: TrialRow) -> int:
    """Return the trial's number in its study."""
    return cast(int, trial.number)


def frozen(storage: RDBStorage, trial: TrialRow) -> FrozenTrial:
    """Return the trial as its row's session sees it. As `get_trial`."""
    return storage._build_frozen_trial_from_trial_model(trial)


def new_trial(study_id: int, number: int) -> TrialRow:
    """Return a row for a RUNNING trial that begins now, to be added to a session. As `create_new_trial`."""
    began = datetime.now()  # noqa: DTZ005 - Optuna keeps local times
    return TrialRow(study_id=study_id, number=number, state=TrialState.RUNNING, datetime_start=began)


def param_fields(trial_id: int, name: str, value: float, distribution: BaseDistribution) -> dict[str, Any]:
    """Return a row of TrialParam. value: in Optuna's own form. As `set_trial_param`, after its check."""
    kept = distribution_to_json(distribution)
    return {"trial_id": trial_id, "param_name": name, "param_value": value, "distribution_json": kept}


def report_fields(trial_id: int, step: int, value: float) -> dict[str, Any]:
    """Return a row of TrialReport. As `Trial.report`."""
    stored, kind = TrialReport.intermediate_value_to_stored_repr(value)
    return {"trial_id": trial_id, "step": step, "intermediate_value": stored, "intermediate_value_type": kind}


def report_value(stored: float | None, kind: Any) -> float:
    """Return the value of such a row."""
    return TrialReport.stored_repr_to_intermediate_value(stored, kind)


def value_fields(trial_id: int, objective: int, value: float) -> dict[str, Any]:
    """Return a row of TrialValue, one per objective. As `set_trial_state_values`."""
    stored, kind = TrialValue.value_to_stored_repr(value)
    return {"trial_id": trial_id, "objective": objective, "value": stored, "value_type": kind}


def set_constraint(storage: RDBStorage, session: Any, trial: TrialRow, name: str, value: float) -> None:
    """Say that the trial is feasible (0 or less) or not. As `Trial.set_constraint`."""
    storage._set_trial_attr_without_commit(
        session, models.TrialSystemAttributeModel, trial_id(trial), CONSTRAINT.format(name), value
    )


def begin_loop(study: optuna.Study) -> None:
    """Let `Study.stop` be called by whoever is given this study, and nobody have called it yet. As `Study.optimize`."""
    study._thread_local.in_optimize_loop, study._stop_flag = True, False


def end_loop(study: optuna.Study) -> None:
    """Undo `begin_loop`."""
    study._thread_local.in_optimize_loop = False


def allow_stop(study: optuna.Study) -> None:
    """Let `Study.stop` be called on another thread, where the loop has begun."""
    study._thread_local.in_optimize_loop = True


def is_stopped(study: optuna.Study) -> bool:
    """Whether it was. As the loop of `Study.optimize` asks before each trial."""
    return bool(study._stop_flag)


def storage_of(study: optuna.Study) -> tuple[BaseStorage, str | None]:
    """Return the storage that the study was given, and its URL where it is a database."""
    storage = study._storage
    backend = getattr(storage, "_backend", storage)
    return storage, backend.url if isinstance(backend, RDBStorage) else None


def id_of(trial: FrozenTrial) -> int:
    """Return the trial's number in its storage, which is not its number in the study."""
    return trial._trial_id

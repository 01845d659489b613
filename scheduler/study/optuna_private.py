"""Everything of Optuna's that is not its public API and that this project rests on, in one place (release 5).

Covers: the tables of the RDB storage as classes, four methods of the storage that work inside a transaction of ours,
the storage's engine, and the keys under which Optuna keeps fixed parameters and constraints. Each is held by a test in
tests/study/test_optuna_private.py that compares it with what the public API does, and tests/test_imports.py sees to it
that no other module uses anything private. Everything else goes through the public API (`ask`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

import optuna
import sqlalchemy
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial

StudyRow: TypeAlias = models.StudyModel
StudyAttr: TypeAlias = models.StudyUserAttributeModel
TrialRow: TypeAlias = models.TrialModel
TrialAttr: TypeAlias = models.TrialUserAttributeModel

COLUMNS: Mapping[Any, tuple[str, ...]] = {
    StudyRow: ("study_id",),
    StudyAttr: ("study_id", "key", "value_json"),
    TrialRow: ("trial_id", "study_id", "number", "state", "datetime_start", "datetime_complete"),
    TrialAttr: ("trial_id", "key", "value_json"),
}
METHODS = (
    "_get_prepared_new_trial",
    "_build_frozen_trial_from_trial_model",
    "_set_trial_value_without_commit",
    "_set_trial_intermediate_value_without_commit",
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


def set_values(storage: RDBStorage, session: Any, trial: TrialRow, values: Sequence[float]) -> None:
    """Set the trial's values, one per objective. As `set_trial_state_values`."""
    for objective, value in enumerate(values):
        storage._set_trial_value_without_commit(session, trial, objective, value)


def set_intermediate_value(storage: RDBStorage, session: Any, trial: TrialRow, step: int, value: float) -> None:
    """One report; a later one of the same step wins. As `Trial.report`."""
    storage._set_trial_intermediate_value_without_commit(session, trial_id(trial), step, value)


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

"""A run's studies for those who only look: rows, where parameters come from, and how much each matters.

Covers any database that Optuna can open; writes nothing and creates nothing, so it may be done while a driver runs.
Importance is Optuna's (PED-ANOVA, its default): over the parameters that the study holds.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
import sqlalchemy
from optuna.trial import TrialState

from scheduler.model.parameters import Distribution
from scheduler.study.distributions import space
from scheduler.study.rows import row
from scheduler.study.transactions import StudyUnavailable, engine_kwargs, one_line, sqlite_path

ENOUGH = 8  # completed trials with different values from which a share of importance means something


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRead:
    """One study. directions: "minimize" or "maximize", one per value. rows: a trial each, as for results.csv.

    params: trial number -> what was suggested. reported: trial number -> step -> intermediate value. space: of each
    parameter any trial has. importance: share of 1 by parameter, the largest first; empty where why_no_importance says
    why.
    """

    name: str
    directions: tuple[str, ...]
    rows: Sequence[Mapping[str, Any]]
    params: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    reported: Mapping[int, Mapping[int, float]] = field(default_factory=dict)
    space: Mapping[str, Distribution] = field(default_factory=dict)
    importance: Mapping[str, float] = field(default_factory=dict)
    why_no_importance: str = ""


def read(url: str, names: Iterable[str]) -> dict[str, StudyRead]:
    """Read the studies of these names, as far as they are there. Raises StudyUnavailable: no database, no answer."""
    path = sqlite_path(url)
    if path is not None and not path.is_file():
        raise StudyUnavailable(f"there is no study database {path}")
    found = {}
    try:
        # Tables that are not there are not made: whoever looks at a database leaves it as it is.
        storage = optuna.storages.RDBStorage(url, engine_kwargs=engine_kwargs(url), skip_table_creation=True)
        try:
            known = set(optuna.get_all_study_names(storage))
            for name in names:
                if name in known:
                    found[name] = _read(optuna.load_study(study_name=name, storage=storage))
        finally:
            storage.engine.dispose()
    except (optuna.exceptions.OptunaError, sqlalchemy.exc.SQLAlchemyError, RuntimeError, ImportError) as error:
        raise StudyUnavailable(one_line(error)) from error
    return found


def _read(study: optuna.Study) -> StudyRead:
    trials = study.get_trials(deepcopy=False)
    directions = tuple(direction.name.lower() for direction in study.directions)
    everything: dict[str, Distribution] = {}
    for trial in trials:
        everything |= space(trial.distributions)
    importance, why = _importance(study, trials)
    return StudyRead(
        name=study.study_name,
        directions=directions,
        rows=[row(trial) for trial in trials],
        params={trial.number: dict(trial.params) for trial in trials},
        reported={trial.number: dict(trial.intermediate_values) for trial in trials if trial.intermediate_values},
        space=everything,
        importance=importance,
        why_no_importance=why,
    )


def _importance(study: optuna.Study, trials: Sequence[optuna.trial.FrozenTrial]) -> tuple[dict[str, float], str]:
    if len(study.directions) > 1:
        return {}, "of a study with several values no single importance can be given"
    complete = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    if len({trial.value for trial in complete}) < ENOUGH:
        return {}, f"it takes {ENOUGH} completed trials with different values, there are {len(complete)}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(Exception):  # an evaluator has its own conditions, and the rest of a report has none
            found = optuna.importance.get_param_importances(study)
            return {name: float(share) for name, share in found.items()}, ""
    return {}, "Optuna's evaluator could make nothing of these trials"

"""The statements on Optuna's tables that every trial needs, made once: a trial costs some thirty of them.

Covers what our transactions read and write of a trial's attributes, parameters, reports and values, in SQLAlchemy's
core on the tables of `optuna_private`: through its ORM the same statements take two to four times the CPU. All are for
a transaction that holds the study's lock. Decides nothing, and commits nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.trial import TrialState
from sqlalchemy import Table, and_, bindparam, func, insert, select, update
from sqlalchemy.orm import Session

from scheduler.core import fault
from scheduler.model.plain import plain
from scheduler.model.plain import text as bounded_text
from scheduler.study import optuna_private
from scheduler.study.optuna_private import StudyRow, TrialAttr, TrialParam, TrialReport, TrialRow, TrialSystemAttr

OVER = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
MAX_ATTRIBUTE = 60_000  # characters of one attribute's JSON: MySQL's TEXT holds 64 KiB


@dataclass(slots=True, kw_only=True)
class Drawn:
    """What a trial was given while it was drawn. params: name -> Optuna's own form of the value, distribution."""

    params: dict[str, tuple[float, BaseDistribution]] = field(default_factory=dict)
    system_attrs: dict[str, Any] = field(default_factory=dict)
    user_attrs: dict[str, Any] = field(default_factory=dict)


def _table(row: Any) -> Table:
    table: Table = row.__table__
    return table


_STUDIES, _TRIALS, _ATTRS = _table(StudyRow), _table(TrialRow), _table(TrialAttr)
_SYSTEM_ATTRS, _PARAMS, _REPORTS = _table(TrialSystemAttr), _table(TrialParam), _table(TrialReport)
_VALUES = _table(optuna_private.TrialValue)
_STUDY = _TRIALS.c.study_id == bindparam("study")
_OWNER = _ATTRS.alias()

# Take the study's lock. Of one study:
LOCK = select(_STUDIES.c.study_id).where(_STUDIES.c.study_id == bindparam("study")).with_for_update()
_STATES = select(_TRIALS.c.state, func.count()).where(_STUDY).group_by(_TRIALS.c.state)
RUNNING = (
    select(_TRIALS.c.trial_id, _TRIALS.c.number, _OWNER.c.value_json.label("owner"))
    .outerjoin(_OWNER, and_(_OWNER.c.trial_id == _TRIALS.c.trial_id, _OWNER.c.key == "owner"))
    .where(_STUDY, _TRIALS.c.state == TrialState.RUNNING)
    .order_by(_TRIALS.c.trial_id)
)
TRIAL = (
    select(_TRIALS.c.trial_id, _TRIALS.c.state).where(_STUDY, _TRIALS.c.number == bindparam("number")).with_for_update()
)
_NOT_COUNTED = (
    select(func.count(func.distinct(_ATTRS.c.trial_id)))
    .join(_TRIALS, _TRIALS.c.trial_id == _ATTRS.c.trial_id)
    .where(_STUDY, _TRIALS.c.state.in_(OVER))
    .where(
        (_ATTRS.c.key == "retried")
        | ((_ATTRS.c.key == "stop_reason") & _ATTRS.c.value_json.in_([json.dumps(why) for why in fault.NEVER_RAN]))
    )
)
_STORED = select(_ATTRS.c.key, _ATTRS.c.value_json).where(_ATTRS.c.trial_id == bindparam("trial"))
_CHANGE = (
    update(_ATTRS)
    .where(_ATTRS.c.trial_id == bindparam("trial"), _ATTRS.c.key == bindparam("named"))
    .values(value_json=bindparam("text"))
)
_REPORTS_OF = select(_REPORTS.c.step, _REPORTS.c.intermediate_value, _REPORTS.c.intermediate_value_type).where(
    _REPORTS.c.trial_id == bindparam("trial")
)
_REPORTED = select(_REPORTS.c.step).where(
    _REPORTS.c.trial_id == bindparam("trial"), _REPORTS.c.step.in_(bindparam("steps", expanding=True))
)
_REPORT_AGAIN = (
    update(_REPORTS)
    .where(_REPORTS.c.trial_id == bindparam("trial"), _REPORTS.c.step == bindparam("at"))
    .values(intermediate_value=bindparam("stored"), intermediate_value_type=bindparam("kind"))
)
_NEW_ATTR, _NEW_SYSTEM_ATTR, _NEW_PARAM = insert(_ATTRS), insert(_SYSTEM_ATTRS), insert(_PARAMS)
_NEW_REPORT, _NEW_VALUE = insert(_REPORTS), insert(_VALUES)


def in_state(session: Session, study_id: int) -> dict[TrialState, int]:
    """Return how many trials of the study are in each state that there is."""
    return dict(session.connection().execute(_STATES, {"study": study_id}).all())


def counted(session: Session, study_id: int, states: Mapping[TrialState, int]) -> int:
    """Return how many trials count towards the quota. states: see `in_state`."""
    finished = sum(states.get(state, 0) for state in OVER)
    return finished - (session.connection().scalar(_NOT_COUNTED, {"study": study_id}) or 0 if finished else 0)


def stored_attributes(session: Session, trial_id: int) -> dict[str, str]:
    """Return the trial's user attributes, name -> JSON."""
    return dict(session.connection().execute(_STORED, {"trial": trial_id}).all())


def parsed(stored: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of attributes as they are stored."""
    return {key: json.loads(text) for key, text in stored.items()}


def put_attributes(session: Session, trial_id: int, attrs: Mapping[str, Any], have: Mapping[str, str]) -> None:
    """Write user attributes, in one statement where all are new. have: those that it has, as they are stored."""
    written = {key: _attribute(value) for key, value in attrs.items()}
    new = {key: text for key, text in written.items() if key not in have}
    _add(session, _NEW_ATTR, [{"trial_id": trial_id, "key": key, "value_json": text} for key, text in new.items()])
    changed = {key: text for key, text in written.items() if have.get(key, text) != text}
    _add(session, _CHANGE, [{"trial": trial_id, "named": key, "text": text} for key, text in changed.items()])


def put_drawn(session: Session, trial_id: int, drawn: Drawn) -> None:
    """Write parameters and system attributes that the trial does not have yet; user attributes are not written here."""
    params = [optuna_private.param_fields(trial_id, name, *given) for name, given in drawn.params.items()]
    _add(session, _NEW_PARAM, params)
    attrs = [{"trial_id": trial_id, "key": k, "value_json": json.dumps(v)} for k, v in drawn.system_attrs.items()]
    _add(session, _NEW_SYSTEM_ATTR, attrs)


def put_reports(session: Session, trial_id: int, values: Mapping[int, float]) -> None:
    """Write intermediate values, step -> value; a later one of a step wins."""
    have = set(session.connection().scalars(_REPORTED, {"trial": trial_id, "steps": list(values)}))
    rows = [optuna_private.report_fields(trial_id, step, float(value)) for step, value in values.items()]
    _add(session, _NEW_REPORT, [row for row in rows if row["step"] not in have])
    again = [row for row in rows if row["step"] in have]
    changed = [
        {"trial": trial_id, "at": r["step"], "stored": r["intermediate_value"], "kind": r["intermediate_value_type"]}
        for r in again
    ]
    _add(session, _REPORT_AGAIN, changed)


def reports(session: Session, trial_id: int) -> dict[int, float]:
    """Return the intermediate values, step -> value."""
    found = session.connection().execute(_REPORTS_OF, {"trial": trial_id})
    return {step: optuna_private.report_value(stored, kind) for step, stored, kind in found}


def put_values(session: Session, trial_id: int, values: Sequence[float]) -> None:
    """Write the values of a trial that has none yet, one per objective."""
    _add(session, _NEW_VALUE, [optuna_private.value_fields(trial_id, n, value) for n, value in enumerate(values)])


def _add(session: Session, statement: Any, rows: list[dict[str, Any]]) -> None:
    if rows:
        session.connection().execute(statement, rows)


def _attribute(value: Any) -> str:
    """Return an attribute's JSON. Larger than a column of MySQL holds, it is cut to its text: the study matters
    more."""
    text = json.dumps(plain(value))
    return text if len(text) <= MAX_ATTRIBUTE else json.dumps(bounded_text(text, MAX_ATTRIBUTE // 2))

"""The operations of `transactions.Rdb` on any other storage of Optuna's, in memory or in a file, for one driver.

Through the public interface of a storage alone, one call after the other: there is no transaction, so a crash in the
middle may leave half of an operation, and two drivers may take the same trial. Whoever needs more takes a database.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from scheduler.core import fault
from scheduler.study import optuna_private
from scheduler.study.statements import OVER, Drawn
from scheduler.study.transactions import Begun, Full, NotOurs, clean


class PlainStorage:
    """Meanings, arguments and errors are those of `Rdb`."""

    file = None

    def __init__(self, storage: BaseStorage) -> None:
        self.storage = storage

    def rescue(self, target: Path) -> None:
        """There is no file of ours that could have been removed. Raises OSError."""
        raise OSError(f"{type(self.storage).__name__} is no SQLite file")

    def close(self) -> None:
        self.storage.remove_session()

    # -- trials -----------------------------------------------------------------------------------------------------

    def begin(self, study_id: int, *, run: str, owner: str, quota: int, delivered: Container[int]) -> Begun | Full:
        running = 0
        for trial in self._trials(study_id, TrialState.RUNNING):
            if trial.user_attrs.get("owner") == owner and trial.number not in delivered:
                return _begun(trial)
            running += "owner" in trial.user_attrs
        counted = self.counted(study_id)
        if counted + running >= quota:
            return Full(counted=counted, running=running)
        mine = {"owner": owner, "run": run}
        for waiting in self._trials(study_id, TrialState.WAITING):
            self._put(waiting, mine)
            if self.storage.set_trial_state_values(optuna_private.id_of(waiting), TrialState.RUNNING):
                return _begun(self.frozen(study_id, waiting.number))
        template = create_trial(state=TrialState.RUNNING, user_attrs=mine)
        return _begun(self.storage.get_trial(self.storage.create_new_trial(study_id, template)))

    def enqueue_first(self, study_id: int, trials: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> bool:
        if self.storage.get_n_trials(study_id):
            return False
        for fixed, attrs in trials:
            self._enqueue(study_id, fixed, attrs, {})
        return True

    def annotate(
        self, study_id: int, number: int, run: str, attrs: Mapping[str, Any], drawn: Drawn | None = None
    ) -> None:
        trial = self._running(study_id, number, run)
        if drawn is not None:
            trial_id, attrs = optuna_private.id_of(trial), {**drawn.user_attrs, **attrs}
            for name, (value, distribution) in drawn.params.items():
                self.storage.set_trial_param(trial_id, name, value, distribution)
            for key, value in drawn.system_attrs.items():
                self.storage.set_trial_system_attr(trial_id, key, value)
        self._put(trial, attrs)

    def report(self, study_id: int, number: int, run: str, values: Mapping[int, float]) -> Begun:
        trial = self._running(study_id, number, run)
        for step, value in values.items():
            self.storage.set_trial_intermediate_value(optuna_private.id_of(trial), step, float(value))
        return _begun(trial)

    def finish(
        self,
        study_id: int,
        number: int,
        run: str,
        state: TrialState,
        values: Sequence[float],
        attrs: Mapping[str, Any],
        constraint: float | None,
        lease: tuple[str, Any] | None = None,
    ) -> TrialState:
        trial = self._ours(study_id, number, run)
        if trial.state.is_finished():
            if "retried" in trial.user_attrs:
                raise NotOurs(f"trial {number} was queued again by another driver")
            return trial.state
        self._finish(trial, state, values, attrs, constraint)
        return state

    def requeue(
        self,
        study_id: int,
        number: int,
        run: str,
        *,
        attrs: Mapping[str, Any],
        successor_attrs: Mapping[str, Any],
        lease: tuple[str, Any] | None = None,
    ) -> int | None:
        trial = self._ours(study_id, number, run)
        if trial.state.is_finished():
            found: int | None = trial.user_attrs.get("retried")
            return found
        fixed = {**trial.system_attrs.get(optuna_private.FIXED_PARAMS, {}), **trial.params}
        successor = self._enqueue(study_id, fixed, {**successor_attrs, "retry_of": number}, trial.intermediate_values)
        self._finish(trial, TrialState.FAIL, (), {**attrs, "retried": successor}, None)
        return successor

    def finished(self, study_id: int, numbers: Collection[int]) -> set[int]:
        return {trial.number for trial in self._trials(study_id, *OVER)} & set(numbers)

    def frozen(self, study_id: int, number: int) -> FrozenTrial:
        return self.storage.get_trial(self.storage.get_trial_id_from_study_id_trial_number(study_id, number))

    def counted(self, study_id: int) -> int:
        ended = (trial.user_attrs for trial in self._trials(study_id, *OVER))
        return sum("retried" not in attrs and attrs.get("stop_reason") not in fault.NEVER_RAN for attrs in ended)

    def completed(self, study_id: int) -> int:
        return len(self._trials(study_id, TrialState.COMPLETE))

    # -- attributes of the study ------------------------------------------------------------------------------------

    def remember(self, study_id: int, key: str, value: Any) -> Any:
        attrs = self.study_attrs(study_id)
        if key not in attrs:
            self.set_study_attr(study_id, key, value)
        return attrs.get(key, value)

    def set_study_attr(self, study_id: int, key: str, value: Any) -> None:
        self.storage.set_study_user_attr(study_id, key, value)

    def study_attrs(self, study_id: int) -> dict[str, Any]:
        return self.storage.get_study_user_attrs(study_id)

    # -- small things -----------------------------------------------------------------------------------------------

    def _trials(self, study_id: int, *states: TrialState) -> list[FrozenTrial]:
        return self.storage.get_all_trials(study_id, deepcopy=False, states=states)

    def _ours(self, study_id: int, number: int, run: str) -> FrozenTrial:
        trial = self.frozen(study_id, number)
        if (owner := trial.user_attrs.get("run")) != run:
            raise NotOurs(f"trial {number} belongs to {owner or 'another program'}, this is {run}")
        return trial

    def _running(self, study_id: int, number: int, run: str) -> FrozenTrial:
        trial = self._ours(study_id, number, run)
        if trial.state is not TrialState.RUNNING:
            raise NotOurs(f"trial {number} is {trial.state.name}, not RUNNING")
        return trial

    def _put(self, trial: FrozenTrial, attrs: Mapping[str, Any]) -> None:
        for key, value in clean(dict(attrs)).items():
            if value is not None:
                self.storage.set_trial_user_attr(optuna_private.id_of(trial), key, value)

    def _enqueue(
        self, study_id: int, fixed: Mapping[str, Any], attrs: Mapping[str, Any], reports: Mapping[int, float]
    ) -> int:
        template = create_trial(
            state=TrialState.WAITING,
            user_attrs=clean(dict(attrs)),
            system_attrs={optuna_private.FIXED_PARAMS: dict(fixed)},
            intermediate_values=dict(reports),
        )
        return self.storage.get_trial_number_from_id(self.storage.create_new_trial(study_id, template))

    def _finish(
        self,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float],
        attrs: Mapping[str, Any],
        constraint: float | None,
    ) -> None:
        self._put(trial, attrs)
        trial_id = optuna_private.id_of(trial)
        if constraint is not None:
            self.storage.set_trial_system_attr(trial_id, optuna_private.CONSTRAINT.format("memory"), float(constraint))
        if state is TrialState.PRUNED:
            reports = trial.intermediate_values
            last = reports[max(reports)] if reports else math.nan
            values = () if math.isnan(last) else (last,)
        numbers = [float(value) for value in values] if state is not TrialState.FAIL else []
        self.storage.set_trial_state_values(trial_id, state, numbers or None)


def _begun(trial: FrozenTrial) -> Begun:
    return Begun(trial_id=optuna_private.id_of(trial), number=trial.number, attrs=trial.user_attrs)

"""Trials that ask their study while they run, answered by Optuna itself: an `optuna.Trial` for each, kept as long.

Covers what is known before a trial starts (sampled ahead, along the branch that earlier trials of the study took, and
not written), what it asks while it runs, and forgetting it. Part of the study adapter, on its one thread; claims and
finishes no trial, and does not know where they run.
"""

from __future__ import annotations

import base64
import pickle
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from scheduler.core.branches import Branches
from scheduler.model import Json
from scheduler.study import distributions, reserved
from scheduler.study.ask import AheadStorage, begun_trial
from scheduler.study.transactions import Begun, is_storage_error

# What a trial may read of its study beyond the names and directions, which it is told with its task.
READABLE = frozenset({"best_value", "best_params", "best_trial", "best_trials", "trials", "user_attrs"})
MOST_AHEAD = 1000  # questions: a loop that asks without end is followed no further


class LiveTrial:
    """One trial. begun: as the transaction left it."""

    def __init__(self, ask: Callable[[AheadStorage], optuna.Trial], storage: BaseStorage, begun: Begun) -> None:
        self._ask, self._behind, self._begun = ask, storage, begun
        self.named: set[str] = set()  # user attributes that the objective has set
        self._begin()

    @property
    def trial_id(self) -> int:
        """Its row in the storage."""
        return self._begun.trial_id

    def _begin(self) -> None:
        self._storage = AheadStorage(self._behind, self._begun.trial_id)
        self.trial = self._ask(self._storage)

    def look_ahead(self, branches: Branches) -> Json:
        """Sample what it will ask, as far as that is known; name -> {value, distribution}. Nothing is written."""
        self._storage.is_ahead = True
        try:
            for _ in range(MOST_AHEAD):
                asked = distributions.answered(self.trial.params, self.trial.distributions)
                if (question := branches.next(asked)) is None or question.name in self.trial.params:
                    break
                drawn = distributions.from_text(question.distribution)
                try:
                    distributions.suggest(self.trial, question.name, drawn)
                except ValueError:  # what it was queued with is out of this range: its own suggest will say so
                    break
        finally:
            self._storage.is_ahead = False
        return self.known()

    def known(self) -> Json:
        """Return what it has, and what it will be answered."""
        return {
            name: {"value": value, "distribution": distributions.to_json(self.trial.distributions[name])}
            for name, value in self.trial.params.items()
        }

    def asked(self, name: str, value: Any, data: Mapping[str, Any]) -> None:
        """Note that it has asked for what it had been told ahead, and has answered itself."""
        if name in self._storage.unasked:
            self._storage.asked(name)
        elif name not in self.trial.params:  # an attempt before this one went another way meanwhile
            distribution = distributions.from_json(data)
            internal = distribution.to_internal_repr(value)
            self._storage.set_trial_param(self._begun.trial_id, name, internal, distribution)
            self._begin()

    def suggest(self, name: str, data: Mapping[str, Any]) -> Any:
        """Suggest something else that it asks for.

        What was told ahead and not yet asked for is forgotten: it went another way.
        """
        distribution = distributions.from_json(data)
        drawn = self._storage.unasked.get(name)
        if drawn is not None and drawn[1] == distribution:
            self._storage.asked(name)
        elif self._storage.unasked:
            self._begin()
        return distributions.suggest(self.trial, name, distribution)


class LiveTrials:
    """Those of one study. study: as it is opened, with its sampler and pruner."""

    def __init__(self, study: optuna.Study, storage: BaseStorage) -> None:
        self._study, self._storage = study, storage
        self._branches = Branches()
        self._trials: dict[int, LiveTrial] = {}
        for trial in study.get_trials(deepcopy=False):
            self.learn(trial)

    def learn(self, trial: optuna.trial.FrozenTrial) -> None:
        """Take in what a trial that has ended asked for."""
        if trial.state.is_finished():
            asked = distributions.answered(trial.params, trial.distributions)
            self._branches.learn(asked, whole=trial.state is TrialState.COMPLETE)

    def begin(self, begun: Begun) -> tuple[LiveTrial, Json]:
        """Begin the trial; return it, and what it is told ahead."""

        def ask(seen: AheadStorage) -> optuna.Trial:
            study = self._study
            return begun_trial(
                study.study_name, self._storage, begun, sampler=study.sampler, pruner=study.pruner, seen=seen
            )

        live = self._trials[begun.number] = LiveTrial(ask, self._storage, begun)
        return live, live.look_ahead(self._branches)

    def get(self, number: int) -> LiveTrial | None:
        return self._trials.get(number)

    def end(self, number: int) -> None:
        """Forget a trial that has its final state."""
        if (live := self._trials.get(number)) is not None:
            self.learn(self._storage.get_trial(live.trial_id))
            del self._trials[number]

    def report(self, number: int, values: Mapping[int, float]) -> None:
        """Intermediate values, step -> value; a step that has one keeps it."""
        if (live := self._trials.get(number)) is not None:
            with warnings.catch_warnings():  # an attempt that begins anew reports again what an earlier one has
                warnings.simplefilter("ignore", UserWarning)
                for step, value in values.items():
                    live.trial.report(value, step)

    def answer(self, number: int, method: str, arguments: Mapping[str, Any]) -> Json:
        """Answer a call of the trial's: {"value": ...}, or what Optuna raised: {"error": text, "kind": its class}."""
        live = self._trials.get(number)
        if live is None:
            return {"error": f"trial {number} is not running", "kind": "RuntimeError"}
        try:
            return {"value": self._answer(live, method, arguments)}
        except Exception as error:
            if is_storage_error(error):
                raise
            return {"error": str(error), "kind": type(error).__name__}

    def _answer(self, live: LiveTrial, method: str, arguments: Mapping[str, Any]) -> Any:
        match method, arguments:
            case "suggest", {"name": str(name), "distribution": Mapping() as data}:
                return live.suggest(name, data)
            case "asked", {"name": str(name), "value": value, "distribution": Mapping() as data}:
                return live.asked(name, value, data)
            case "report", {"step": int(step), "value": str(value)}:
                return live.trial.report(float(value), step)
            case "should_prune", _:
                return bool(live.trial.should_prune())  # some pruners answer with numpy's
            case "set_user_attr", {"key": str(key), "value": value}:
                reserved.check(key)
                live.named.add(key)
                return live.trial.set_user_attr(key, value)
            case "system_attr", {"key": str(key), "value": value}:
                reserved.check_system(key)
                return self._storage.set_trial_system_attr(live.trial_id, key, value)
            case "system_attrs", _:
                return self._storage.get_trial_system_attrs(live.trial_id)
            case "set_constraint", {"key": str(key), "value": value}:
                return live.trial.set_constraint(key, float(value))
            case "study", {"name": str(name)} if name in READABLE:
                return _pickled(getattr(self._study, name))
            case "study_attr", {"key": str(key), "value": value}:
                return self._study.set_user_attr(key, value)
        raise NotImplementedError(f"a trial that Headroom runs has no {method}")


def _pickled(value: Any) -> str:
    """As text: a trial's dates and states are no JSON."""
    return base64.b64encode(pickle.dumps(value)).decode()

"""Sampling through Optuna's public `Study.ask`, for a trial that our own transaction has begun.

Covers the sampler and the study that a sampler is given: one of its own for each trial. Optuna keeps the trials a
sampler learns from in the study and forgets them in `Study.ask` and `Study.tell` only; `Rdb` finishes trials without
`tell`, so a trial made without `ask` would be proposed from what the first one saw, for ever. Part of the study
adapter. Does not claim trials (`study_rdb`) or know what their parameters mean.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from scheduler.study.grid_sampler import GridSampler
from scheduler.study.transactions import Begun


def make_sampler(seed: int, candidates: Sequence[Mapping[str, Any]] = ()) -> optuna.samplers.BaseSampler:
    """Make the sampler of every study: TPE, where trials that run are counted as bad until they end (constant liar).

    A parameter that is a field of the candidates is drawn as one of them, and so is `architecture`, one's index.
    """
    tpe = optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
    return GridSampler(tpe, candidates, seed=seed) if candidates else tpe


def begun_trial(
    study_name: str,
    storage: BaseStorage,
    begun: Begun,
    *,
    sampler: optuna.samplers.BaseSampler,
    pruner: optuna.pruners.BasePruner,
    seen: BegunStorage | None = None,
) -> optuna.Trial:
    """Return our RUNNING trial as `Study.ask` does, ready to suggest from all that is in the storage now.

    seen: the storage as it is to see it.
    """
    seen = seen or BegunStorage(storage, begun.trial_id)
    study = optuna.load_study(study_name=study_name, storage=seen, sampler=sampler, pruner=pruner)
    trial = study.ask()  # looks for waiting ones first, and so the cache learns of this one
    assert trial.number == begun.number, f"Optuna asked trial {trial.number}, not {begun.number}"
    return trial


def _passed_on(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.behind, name)(*args, **kwargs)

    return method


# A storage whose every method is that of the one `behind` it; also those that a later release adds to the interface.
_PassedOn: Any = type(
    "_PassedOn",
    (BaseStorage,),
    {name: _passed_on(name) for name, member in vars(BaseStorage).items() if callable(member) and name[0] != "_"},
)


class BegunStorage(_PassedOn):  # type: ignore[misc]  # a base made at run time
    """The storage as `Study.ask` sees it: the trial it creates is there already, and no waiting one is left to take."""

    def __init__(self, behind: BaseStorage, trial_id: int) -> None:
        self.behind, self.trial_id = behind, trial_id

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        return self.trial_id

    def get_trial(self, trial_id: int) -> FrozenTrial:
        # A storage in memory gives its own, into which Optuna's trial writes: what is only suggested ahead, too.
        return copy.deepcopy(self.behind.get_trial(trial_id))

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Any = None) -> bool:
        # False: another process was quicker. Which waiting trial is next was decided when this one was begun.
        return False


class AheadStorage(BegunStorage):
    """The same for a trial that is asked ahead: what is suggested meanwhile is held back until it was really asked."""

    def __init__(self, behind: BaseStorage, trial_id: int) -> None:
        super().__init__(behind, trial_id)
        self.is_ahead = False
        self.unasked: dict[str, tuple[float, BaseDistribution]] = {}

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        if self.is_ahead:
            self.unasked[param_name] = (param_value_internal, distribution)
        else:
            self.behind.set_trial_param(trial_id, param_name, param_value_internal, distribution)

    def asked(self, name: str) -> None:
        """Write the parameter into the study, unless it is there."""
        if name in self.unasked:
            self.behind.set_trial_param(self.trial_id, name, *self.unasked[name])
            del self.unasked[name]

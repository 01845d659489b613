"""Sampling through Optuna's public `Study.ask`, for a trial that our own transaction has begun.

Covers the sampler and the study that a sampler is given: one of its own for each trial. Optuna keeps the trials a
sampler learns from in the study and forgets them in `Study.ask` and `Study.tell` only; `Rdb` finishes trials without
`tell`, so a trial made without `ask` would be proposed from what the first one saw, for ever. Part of the study
adapter. Does not claim trials (`study_rdb`) or know what their parameters mean.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, check_distribution_compatibility
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from scheduler.study.grid_sampler import GridSampler
from scheduler.study.statements import Drawn
from scheduler.study.transactions import Begun


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A study as a storage is asked for it. id: its number in the database."""

    id: int
    directions: Sequence[StudyDirection]


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


class SeenStorage(BegunStorage):
    """The same, read once: what others write afterwards is not seen. For one proposal, or one word of a pruner.

    Optuna reads the study three times for a trial that it proposes, and twice for one that it judges.
    """

    def __init__(self, behind: BaseStorage, begun: Begun, study: Stored) -> None:
        super().__init__(behind, begun.trial_id)
        self._study = study
        self._trials = behind.get_all_trials(study.id, deepcopy=False)
        self.own = next(trial for trial in reversed(self._trials) if trial.number == begun.number)

    def get_study_id_from_name(self, study_name: str) -> int:
        return self._study.id

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        return list(self._study.directions)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        found = [trial for trial in self._trials if states is None or trial.state in states]
        return copy.deepcopy(found) if deepcopy else found

    def get_trial(self, trial_id: int) -> FrozenTrial:
        return copy.deepcopy(self.own) if trial_id == self.trial_id else self.behind.get_trial(trial_id)


class HeldStorage(SeenStorage):
    """The same for a trial that is drawn in one go: what is drawn is held back, to be written at once.

    Optuna writes each parameter in a transaction of its own: so asking took twice the CPU. distributions: of each
    parameter the one that the study has, kept by the caller between trials.
    """

    def __init__(
        self, behind: BaseStorage, begun: Begun, study: Stored, distributions: dict[str, BaseDistribution]
    ) -> None:
        super().__init__(behind, begun, study)
        self._distributions = distributions
        self.own = copy.deepcopy(self.own)  # what others are shown stays as it is
        self._had = frozenset(self.own.system_attrs)
        self.drawn = Drawn()

    def get_trial_system_attrs(self, trial_id: int) -> dict[str, Any]:
        return self.get_trial(trial_id).system_attrs

    def get_trial_user_attrs(self, trial_id: int) -> dict[str, Any]:
        return self.get_trial(trial_id).user_attrs

    def get_trial_params(self, trial_id: int) -> dict[str, Any]:
        return self.get_trial(trial_id).params

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        if (before := self._of(param_name)) is not None:
            check_distribution_compatibility(before, distribution)
        self._distributions.setdefault(param_name, distribution)
        self.own.params[param_name] = distribution.to_external_repr(param_value_internal)
        self.own.distributions[param_name] = distribution
        self.drawn.params[param_name] = (param_value_internal, distribution)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self.own.system_attrs[key] = value
        if key in self._had:  # an earlier try of this ask got as far as writing it
            self.behind.set_trial_system_attr(trial_id, key, value)
        else:
            self.drawn.system_attrs[key] = value

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        self.own.user_attrs[key] = self.drawn.user_attrs[key] = value

    def _of(self, name: str) -> BaseDistribution | None:
        """Return the distribution that the study's trials have for this parameter."""
        if name not in self._distributions:
            found = next((trial.distributions[name] for trial in self._trials if name in trial.distributions), None)
            if found is not None:
                self._distributions[name] = found
        return self._distributions.get(name)


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

"""What a new study can begin with: the best trials of a finished study of the same search, another horizon or budget.

Covers choosing that study in the storage and reading its trials. Part of the study adapter; writes nothing. How much
it is worth is measured by `tests/benchmarks/search_defaults.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from scheduler.model import StudySpec

ENOUGH = 10  # completed trials from which a study's best say something: as many as the sampler draws at random first
# What must be the same for a parameter's value to mean the same: everything that shapes a training but these two.
SAME = ("data", "training_search_space", "early_stopping", "max_epochs", "max_steps", "target_effective_batch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """study: where they are from. trials: (number there, parameters to fix), best first."""

    study: str
    trials: Sequence[tuple[int, Mapping[str, Any]]]


def beginning(
    storage: optuna.storages.BaseStorage, spec: StudySpec, architectures: Sequence[Mapping[str, Any]], count: int
) -> Beginning | None:
    """Find the best `count` trials of the nearest finished study; None where there is none.

    Nearest: the same budget first, then the nearest horizon. Architectures are taken over only where both studies have
    the same list; of another budget's trials the rest of the parameters is.
    """
    summaries = optuna.get_all_study_summaries(storage, include_best_trial=False)
    alike = [s for s in summaries if s.study_name != spec.name and _alike(s.user_attrs, spec.context)]
    for summary in sorted(alike, key=lambda s: (*_distance(s.user_attrs["headroom"], spec), s.study_name)):
        trials = optuna.load_study(study_name=summary.study_name, storage=storage).get_trials(deepcopy=False)
        complete = [t for t in trials if t.state is TrialState.COMPLETE]
        if len(complete) < ENOUGH or any(not t.state.is_finished() for t in trials):
            continue
        same_list = summary.user_attrs.get("architectures") == list(architectures)
        shape = {"architecture", *(architectures[0] if architectures else ())}

        def fixed(trial: FrozenTrial, same_list: bool = same_list, shape: set[str] = shape) -> dict[str, Any]:
            return {name: value for name, value in trial.params.items() if same_list or name not in shape}

        best = sorted(complete, key=lambda t: (t.value, t.number))[:count]
        return Beginning(study=summary.study_name, trials=[(t.number, fixed(t)) for t in best])
    return None


def _alike(attrs: Mapping[str, Any], context: Mapping[str, Any]) -> bool:
    theirs = attrs.get("context")
    return isinstance(theirs, dict) and "headroom" in attrs and all(theirs.get(k) == context.get(k) for k in SAME)


def _distance(headroom: Mapping[str, Any], spec: StudySpec) -> tuple[int, int]:
    """How many words differ among what tells studies apart, then by how much the numbers do."""
    words, numbers = 0, 0
    for name, value in spec.shown.labels.items():
        if isinstance(value, int):
            numbers += abs(int(headroom.get(name) or 0) - value)
        else:
            words += headroom.get(name) != value
    return words, numbers

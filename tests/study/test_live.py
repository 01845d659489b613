"""Trials that are answered by Optuna while they run: what is suggested ahead of them is not in the study."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

from scheduler.study import distributions
from scheduler.study.live import LiveTrials
from scheduler.study.plain_storage import PlainStorage

STORAGES: dict[str, Callable[[Path], BaseStorage]] = {
    "memory": lambda folder: InMemoryStorage(),
    "journal": lambda folder: JournalStorage(JournalFileBackend(str(folder / "journal.log"))),
    "rdb": lambda folder: RDBStorage(f"sqlite:///{folder / 'study.db'}"),
}
RANGE = optuna.distributions.FloatDistribution(0, 1)


def objective(trial: optuna.Trial) -> float:
    """Another parameter for each kind."""
    kind = trial.suggest_categorical("kind", ["a", "b"])
    return trial.suggest_float(f"only_{kind}", 0, 1)


def asked(distribution: optuna.distributions.BaseDistribution) -> Any:
    """As it comes through the pipe."""
    return distributions.to_json(distribution)


@pytest.mark.parametrize("storage", STORAGES)
def test_what_was_suggested_ahead_and_never_asked_for_is_not_in_the_study(tmp_path: Path, storage: str) -> None:
    """Earlier trials all went one way; this one goes the other: it has what it asked for and nothing else, at each
    moment."""
    backend = STORAGES[storage](tmp_path)
    study = optuna.create_study(study_name="s", storage=backend, sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(3):
        study.enqueue_trial({"kind": "a"})
    study.optimize(objective, n_trials=3)
    study.enqueue_trial({"kind": "b"})
    plain = PlainStorage(backend)
    study_id = backend.get_study_id_from_name("s")
    begun = plain.begin(study_id, run="r", owner="o", quota=99, delivered=())
    live, ahead = LiveTrials(study, backend).begin(begun)  # type: ignore[arg-type]  # not full
    assert set(ahead) == {"kind", "only_a"} and ahead["kind"]["value"] == "b"
    assert plain.frozen(study_id, 3).params == {}
    live.asked("kind", "b", ahead["kind"]["distribution"])
    assert plain.frozen(study_id, 3).params == {"kind": "b"}
    value = live.suggest("only_b", asked(RANGE))
    assert plain.frozen(study_id, 3).params == {"kind": "b", "only_b": value}
    plain.finish(study_id, 3, "r", optuna.trial.TrialState.COMPLETE, [value], {}, None)
    assert study.trials[3].params == {"kind": "b", "only_b": value}
    assert set(study.trials[3].distributions) == {"kind", "only_b"}

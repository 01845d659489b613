"""A new study begins with the best trials of a finished one nearby, and with none that would mean another thing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest

from scheduler.model import AskTrial, FinalState, Presentation, StudySpec, TellTrial, TrialAsked
from scheduler.study.store import Functions, OpenedStudy, StudyStore
from tests import bowl

CONTEXT = {"data": "bars.csv", "max_epochs": None, "training_search_space": {"rate": {"low": 1e-5, "high": 0.1}}}


def opened(
    file: Path,
    horizon: int,
    *,
    budget: str = "2M",
    architectures: Any = bowl.ARCHITECTURES,
    warm: int = 3,
    **context: Any,
) -> tuple[StudyStore, OpenedStudy]:
    """A driver that opens one study."""
    functions = Functions(sample=bowl.sample, estimate=bowl.estimate)
    run = f"run{horizon}"
    store = StudyStore(f"sqlite:///{file}", owner=run, run=run, functions=functions, warm_start=warm)
    spec = StudySpec(
        name=f"s_{budget}_h{horizon}",
        quota=20,
        slots=1,
        shown=Presentation(labels={"budget": budget, "horizon": horizon}),
        context={**CONTEXT, "horizon": horizon, "budget": budget, **context},
    )
    return store, store.open(spec, architectures)


def ask(store: StudyStore, study: str) -> TrialAsked:
    """Ask, and insist on a trial."""
    asked = store.ask(AskTrial(study=study, limit_bytes=2**40))
    assert isinstance(asked, TrialAsked)
    return asked


def run_some(file: Path, horizon: int, trials: int = 12, **settings: Any) -> list[dict[str, Any]]:
    """Complete trials of a study; the parameters of the best three, best first."""
    store, study = opened(file, horizon, warm=0, **settings)
    found = []
    for _ in range(trials):
        asked = ask(store, study.spec.name)
        value = bowl.value(asked.params) + horizon
        store.tell(TellTrial(trial=asked.trial, state=FinalState.COMPLETE, value=value))
        found.append((value, asked.trial.number, asked.params))
    store.close()
    return [dict(params) for *_, params in sorted(found, key=lambda each: each[:2])[:3]]


def test_the_best_three_of_the_nearest_horizon_run_first(tmp_path: Path) -> None:
    """Horizon 3 follows 5 and not 20: its best three first, as they were, then the sampler's; and the study says so."""
    file = tmp_path / "study.db"
    run_some(file, 20)
    best = run_some(file, 5)
    store, study = opened(file, 3)
    assert study.waiting == 3
    assert study.notes == ["s_2M_h3 begins with the best 3 trials of s_2M_h5 (warm_start)"]
    asked = [ask(store, "s_2M_h3") for _ in range(4)]
    assert [a.params for a in asked[:3]] == best
    assert asked[3].params not in best
    trials = optuna.load_study(study_name="s_2M_h3", storage=f"sqlite:///{file}").trials
    assert all(t.user_attrs["warm_start"].startswith("s_2M_h5/") for t in trials[:3])
    assert "warm_start" not in trials[3].user_attrs


def test_of_another_budget_all_but_the_architecture_is_taken_over(tmp_path: Path) -> None:
    """The lists differ: rate and dropout are those of the best, the architecture is drawn from the study's own."""
    file, wider = tmp_path / "study.db", [{"d_model": d} for d in (1000, 2000)]
    best = run_some(file, 1)
    store, study = opened(file, 1, budget="20M", architectures=wider)
    assert study.waiting == 3
    asked = [ask(store, "s_20M_h1").params for _ in range(3)]
    assert [(p["rate"], p["dropout"]) for p in asked] == [(p["rate"], p["dropout"]) for p in best]
    assert {p["d_model"] for p in asked} <= {1000, 2000}


@pytest.mark.parametrize("why", ["other data", "other space", "too few", "still running", "off"])
def test_nothing_is_taken_over_that_would_mean_another_thing(tmp_path: Path, why: str) -> None:
    """Other data or search space, too few trials, a study that still runs: no sibling. And 0 switches it off."""
    file = tmp_path / "study.db"
    run_some(file, 1, trials=9 if why == "too few" else 12)
    if why == "still running":
        ask(opened(file, 1, warm=0)[0], "s_2M_h1")
    contexts: dict[str, dict[str, Any]] = {
        "other data": {"data": "weekly.csv"},
        "other space": {"training_search_space": {}},
    }
    _, study = opened(file, 3, warm=0 if why == "off" else 3, **contexts.get(why, {}))
    assert (study.waiting, list(study.notes)) == (0, [])


def test_it_happens_once(tmp_path: Path) -> None:
    """A restart, a second driver and a study that has begun already queue nothing more."""
    file = tmp_path / "study.db"
    run_some(file, 1)
    store, _ = opened(file, 3)
    ask(store, "s_2M_h3")
    _, again = opened(file, 3)
    assert (again.waiting, list(again.notes)) == (2, [])
    begun, _ = opened(file, 5, warm=0)
    ask(begun, "s_2M_h5")
    assert opened(file, 5)[1].waiting == 0

"""What the search promises: it learns from what has ended, sees what runs, and keeps away from what does not fit.

Through the study store on a real database and through the command with real processes, on a function whose lowest
value is known. How good the search is beside plain Optuna is `tests/benchmarks/search.py`'s to say.
"""

from __future__ import annotations

import math
import os
import sqlite3
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import optuna
import pytest
import yaml
from optuna.trial import TrialState

from scheduler.model import AskTrial, AttemptId, EnqueueRetry, FinalState, StudySpec, TellTrial, TrialAsked
from scheduler.study.ask import make_sampler
from scheduler.study.grid_sampler import GridSampler
from scheduler.study.store import Functions, StudyStore
from tests import bowl

PROJECT = Path(__file__).resolve().parent.parent
STUDY = "bowl_2M_h1"
INDEXED = [{"architecture": index, **candidate} for index, candidate in enumerate(bowl.ARCHITECTURES)]
STARTUP = 10  # trials before Optuna's TPE leaves random sampling


def opened(file: Path, *, seed: int = 0, owner: str = "driver", run: str = "run", **settings: Any) -> StudyStore:
    """A store with the bowl's study open."""
    functions = settings.pop("functions", Functions(sample=bowl.sample, estimate=bowl.estimate))
    candidates = settings.pop("candidates", bowl.ARCHITECTURES)
    store = StudyStore(f"sqlite:///{file}", owner=owner, run=run, functions=functions, seed=seed, **settings)
    store.open(StudySpec(name=STUDY, quota=200, slots=1), candidates)
    return store


def ask(store: StudyStore, limit: int = 2**40) -> TrialAsked:
    """Ask, and insist on a trial."""
    asked = store.ask(AskTrial(study=STUDY, limit_bytes=limit))
    assert isinstance(asked, TrialAsked)
    return asked


def complete(store: StudyStore, asked: TrialAsked) -> float:
    """Tell the bowl's value."""
    value = bowl.value(asked.params)
    store.tell(TellTrial(trial=asked.trial, state=FinalState.COMPLETE, value=value))
    return value


def play(store: StudyStore, trials: int, parallel: int = 1) -> list[float]:
    """Run so many trials, `parallel` at once, the oldest ending first; their values in the order of asking."""
    running: list[TrialAsked] = []
    values = []
    for _ in range(trials):
        running.append(ask(store))
        if len(running) == parallel:
            values.append(complete(store, running.pop(0)))
    return values + [complete(store, asked) for asked in running]


def learns(values: Sequence[float]) -> bool:
    """Whether the mean of the last third is at most half of the first third's."""
    third = len(values) // 3
    return mean(values[-third:]) <= mean(values[:third]) / 2


def trials_in(file: Path) -> list[optuna.trial.FrozenTrial]:
    """The trials as Optuna itself reads them."""
    return optuna.load_study(study_name=STUDY, storage=f"sqlite:///{file}").trials


def at_random(number: int, seed: int = 0) -> dict[str, Any]:
    """What random search proposes as trial `number` of this seed."""
    number_seed = zlib.crc32(f"{seed}/{STUDY}/{number}".encode())
    sampler = GridSampler(optuna.samplers.RandomSampler(seed=number_seed), INDEXED, seed=number_seed)
    trial = optuna.create_study(sampler=sampler).ask()
    bowl.sample(trial, {}, bowl.ARCHITECTURES, None)
    return trial.params


def test_after_the_startup_trials_no_proposal_is_random_search(tmp_path: Path) -> None:
    """The first ten are what random search draws; none after them is, and each carries what TPE drew jointly."""
    play(opened(tmp_path / "study.db"), 25)
    trials = trials_in(tmp_path / "study.db")
    assert [t.number for t in trials if t.params == at_random(t.number)] == list(range(STARTUP))
    relative = [t.number for t in trials if any("relative_params" in key for key in t.system_attrs)]
    assert relative == list(range(STARTUP, 25))


@pytest.mark.parametrize("parallel", [1, 2, 8])
def test_it_learns(tmp_path: Path, parallel: int) -> None:
    """The mean of the last third of 45 trials is at most half of the first third's, so many at once."""
    assert learns(play(opened(tmp_path / "study.db", seed=parallel), 45, parallel))


def test_it_learns_across_restarts_and_two_drivers(tmp_path: Path) -> None:
    """Nothing that is learnt is lost by a new process, or kept from the other driver of the same study."""
    file = tmp_path / "study.db"
    values = []
    for start in range(3):
        stores = [opened(file, owner=f"{run}.{start}", run=run) for run in ("run1", "run2")]
        for _ in range(8):
            asked = [ask(store) for store in stores]
            values += [complete(store, trial) for store, trial in zip(stores, asked, strict=True)]
        for store in stores:
            store.close()
    assert learns(values)


# -- what the sampler sees ---------------------------------------------------------------------------------------------


def optunas_own_proposal(file: Path, number: int, seed: int = 0) -> dict[str, Any]:
    """What plain Optuna asks next on a copy of the database, with the sampler and the seed that the store would use."""
    copy = file.with_suffix(".copy.db")
    with sqlite3.connect(file) as source, sqlite3.connect(copy) as target:
        source.backup(target)
    sampler = make_sampler(zlib.crc32(f"{seed}/{STUDY}/{number}".encode()), INDEXED)
    trial = optuna.load_study(study_name=STUDY, storage=f"sqlite:///{copy}", sampler=sampler).ask()
    bowl.sample(trial, {}, bowl.ARCHITECTURES, None)
    assert trial.number == number
    return trial.params


def tell(store: StudyStore, asked: TrialAsked, state: FinalState, value: float | None = None, **more: Any) -> None:
    """A final state."""
    store.tell(TellTrial(trial=asked.trial, state=state, value=value, **more))


def everything(store: StudyStore, other: StudyStore) -> None:
    """Trials of all kinds in one study, by two drivers: complete, failed, pruned with and without reports, killed for
    memory, retried, running."""
    for n in range(14):
        complete(other if n % 3 else store, ask(other if n % 3 else store))
    for n in range(4):
        asked = ask(store)
        store.report(AttemptId(asked.trial, 1), {step: bowl.value(asked.params) + 1 / step for step in range(1, 2 + n)})
        tell(store, asked, FinalState.PRUNED)
    tell(other, ask(other), FinalState.PRUNED)
    tell(store, ask(store), FinalState.PRUNED, constraint=0.5)
    tell(store, ask(store), FinalState.FAIL)
    lost = ask(store)
    store.enqueue_retry(EnqueueRetry(trial=lost.trial, attempt=2, resume_from=None, reason="lost"))
    assert ask(store).params == lost.params  # runs again
    ask(store)
    ask(other)


@pytest.mark.parametrize("pruner", ["median", "hyperband"])
def test_a_proposal_is_the_one_that_optuna_would_make(tmp_path: Path, pruner: str) -> None:
    """Whatever has happened in a study, by whatever driver, the next proposal is what plain Optuna asks there."""
    file = tmp_path / "study.db"
    store, other = (opened(file, owner=run, run=run, pruner=pruner) for run in ("run1", "run2"))
    everything(store, other)
    for asking in (store, other, opened(file, owner="again", run="run1", pruner=pruner)):
        number = len(trials_in(file))
        expected = optunas_own_proposal(file, number) if pruner == "median" else None
        asked = ask(asking)
        proposed = trials_in(file)[number]
        assert asked.trial.number == number
        assert expected in (None, proposed.params)
        assert any("relative_params" in key for key in proposed.system_attrs)


def test_a_trial_that_optuna_enqueued_is_run_first_with_its_parameters(tmp_path: Path) -> None:
    """WAITING means to be run next, whoever put it there; what it leaves open is sampled."""
    file = tmp_path / "study.db"
    store = opened(file)
    study = optuna.load_study(study_name=STUDY, storage=f"sqlite:///{file}")
    study.enqueue_trial({"architecture": 3, "rate": 0.05})
    study.enqueue_trial({"architecture": 4})
    first, second, third = (ask(store) for _ in range(3))
    assert (first.params["architecture"], first.params["rate"], second.params["architecture"]) == (3, 0.05, 4)
    assert [t.state for t in study.trials] == [TrialState.RUNNING] * 3 and third.trial.number == 2


def test_eight_that_run_at_once_are_not_one_proposal_eight_times(tmp_path: Path) -> None:
    """Running trials are kept away from: eight asked without a result in between differ more than a seed would make."""
    store = opened(tmp_path / "study.db")
    play(store, 30)
    asked = [ask(store).params for _ in range(8)]
    assert len({round(math.log10(params["rate"]), 1) for params in asked}) >= 5
    assert len({params["architecture"] for params in asked}) >= 4


def infeasible_share(params: Sequence[Any]) -> float:
    """The part of these proposals whose width is one of the upper half, which the tests forbid."""
    return float(mean(p["width"] >= 10 for p in params))


@pytest.mark.parametrize("how", ["misfit", "killed"])
def test_constraints_lower_the_share_of_infeasible_proposals(tmp_path: Path, how: str) -> None:
    """The upper half, where the best lies, does not fit or is killed for memory; there is no list that would say so.
    Random search proposes half of its trials there, TPE that is told nothing (FAIL) nine in ten; told constraints,
    under 0.4."""
    shares = []
    for seed in range(2):
        fits = Functions(sample=bowl.sample_what_fits, micro_batch=bowl.lower_half, estimate=bowl.estimate)
        functions = fits if how == "misfit" else Functions(sample=bowl.sample_width, estimate=bowl.estimate)
        file = tmp_path / f"{seed}.db"
        store = opened(file, seed=seed, functions=functions, candidates=())
        for _ in range(35):
            asked = ask(store)
            if infeasible_share([asked.params]):
                tell(store, asked, FinalState.PRUNED, constraint=0.5)
            else:
                complete(store, asked)
        trials = trials_in(file)
        infeasible = [infeasible_share([t.params]) for t in trials]
        assert [max(t.constraints.values(), default=0) > 0 for t in trials] == infeasible
        shares.append(mean(infeasible[-20:]))
    assert mean(shares) < 0.4


# -- a real run --------------------------------------------------------------------------------------------------------


def schedule(folder: Path, slots: int, trials: int = 45, trial_s: float = 0.0, **settings: Any) -> Path:
    """Run the bowl's study through the command, from start to end; its database. trial_s: what a trial lasts."""
    settings = {"name": "bowl", "budgets": ["2M"], "horizons": [1], "trials": trials, "threads": 1, "slots": slots,
                "dashboard": "off", "training": bowl.FUNCTIONS, **settings}  # fmt: skip
    (folder / "host").mkdir(exist_ok=True)
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    done = subprocess.run(
        [sys.executable, "-m", "scheduler", "--config", folder / "settings.yaml", "--runs-dir", folder / "runs"],
        cwd=PROJECT,
        env={**os.environ, "HEADROOM_HOST_DIR": str(folder / "host"), "BOWL_TRIAL_S": str(trial_s)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "bowl" / "study.db"


def most_at_once(trials: Sequence[optuna.trial.FrozenTrial]) -> int:
    """How many were RUNNING together, at the start of some trial."""
    spans = [(t.datetime_start, t.datetime_complete) for t in trials if t.datetime_start and t.datetime_complete]
    return max(sum(start <= at < end for start, end in spans) for at, _ in spans)


@pytest.mark.parametrize(("slots", "trial_s"), [(1, 0.0), (2, 0.1), (8, 0.6)])
def test_a_run_of_the_command_learns(tmp_path: Path, slots: int, trial_s: float) -> None:
    """One driver, never restarted: the mean of the last third is at most half of the first third's."""
    trials = trials_in(schedule(tmp_path, slots, trial_s=trial_s))
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 45
    assert learns([t.value for t in trials if t.value is not None])
    assert most_at_once(trials) > slots / 2, "the trials did run together"
    relative = [t.number for t in trials if any("relative_params" in key for key in t.system_attrs)]
    assert relative == list(range(relative[0], 45)), "once TPE has taken over, it draws every trial"
    assert STARTUP <= relative[0] <= STARTUP + slots + 1

"""`optimize(study, objective)`: scripts as users write them, without a guard, beside what `study.optimize` does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest

from scheduler import optimize
from scheduler.model import UsageError

pytestmark = pytest.mark.timeout(800)  # whole runs, on a machine that may be busy
ROOT = Path(__file__).parent.parent
HEAD = """
import json, optuna, sys
from scheduler import ObjectiveFailed, optimize
OFFSET = 3

def tell(**found):
    print("FOUND " + json.dumps(found))

def objective(trial):
    x = trial.suggest_float("x", -10, 10)
    trial.set_user_attr("process", __import__("os").getpid())
    return (x - OFFSET) ** 2
"""


def run(folder: Path, script: str, *, code: int = 0) -> dict[str, Any]:
    """Run a script in an empty folder; what it told."""
    (folder / "script.py").write_text(HEAD + script)
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    found: dict[str, Any] = json.loads(said[-1].removeprefix("FOUND ")) if said else {"stderr": done.stderr}
    return found


def test_a_script_without_a_guard_runs_its_function_on_a_study_in_memory(tmp_path: Path) -> None:
    """A lambda, a closure over a global, the study's sampler and its queue; every trial in a process of its own."""
    found = run(
        tmp_path,
        """
study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
study.enqueue_trial({"x": 3.0})
assert optimize(study, lambda trial: objective(trial), n_trials=6, n_jobs=2) is None
level = optuna.logging.get_verbosity()
import os
tell(best=study.best_value, states=[t.state.name for t in study.trials], first=study.trials[0].params["x"],
     processes=len({t.user_attrs["process"] for t in study.trials} - {os.getpid()}), level=level,
     drawn=sorted(t.params["x"] for t in study.trials[1:]))
""",
    )
    assert found["states"] == ["COMPLETE"] * 6 and found["best"] == 0.0 and found["first"] == 3.0
    assert found["processes"] == 6
    assert found["level"] == optuna.logging.INFO  # as it was
    plain = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    plain.enqueue_trial({"x": 3.0})
    plain.optimize(lambda trial: trial.suggest_float("x", -10, 10), n_trials=6)
    assert found["drawn"] == sorted(trial.params["x"] for trial in plain.trials[1:])


def test_a_function_of_a_module_beside_the_script_is_found_wherever_it_is_started(tmp_path: Path) -> None:
    """It travels by name; a trial looks where the caller has found it. One that is nowhere is told before the start."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "helper.py").write_text("def objective(trial):\n    return trial.suggest_float('x', 0, 1)\n")
    found = run(
        tmp_path,
        """
sys.path.insert(0, "scripts")
import helper, os
study = optuna.create_study()
optimize(study, helper.objective, n_trials=2, n_jobs=1)
os.rename("scripts/helper.py", "scripts/gone.py")
from scheduler.model import UsageError
try:
    optimize(study, helper.objective, n_trials=2, n_jobs=1)
except UsageError as error:
    said = str(error)
tell(states=[t.state.name for t in study.trials], said=said)
""",
    )
    assert found["states"] == ["COMPLETE"] * 2
    assert "No module named 'helper'" in found["said"] and "\n" not in found["said"]


def test_a_script_on_stdin_runs_an_object_that_can_be_called(tmp_path: Path) -> None:
    """`python -`: there is no file that a worker could run again; the object travels with what it holds."""
    script = """
class Mine:
    def __init__(self, data):
        self.data = data
    def __call__(self, trial):
        return sum(self.data) + objective(trial)
study = optuna.create_study()
optimize(study, Mine([1, 2]), n_trials=2, n_jobs=1)
tell(states=[t.state.name for t in study.trials], least=study.best_value)
"""
    done = subprocess.run(
        [sys.executable, "-"],
        input=HEAD + script,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (said,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    found = json.loads(said.removeprefix("FOUND "))
    assert found["states"] == ["COMPLETE"] * 2 and found["least"] >= 3


def test_trials_are_counted_from_where_the_study_is_in_its_database(tmp_path: Path) -> None:
    """Twice three are six, as with `study.optimize`; several values, callbacks with the study, `study.stop()`."""
    found = run(
        tmp_path,
        """
study = optuna.create_study(storage="sqlite:///mine.db", study_name="two", directions=["minimize", "maximize"])
both = lambda trial: (objective(trial), trial.suggest_int("n", 1, 9))
seen = []
def callback(study, trial):
    seen.append(trial.number)
    if trial.number == 7:
        study.stop()
optimize(study, both, n_trials=3, n_jobs=1)
optimize(study, both, n_trials=3, n_jobs=1, callbacks=[callback])
between = len(study.trials)
optimize(study, both, n_trials=50, n_jobs=1, callbacks=[callback])
tell(between=between, after=len(study.trials), seen=seen, front=len(study.best_trials),
     states=sorted({t.state.name for t in study.trials}))
""",
    )
    assert found["between"] == 6 and found["seen"][:3] == [3, 4, 5]
    assert 8 <= found["after"] <= 10 and len(found["seen"]) == found["after"] - 3  # one was drawn and waited
    assert found["states"] == ["COMPLETE"] and found["front"] >= 1


def test_an_error_ends_the_study_unless_it_is_to_be_caught(tmp_path: Path) -> None:
    """`catch` by class, also one of the script's own; anything else is raised with the trial's traceback."""
    found = run(
        tmp_path,
        """
class Odd(Exception):
    pass
def fails(trial):
    trial.suggest_categorical("k", [0, 1])
    if trial.number in (1, 2):
        raise Odd("no luck")
    return 1.0
study = optuna.create_study()
optimize(study, fails, n_trials=5, n_jobs=1, catch=(Odd,))
caught = [t.state.name for t in study.trials]
try:
    optimize(study, lambda trial: 1 / 0, n_trials=20, n_jobs=1)
except ObjectiveFailed as error:
    said = str(error)
tell(caught=caught, said=said, after=len(study.trials))
""",
    )
    assert len(found["caught"]) == 5 and "FAIL" in found["caught"]
    assert "ZeroDivisionError" in found["said"] and "script.py" in found["said"]
    assert found["after"] <= 7  # the one that failed, and one that was drawn and waited


def test_what_a_callback_raises_is_raised_and_a_timeout_ends_it_in_order(tmp_path: Path) -> None:
    """As `study.optimize`: what runs comes to its end first."""
    found = run(
        tmp_path,
        """
study = optuna.create_study()
def callback(study, trial):
    raise LookupError("mine")
try:
    optimize(study, objective, n_trials=30, n_jobs=1, callbacks=[callback])
except LookupError as error:
    said = str(error)
raised = len(study.trials)
optimize(study, objective, timeout=5, n_jobs=1)
tell(said=said, raised=raised, states=sorted({t.state.name for t in study.trials}), after=len(study.trials))
""",
    )
    assert found["said"] == "mine" and found["raised"] <= 3
    assert found["states"] == ["COMPLETE"] and found["after"] > found["raised"]


def test_a_function_that_names_a_module_which_is_imported_late_can_travel(tmp_path: Path) -> None:
    """`optuna.integration` is no plain module, nor are those of transformers; a lock is told as what cannot travel."""
    found = run(
        tmp_path,
        """
import threading
def late(trial):
    assert optuna.integration.__name__ == "optuna.integration"
    return objective(trial)
lock = threading.Lock()
def locked(trial):
    with lock:
        return objective(trial)
from scheduler.model import UsageError
study = optuna.create_study()
optuna.integration
optimize(study, late, n_trials=2, n_jobs=1)
try:
    optimize(study, locked, n_trials=2)
except UsageError as error:
    said = str(error)
tell(states=[t.state.name for t in study.trials], said=said)
""",
    )
    assert found["states"] == ["COMPLETE"] * 2
    assert "objective cannot be pickled" in found["said"] and "lock" in found["said"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"objective": 3}, "function of a trial"),
        ({"objective": lambda: 0}, "one argument"),
        ({"n_trials": 0}, "n_trials=0"),
        ({"n_jobs": "all"}, "n_jobs='all'"),
        ({"threads": 1.5}, "threads=1.5"),
        ({"timeout": -1}, "timeout=-1"),
        ({"memory": "lots"}, "lots"),
        ({"memory_budget": "900%"}, "900%"),
        ({"cluster": "host:1"}, "host:1"),
        ({"memory": "900TiB"}, "more than any worker has"),
    ],
)
def test_a_wrong_argument_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: dict[str, Any], said: str
) -> None:
    """UsageError with the value; the study is as it was."""
    monkeypatch.chdir(tmp_path)
    study = optuna.create_study()
    given = {"objective": lambda trial: 0.0, "n_trials": 1, **words}
    with pytest.raises(UsageError, match=said):
        optimize(study, given.pop("objective"), **given)
    assert study.trials == [] and study.user_attrs == {}


def test_the_report_of_a_study_in_memory_says_where_its_study_was(tmp_path: Path) -> None:
    """Nothing is said to be missing that never was there, and no setting of the built-in training is shown."""
    run(tmp_path, 'study = optuna.create_study(study_name="mine")\noptimize(study, objective, n_trials=2)\ntell()\n')
    text = (tmp_path / "runs" / "mine" / "report.html").read_text()
    assert "the study was in the memory of the program that called optimize()" in text
    assert "its objective is a function of a program" in text
    assert "could not be read" not in text
    kept = (tmp_path / "runs" / "mine" / "settings.yaml").read_text()
    for key in ("training_search_space", "budgets", "horizons", "early_stopping", "warm_start"):
        assert key not in text and f"\n{key}:" not in kept

"""Somebody's objective on a Dask cluster that was started by hand: by its file, by its module, and as a function."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

from tests import optuna_objectives
from tests.faults.sandbox import Sandbox

pytestmark = pytest.mark.timeout(900)  # whole commands, on a machine that may be busy
FILE = Path(optuna_objectives.__file__)
COMPLETE = optuna.trial.TrialState.COMPLETE


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Sandbox, str]]:
    """A scheduler and a worker with two threads; its address."""
    with Sandbox(tmp_path_factory.mktemp("cluster")) as box:
        yield box, box.start_cluster()[0]


def started(box: Sandbox, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a Python command line in a folder of its own, to its end."""
    environment = {**box.environment, "PYTHONPATH": str(FILE.parent.parent)}
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("function", "directions"),
    [(f"{FILE}:quadratic", ["minimize"]), ("tests.optuna_objectives:two_objectives", ["minimize", "maximize"])],
)
def test_an_objective_runs_on_the_workers(
    cluster: tuple[Sandbox, str], tmp_path: Path, function: str, directions: list[str]
) -> None:
    """A file by its path, a module by its name; the study is here, the trials are there."""
    box, address = cluster
    flags = [flag for direction in directions for flag in ("--direction", direction)]
    words = ["-m", "scheduler", "--objective", function, *flags, "--cluster", address, "--trials", "5", "--name", "run"]
    done = started(box, tmp_path, *words)
    assert done.returncode == 0, done.stderr
    study = optuna.load_study(study_name="run", storage=f"sqlite:///{tmp_path / 'runs' / 'run' / 'study.db'}")
    assert [trial.state for trial in study.trials] == [COMPLETE] * 5
    assert (tmp_path / "runs" / "run" / "best" / "run.json").exists()


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (f"{FILE}:qadratic", "did you mean 'quadratic'"),
        ("nowhere.py:objective", "no file"),
        ("tests.optuna_objectives:needs_two", "must take one argument"),
    ],
)
def test_what_no_worker_can_import_is_one_line_before_anything_starts(
    cluster: tuple[Sandbox, str], tmp_path: Path, function: str, said: str
) -> None:
    """What counts is what the workers have; nothing is written."""
    box, address = cluster
    done = started(box, tmp_path, "-m", "scheduler", "--objective", function, "--cluster", address)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("headroom: --objective:") and said in line and address in line
    assert list(tmp_path.iterdir()) == []


SCRIPT = """
import json, optuna, sys
from scheduler import optimize
SHIFT, TABLE = 4, bytes(200_000)  # longer than an argument may be

def objective(trial):
    assert len(TABLE) == 200_000
    return (trial.suggest_float("x", 0, 9) - SHIFT) ** 2

study = optuna.create_study()
seen = []
optimize(study, objective, n_trials=4, cluster=sys.argv[1], callbacks=[lambda study, trial: seen.append(trial.number)])
print("FOUND " + json.dumps([[t.state.name, t.value == (t.params["x"] - 4) ** 2] for t in study.trials] + sorted(seen)))
"""


def test_a_function_of_a_script_travels_to_the_workers(cluster: tuple[Sandbox, str], tmp_path: Path) -> None:
    """With its globals, from a script without a guard; the study stays in the script's memory, its callbacks too."""
    box, address = cluster
    (tmp_path / "script.py").write_text(SCRIPT)
    done = started(box, tmp_path, "script.py", address)
    assert done.returncode == 0, done.stderr
    (found,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert json.loads(found.removeprefix("FOUND ")) == [["COMPLETE", True]] * 4 + [0, 1, 2, 3]

"""Somebody else's objective, unchanged: the whole command beside `study.optimize`, read back by plain Optuna."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
import pytest

from scheduler.driver import journal
from tests import optuna_objectives
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(800)  # whole commands, on a machine that may be busy
FILE = Path(optuna_objectives.__file__)
OWN = f"{optuna_objectives.__name__}:"
States = optuna.trial.TrialState
Direction = Literal["minimize", "maximize"]


@dataclass(frozen=True)
class Done:
    """A run of the command: what it said, and its study as Optuna reads it."""

    folder: Path
    code: int
    stdout: str
    stderr: str

    @property
    def study(self) -> optuna.Study:
        """The one study of the run's database."""
        url = f"sqlite:///{self.folder / 'run' / 'study.db'}"
        (name,) = optuna.get_all_study_names(url)
        return optuna.load_study(study_name=name, storage=url)

    def events(self, event: str) -> list[dict[str, Any]]:
        """The journal's lines of one kind."""
        return [line for line in journal.read(self.folder / "run" / "journal.jsonl") if line["event"] == event]


def command(folder: Path, objective: str, *arguments: str) -> list[str]:
    """The command for one of the objectives, or any other function."""
    function = objective if ":" in objective else f"{FILE}:{objective}"
    base = [sys.executable, "-m", "scheduler", "--objective", function, "--dashboard", "off"]
    return [*base, "--runs-dir", str(folder), "--name", "run", *arguments]


def schedule(folder: Path, objective: str, *arguments: str) -> Done:
    """Run an objective to its end, from a folder that is not the project's."""
    done = subprocess.run(
        command(folder, objective, *arguments),
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=360,
        check=False,
    )
    return Done(folder, done.returncode, done.stdout, done.stderr)


def environment() -> dict[str, str]:
    """Ours, and where our own modules are, since these are not installed."""
    return {**os.environ, "PYTHONPATH": str(FILE.parent.parent)}


def optimized(
    objective: str, directions: Sequence[Direction], like: Sequence[optuna.trial.FrozenTrial]
) -> optuna.Study:
    """What `study.optimize` makes of the same parameters in the same order."""
    study = optuna.create_study(directions=list(directions), sampler=optuna.samplers.RandomSampler(seed=0))
    for trial in like:
        study.enqueue_trial(trial.params)
    study.optimize(getattr(optuna_objectives, objective), n_trials=len(like), catch=(Exception,))
    return study


@pytest.mark.timeout(400)  # each trial imports torch anew, several seconds on a loaded machine
@pytest.mark.parametrize(
    ("objective", "directions", "trials"),
    [
        ("quadratic", ["minimize"], 8),
        ("conditional", ["minimize"], 14),
        ("two_objectives", ["minimize", "maximize"], 6),
        ("pruned", ["maximize"], 14),
        ("own_names", ["minimize"], 3),
        ("fails", ["minimize"], 12),
        ("torch_net", ["maximize"], 9),
    ],
)
def test_an_unchanged_objective_gives_what_study_optimize_gives(
    tmp_path: Path, objective: str, directions: list[Direction], trials: int
) -> None:
    """One after the other: same parameters, then same states, values, reports and attributes; nothing is left over."""
    flags = [flag for direction in directions for flag in ("--direction", direction)]
    extra = ["--config", str(tolerant(tmp_path))] if objective == "fails" else []
    done = schedule(tmp_path, objective, *flags, "--slots", "1", "--trials", str(trials), *extra)
    assert done.code == 0, done.stderr
    ours = done.study.trials
    theirs = optimized(objective, directions, ours).trials
    assert [t.state for t in ours] == [t.state for t in theirs]
    assert {t.state for t in ours} <= {States.COMPLETE, States.PRUNED, States.FAIL}
    assert [t.values for t in ours] == [t.values for t in theirs]
    assert [t.intermediate_values for t in ours] == [t.intermediate_values for t in theirs]
    assert [t.distributions for t in ours] == [t.distributions for t in theirs]
    for mine, plain in zip(ours, theirs, strict=True):
        assert plain.user_attrs.items() <= mine.user_attrs.items()
    if objective == "fails":
        failed = [t.user_attrs["error"] for t in ours if t.params["x"] == "raises"]
        assert failed and all("singular matrix" in said for said in failed)
    if objective == "pruned":
        assert States.PRUNED in {t.state for t in ours}


def tolerant(folder: Path) -> Path:
    """A configuration under which a study with many failures goes on."""
    path = folder / "tolerant.yaml"
    path.write_text("max_consecutive_failures: 1000\n")
    return path


def test_artifacts_and_scores_of_a_cross_validation_are_in_the_study(tmp_path: Path) -> None:
    """What Optuna's own functions keep of a running trial, read back by them."""
    done = schedule(tmp_path, "keeps_an_artifact", "--slots", "1", "--trials", "2")
    assert done.code == 0, done.stderr
    study = done.study
    store = optuna.artifacts.FileSystemArtifactStore(tmp_path / "artifacts")
    for trial in study.trials:
        (kept,) = optuna.artifacts.get_all_artifact_meta(trial, storage=study._storage)
        assert kept.artifact_id == trial.user_attrs["artifact"]
        with store.open_reader(kept.artifact_id) as file:
            assert float(file.read()) == trial.params["x"]
        assert trial.user_attrs["count"] == {"n": 3}
        assert trial.system_attrs["terminator:cv_scores"] == [trial.value, trial.params["x"] + 0.5]


def test_what_trials_before_it_asked_is_known_before_a_trial_starts(tmp_path: Path) -> None:
    """Also in branches and loops: parameters are in the line of the launch, and the size follows from them."""
    done = schedule(tmp_path, "conditional", "--slots", "1", "--trials", "25", "--sampler", "random")
    assert done.code == 0, done.stderr
    asked = {line["trial"]: line["params"] for line in done.events("trial.asked")}
    study = done.study
    whole = [t for t in study.trials if asked[f"run/{t.number}"] == t.params]
    assert asked["run/0"] == {}  # nobody has asked anything yet
    assert len([t for t in whole if t.number >= 10]) >= 12
    sources = [line["source"] for line in done.events("attempt.launched")]
    assert sources[0] == "unknown" and set(sources[1:]) == {"learnt"}


def test_a_trial_that_goes_another_way_is_answered(tmp_path: Path) -> None:
    """What was sent ahead and not asked for is in no trial of the study."""
    done = schedule(tmp_path, "leaves_the_beaten_track", "--slots", "2", "--trials", "8")
    assert done.code == 0, done.stderr
    for trial in done.study.trials:
        other = f"only_in_{trial.number}" if trial.number % 2 else "y"
        assert set(trial.params) == {"x", other}
        assert trial.value == trial.params["x"] + trial.params[other]


def test_a_trial_sees_itself_and_its_study_and_can_stop_it(tmp_path: Path) -> None:
    """`study.stop()` lets what runs end, and the command is done: exit code 0, no trial left over."""
    done = schedule(tmp_path, "looks_around", "--slots", "1", "--trials", "50", "--study", "mine")
    assert done.code == 0, done.stderr
    trials = done.study.trials
    assert 2 <= len(trials) <= 3 and all(t.state is States.COMPLETE for t in trials)
    assert [t.user_attrs["names"] for t in trials] == [{"study": "mine", "number": t.number} for t in trials]


def test_what_was_enqueued_runs_first_in_a_database_of_ones_own(tmp_path: Path) -> None:
    """A study made by plain Optuna, with a queue and trials of its own, goes on from there."""
    url = f"sqlite:///{tmp_path / 'mine.db'}"
    study = optuna.create_study(study_name="theirs", storage=url)
    study.optimize(optuna_objectives.quadratic, n_trials=3)
    study.enqueue_trial({"x": 2.5}, user_attrs={"why": "a hunch"})
    done = schedule(tmp_path, "quadratic", "--storage", url, "--study", "theirs", "--trials", "6", "--slots", "1")
    assert done.code == 0, done.stderr
    trials = optuna.load_study(study_name="theirs", storage=url).trials
    assert [t.state for t in trials] == [States.COMPLETE] * 6
    assert trials[3].params == {"x": 2.5} and trials[3].value == 0.25 and trials[3].user_attrs["why"] == "a hunch"


@pytest.mark.parametrize("objective", ["slow_reports", "goes_on"])
def test_an_interrupted_trial_is_taken_up_again_with_the_same_parameters(tmp_path: Path, objective: str) -> None:
    """Asked to leave, it does so at its next report; the same command runs it again, from its checkpoint."""
    arguments = (objective, "--slots", "1", "--trials", "1")
    driver = subprocess.Popen(
        command(tmp_path, *arguments), cwd=tmp_path, env=environment(), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    lines = tmp_path / "run" / "journal.jsonl"
    wait_until(lambda: lines.exists() and '"attempt.progress"' in lines.read_text(), "an epoch is reported", 120)
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(120) == 130
    assert driver.stderr is not None
    driver.stderr.close()
    done = schedule(tmp_path, *arguments)
    assert done.code == 0, done.stderr
    first, again = done.study.trials
    assert (first.state, again.state) == (States.FAIL, States.COMPLETE)
    assert again.params == first.params and again.value == again.params["x"]
    if objective == "goes_on":
        assert first.user_attrs["first"] == 0 and again.user_attrs["first"] > 0
        assert sorted(again.intermediate_values) == list(range(20))


def test_the_attempt_is_nothing_outside_of_headroom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same function under `study.optimize`."""
    monkeypatch.chdir(tmp_path)
    study = optuna.create_study()
    study.optimize(optuna_objectives.goes_on, n_trials=2)
    assert [t.user_attrs["first"] for t in study.trials] == [0, 0]


def test_an_answer_takes_no_longer_than_its_way(tmp_path: Path) -> None:
    """A suggest that nobody could foresee: through agent, worker and driver to the study and back, beside a word that
    is handed round meanwhile between processes that do about as much. Whoever waits for a clock on the way (every
    50 ms: 6 times) is found out, whatever else the machine has to do."""
    done = schedule(tmp_path, "asks_often", "--slots", "1", "--trials", "3", "--sampler", "random")
    assert done.code == 0, done.stderr
    asked = [t.user_attrs for t in done.study.trials]
    # The quickest of each: 1.7 to 2.2 times, also with a load of 8 a core, where half of all waited for a processor.
    quickest = [(attrs["answers_ms"][0], attrs["rounds_ms"][0]) for attrs in asked]
    assert min(answer / round_ for answer, round_ in quickest) < 4, quickest


def test_sampler_pruner_and_size_of_ones_own(tmp_path: Path) -> None:
    """Functions by path; a given size is what is reserved."""
    flags = ["--sampler", OWN + "random_seeded", "--memory", OWN + "sized", "--pruner", "none"]
    done = schedule(tmp_path, "quadratic", "--slots", "1", "--trials", "4", *flags)
    assert done.code == 0, done.stderr
    theirs = optuna.create_study(sampler=optuna_objectives.random_seeded())
    theirs.optimize(optuna_objectives.quadratic, n_trials=4)
    drawn = sorted(t.params["x"] for t in done.study.trials)  # one that waits is drawn before one that has just begun
    assert drawn == sorted(t.params["x"] for t in theirs.trials)
    launched = done.events("attempt.launched")
    known = [line for line in launched if line["source"] == "given"]
    assert len(known) >= 2
    for line in known:
        x = done.study.trials[int(line["attempt"].split("/")[1])].params["x"]
        assert line["reserved_bytes"] == (100 + int(x)) * 2**20


TRAIN = """
import argparse
parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float)
parser.add_argument("--depth", type=int)
given = parser.parse_args()
for epoch in range(3):
    print(f"epoch {epoch} val_loss={given.lr * given.depth + 2 - epoch}")
if given.depth == 4:
    raise SystemExit("depth 4 is too deep")
"""
SPACE = "lr: {type: log_uniform, low: 1.0e-3, high: 1.0}\ndepth: {type: int, low: 1, high: 4}\n"


def test_a_script_is_enough(tmp_path: Path) -> None:
    """Each match is a report, the last the value; another exit status than 0 is a failure with the last line."""
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "space.yaml").write_text(SPACE)
    line = f"{sys.executable} train.py --lr {{lr}} --depth={{depth}}"
    words = ["--command", line, "--space", "space.yaml", "--metric", "val_loss=([0-9.eE+-]+)", "--pruner", "none"]
    base = [sys.executable, "-m", "scheduler", "--runs-dir", str(tmp_path), "--name", "run", "--dashboard", "off"]
    more = ["--trials", "12", "--slots", "1", "--sampler", "random", "--config", str(tolerant(tmp_path))]
    done = subprocess.run(
        [*base, *words, *more],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=360,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    trials = Done(tmp_path, 0, "", "").study.trials
    assert {t.state for t in trials} == {States.COMPLETE, States.FAIL}
    for trial in trials:
        value = trial.params["lr"] * trial.params["depth"]
        assert list(trial.params) == ["lr", "depth"]  # asked in the order of the file
        assert list(trial.intermediate_values) == [0, 1, 2]
        if trial.params["depth"] == 4:
            assert trial.state is States.FAIL and "depth 4 is too deep" in trial.user_attrs["error"]
        else:
            assert trial.value == pytest.approx(value)
    wrong = {"{lr}": "--command needs --space", "{rl}": "has {rl}"}
    for place, said in wrong.items():
        flags = [] if place == "{lr}" else ["--space", "space.yaml", "--metric", "(x)"]
        failed = subprocess.run(
            [*base, "--command", f"python {place}", *flags],
            cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert failed.returncode == 2 and said in failed.stderr, failed.stderr


def test_the_examples_of_the_readme_run_as_they_stand(tmp_path: Path) -> None:
    """Each file under "Your own Optuna objective" is written, each command given, in order, in an empty folder."""
    section = (FILE.parent.parent / "README.md").read_text().split("## Your own Optuna objective")[1].split("\n## ")[0]
    for name, source in re.findall(r"This file is `(\S+)`:\n\n```\w+\n(.*?)```", section, re.DOTALL):
        (tmp_path / name).write_text(source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["forest.py", "search.py", "space.yaml", "train.sh"]
    ours = [sys.executable, "-m", "scheduler", "--dashboard", "off"]
    starts = {"bin/schedule": ours, "python": [sys.executable]}
    said = []
    for command_line in re.findall(r"^\$ (.*)", section, re.MULTILINE):
        program, *words = shlex.split(command_line)
        done = subprocess.run(
            [*starts[program], *words],
            cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=360, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    objective, search, script = said
    assert "20/20" in objective and "best of forest-objective" in objective
    assert "10/10" in search and "'kind': " in search
    assert re.search(r"\d/10 ", script) and re.search(r"with lr=\d\S* depth=\d", script)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere.py:objective",), ["--objective", "no file", "nowhere.py"]),
        ((f"{FILE}:qadratic",), ["--objective", "qadratic", "did you mean 'quadratic'"]),
        ((f"{FILE}:not_a_function",), ["--objective", "int, not a function"]),
        ((f"{FILE}:needs_two",), ["--objective", "must take one argument, the trial", "data"]),
        (("quadratic",), ["--objective", "'quadratic'", "FILE.py:NAME"]),
        ((f"{FILE}:quadratic", "--sampler", "tpee"), ["--sampler", "'tpee'", "tpe, random"]),
        (
            (f"{FILE}:quadratic", "--sampler", "tests.optuna_objectives:not_a_sampler"),
            ["returned a str", "BaseSampler"],
        ),
        ((f"{FILE}:quadratic", "--pruner", "medain"), ["--pruner", "'medain'", "median, hyperband"]),
        ((f"{FILE}:quadratic", "--direction", "up"), ["--direction", "'up'", "minimize", "maximize"]),
        ((f"{FILE}:quadratic", "--memory", "lots"), ["--memory", "'lots'"]),
        ((f"{FILE}:quadratic", "--budgets", "2M"), ["--budgets", "leave it out with --objective"]),
        ((f"{FILE}:quadratic", "--metric", "(x)"), ["--metric goes with --command"]),
        ((f"{FILE}:quadratic", "--memory", "0"), ["--memory", "'0'", "more than 0"]),
        ((f"{FILE}:quadratic", "--memory-budget", "200%"), ["--memory-budget", "(default: 90%)"]),
        ((f"{FILE}:quadratic", "--trials", "0"), ["--trials", "0", "at least 1"]),
        ((f"{FILE}:quadratic", "--storage", "mine.db"), ["--storage", "mine.db", "sqlite:///"]),
    ],
)
def test_a_wrong_argument_is_one_line_and_leaves_nothing(
    tmp_path: Path, arguments: tuple[str, ...], words: list[str]
) -> None:
    """What, the value seen, what to do; exit code 2, no run folder."""
    function, *rest = arguments
    base = [sys.executable, "-m", "scheduler", "--objective", function, "--runs-dir", str(tmp_path / "runs")]
    done = subprocess.run(
        [*base, *rest], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert all(word in line for word in words), line
    assert list(tmp_path.iterdir()) == []


def test_directions_other_than_the_studys_are_refused_before_anything_starts(tmp_path: Path) -> None:
    """One line with what the study has; nothing is written, not even a run folder."""
    url = f"sqlite:///{tmp_path / 'mine.db'}"
    optuna.create_study(study_name="theirs", storage=url, direction="maximize")
    done = schedule(tmp_path / ".", "quadratic", "--storage", url, "--study", "theirs")
    assert done.code == 2
    assert "--direction maximize" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_the_plan_of_an_objective_shows_nothing_of_the_built_in_training(tmp_path: Path) -> None:
    """Name, trials, directions and what is known of its memory."""
    done = schedule(tmp_path, "quadratic", "--dry-run", "--memory", "1GiB", "--slots", "2")
    assert done.code == 0, done.stderr
    assert "1.00 GiB to 1.00 GiB" in done.stdout and "minimize" in done.stdout
    assert not any(word in done.stdout for word in ("d_model", "micro-batch", "never", "horizon"))
    assert not (tmp_path / "run").exists()


def test_a_name_that_is_needed_for_the_bookkeeping_is_refused_where_it_is_set(tmp_path: Path) -> None:
    """The trial fails with the line that says so, and nothing about whose it is has changed."""
    done = schedule(tmp_path, "takes_a_reserved_name", "--slots", "1", "--trials", "1")
    (trial,) = done.study.trials
    assert trial.state == States.FAIL
    assert "user attribute 'owner': Headroom keeps its own under this name" in trial.user_attrs["error"]
    assert trial.user_attrs["owner"] != "me"

"""The command from outside: real processes, a real LocalCluster, the real data set, a real database.

One small run is made once and looked at from all sides; a second one runs on a cluster that was started by hand.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest

from scheduler.driver import decisions, journal
from tests.waiting import free_port, wait_until
from training import load_model

ROOT = Path(__file__).parent.parent
ARGUMENTS = ["--horizons", "1", "--trials", "2", "--max-steps", "2", "--seed", "3"]


@dataclass(frozen=True)
class Run:
    """A finished run: what it left and what it said."""

    folder: Path
    returncode: int
    stdout: str
    stderr: str

    @property
    def records(self) -> list[dict[str, Any]]:
        """The journal's lines."""
        return list(journal.read(self.folder / "journal.jsonl"))

    def study(self, name: str) -> optuna.Study:
        """A study as Optuna itself opens it."""
        return optuna.load_study(study_name=name, storage=f"sqlite:///{self.folder / 'study.db'}")


def schedule(runs: Path, *arguments: str, timeout_s: float = 110) -> Run:
    """Run the command to its end with its own host registry."""
    done = subprocess.run(
        [sys.executable, "-m", "scheduler", *ARGUMENTS, "--runs-dir", str(runs), "--name", "run", *arguments],
        cwd=ROOT,
        env={**os.environ, "HEADROOM_HOST_DIR": str(runs / "host")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    return Run(runs / "run", done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """2M and 2B on this machine with less memory than 2B needs."""
    runs = tmp_path_factory.mktemp("runs")
    (runs / "host").mkdir()
    return schedule(runs, "--budgets", "2m,2B", "--memory-budget", "6GiB", "--dashboard", "127.0.0.1:0")


def test_ends_with_results_and_says_what_was_refused(run: Run) -> None:
    """The study that fits runs to its quota; the one that cannot is refused in one line; the exit code is 1."""
    assert run.returncode == 1, run.stderr
    refusal = next(line for line in run.stderr.splitlines() if "run_2B_h1 cannot run" in line)
    assert "GiB" in refusal
    assert "would help" in refusal
    assert "run_2M_h1" in run.stdout
    assert "2/2" in run.stdout


def test_study_holds_what_a_person_asks_of_it(run: Run) -> None:
    """Architecture, batch, footprint and duration are readable in the study, and so are the values per epoch."""
    trials = run.study("run_2M_h1").trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "COMPLETE"]
    for trial in trials:
        attrs = trial.user_attrs
        for key in ("d_model", "n_layers", "n_heads", "d_ff", "param_count", "micro_batch", "accumulation_steps"):
            assert isinstance(attrs[key], int), key
        assert abs(attrs["param_count"] - 2e6) <= 0.5e6
        assert attrs["micro_batch"] * attrs["accumulation_steps"] == 256
        assert 0 < attrs["footprint.observed_peak_bytes"] <= attrs["footprint.predicted_bytes"]
        assert attrs["duration_s"] > 0
        assert attrs["stop_reason"] == "max_steps"
        assert trial.intermediate_values == {1: pytest.approx(trial.value)}


def test_journal_tells_the_story_in_order(run: Run) -> None:
    """Per attempt: asked, launched, started, settled, ended, told; the canonical line has it all."""
    names = [r["event"] for r in run.records if "run_2M_h1/0" in str(r.get("trial", r.get("attempt", "")))]
    for earlier, later in [
        ("trial.asked", "attempt.launched"),
        ("attempt.launched", "attempt.started"),
        ("attempt.started", "attempt.progress"),
        ("attempt.progress", "attempt.ended"),
        ("attempt.ended", "trial.ended"),
        ("trial.ended", "trial.told"),
    ]:
        assert names.index(earlier) < names.index(later)
    ended = next(r for r in run.records if r["event"] == "attempt.ended")
    assert ended["reason"] == "completed"
    assert ended["peak_bytes"] <= ended["reserved_bytes"]
    assert ended["exit_status"] == 0
    assert ended["params"]["d_model"] > 0


def test_journal_and_database_agree(run: Run) -> None:
    """The final states the journal gives are those in the study."""
    study = run.study("run_2M_h1")
    assert decisions.final_states(run.records) == {
        f"run_2M_h1/{trial.number}": trial.state.name for trial in study.trials
    }


def test_run_folder_is_complete(run: Run) -> None:
    """Settings, results, the best trial, and a folder per attempt; only the best trial's checkpoint is kept."""
    assert (run.folder / "settings.yaml").read_text().count("memory_budget: 6GiB") == 1
    rows = list(csv.DictReader((run.folder / "results.csv").open()))
    assert [row["state"] for row in rows] == ["COMPLETE", "COMPLETE"]
    best = json.loads((run.folder / "best" / "run_2M_h1.json").read_text())
    assert best["value"] == pytest.approx(min(float(row["value"]) for row in rows))
    attempts = sorted(path.name for path in (run.folder / "attempts").iterdir())
    assert attempts == ["run_2M_h1.t0000.a1", "run_2M_h1.t0001.a1"]
    for name in attempts:
        files = {path.name for path in (run.folder / "attempts" / name).iterdir()}
        assert {"spec.json", "trial.log", "result.json"} <= files
        is_best = f"t{best['number']:04d}" in name
        assert ("checkpoint.safetensors" in files, "model.safetensors" in files) == (is_best, is_best)


def test_the_best_trials_model_can_be_taken_out(run: Run) -> None:
    """Its path is in best/<study>.json; loaded, it is the trial's, with the loss that the study has."""
    best = json.loads((run.folder / "best" / "run_2M_h1.json").read_text())
    model = load_model(best["model"])
    assert model.value == pytest.approx(best["value"]) and model.epoch == best["best_epoch"]
    assert sum(weights.numel() for weights in model.module.parameters()) == best["param_count"]


def test_the_run_can_be_gone_through_again(run: Run) -> None:
    """What the brain was told is in the run folder, and leads to the same commands in another process."""
    done = subprocess.run(
        [sys.executable, "-m", "scheduler.replay", str(run.folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same as in the run" in done.stdout


def test_reservations_were_tightened_and_learned_from(run: Run) -> None:
    """After the first step and validation an attempt holds no more than it was admitted with, and enough."""
    launched = {r["attempt"]: r["reserved_bytes"] for r in run.records if r["event"] == "attempt.launched"}
    resized = {
        r["attempt"]: r["reserved_bytes"]
        for r in run.records
        if r["event"] == "reservation.resized" and r["reason"] == "settled"
    }
    peaks = {r["attempt"]: r["peak_bytes"] for r in run.records if r["event"] == "attempt.ended"}
    assert set(resized) <= set(launched)
    for attempt, reserved in launched.items():
        assert peaks[attempt] <= resized.get(attempt, reserved) <= reserved


def test_leaves_no_process_behind(run: Run) -> None:
    """Worker, watchdog, warm spare and trials are gone once the command has returned."""
    folder = str(run.folder.parent)

    def ours() -> list[psutil.Process]:
        return [
            process
            for process in psutil.process_iter(["environ"])
            if (process.info["environ"] or {}).get("HEADROOM_HOST_DIR", "").startswith(folder)
        ]

    wait_until(lambda: not ours(), "no process of the run is left", 10)


def test_same_command_again_finds_everything_done(run: Run) -> None:
    """A run that is complete starts no trial and no cluster, and gives the same results."""
    again = schedule(run.folder.parent, "--budgets", "2M", "--memory-budget", "6GiB", "--dashboard", "off")
    assert again.returncode == 0, again.stderr
    assert "2/2" in again.stdout
    assert len(list((run.folder / "attempts").iterdir())) == 2
    names = [record["event"] for record in again.records]
    last = names[len(names) - names[::-1].index("batch.started") :]
    assert last == ["study.opened", "study.closed", "batch.ended"]


def test_runs_on_a_cluster_started_by_hand(tmp_path: Path) -> None:
    """`dask scheduler` and `dask worker` on loopback; the worker survives the run and carries nothing of it after."""
    port = free_port()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "HEADROOM_HOST_DIR": str(tmp_path)}
    dask = [sys.executable, "-m", "dask"]
    address = f"tcp://127.0.0.1:{port}"
    scheduler = subprocess.Popen(
        [*dask, "scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    worker = subprocess.Popen(
        [*dask, "worker", address, "--host", "127.0.0.1", "--nthreads", "2", "--memory-limit", "0", "--no-nanny"],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        done = schedule(tmp_path, "--budgets", "2M", "--trials", "1", "--cluster", address)
        assert done.returncode == 0, done.stderr
        assert [t.state.name for t in done.study("run_2M_h1").trials] == ["COMPLETE"]
        children = psutil.Process(worker.pid).children
        wait_until(lambda: not children(recursive=True), "the worker has no child of ours left", 10)
        assert worker.poll() is None
    finally:
        for process in (worker, scheduler):
            process.terminate()
        for process in (worker, scheduler):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

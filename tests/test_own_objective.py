"""Objectives of one's own, run by the whole command: the heap they get, and what is learnt of their memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest

from scheduler.driver import journal
from training import runtime

pytestmark = pytest.mark.timeout(800)  # whole commands, on a machine that may be busy
ROOT = Path(__file__).parent.parent
WITHOUT_ESTIMATE = {"candidates": None, "estimate": None, "micro_batch": None, "check_data": None}


def schedule(
    folder: Path, training: dict[str, Any], *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run one study of this training side to its end; the run is named `run`."""
    config = folder / "own.yaml"
    config.write_text(json.dumps({"training": training, "budgets": ["2M"], "horizons": [1], "dashboard": None}))
    command = [sys.executable, "-m", "scheduler", "--config", str(config), "--runs-dir", str(folder), "--name", "run"]
    return subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=360,
        check=False,
    )


def trials_of(folder: Path) -> list[optuna.trial.FrozenTrial]:
    """The study's trials as Optuna itself reads them."""
    storage = f"sqlite:///{folder / 'run' / 'study.db'}"
    return optuna.load_study(study_name="run_2M_h1", storage=storage).trials


def launches_of(folder: Path) -> list[dict[str, Any]]:
    """The journal's lines of what was launched, in order."""
    lines = journal.read(folder / "run" / "journal.jsonl")
    return [line for line in lines if line["event"] == "attempt.launched"]


def test_an_lstm_gets_the_systems_heap_and_its_peaks_are_learnt(tmp_path: Path) -> None:
    """Neither our heap nor Dask's trimming; the second trial is reserved for by what the first one took."""
    training = {**WITHOUT_ESTIMATE, "sample": "tests.lstm:sample", "objective": "tests.lstm:objective"}
    done = schedule(tmp_path, training, "--trials", "2", "--slots", "1")
    assert done.returncode == 0, done.stderr
    first, second = trials_of(tmp_path)
    heap = {"GLIBC_TUNABLES": None, "MALLOC_TRIM_THRESHOLD_": None}
    assert [trial.user_attrs["metrics"]["heap"] for trial in (first, second)] == [heap, heap]
    peak = first.user_attrs["footprint.observed_peak_bytes"]
    assert 225 * 2**20 < peak < 2**30
    launched = launches_of(tmp_path)
    assert [line["source"] for line in launched] == ["unknown", "learnt"]
    assert launched[1]["samples"] == 1 and launched[1]["reserved_bytes"] == int(peak * 3.5)
    # The same command with one trial more: what was learnt is still known.
    assert schedule(tmp_path, training, "--trials", "3", "--slots", "1").returncode == 0
    assert launches_of(tmp_path)[2]["source"] == "learnt"


@pytest.mark.skipif(runtime.allocator({}) != runtime.STACK, reason="needs glibc")
def test_who_asks_for_our_heap_gets_it(tmp_path: Path) -> None:
    """`allocator: glibc-stack` holds for an objective of one's own, too."""
    training = {**WITHOUT_ESTIMATE, "sample": "tests.lstm:sample", "objective": "tests.lstm:objective"}
    done = schedule(tmp_path, training, "--trials", "1", HEADROOM_ALLOCATOR="glibc-stack")
    assert done.returncode == 0, done.stderr
    (trial,) = trials_of(tmp_path)
    assert "glibc.malloc.mmap_max=0" in trial.user_attrs["metrics"]["heap"]["GLIBC_TUNABLES"]

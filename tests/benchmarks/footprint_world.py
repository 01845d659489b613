"""The footprint where a user's own data and processes come in: large files of bars, objectives with children.

A part of `tests.benchmarks.footprint` (`--groups data,children`). Data: the prior against the VmHWM of a fresh trial
process that reads the file and trains, for CSV and Parquet files on which no constant was fitted. Children: the whole
command runs an objective whose work is done by other processes; what its study has learnt stands beside the largest sum
over the process tree that this benchmark saw itself, looking at it every 10 ms.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna

from scheduler.driver import journal
from scheduler.host import vitals
from tests.benchmarks import footprint_trials as trials
from tests.benchmarks.footprint_cases import PUBLISHED, Case
from training.arch_grid import param_count

MIB = 2**20
# rows, columns, kind. The term was fitted on 5,000 x 6, 20,000 x 30, 50,000 x 100, 100,000 x 6 and x 20, 200,000 x 50.
FILES = (
    (30_000, 60, "csv"),
    (150_000, 12, "csv"),
    (400_000, 7, "csv"),
    (10_000, 300, "csv"),
    (30_000, 60, "parquet"),
    (120_000, 40, "parquet"),
)
MODELS: tuple[dict[str, Any], ...] = (
    {"d_model": 64, "n_layers": 2, "d_ff": 128, "n_heads": 4, "micro_batch": 8},
    {"d_model": 128, "n_layers": 6, "d_ff": 256, "n_heads": 4, "micro_batch": 64},
    {"d_model": 96, "n_layers": 16, "d_ff": 192, "n_heads": 4, "micro_batch": 256},
    {"d_model": 1024, "n_layers": 2, "d_ff": 2048, "n_heads": 16, "micro_batch": 16},
)
CHILDREN = ("short", "long", "forks", "loads")


# -- data -----------------------------------------------------------------------------------------------------------


def write_file(folder: Path, rows: int, columns: int, kind: str) -> Path:
    """Daily bars of a random walk and further columns of noise, `columns` beside the date."""
    import numpy as np
    import pandas as pd

    random = np.random.default_rng(rows + columns)
    close = 100 * np.exp(np.cumsum(random.normal(0, 0.001, rows)))
    bars = {"Date": (np.datetime64("1000-01-01") + np.arange(rows)).astype(str), "Open": close, "High": close * 1.01}
    bars |= {"Low": close * 0.99, "Close": close, "Volume": 1000.0 + np.arange(rows) % 7}
    further = {f"x{i}": random.normal(size=rows) for i in range(columns - 5)}
    table, path = pd.DataFrame(bars | further), folder / f"bars_{rows}_{columns}.{kind}"
    if kind == "csv":
        table.to_csv(path, index=False, float_format="%.6g")
    else:
        table.to_parquet(path, index=False)
    return path


def data_case(path: Path, rows: int, columns: int, model: Mapping[str, Any]) -> Case:
    """A trial of that model on that file."""
    context: dict[str, Any] = {"device": "cpu", "threads": 1, "allocator": "auto", "horizon": 1, **PUBLISHED}
    context |= {"n_features": 20 + columns, "n_rows": rows, "n_columns": 1 + columns, "data": str(path)}
    context["target_effective_batch"] = 2 * model["micro_batch"]
    count = param_count(model["d_model"], model["n_layers"], model["d_ff"], n_features=context["n_features"])
    return {"params": {**model, "param_count": count, "accumulation_steps": 2, "dropout": 0.1}, "context": context}


def judge_data(python: str) -> list[float]:
    """A line for each file and model; returns their errors."""
    print("large files: peak and prior, MiB")
    errors = []
    with tempfile.TemporaryDirectory(prefix="footprint-data-") as folder:
        for rows, columns, kind in FILES:
            path = write_file(Path(folder), rows, columns, kind)
            for model in MODELS:
                case = data_case(path, rows, columns, model)
                case["observed"] = trials.measure(case, Path(folder), python)
                peak, prior = case["observed"]["peak_bytes"], trials.ours(case)
                errors.append(prior / peak - 1)
                shape = f"d={model['d_model']} L={model['n_layers']} B={model['micro_batch']}"
                print(
                    f"{rows:>7} x {columns:<4}{kind:<8} {shape:<20} {peak / MIB:>7.0f} {prior / MIB:>7.0f} "
                    f"{errors[-1]:>+7.1%}",
                    flush=True,
                )
            path.unlink()
    return errors


# -- children -------------------------------------------------------------------------------------------------------


def run_with_children(objective: str, folder: Path, python: str = sys.executable) -> tuple[int, int, list[int]]:
    """(seen, learnt, reserved): the largest sum over either trial's tree, the larger peak learnt, what was reserved."""
    training: dict[str, Any] = {
        "candidates": None,
        "estimate": None,
        "micro_batch": None,
        "check_data": None,
        "preload": [],
    }
    training |= {"sample": "tests.children:sample", "objective": f"tests.children:{objective}"}
    config = folder / "own.yaml"
    config.write_text(json.dumps({"training": training, "budgets": ["2M"], "horizons": [1], "dashboard": None}))
    arguments = ["--config", str(config), "--runs-dir", str(folder), "--name", "run", "--trials", "2", "--slots", "1"]
    seen = 0
    with subprocess.Popen(
        [python, "-m", "scheduler", *arguments],
        cwd=trials.ROOT,
        env={**os.environ, "PYTHONPATH": str(trials.ROOT), "HEADROOM_HOST_DIR": str(folder / "host")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as command:
        lines = folder / "run" / "journal.jsonl"
        roots: dict[int, float] = {}
        next_read = 0.0
        while command.poll() is None:
            if time.monotonic() >= next_read and lines.exists():
                next_read = time.monotonic() + 0.2
                started = [line["pid"] for line in journal.read(lines) if line["event"] == "attempt.started"]
                roots = {pid: start for pid in started if (start := vitals.start_time(pid)) is not None}
            for found in vitals.processes({str(pid): (pid, start, ()) for pid, start in roots.items()}).values():
                held = sum(each.footprint_bytes or 0 for each in found)
                seen = max(seen, held + max((each.file_bytes for each in found), default=0))
            time.sleep(0.01)
        if command.returncode != 0:
            raise RuntimeError(f"the command ended with {command.returncode}")
    study = optuna.load_study(study_name="run_2M_h1", storage=f"sqlite:///{folder / 'run' / 'study.db'}")
    learnt = max(trial.user_attrs["footprint.observed_peak_bytes"] for trial in study.trials)
    launched = [line for line in journal.read(lines) if line["event"] == "attempt.launched"]
    return seen, learnt, [line["reserved_bytes"] for line in launched]


def judge_children(python: str) -> None:
    """A line for each objective of tests/children.py."""
    print("children: largest sum over the tree seen here every 10 ms, learnt, and reserved for the second trial, MiB")
    for objective in CHILDREN:
        with tempfile.TemporaryDirectory(prefix="footprint-children-") as folder:
            seen, learnt, reserved = run_with_children(objective, Path(folder), python)
        print(
            f"{objective:<8} {seen / MIB:>7.0f} {learnt / MIB:>7.0f} ({learnt / seen - 1:+.1%}) "
            f"{reserved[1] / MIB:>7.0f}",
            flush=True,
        )

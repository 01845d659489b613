"""The truth: real trial processes, with the Python that is asked about, and what they took at their peak.

A part of `tests.benchmarks.footprint`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.footprint_cases import Case, work
from training import footprint, runtime

ROOT = Path(__file__).resolve().parents[2]
STEP_BUDGET = 6e10  # parameters x rows of all steps together
BARS = 1500


def steps_of(case: Case) -> int:
    """Optimizer steps of a measurement. Small trials take some more MiB in their first twenty, and run hundreds."""
    return max(2, min(20, int(STEP_BUDGET / work(case))))


def write_bars(folder: Path, n_features: int, rows: int = BARS) -> Path:
    """The last `rows` days of the built-in sample, with further numeric columns up to `n_features`."""
    import pandas

    from training.table import SAMPLE_FILE

    path = folder / f"bars_{n_features}.csv"
    if not path.exists():
        bars = pandas.read_csv(SAMPLE_FILE, index_col=0).tail(rows).copy()
        bars = bars.drop(columns=[name for name in bars.columns if str(name).lower().startswith("adj")])
        for i in range(n_features - 25):
            bars[f"further_{i}"] = bars["Close"].pct_change(i + 1).fillna(0.0)
        bars.to_csv(path)
    return path


def started_with(variables: Mapping[str, str | None]) -> dict[str, str]:
    """This process's environment with these put over it; None takes one away."""
    return {name: value for name, value in {**os.environ, **variables}.items() if value is not None}


def measure(case: Case, folder: Path, python: str = sys.executable) -> dict[str, Any]:
    """Train it in a fresh trial process.

    Returns environment and runtime_bytes (as the ready process says), settled_bytes (after two steps and a validation
    batch), peak_bytes (at the end), steps, and what a plan would have read off the file.
    """
    params, context = dict(case["params"]), dict(case["context"])
    read: dict[str, int] = {}
    if context.get("data") is None:
        context["data"] = str(write_bars(folder, context["n_features"]))
        read = {
            "n_rows": BARS,
            "n_columns": 6 + context["n_features"] - 25,
        }  # the date, OHLCV and what further there is
    steps = steps_of(case)
    context |= {"max_steps": steps, "max_epochs": steps, "seed": 0}
    params |= {"epochs": steps, "learning_rate": 1e-4, "weight_decay": 1e-3, "warmup_steps": 100}
    attempt = tempfile.mkdtemp(dir=folder)
    task = {
        "protocol": 1,
        "attempt": "benchmark/0/1",
        "objective": "training.hpo:objective",
        "params": params,
        "context": context,
        "folder": attempt,
        "resume_from": None,
        "threads": context["threads"],
    }
    # Passive: threads that spin for each other make a measurement on a busy machine last for ever.
    variables = {"OMP_WAIT_POLICY": "PASSIVE", **runtime.environment(context)}
    if "preload_library" in case:
        variables["LD_PRELOAD"] = case["preload_library"]
    found: dict[str, Any] = {"steps": steps, "read": read}
    with subprocess.Popen(
        [python, "-m", "training.trial"],
        cwd=ROOT,
        env=started_with({**variables, "PYTHONPATH": str(ROOT)}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(task) + "\n")
        process.stdin.flush()
        for line in process.stdout:
            message = json.loads(line)
            match message["type"]:
                case "ready":
                    found |= {"environment": message["environment"], "runtime_bytes": message["rss_bytes"]}
                case "settled":
                    found["settled_bytes"] = message["peak_bytes"]
                case "result":
                    found["peak_bytes"] = message["peak_bytes"]
                case "error":
                    raise RuntimeError(f"{case}: {message['error']}")
    shutil.rmtree(attempt)
    if "peak_bytes" not in found:
        raise RuntimeError(f"{case}: ended without a result, status {process.returncode}")
    return found


def observe(cases: Sequence[Case], python: str, save: Path | None = None) -> list[Case]:
    """Measure them one after another. What `save` holds of them already is not measured again: a long list may be done
    in parts."""
    known = json.loads(save.read_text()) if save is not None and save.exists() else []
    done = []
    with tempfile.TemporaryDirectory(prefix="footprint-") as folder:
        for i, case in enumerate(cases):
            before = next((k for k in known if k["case"] == case and k["python"] == python), None)
            if before is None:
                before = {"case": case, "python": python, "observed": measure(case, Path(folder), python)}
                known.append(before)
                if save is not None:
                    save.write_text(json.dumps(known))
            done.append({**case, "observed": before["observed"]})
            print(f"\r{i + 1}/{len(cases)} trials measured", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return done


def ours(case: Case) -> int:
    """The prior of training/footprint.py for a measured case, told what a driver is told of the worker."""
    seen = case["observed"]
    where = {"runtime_bytes": seen["runtime_bytes"], "environments": [seen["environment"]]}
    return int(footprint.estimate(case["params"], {**case["context"], **seen["read"], **where})["host_bytes"])

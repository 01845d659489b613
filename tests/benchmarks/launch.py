"""What the scheduler itself costs: launch latency, overhead per trial, its own memory. Run by hand; prints a table.

    python -m tests.benchmarks.launch [--trials 40] [--launches 7]

Launch: from the task's line on the pipe to the first training step of a real 2M trial, warm spare against cold start.
Overhead: a batch of trials that do nothing, so that what is left is asking, launching, reporting, telling and the
process per attempt. Memory: PSS of each process of an idle batch. Wall times depend on the machine: quote the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from scheduler.driver import journal
from scheduler.worker.trial_process import TrialProcess
from training import arch_grid, runtime

ROOT = Path(__file__).resolve().parents[2]
CONTEXT: dict[str, Any] = {
    "budget": "2M", "horizon": 1, "data": None, "max_epochs": 1, "max_steps": 1, "device": "cpu",
    "recipe": "fp32_adamw", "threads": 1, "allocator": "auto", "target_effective_batch": 256, "seed": 0,
    "context_length": 60, "patch_length": 10, "stride": 5, "n_features": 25, "head_dropout": 0.0,
    "early_stopping": {"patience": 10, "min_delta": 0.001},
}  # fmt: skip
PARAMS: dict[str, Any] = {
    "d_model": 128, "n_layers": 12, "n_heads": 4, "d_ff": 256, "learning_rate": 1e-3, "weight_decay": 1e-3,
    "warmup_steps": 100, "epochs": 1, "dropout": 0.1, "micro_batch": 256, "accumulation_steps": 1,
    "effective_batch": 256,
}  # fmt: skip
IDLE = "tests.benchmarks.launch"  # the functions below, by dotted path


def candidates(context: dict[str, Any]) -> list[dict[str, Any]]:
    """One architecture."""
    return [{"d_model": 1, "n_layers": 1, "n_heads": 1, "d_ff": 1, "param_count": 1}]


def sample(trial: Any, context: dict[str, Any], architectures: list[dict[str, Any]], fit: Any) -> dict[str, Any]:
    """Two parameters."""
    return {**architectures[0], "x": trial.suggest_float("x", 0, 1), "y": trial.suggest_float("y", 0, 1)}


def estimate(params: dict[str, Any], context: dict[str, Any]) -> dict[str, Any]:
    """An interpreter."""
    return {"host_bytes": 64 * 2**20, "device_bytes": 0, "components": {}, "family": "idle/cpu"}


def objective(task: dict[str, Any], progress: Any) -> dict[str, Any]:
    """Nothing but one report."""
    progress.report(1, task["params"]["x"])
    return {"value": task["params"]["x"], "epochs": 1}


def launch(folder: Path, *, warm: bool) -> dict[str, float]:
    """Seconds from the task (warm) or from the start of the process (cold) to `started` and to the first step."""
    began = time.monotonic()
    process = TrialProcess(environment=runtime.environment(CONTEXT), log=folder / "spare.log")
    process.wait_ready(120)
    if warm:
        began = time.monotonic()
    process.send(
        {
            "protocol": 1, "attempt": "bench/0/1", "objective": "training.hpo:objective", "params": PARAMS,
            "context": CONTEXT, "folder": str(folder), "resume_from": None, "threads": 1,
        }
    )  # fmt: skip
    seen: dict[str, float] = {}
    for message in process.messages():
        kind = {"tick": "first step", "started": "started"}.get(str(message["type"]))
        if kind:
            seen.setdefault(kind, time.monotonic() - began)
        if message["type"] == "error":
            raise SystemExit(message["error"])
    process.close()
    return seen


def batch(trials: int, preload: list[str] | None) -> dict[str, float]:
    """Run a batch of idle trials; figures per trial, and the memory of its processes while it runs."""
    with tempfile.TemporaryDirectory() as root:
        functions = {name: f"{IDLE}:{name}" for name in ("objective", "sample", "candidates", "estimate")}
        training: dict[str, Any] = {**functions, "micro_batch": None, "check_data": None}
        if preload is not None:
            training["preload"] = preload
        config = Path(root) / "settings.yaml"
        config.write_text(yaml.safe_dump({"training": training}))
        command = [
            sys.executable, "-m", "scheduler", "--config", str(config), "--budgets", "2M", "--horizons", "1",
            "--trials", str(trials), "--runs-dir", root, "--name", "bench", "--slots", "2", "--dashboard", "off",
            "--pruner", "none",
        ]  # fmt: skip
        driver = psutil.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "HEADROOM_HOST_DIR": f"{root}/host"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        memory: dict[str, int] = {}
        cpu_s = 0.0
        while driver.poll() is None:
            try:
                cpu_s = sum(driver.cpu_times()[:2])
                for process in (driver, *driver.children(recursive=True)):
                    name, pss = role(process), process.memory_full_info().pss
                    memory[name] = max(memory.get(name, 0), pss)
            except psutil.Error:
                continue
            time.sleep(0.2)
        if driver.returncode != 0:
            raise SystemExit(f"the batch ended with {driver.returncode}")
        records = list(journal.read(Path(root) / "bench" / "journal.jsonl"))
    at = {name: [r["unix"] for r in records if r["event"] == name] for name in ("attempt.launched", "trial.told")}
    span = max(at["trial.told"]) - min(at["attempt.launched"])
    figures = {"ms per trial": 1000 * span / trials, "driver CPU ms per trial": 1000 * cpu_s / trials}
    return figures | {f"{name} MiB": size / 2**20 for name, size in sorted(memory.items())}


def role(process: psutil.Process) -> str:
    """What a process of the run is."""
    line = " ".join(process.cmdline())
    for word, name in {
        "training.trial": "trial process", "scheduler.watchdog": "watchdog", "-m scheduler": "driver",
        "resource_tracker": "resource tracker", "spawn_main": "worker with its agent",
    }.items():  # fmt: skip
        if word in line:
            return name
    return "other"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--launches", type=int, default=7)
    arguments = parser.parse_args()
    count = arch_grid.param_count(PARAMS["d_model"], PARAMS["n_layers"], PARAMS["d_ff"])
    PARAMS["param_count"] = count
    print(f"launch of a real trial ({count / 1e6:.1f}M parameters, micro-batch 256), seconds, median [min, max]")
    for warm in (True, False):
        runs = []
        for _ in range(arguments.launches):
            with tempfile.TemporaryDirectory() as folder:
                runs.append(launch(Path(folder), warm=warm))
        for what in ("started", "first step"):
            values = [run[what] for run in runs]
            name = "warm spare" if warm else "cold start"
            print(f"  {name:10} to {what:10} {statistics.median(values):7.3f} [{min(values):.3f}, {max(values):.3f}]")
    for preload, what in ((None, "with torch in each trial process"), ([], "without torch")):
        print(f"batch of {arguments.trials} idle trials, 2 slots, {what}")
        for name, value in batch(arguments.trials, preload).items():
            print(f"  {name:28} {value:8.1f}")
    print(json.dumps({"cores": os.cpu_count(), "python": sys.version.split()[0]}))


if __name__ == "__main__":
    main()

"""What the scheduler itself costs: launch latency, overhead per trial, its own memory. Run by hand; prints a table.

    python -m tests.benchmarks.launch [--launches 7] [--starts 5] [--few 10 --many 60 --rounds 3] [--naps 40]

Launch: from the task's line on the pipe to the first training step of a real 2M trial, warm spare against cold start.
One trial more: trials that do nothing, so that what is left is asking, launching, reporting, telling and the process
per attempt; the difference of two runs, start and end left out. CPU is that of the whole tree: this process adopts what
is orphaned and waits for it. Slots busy: the trials' own time against that of the slots, from the first launch to the
last result told; and where a slot's time goes between two trials. Start: from the command to its first trial, beside a
script of twenty lines that asks Optuna and submits to Dask, taking turns. Memory: PSS of each process. Wall times
depend on the machine: quote the ratios. Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
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
MEDIAN = "median [min, max]"
PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>
KINDS: tuple[tuple[bool, list[str] | None, str], ...] = (
    (True, None, "torch, forked"), (True, [], "no torch, forked"),
    (False, None, "torch, started"), (False, [], "no torch, started"),
)  # fmt: skip
IDLE = "tests.benchmarks.idle"
# What one would write without a scheduler: prints when it has its first trial, and when that has run.
ASK_AND_TELL = """
import sys, time
import optuna
from distributed import Client, LocalCluster
from tests.benchmarks.idle import objective

class Progress:
    def report(self, step, value):
        pass

if __name__ == "__main__":
    study = optuna.create_study(storage=sys.argv[1], sampler=optuna.samplers.TPESampler(multivariate=True))
    with LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=None) as cluster, Client(cluster) as client:
        trial = study.ask()
        params = {name: trial.suggest_float(name, 0, 1) for name in "xy"}
        asked = time.time()
        result = client.submit(objective, {"params": params}, Progress()).result()
        study.tell(trial, result["value"])
        print(asked)
"""
TIMED = ("attempt.launched", "attempt.started", "trial.told")
STAGES = (
    ("attempt.ended", "trial.asked"),
    ("trial.asked", "attempt.launched"),
    ("attempt.launched", "attempt.started"),
)


def launch(folder: Path, *, warm: bool) -> dict[str, float]:
    """Seconds from the task (warm) or from the start of the process (cold) to `started` and to the first step."""
    began = time.monotonic()
    process = TrialProcess.start(environment=runtime.environment(CONTEXT), log=folder / "spare.log")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of the command. start_s: to its first trial; span_s: from its first launch to the last trial told.

    cpu_s: of every process it had. between_ms: medians of STAGES, from one trial in a slot to the next.
    """

    start_s: float
    span_s: float
    cpu_s: float
    memory: dict[str, int]
    between_ms: list[float]


def between(records: list[dict[str, Any]]) -> list[float]:
    """Medians of STAGES in ms: each event with the first of the next kind after it that no earlier one has taken."""
    found = []
    for first, then in STAGES:
        begun, waits = list[float](), []
        for record in records:
            if record["event"] == then and begun:
                waits.append(1000 * (record["unix"] - begun.pop(0)))
            elif record["event"] == first:
                begun.append(record["unix"])
        found.append(statistics.median(waits) if waits else math.nan)
    return found


def ask_and_tell() -> float:
    """Seconds from the start of the script to its first trial."""
    with tempfile.TemporaryDirectory() as root:
        script, began = Path(root) / "ask_and_tell.py", time.time()
        script.write_text(ASK_AND_TELL)
        command = [sys.executable, str(script), f"sqlite:///{root}/study.db"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        said = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True).stdout
    return float(said.split()[-1]) - began


def batch(trials: int, preload: list[str] | None, *, fork: bool, what: str = "objective", watch: bool = False) -> Run:
    """Run that many trials, 2 slots. watch: look at its processes' memory meanwhile, which costs them something."""
    with tempfile.TemporaryDirectory() as root:
        config = Path(root) / "settings.yaml"
        config.write_text(yaml.safe_dump({"training": training(preload, fork=fork, what=what)}))
        command = [
            sys.executable, "-m", "scheduler", "--config", str(config), "--budgets", "2M", "--horizons", "1",
            "--trials", str(trials), "--runs-dir", root, "--name", "bench", "--slots", "2", "--dashboard", "off",
            "--pruner", "none",
        ]  # fmt: skip
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
        driver = psutil.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "HEADROOM_HOST_DIR": f"{root}/host"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        memory: dict[str, int] = {}
        while driver.poll() is None:
            with contextlib.suppress(psutil.Error):
                for process in (driver, *driver.children(recursive=True)) if watch else ():
                    name, pss = role(process), process.memory_full_info().pss
                    memory[name] = max(memory.get(name, 0), pss)
            time.sleep(0.2)
        if driver.returncode != 0:
            raise SystemExit(f"the batch ended with {driver.returncode}")
        with contextlib.suppress(ChildProcessError):  # what was orphaned comes to us: its CPU time counts, too
            while True:
                os.waitpid(-1, 0)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        records = list(journal.read(Path(root) / "bench" / "journal.jsonl"))
    at = {event: [r["unix"] for r in records if r["event"] == event] for event in TIMED}
    return Run(
        start_s=min(at["attempt.started"]) - began,
        span_s=max(at["trial.told"]) - min(at["attempt.launched"]),
        cpu_s=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        memory=memory,
        between_ms=between(records),
    )


def training(preload: list[str] | None, *, fork: bool, what: str) -> dict[str, Any]:
    """The settings of a workload that does nothing."""
    found: dict[str, Any] = {name: f"{IDLE}:{name}" for name in ("sample", "candidates", "estimate")}
    found |= {"objective": f"{IDLE}:{what}", "micro_batch": None, "check_data": None, "fork": fork}
    return found if preload is None else {**found, "preload": preload}


def marginal(few: int, many: int, preload: list[str] | None, *, fork: bool) -> tuple[float, float]:
    """What one more idle trial costs: (wall, CPU of all processes) in ms."""
    small, large = (batch(trials, preload, fork=fork) for trials in (few, many))
    more = many - few
    return 1000 * (large.span_s - small.span_s) / more, 1000 * (large.cpu_s - small.cpu_s) / more


def role(process: psutil.Process) -> str:
    """What a process of the run is."""
    line = " ".join(process.cmdline())
    for word, name in {
        "training.trial": "trial process", "training.fork_server": "forked",
        "scheduler.watchdog": "watchdog", "-m scheduler": "driver",
        "resource_tracker": "resource tracker", "spawn_main": "worker with its agent",
    }.items():  # fmt: skip
        if word in line:
            return name
    return "other"


def show_launches(times: int) -> None:
    """Of a real trial in a warm process and in a cold one."""
    print(f"launch of a real trial ({PARAMS['param_count'] / 1e6:.1f}M parameters, micro-batch 256), seconds, {MEDIAN}")
    for warm in (True, False) if times else ():
        runs = []
        for _ in range(times):
            with tempfile.TemporaryDirectory() as folder:
                runs.append(launch(Path(folder), warm=warm))
        for what in ("started", "first step"):
            values = [run[what] for run in runs]
            name = "warm spare" if warm else "cold start"
            print(f"  {name:10} to {what:10} {statistics.median(values):7.3f} [{min(values):.3f}, {max(values):.3f}]")


def show_starts(times: int) -> None:
    """Of a command and of a script, in turns."""
    print(f"from the command to its first trial, seconds, {MEDIAN}")
    ours, theirs = list[float](), list[float]()
    for _ in range(times):
        theirs.append(ask_and_tell())
        ours.append(batch(2, None, fork=True).start_s)
    later = [mine - script for mine, script in zip(ours, theirs, strict=True)]
    named = {"ask and tell + Dask, first ask": theirs, "ours, torch, forked: started": ours, "difference": later}
    for name, values in named.items() if times else ():
        print(f"  {name:30} {statistics.median(values):7.3f} [{min(values):.3f}, {max(values):.3f}]", flush=True)


def show_slots(naps: int) -> None:
    """How busy they are, and what they wait for."""
    stages = ", ".join(f"{first} to {then}" for first, then in STAGES)
    print(f"slots busy, 2 slots: trials of 0.5 s, of 5 s; of the first, medians in ms of {stages}")
    for fork, preload, what in KINDS if naps else ():
        runs = {
            length_s: (trials, batch(trials, preload, fork=fork, what=name))
            for name, length_s, trials in (("nap", 0.5, naps), ("long_nap", 5.0, max(1, naps // 4)))
        }
        shares = [trials * length_s / (2 * run.span_s) for length_s, (trials, run) in runs.items()]
        waits = " ".join(f"{wait:.0f}" for wait in runs[0.5][1].between_ms)
        print(f"  {what:24}", "  ".join(f"{share:6.1%}" for share in shares), f"  {waits}", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--launches", type=int, default=7)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--few", type=int, default=10)
    parser.add_argument("--many", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--naps", type=int, default=40)
    arguments = parser.parse_args()
    PARAMS["param_count"] = arch_grid.param_count(PARAMS["d_model"], PARAMS["n_layers"], PARAMS["d_ff"])
    show_launches(arguments.launches)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    show_starts(arguments.starts)
    print(
        f"one idle trial more, {arguments.few} to {arguments.many}, 2 slots, {arguments.rounds} times: wall, CPU in ms"
    )
    for fork, preload, what in KINDS if arguments.rounds else ():
        costs = [marginal(arguments.few, arguments.many, preload, fork=fork) for _ in range(arguments.rounds)]
        print(f"  {what:24}", "  ".join(f"{wall:6.0f} {cpu:6.0f}" for wall, cpu in costs), flush=True)
    show_slots(arguments.naps)
    print("memory of its processes, MiB")
    for fork, preload, what in KINDS:
        found = batch(10, preload, fork=fork, what="nap", watch=True).memory
        print(
            f"  {what:24}", "  ".join(f"{name} {size / 2**20:.0f}" for name, size in sorted(found.items())), flush=True
        )
    print(json.dumps({"cores": os.cpu_count(), "python": sys.version.split()[0]}))


if __name__ == "__main__":
    main()

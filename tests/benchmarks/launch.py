"""What the scheduler itself costs: launch latency, overhead per trial, its own memory. Run by hand; prints a table.

    python -m tests.benchmarks.launch [--launches 7] [--few 10 --many 60 --rounds 3] [--naps 40]

Launch: from the task's line on the pipe to the first training step of a real 2M trial, warm spare against cold start.
One trial more: trials that do nothing, so that what is left is asking, launching, reporting, telling and the process
per attempt; the difference of two runs, start and end left out. CPU is that of the whole tree: this process adopts what
is orphaned and waits for it. Slots busy: the trials' own time against that of the slots, from the first launch to the
last result told. Memory: PSS of each process. Wall times depend on the machine: quote the ratios. Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
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
PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>
KINDS: tuple[tuple[bool, list[str] | None, str], ...] = (
    (True, None, "torch, forked"), (True, [], "no torch, forked"),
    (False, None, "torch, started"), (False, [], "no torch, started"),
)  # fmt: skip
IDLE = "tests.benchmarks.idle"


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
    """One run of the command. span_s: from its first launch to the last trial told; cpu_s: of every process it had."""

    span_s: float
    cpu_s: float
    memory: dict[str, int]


def batch(trials: int, preload: list[str] | None, *, fork: bool, what: str = "objective", watch: bool = False) -> Run:
    """Run that many trials, 2 slots. watch: look at its processes' memory meanwhile, which costs them something."""
    with tempfile.TemporaryDirectory() as root:
        functions = {name: f"{IDLE}:{name}" for name in ("sample", "candidates", "estimate")}
        training: dict[str, Any] = {**functions, "objective": f"{IDLE}:{what}", "micro_batch": None, "check_data": None}
        training["fork"] = fork
        if preload is not None:
            training["preload"] = preload
        config = Path(root) / "settings.yaml"
        config.write_text(yaml.safe_dump({"training": training}))
        command = [
            sys.executable, "-m", "scheduler", "--config", str(config), "--budgets", "2M", "--horizons", "1",
            "--trials", str(trials), "--runs-dir", root, "--name", "bench", "--slots", "2", "--dashboard", "off",
            "--pruner", "none",
        ]  # fmt: skip
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
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
    at = {name: [r["unix"] for r in records if r["event"] == name] for name in ("attempt.launched", "trial.told")}
    return Run(
        span_s=max(at["trial.told"]) - min(at["attempt.launched"]),
        cpu_s=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        memory=memory,
    )


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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--launches", type=int, default=7)
    parser.add_argument("--few", type=int, default=10)
    parser.add_argument("--many", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--naps", type=int, default=40)
    arguments = parser.parse_args()
    count = arch_grid.param_count(PARAMS["d_model"], PARAMS["n_layers"], PARAMS["d_ff"])
    PARAMS["param_count"] = count
    print(f"launch of a real trial ({count / 1e6:.1f}M parameters, micro-batch 256), seconds, median [min, max]")
    for warm in (True, False) if arguments.launches else ():
        runs = []
        for _ in range(arguments.launches):
            with tempfile.TemporaryDirectory() as folder:
                runs.append(launch(Path(folder), warm=warm))
        for what in ("started", "first step"):
            values = [run[what] for run in runs]
            name = "warm spare" if warm else "cold start"
            print(f"  {name:10} to {what:10} {statistics.median(values):7.3f} [{min(values):.3f}, {max(values):.3f}]")
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    print(
        f"one idle trial more, {arguments.few} to {arguments.many}, 2 slots, {arguments.rounds} times: wall, CPU in ms"
    )
    for fork, preload, what in KINDS:
        costs = [marginal(arguments.few, arguments.many, preload, fork=fork) for _ in range(arguments.rounds)]
        print(f"  {what:24}", "  ".join(f"{wall:6.0f} {cpu:6.0f}" for wall, cpu in costs), flush=True)
    print("slots busy, 2 slots: trials of 0.5 s, of 5 s")
    for fork, preload, what in KINDS:
        shares = []
        for name, length_s, trials in (("nap", 0.5, arguments.naps), ("long_nap", 5.0, arguments.naps // 4)):
            shares.append(trials * length_s / (2 * batch(trials, preload, fork=fork, what=name).span_s))
        print(f"  {what:24}", "  ".join(f"{share:6.1%}" for share in shares), flush=True)
    print("memory of its processes, MiB")
    for fork, preload, what in KINDS:
        found = batch(10, preload, fork=fork, what="nap", watch=True).memory
        print(
            f"  {what:24}", "  ".join(f"{name} {size / 2**20:.0f}" for name, size in sorted(found.items())), flush=True
        )
    print(json.dumps({"cores": os.cpu_count(), "python": sys.version.split()[0]}))


if __name__ == "__main__":
    main()

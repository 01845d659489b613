"""A study whose trials nobody can size, run for real: ours beside three other ways, memory sampled. Run by hand.

    python -m tests.benchmarks.packing_real [--stream lightgbm-random] [--slots 3] [--scale 0.5] [--mean-s 1.2]

The trials are those of one file of `tests/benchmarks/data`, in its order: each asks for its parameters, and takes in a
process the memory that was recorded (times `scale`) in the time that was recorded (`mean-s` on average), half of it and
90 % of it when it had them. It sleeps meanwhile, so that other load of the machine does not count. The budget is 1.25
times the largest peak. Ours is the whole command, with the present rule and with the largest seen x 1.5; Dask's
`resources=` has the exact worst case as its number; `study.optimize(n_jobs=slots)` has none. Sampled every 50 ms: the
PSS of all processes that trials run in. From the first trial's first line to the last one's last: what a start costs is
left out. Linux.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna

from scheduler.model.parameters import Choice
from tests.benchmarks.packing_learnt import TIGHT, LargestOnly, Trial, trials_of
from tests.benchmarks.sizing import Stream, streams

MIB = 2**20
OWN_BYTES = 40 * MIB  # what the process of a trial holds before it takes what was recorded
PIECE_S, SAMPLE_S = 0.02, 0.05
FOLDER, STREAM, SCALE, MEAN_S = "PACKING_FOLDER", "PACKING_STREAM", "PACKING_SCALE", "PACKING_MEAN_S"


def stream_of(name: str) -> Stream:
    """The stream of that name."""
    return next(stream for stream in streams() if stream.name == name)


def recorded() -> list[Trial]:
    """The trials that the environment names, in the time that it gives them."""
    found = trials_of(stream_of(os.environ[STREAM]))
    stretch = float(os.environ[MEAN_S]) * len(found) / sum(trial.seconds for trial in found)
    return [Trial(each.seen, max(0.1, stretch * each.seconds), each.half, each.most) for each in found]


def objective(trial: optuna.Trial) -> float:
    """Ask for what the recorded trial of that row asked for, then take what it took."""
    row = trial.user_attrs["row"]
    told = recorded()[row]
    for name in told.seen.parameters:
        drawn = told.seen.space[name]
        if isinstance(drawn, Choice):
            trial.suggest_categorical(name, list(drawn.options))
        else:
            trial.suggest_float(name, drawn.low, drawn.high, log=drawn.log)
    take(row, told)
    return float(row)


def by_number(trial: optuna.Trial) -> float:
    """Take what the trial of that number took: of a queue, two threads of `n_jobs` have been seen to take the same."""
    take(trial.number, recorded()[trial.number])
    return float(trial.number)


def take(row: int, told: Trial) -> None:
    """Hold memory as it was recorded, and note when."""
    folder, scale = Path(os.environ[FOLDER]), float(os.environ[SCALE])
    (folder / "pids" / str(os.getpid())).touch()
    began, held, pieces = time.time(), OWN_BYTES, []
    while (ran := time.time() - began) < told.seconds:
        missing = int(scale * told.held(ran)) - held
        if missing > 0:
            pieces.append(b"\xff" * missing)
            held += missing
        time.sleep(PIECE_S)
    pieces.append(b"\xff" * max(0, int(scale * told.seen.peak_bytes) - held))
    time.sleep(SAMPLE_S)
    pieces.clear()
    line = json.dumps({"row": row, "began": began, "ended": time.time()})
    with (folder / "trials.jsonl").open("a") as file:
        file.write(line + "\n")


@dataclass(slots=True)
class Memory:
    """What the processes of trials hold together."""

    folder: Path
    budget_bytes: int
    most_bytes: int = 0
    over_s: float = 0.0

    def watch(self, over: threading.Event) -> None:
        """Sample until told that it is over."""
        before = time.monotonic()
        while not over.wait(SAMPLE_S):
            held = sum(pss_bytes(path.name) for path in (self.folder / "pids").iterdir())
            now = time.monotonic()
            self.over_s += (now - before) * (held > self.budget_bytes)
            self.most_bytes, before = max(self.most_bytes, held), now


def pss_bytes(pid: str) -> int:
    """PSS of a process, 0 when it is gone."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:")), 0)


def enqueued(folder: Path, stream: Stream) -> str:
    """Make a study whose queue is the stream; its database's URL."""
    url = f"sqlite:///{folder / 'study.db'}"
    study = optuna.create_study(study_name="packed", storage=url)
    for row, trial in enumerate(trials_of(stream)):
        study.enqueue_trial(dict(trial.seen.parameters), user_attrs={"row": row})
    return url


def run_ours(folder: Path, stream: Stream, slots: int, budget_bytes: int, *largest_only: str) -> None:
    """The whole command, in a process."""
    count = len(trials_of(stream))
    words = ["--objective", "tests.benchmarks.packing_real:objective", "--storage", enqueued(folder, stream)]
    words += ["--study", "packed", "--trials", str(count), "--slots", str(slots), "--sampler", "random"]
    words += ["--memory-budget", str(budget_bytes), "--pruner", "none", "--dashboard", "off", "--runs-dir", str(folder)]
    start = "from tests.benchmarks import packing_real as p; p.main_of_ours()"
    command = [sys.executable, "-c", start, *largest_only, *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=(folder / "log").open("w"))


def main_of_ours() -> None:
    """The command; with the rule before where that is the first word."""
    from scheduler.cli import schedule
    from scheduler.core import sizing

    words = sys.argv[1:]
    if words[0] == "largest-only":
        sizing.ParameterSizing = LargestOnly  # type: ignore[attr-defined]
        words = words[1:]
    schedule.main(words)


def run_n_jobs(folder: Path, stream: Stream, slots: int, budget_bytes: int) -> None:
    """`study.optimize`, threads of one process."""
    url = f"sqlite:///{folder / 'study.db'}"
    code = (
        "import optuna; from tests.benchmarks.packing_real import by_number; "
        f"optuna.create_study(storage={url!r}).optimize(by_number, n_jobs={slots}, n_trials={len(trials_of(stream))})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stderr=(folder / "log").open("w"))


def run_dask(folder: Path, stream: Stream, slots: int, budget_bytes: int) -> None:
    """A Dask worker with `resources=`, each task with the worst case of all."""
    from distributed import Client, LocalCluster

    told = recorded()
    worst = max(int(float(os.environ[SCALE]) * trial.seen.peak_bytes) for trial in told)
    local = {"threads_per_worker": slots, "memory_limit": 0, "dashboard_address": None}
    with LocalCluster(n_workers=1, resources={"memory": budget_bytes}, **local) as cluster, Client(cluster) as client:
        tasks = [client.submit(take, n, each, resources={"memory": worst}, pure=False) for n, each in enumerate(told)]
        client.gather(tasks)


def measured(run: Any, stream: Stream, slots: int, budget_bytes: int, *more: str) -> str:
    """Run it in a folder of its own; its line of the table."""
    with tempfile.TemporaryDirectory(prefix="packing-") as name:
        folder = Path(name)
        (folder / "pids").mkdir()
        os.environ[FOLDER] = name
        memory, over = Memory(folder, budget_bytes), threading.Event()
        watcher = threading.Thread(target=memory.watch, args=(over,))
        watcher.start()
        try:
            run(folder, stream, slots, budget_bytes, *more)
        finally:
            over.set()
            watcher.join()
        done = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
        ended = list(ends(folder))
    makespan = max(each["ended"] for each in done) - min(each["began"] for each in done)
    work = sum(each["ended"] - each["began"] for each in done) / makespan
    again = sum(reason != "completed" for reason in ended)
    rows = len({each["row"] for each in done})
    return (
        f"{rows:6} {makespan:10.1f} {work:8.2f} {memory.most_bytes / budget_bytes:14.2f} {memory.over_s:8.1f} {again:6}"
    )


def ends(folder: Path) -> Iterator[str]:
    """How the attempts of ours ended."""
    for path in folder.glob("*/journal.jsonl"):
        for line in path.read_text().splitlines():
            if (record := json.loads(line))["event"] == "attempt.ended":
                yield record["reason"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stream", default="lightgbm-random")
    parser.add_argument("--slots", type=int, default=3)
    parser.add_argument("--scale", type=float, default=0.5)
    parser.add_argument("--mean-s", type=float, default=1.2)
    given = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    stream = stream_of(given.stream)
    os.environ.update({STREAM: given.stream, SCALE: str(given.scale), MEAN_S: str(given.mean_s)})
    budget = math.ceil(TIGHT * given.scale * max(trial.seen.peak_bytes for trial in recorded()))
    print(f"{given.stream}: {len(recorded())} trials, {given.slots} slots, budget {budget / MIB:.0f} MiB")
    print(
        f"{'rule':38} {'trials':>6} {'makespan s':>10} {'at work':>8} {'most / budget':>14} {'over s':>8} {'again':>6}"
    )
    ways: list[tuple[str, Any, tuple[str, ...]]] = [
        ("Dask resources=, the worst case known", run_dask, ()),
        ("largest seen x 1.5", run_ours, ("largest-only",)),
        ("ours", run_ours, ()),
        ("study.optimize(n_jobs=slots)", run_n_jobs, ()),
    ]
    for name, run, more in ways:
        print(f"{name:38} {measured(run, stream, given.slots, budget, *more)}", flush=True)


if __name__ == "__main__":
    main()

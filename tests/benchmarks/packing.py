"""How well placement packs memory: makespan over the lower bound, in simulated time, beside simple policies.

The workload: 40 trials, sizes 24 x 150 MB, 10 x 600 MB, 5 x 1.5 GB and 3 GB in random order, each lasting 1 to 4 s; one
worker of 4 GB and 16 slots. Lower bound: max(sum of size x duration / budget, longest trial, sum of durations / slots).

    python -m tests.benchmarks.packing [--seeds 200]
    python -m tests.benchmarks.packing --real 0,1,2,3,4

The first is simulated and covers no overheads: simple policies and `placement` see all that waits; `brain` is the real
brain, which is shown one trial of each study at a time (more while memory is short) and learns durations as it goes.
The second runs the command itself, with real processes that hold a quarter of the memory for the same time, beside the
brain.
"""

from __future__ import annotations

import argparse
import heapq
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import psutil
import yaml

from scheduler.core.placement import place
from scheduler.driver import journal, recording
from scheduler.model import AttemptId, Footprint, Running, TrialId, Waiting, WorkerView, WorkerVitals
from tests.builders import facts, study
from tests.simulator import Simulation, World

MB = 10**6
BUDGET, SLOTS = 4_000 * MB, 16
EPOCH_S = 0.25  # a trial trains for as many epochs as it takes quarters of a second, and says how many beforehand
STUDIES = {1: "one study of 40", 10: "ten studies of 4"}
BUDGETS, HORIZONS = ("2M", "20M"), (1, 2, 3, 4, 5)  # ten studies for the command
SCALE = 4  # of the real run: a whole process, 35 MB, fits into the smallest size
SLACK = 2 * MB  # what a process still takes after it has taken its size
ROOT = Path(__file__).resolve().parents[2]
SIZES = (*[150 * MB] * 24, *[600 * MB] * 10, *[1_500 * MB] * 5, 3_000 * MB)


@dataclass(frozen=True, slots=True)
class Job:
    """One trial of the workload."""

    number: int
    size: int
    duration: float


Chooser = Callable[[list[Job], dict[Job, float], float], Sequence[Job]]


def workload(seed: int) -> list[Job]:
    """The trials in order of arrival (all at 0)."""
    source = random.Random(seed)
    sizes = list(SIZES)
    source.shuffle(sizes)
    return [Job(number, size, source.uniform(1, 4)) for number, size in enumerate(sizes)]


def lower_bound(jobs: Sequence[Job]) -> float:
    """No schedule ends earlier than this."""
    area = sum(job.size * job.duration for job in jobs) / BUDGET
    durations = [job.duration for job in jobs]
    return max(area, *durations, sum(durations) / SLOTS)


def simulate(jobs: Sequence[Job], choose: Chooser) -> tuple[float, int]:
    """Makespan in s and the most bytes reserved at once. `choose` sees what waits, what runs (-> its end) and now."""
    waiting, running = list(jobs), dict[Job, float]()
    ends: list[tuple[float, int, Job]] = []
    now, most = 0.0, 0
    while waiting or ends:
        for job in choose(waiting, running, now):
            waiting.remove(job)
            running[job] = now + job.duration
            heapq.heappush(ends, (now + job.duration, job.number, job))
        most = max(most, sum(job.size for job in running))
        now, _, job = heapq.heappop(ends)
        del running[job]
    return now, most


def greedy(key: Callable[[Job], float], *, backfill: bool, budget: float = BUDGET, slots: int = SLOTS) -> Chooser:
    """Start in the order of `key` whatever fits; without backfill stop at the first that does not."""

    def choose(waiting: list[Job], running: dict[Job, float], now: float) -> list[Job]:
        free, places, starts = budget - sum(job.size for job in running), slots - len(running), list[Job]()
        for job in sorted(waiting, key=lambda job: (key(job), job.number)):
            if job.size <= free and places:
                starts.append(job)
                free, places = free - job.size, places - 1
            elif not backfill:
                break
        return starts

    return choose


def ours(*, known: bool) -> Chooser:
    """The real `place`, with durations predicted exactly (`known`) or not at all."""

    def choose(waiting: list[Job], running: dict[Job, float], now: float) -> list[Job]:
        jobs = {TrialId("packing", job.number): job for job in waiting}
        reserved = sum(job.size for job in running)
        view = WorkerView(
            address="worker",
            capacity_bytes=BUDGET,
            reserved_bytes=reserved,
            available_bytes=BUDGET - reserved,
            unclaimed_bytes=0,
            reserve_bytes=0,
            free_slots=SLOTS - len(running),
            slots=SLOTS,
        )
        queue = [
            Waiting(
                trial=trial,
                footprint=Footprint(host_bytes=job.size),
                slots=1,
                since=0.0,
                share=0.0,
                expected_s=job.duration if known else None,
            )
            for trial, job in jobs.items()
        ]
        busy = [
            Running(
                attempt=AttemptId(TrialId("packing", job.number), 1),
                worker="worker",
                reserved_bytes=job.size,
                device_reserved_bytes=0,
                slots=1,
                expected_end=end if known else None,
            )
            for job, end in running.items()
        ]
        return [jobs[start.trial] for start in place(queue, busy, [view], now).starts]

    return choose


def as_the_brain_sees_it(jobs: Sequence[Job], studies: int, epoch_s: float = EPOCH_S) -> Simulation:
    """Run the workload through the real brain: of each study one trial at a time, durations known from what has run.

    An ask takes 20 ms, a start 10, as in `tests.simulator`. The trials are dealt to the studies in turn.
    """
    names = [f"s{number}" for number in range(studies)]
    left = {name: list(jobs[number::studies]) for number, name in enumerate(names)}
    drawn: dict[str, Job] = {}

    def size(name: str, _: random.Random) -> int:
        drawn[name] = left[name].pop(0)
        return drawn[name].size

    world = World(bytes_of=size, seconds_of=lambda name, _: drawn[name].duration, over=0.0, epoch_s=epoch_s)
    specs = [study(name, quota=len(left[name])) for name in names]
    return Simulation(world, specs, [facts(limit_bytes=BUDGET, slots=SLOTS)], seed=0).run()


POLICIES: dict[str, Chooser] = {
    "static 1 slot": greedy(lambda job: 0, backfill=False, slots=1),
    "FIFO, no backfill": greedy(lambda job: 0, backfill=False),
    "FIFO, first-fit backfill": greedy(lambda job: 0, backfill=True),
    "longest first, backfill": greedy(lambda job: -job.duration, backfill=True),
    "largest memory first, backfill": greedy(lambda job: -job.size, backfill=True),
    "largest mem*dur first, backfill": greedy(lambda job: -job.size * job.duration, backfill=True),
    "smallest memory first, backfill": greedy(lambda job: job.size, backfill=True),
    "16 slots, no admission": greedy(lambda job: 0, backfill=True, budget=float("inf")),
    "placement, durations known": ours(known=True),
    "placement, durations unknown": ours(known=False),
}


def row(name: str, found: Sequence[float], *, seed_0_s: float | None = None, most: int | None = None) -> str:
    """One line of the report. found: ratios to the lower bound, one a seed."""
    twentieths = quantiles(found, n=20, method="inclusive") if len(found) > 1 else [found[0]] * 2
    makespan, peak = "" if seed_0_s is None else f"{seed_0_s:.2f}", "" if most is None else f"{most / 1e9:.2f}"
    return f"{name:34} {makespan:>10} {peak:>8}   {median(found):.3f} [{twentieths[0]:.2f}-{twentieths[-1]:.2f}]"


def table(seeds: int) -> str:
    """The report: seed 0 in full, and the ratio's median and 5th and 95th percentile over the seeds."""
    lines = [
        f"lower bound, seed 0: {lower_bound(workload(0)):.2f} s; {seeds} seeds",
        f"{'policy, simulated':34} {'makespan s':>10} {'peak GB':>8}   ratio: median [p5-p95] over seeds",
    ]
    for name, choose in POLICIES.items():
        makespan, most = simulate(workload(0), choose)
        ratios = [simulate(workload(seed), choose)[0] / lower_bound(workload(seed)) for seed in range(seeds)]
        lines.append(row(name, ratios, seed_0_s=makespan, most=most))
    for studies, name in STUDIES.items():
        for epoch_s, what in ((EPOCH_S, "epochs known"), (0.0, "nothing known")):
            runs = [as_the_brain_sees_it(workload(seed), studies, epoch_s).now for seed in range(seeds)]
            ratios = [now / lower_bound(workload(seed)) for seed, now in enumerate(runs)]
            lines.append(row(f"brain, {name}, {what}", ratios, seed_0_s=runs[0]))
    return "\n".join(lines)


def real_table(seeds: Sequence[int]) -> str:
    """Real and simulated side by side, a line a study count."""
    overhead = workers_own_bytes()
    lines = [
        f"real processes, sizes and budget 1/{SCALE}, seeds {', '.join(map(str, seeds))}; simulated, the same seeds"
    ]
    for studies, name in STUDIES.items():
        played = [real(seed, studies, overhead) for seed in seeds]
        bounds = [lower_bound(workload(seed)) for seed in seeds]
        ratios = [run.makespan_s / bound for run, bound in zip(played, bounds, strict=True)]
        brain = [as_the_brain_sees_it(workload(seed), studies).now / lower_bound(workload(seed)) for seed in seeds]
        most = SCALE * max(run.admitted for run in played)
        lines.append(row(f"real, {name}", ratios, seed_0_s=played[0].makespan_s, most=most))
        lines.append(row(f"brain, {name}, epochs known", brain))
        lines.append("  each: " + " ".join(f"{ratio:.2f}" for ratio in ratios))
        of_room = {
            "reserved at an admission": max(run.admitted / run.room for run in played),
            "reserved with growth": max(run.reserved / run.room for run in played),
            "in use": max(run.used / run.room for run in played),
        }
        lines.append("  most of the budget " + ", ".join(f"{what} {share:.1%}" for what, share in of_room.items()))
        assert of_room["reserved at an admission"] <= 1, "more was admitted than there is room for"
        assert of_room["in use"] <= 1, "more was in use than there is room for"
    return "\n".join(lines)


# -- the real run -----------------------------------------------------------------------------------------------------


def candidates(context: dict[str, Any]) -> list[dict[str, Any]]:
    """One architecture."""
    return [{"d_model": 1, "n_layers": 1, "n_heads": 1, "d_ff": 1, "param_count": 1}]


def sample(trial: Any, context: dict[str, Any], architectures: list[dict[str, Any]], fit: Any) -> dict[str, Any]:
    """The job whose turn it is. The seed of the workload is that of the run; budget and horizon tell the study."""
    seed, studies = divmod(int(context["seed"]), 100)
    number = BUDGETS.index(context["budget"]) * len(HORIZONS) + HORIZONS.index(context["horizon"])
    job = workload(seed)[number::studies][trial.number]
    trial.suggest_float("x", 0, 1)
    epochs = max(1, round(job.duration / EPOCH_S))
    return {**architectures[0], "size": job.size // SCALE, "duration": job.duration, "epochs": epochs}


def estimate(params: dict[str, Any], context: dict[str, Any]) -> dict[str, Any]:
    """Exact; a bare candidate is the smallest."""
    size = params.get("size", min(SIZES) // SCALE)
    return {"host_bytes": size, "device_bytes": 0, "components": {}, "family": "packing/cpu"}


def objective(task: dict[str, Any], progress: Any) -> dict[str, Any]:
    """Hold so much memory for so long, the process itself counted; a report an epoch."""
    params, began = task["params"], time.monotonic()
    taken = bytearray(max(0, params["size"] - psutil.Process().memory_info().rss - SLACK))
    taken[::4096] = b"x" * len(taken[::4096])
    for epoch in range(1, params["epochs"] + 1):
        time.sleep(max(0.0, began + params["duration"] * epoch / params["epochs"] - time.monotonic()))
        progress.report(epoch, 1 / epoch)
    return {"value": 0.0, "epochs": params["epochs"]}


def schedule(root: str, seed: int, studies: int, trials: int, budget_bytes: int, slots: int) -> list[dict[str, Any]]:
    """Run the command; return the journal."""
    functions = {name: f"tests.benchmarks.packing:{name}" for name in ("objective", "sample", "candidates", "estimate")}
    training: dict[str, Any] = {**functions, "micro_batch": None, "check_data": None, "preload": []}
    config = Path(root) / "settings.yaml"
    config.write_text(yaml.safe_dump({"training": training}))
    budgets, horizons = (BUDGETS, HORIZONS) if studies > 1 else (BUDGETS[:1], HORIZONS[:1])
    command = [
        sys.executable, "-m", "scheduler", "--config", str(config), "--budgets", ",".join(budgets), "--horizons",
        ",".join(map(str, horizons)), "--trials", str(trials), "--runs-dir", root, "--name", "bench", "--slots",
        str(slots), "--dashboard", "off", "--pruner", "none", "--seed", str(100 * seed + studies), "--memory-budget",
        str(budget_bytes),
    ]  # fmt: skip
    environment = {**os.environ, "HEADROOM_HOST_DIR": f"{root}/host"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"the run ended with {done.returncode}: {done.stderr[-2000:]}")
    return list(journal.read(Path(root) / "bench" / "journal.jsonl"))


def workers_own_bytes() -> int:
    """What a worker, its agent and its warm process hold: the budget counts them, the workload does not."""
    with tempfile.TemporaryDirectory() as root:
        records = schedule(root, 0, 1, 1, BUDGET, SLOTS)
    return int(next(r["overhead_bytes"] for r in records if r["event"] == "worker.joined"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Real:
    """One run of the command. Bytes are the most at once: reserved when one was admitted, or ever (what trials have
    taken beyond their reservations is charged, too), and in use as the agent's looks of once a second show it.

    room: what there was for all of them.
    """

    makespan_s: float
    room: int
    admitted: int
    reserved: int
    used: int


def real(seed: int, studies: int, overhead_bytes: int) -> Real:
    """Run it, and measure from the first launch to the last end."""
    with tempfile.TemporaryDirectory() as root:
        budget = BUDGET // SCALE + overhead_bytes
        records = schedule(root, seed, studies, len(SIZES) // studies, budget, SLOTS)
        seen = [step.event for start in recording.read(Path(root) / "bench") for step in start.steps]
    room = budget - next(int(r["overhead_bytes"]) for r in records if r["event"] == "worker.joined")
    used = max(sum(event.used_bytes.values()) for event in seen if isinstance(event, WorkerVitals))
    held: dict[str, int] = {}
    admitted, reserved, at = 0, 0, []
    for record in records:
        if record["event"] in ("attempt.launched", "reservation.resized"):
            held[record["attempt"]] = record["reserved_bytes"]
        elif record["event"] == "attempt.ended":
            held.pop(record["attempt"], None)
        else:
            continue
        reserved = max(reserved, sum(held.values()))
        if record["event"] == "attempt.launched":
            admitted = max(admitted, sum(held.values()))
        at.append(record["unix"])
    return Real(makespan_s=at[-1] - at[0], room=room, admitted=admitted, reserved=reserved, used=used)


def main() -> None:
    """Print a report."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.packing")
    parser.add_argument("--seeds", type=int, default=200, help="simulated")
    parser.add_argument("--real", metavar="SEED,...", help="run these for real, beside the same simulated")
    options = parser.parse_args()
    print(table(options.seeds) if options.real is None else real_table([int(seed) for seed in options.real.split(",")]))


if __name__ == "__main__":
    main()

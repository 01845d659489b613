"""How well placement packs memory: makespan over the lower bound, in simulated time, beside simple policies.

The workload: 40 trials, sizes 24 x 150 MB, 10 x 600 MB, 5 x 1.5 GB and 3 GB in random order, each lasting 1 to 4 s; one
worker of 4 GB and 16 slots. Lower bound: max(sum of size x duration / budget, longest trial, sum of durations / slots).
Run it by hand: `.venv/bin/python -m tests.benchmarks.packing [SEEDS]`. Covers no overheads: nothing is really run.
"""

from __future__ import annotations

import heapq
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from scheduler.core.placement import place
from scheduler.model import AttemptId, Footprint, Running, TrialId, Waiting, WorkerView

MB = 10**6
BUDGET, SLOTS = 4_000 * MB, 16
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


def table(seeds: int) -> str:
    """The report: seed 0 in full, and the ratio's median and 5th and 95th percentile over the seeds."""
    lines = [
        f"lower bound, seed 0: {lower_bound(workload(0)):.2f} s; {seeds} seeds",
        f"{'policy':34} {'makespan s':>10} {'ratio':>6} {'peak GB':>8}   median [p5-p95] over seeds",
    ]
    for name, choose in POLICIES.items():
        makespan, most = simulate(workload(0), choose)
        ratios = []
        for seed in range(seeds):
            jobs = workload(seed)
            ratios.append(simulate(jobs, choose)[0] / lower_bound(jobs))
        twentieths = quantiles(ratios, n=20, method="inclusive")
        lines.append(
            f"{name:34} {makespan:10.2f} {makespan / lower_bound(workload(0)):6.2f} {most / 1e9:8.2f}   "
            f"{median(ratios):.3f} [{twentieths[0]:.2f}-{twentieths[-1]:.2f}]"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(int(sys.argv[1]) if len(sys.argv) > 1 else 200))

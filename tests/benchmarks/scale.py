"""What the brain costs as workers and trials grow, in the simulated cluster, with the vitals that each host sends.

    python -m tests.benchmarks.scale [TRIALSxWORKERS ...]

Each size is a batch of 24 studies from its first ask to its end (`tests.simulator.large`): hosts of 24 GiB and four
slots, every one of them reporting once a simulated second. CPU seconds of this process: of the brain alone, and with
the simulated world around it. Covers no Dask, no database and no process: what those cost is `tests.benchmarks.launch`.
"""

from __future__ import annotations

import sys
import time
import tracemalloc

from tests.simulator import Simulation, large

SIZES = ("500x10", "1000x100", "2000x300", "4000x1000")
HEAD = (
    f"{'trials':>7}{'workers':>8}{'events':>10}{'simulated s':>12}{'CPU s':>8}{'brain s':>8}{'us/event':>9}{'cores':>7}"
)


def line(trials: int, workers: int) -> str:
    """Run one size. us/event: the brain's; cores: the brain's CPU for each simulated second."""
    simulation = large(trials, workers, vitals_s=1.0)
    began = time.thread_time()
    simulation.run()
    cpu_s, brain_s = time.thread_time() - began, simulation.brain_s
    return (
        f"{len(simulation.finals):7}{workers:8}{simulation.events:10}{simulation.now:12.0f}{cpu_s:8.1f}{brain_s:8.1f}"
        f"{1e6 * brain_s / simulation.events:9.1f}{brain_s / simulation.now:7.3f}"
    )


def bytes_per_live_trial(workers: int = 50) -> float:
    """What the brain holds for each of four trials on each worker, its workers left out."""

    def at(simulation: Simulation, live: int) -> int:
        while len(simulation.brain.trials) < live:
            simulation.step()
        ours = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, "*/scheduler/core/*")])
        return sum(found.size for found in ours.statistics("filename"))

    simulation = large(100 * workers, workers, vitals_s=0.0)
    tracemalloc.start()
    few, many = at(simulation, workers), at(simulation, 4 * workers)
    tracemalloc.stop()
    return (many - few) / (3 * workers)


def main() -> None:
    """Print a line for each size."""
    print(HEAD, flush=True)
    for size in sys.argv[1:] or SIZES:
        trials, _, workers = size.partition("x")
        print(line(int(trials), int(workers)), flush=True)
    if not sys.argv[1:]:
        print(f"{bytes_per_live_trial():.0f} bytes a live trial")


if __name__ == "__main__":
    main()

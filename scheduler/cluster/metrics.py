"""What Headroom adds to the Dask scheduler's `/metrics`: memory per worker, trials, and why they wait and ended.

Read by Prometheus from the same address as the dashboard. One collector per process, as Dask has it: the registry is
the process's, and a test starts several schedulers in one. Runs that are over are left out after `RUN_GONE_S`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from scheduler.ui.dashboard.runs import Board, Run

RUN_GONE_S = 600.0


class BoardCollector(Collector):
    """Turns a board into samples, one label `run` on each."""

    def __init__(self) -> None:
        self.board: Board | None = None

    def collect(self) -> Iterator[Metric]:
        """Yield the families; asked for at each scrape."""
        now = time.monotonic()
        runs = [] if self.board is None else [run for run in self.board.runs(now) if now - run.seen < RUN_GONE_S]
        yield from _memory(runs)
        yield from _trials(runs)


def _memory(runs: list[Run]) -> Iterator[Metric]:
    labels = ["run", "worker", "host"]
    capacity = GaugeMetricFamily("headroom_memory_capacity_bytes", "What a worker may promise", labels=labels)
    reserved = GaugeMetricFamily("headroom_memory_reserved_bytes", "What it has promised", labels=labels)
    used = GaugeMetricFamily("headroom_memory_used_bytes", "What its processes and trials hold", labels=labels)
    swap = GaugeMetricFamily("headroom_swap_used_bytes", "Swap in use on its host", labels=labels)
    for run in runs:
        for worker in run.snapshot.workers if run.ended is None else ():
            names = [run.snapshot.run, worker.address, worker.host]
            capacity.add_metric(names, worker.capacity_bytes)
            reserved.add_metric(names, worker.reserved_bytes)
            if worker.used_bytes is not None:
                used.add_metric(names, worker.used_bytes)
            if worker.swap_bytes is not None:
                swap.add_metric(names, worker.swap_bytes)
    yield from (capacity, reserved, used, swap)


def _trials(runs: list[Run]) -> Iterator[Metric]:
    running = GaugeMetricFamily("headroom_trials_running", "Attempts under way", labels=["run"])
    waiting = GaugeMetricFamily("headroom_trials_waiting", "Trials that wait, by reason", labels=["run", "reason"])
    done = GaugeMetricFamily("headroom_trials_done", "Trials that count, by study", labels=["run", "study"])
    quota = GaugeMetricFamily("headroom_trials_quota", "How many are to count", labels=["run", "study"])
    ended = CounterMetricFamily("headroom_attempts_ended", "Attempts that ended, by reason", labels=["run", "reason"])
    for run in runs:
        shot = run.snapshot
        running.add_metric([shot.run], len(shot.trials) if run.ended is None else 0)
        for reason, count in shot.waits.items():
            waiting.add_metric([shot.run, reason], count)
        for reason, count in shot.ends.items():
            ended.add_metric([shot.run, reason], count)
        for study in shot.studies:
            done.add_metric([shot.run, study.name], study.done)
            quota.add_metric([shot.run, study.name], study.quota)
    yield from (running, waiting, done, quota, ended)


COLLECTOR = BoardCollector()


def publish(board: Board) -> None:
    """Show a board's runs at `/metrics` from now on, instead of any other's."""
    if COLLECTOR.board is None:
        prometheus_client.REGISTRY.register(COLLECTOR)
    COLLECTOR.board = board

"""The arrival of a run's agents: what they are told when they begin, and the wait until the first of them is ready.

What they say from then on is the `dispatcher`'s, how they are reached the `fleet`'s.
"""

from __future__ import annotations

import dataclasses
import queue
import time
from pathlib import Path
from typing import Protocol

from scheduler import model as m
from scheduler.cluster.client import Listener
from scheduler.driver.dispatcher import Inbox, Item, Said
from scheduler.driver.event_log import Log
from scheduler.driver.ports import Connection
from scheduler.driver.quitting import StoppedAtStart
from scheduler.host import vitals
from scheduler.host.agent_folder import ProcessIdentity
from scheduler.host.attempt_folder import attempts_of
from scheduler.model import letters
from scheduler.model.frames import AgentConfig
from scheduler.model.journal_events import JournalEvent
from scheduler.settings.schema import Settings
from scheduler.workload import objective as objective_workload
from scheduler.workload.plan import Plan

ENVIRONMENT = "training.runtime:environment"
FIRST_WORKER_TIMEOUT_S = 120.0  # from a worker's start to a warm spare: importing torch on a cold disk
LOOK_S = 1.0  # while none is there


def config_of(settings: Settings, plan: Plan, *, topic: str, run_id: str, reserve_bytes: int) -> AgentConfig:
    """Work out what every agent of a run is told; its driver is this process. reserve_bytes: as in `Rules`."""
    watch = settings.watchdog.model_dump()
    preload = settings.training.preload
    if settings.objective is not None and preload is None:
        preload = objective_workload.preload(settings.objective)
    return AgentConfig(
        run=settings.name,
        topic=topic,
        run_id=run_id,
        began_unix=time.time(),
        driver=dataclasses.asdict(ProcessIdentity.own(vitals.start_time)),
        away_timeout_s=settings.away_timeout_s,
        drain_timeout_s=settings.drain_timeout_s,
        environment=ENVIRONMENT,
        context=plan.runnable[0].context,
        watchdog_mode=watch.pop("mode"),
        thresholds=watch,
        reserve_bytes=reserve_bytes,
        dask_limit=settings.cluster is not None,
        preload=preload,
        fork=settings.training.fork,
    )


class Startable(Connection, Protocol):
    """A connection through which agents are begun: `cluster.client.Cluster`."""

    def start(self, plugin_config: m.Json, folders: list[str], listener: Listener) -> None:
        """Begin an agent on every worker there is and will be."""


class Hearing(Protocol):
    """Where the frames of agents go: `fleet.Fleet`."""

    def heard(self, worker: str, text: str, /) -> None:
        """Take in a frame that this worker has carried."""

    def worker_left(self, worker: str, /) -> None:
        """Take in that a Dask worker is gone."""


class Arrivals:
    """Those of one run. inbox: where all that agents say arrives. where: what the user calls the cluster."""

    def __init__(self, cluster: Startable, fleet: Hearing, inbox: Inbox, log: Log, *, where: str) -> None:
        self._cluster, self._fleet, self._inbox, self._log, self._where = cluster, fleet, inbox, log, where
        self._unusable: dict[str, str] = {}  # Dask worker -> why

    def begin(self, config: AgentConfig, folder: Path) -> list[Item]:
        """Put agents on the workers; returns what was said until at least one was ready.

        Raises StoppedAtStart, and HeadroomError: no worker that can be used, or one that cannot run trials.
        """
        self._cluster.start(
            dataclasses.asdict(config),
            [str(attempts_of(folder))],
            Listener(frame=self._fleet.heard, left=self._fleet.worker_left, judged=self._judged),
        )
        seen: list[Item] = []
        deadline = time.monotonic() + FIRST_WORKER_TIMEOUT_S
        while not any(isinstance(item, Said) and isinstance(item.report, letters.Joined) for item in seen):
            try:
                item = self._inbox.get(timeout=LOOK_S)
            except queue.Empty:
                if time.monotonic() > deadline:
                    raise self._no_worker() from None
                self._cluster.tend()
                if self._cluster.is_connected and not self._cluster.is_subscribed:
                    self._cluster.rejoin()  # the scheduler was started again meanwhile
                continue
            match item:
                case Said(worker=worker, report=letters.Broken(detail=detail)):
                    raise m.HeadroomError(f"worker {worker} cannot run trials: {detail}")
                case m.QuitRequested(source=source):
                    raise StoppedAtStart(source)
            seen.append(item)
        return seen

    def _judged(self, worker: str, why: str) -> None:
        """Tell of a Dask worker that cannot be used, and is left alone."""
        self._unusable[worker] = why
        self._log(JournalEvent.WORKER_UNUSABLE, durable=True, worker=worker, why=why)

    def _no_worker(self) -> m.HeadroomError:
        if reasons := "; ".join(dict.fromkeys(self._unusable.values())):
            return m.HeadroomError(f"no worker of {self._where} can be used: {reasons}")
        return m.HeadroomError(
            f"no worker of {self._where} got ready within {FIRST_WORKER_TIMEOUT_S:.0f} s; start one with "
            "`dask worker ADDRESS` in an environment that has Headroom, or see the logs above"
        )

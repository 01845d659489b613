"""The Dask side of the driver on real workers: whom it puts its plugin on, what it carries, and what it survives."""

from __future__ import annotations

import dataclasses
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import psutil
import pytest

from scheduler.cluster.client import Cluster, Listener
from scheduler.driver.fleet import Fleet
from scheduler.host import vitals
from scheduler.model import ExitReason, Json, Outcome, letters, messages
from scheduler.model.messages import Task
from tests import builders as b
from tests.waiting import wait_until

MIB = 2**20


def plugin_config(run_id: str = "run") -> Json:
    """An agent that needs neither torch nor a watchdog; its driver is this test."""
    return dataclasses.asdict(b.agent_config(run_id=run_id, drain_timeout_s=5.0, vitals_every_s=0.2))


def task(folder: Path, number: int, **params: Any) -> Task:
    """An attempt of the objectives of `tests.objectives`."""
    return b.task(f"s/{number}/1", params=params, folder=str(folder / f"s.t{number}.a1"))


class Driver:
    """A driver's ears: the fleet and what it reports."""

    def __init__(self, connected: Cluster) -> None:
        self.cluster = connected
        self.reports: queue.SimpleQueue[tuple[str, letters.Report | letters.Unread]] = queue.SimpleQueue()
        self.ends: list[tuple[str, Outcome]] = []
        self.unusable: list[tuple[str, str]] = []
        self.workers_left: list[str] = []
        self.fleet = Fleet(
            connected,
            on_message=lambda worker, report: self.reports.put((worker, report)),
            on_end=lambda attempt, outcome: self.ends.append((attempt, outcome)),
            hold_s=60.0,
            lives=vitals.lives,
            clock=time.monotonic,
        )

    def start(self, folder: Path) -> None:
        """Put the plugins on the workers."""
        listener = Listener(
            frame=self.fleet.heard, left=self._left, judged=lambda worker, why: self.unusable.append((worker, why))
        )
        self.cluster.start(plugin_config(), [str(folder)], listener)

    def _left(self, worker: str) -> None:
        self.workers_left.append(worker)
        self.fleet.worker_left(worker)

    def joined(self) -> str:
        """The name of the next agent that joins."""
        return self._next(letters.Joined)[0]

    def left(self) -> str:
        """The name of the next one that is out of reach."""
        return self._next(letters.Left)[0]

    def started(self, number: int) -> int:
        """The pid of an attempt's process, once it has started."""
        while True:
            _, said = self._next(letters.TrialSaid)
            assert isinstance(said, letters.TrialSaid)
            if isinstance(said.message, messages.Started) and said.attempt == f"s/{number}/1":
                assert said.pid is not None
                return said.pid

    def _next(self, kind: type) -> tuple[str, letters.Report | letters.Unread]:
        while True:
            worker, report = self.reports.get(timeout=60)
            if isinstance(report, kind):
                return worker, report

    def of(self, number: int) -> list[Outcome]:
        """All ends that were reported for an attempt."""
        return [outcome for attempt, outcome in self.ends if attempt == f"s/{number}/1"]

    def until(self, condition: Callable[[], Any], what: str) -> None:
        """Wait, with the driver's heartbeat going."""

        def beat() -> Any:
            self.cluster.tend()
            self.fleet.tick()
            return condition()

        wait_until(beat, what, 60)


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[tuple[Driver, Path]]:
    """A cluster of our own with its driver, and the folder of the run."""
    connected = Cluster.local(slots=2, memory_bytes=2**30, topic="test", dashboard=None, scratch=str(tmp_path / "dask"))
    driver = Driver(connected)
    driver.start(tmp_path)
    yield driver, tmp_path
    driver.fleet.dismiss("the test is over")
    connected.close()


def worker_pid(driver: Driver) -> int:
    """The Dask worker's process."""
    return int(next(iter(driver.cluster._client.run(os.getpid).values())))


def test_each_attempt_ends_once_whatever_becomes_of_its_worker(ours: tuple[Driver, Path]) -> None:
    """An attempt that returns or raises is its outcome; one whose Dask worker is killed goes on under the next one,
    twice in a row; one whose agent is killed is lost."""
    driver, folder = ours
    name = driver.joined()
    driver.fleet.launch(task(folder, 0, do="end"), name)
    driver.fleet.launch(task(folder, 1, do="fail"), name)
    driver.until(lambda: driver.of(0) and driver.of(1), "both have ended")
    assert driver.of(0)[0].reason is ExitReason.COMPLETED
    assert driver.of(1)[0].reason is ExitReason.FAILED
    assert "not to my taste" in driver.of(1)[0].detail

    driver.fleet.launch(task(folder, 2, do="wait", until=str(folder / "go")), name)
    trial = driver.started(2)
    for _ in range(2):
        os.kill(worker_pid(driver), signal.SIGKILL)
        driver.left()
        driver.until(lambda: driver.fleet.in_reach, "another worker carries for the agent")
        assert driver.joined() == name
    assert psutil.pid_exists(trial)
    (folder / "go").touch()
    driver.until(lambda: driver.of(2), "it has ended by itself")
    assert driver.of(2)[0].reason is ExitReason.COMPLETED

    driver.fleet.launch(task(folder, 3, do="wait", until=str(folder / "never")), name)
    driver.started(3)
    os.kill(int(name.rpartition(":")[2]), signal.SIGKILL)
    driver.until(lambda: driver.of(3), "the lost attempt has ended")
    assert driver.of(3)[0].reason is ExitReason.LOST
    driver.fleet.launch(task(folder, 4, do="end"), name)
    driver.until(lambda: driver.of(4), "what is sent to an agent that is gone has ended")
    assert driver.of(4)[0].reason is ExitReason.LOST

    second = driver.joined()
    driver.fleet.launch(task(folder, 5, do="end"), second)
    driver.until(lambda: driver.of(5), "the worker has another agent")
    assert {attempt: len([1 for a, _ in driver.ends if a == attempt]) for attempt, _ in driver.ends} == {
        f"s/{n}/1": 1 for n in range(6)
    }


def test_an_agent_that_is_killed_while_it_starts_is_started_again(tmp_path: Path) -> None:
    """That a process was killed says nothing of its worker: the driver hears of no broken one, only of the next."""
    connected = Cluster.local(slots=2, memory_bytes=2**30, topic="test", dashboard=None, scratch=str(tmp_path / "dask"))
    driver = Driver(connected)
    worker = psutil.Process(worker_pid(driver))

    def kill() -> None:
        def beginning() -> list[psutil.Process]:
            return [child for child in worker.children() if "scheduler.worker.agent_process" in child.cmdline()]

        wait_until(beginning, "an agent begins", 60)
        beginning()[0].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        driver.start(tmp_path)
        killer.join()
        assert isinstance(driver.reports.get(timeout=60)[1], letters.Joined)
    finally:
        driver.fleet.dismiss("the test is over")
        connected.close()


def test_a_cluster_made_anew_finds_what_still_runs(ours: tuple[Driver, Path]) -> None:
    """Scheduler, nanny and worker are replaced; the agent and its attempt are not, and are heard again."""
    driver, folder = ours
    name = driver.joined()
    driver.fleet.launch(task(folder, 0, do="wait", until=str(folder / "go")), name)
    trial = driver.started(0)
    before = driver.cluster._client
    driver.cluster.revive()
    driver.until(lambda: driver.cluster._client is not before and driver.cluster.is_connected, "another cluster")
    driver.fleet.disconnected()  # as the driver's loop does when it finds the connection gone, and back
    driver.cluster.rejoin()
    driver.until(lambda: driver.fleet.in_reach, "its worker carries for the agent")
    assert driver.joined() == name
    assert psutil.pid_exists(trial)
    (folder / "go").touch()
    driver.until(lambda: driver.of(0), "it has ended by itself")
    assert driver.of(0)[0].reason is ExitReason.COMPLETED


def test_a_worker_that_dies_four_times_while_it_starts_is_started_again(tmp_path: Path) -> None:
    """Whatever kills it (the kernel, for memory) may do so more than once, and Dask replaces none that was starting."""
    fatal = tmp_path / "fatal.py"
    fatal.write_text(
        "import os\n"
        f"with open({str(tmp_path / 'starts')!r}, 'a+') as file:\n"
        "    file.write('x')\n"
        "    starts = file.tell()\n"
        "if starts < 5:\n"
        "    os._exit(1)\n"
    )
    with dask.config.set({"distributed.worker.preload": [str(fatal)]}):
        cluster = Cluster.local(
            slots=1, memory_bytes=2**30, topic="test", dashboard=None, scratch=str(tmp_path / "scratch")
        )
    try:
        assert cluster.is_connected
        assert (tmp_path / "starts").stat().st_size >= 5  # Dask reads a preload twice in a worker that lives
    finally:
        cluster.close()

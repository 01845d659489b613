"""The Dask side of the driver on a real LocalCluster: every attempt ends exactly once, whatever its worker does."""

from __future__ import annotations

import os
import queue
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed import WorkerPlugin, get_worker

from scheduler.adapters.cluster import Cluster
from scheduler.model import ExitReason, Outcome
from tests.waiting import wait_until


class Idle(WorkerPlugin):
    """A plugin in the agent's place: says that its worker is there."""

    name = "idle"

    def setup(self, worker: Any) -> None:
        """Announce the worker."""
        worker.log_event("test", {"type": "joined", "worker": worker.address, "pid": os.getpid()})


def act(task: dict[str, Any], topic: str) -> dict[str, Any]:
    """(On the worker.) End, fail, or stay, as the task says."""
    if task["do"] == "fail":
        raise RuntimeError("the agent has a bug")
    if task["do"] == "stay":
        threading.Event().wait(600)
    return Outcome(reason=ExitReason.COMPLETED, value=1.0, detail=get_worker().address).to_json()


class Ends:
    """Collects what the cluster reports."""

    def __init__(self) -> None:
        self.messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.ends: list[tuple[str, Outcome]] = []

    def joined(self) -> dict[str, Any]:
        """The next worker that says it is there."""
        while (message := self.messages.get(timeout=60))["type"] != "joined":
            continue
        return message

    def of(self, attempt: str) -> list[Outcome]:
        """All ends that were reported for an attempt."""
        return [outcome for name, outcome in self.ends if name == attempt]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, Ends]]:
    """One cluster of our own for all tests here."""
    scratch = str(tmp_path_factory.mktemp("dask"))
    cluster = Cluster.local(slots=2, memory_bytes=2**30, topic="test", dashboard=None, scratch=scratch)
    ends = Ends()
    cluster.start(Idle(), ends.messages.put, lambda attempt, outcome: ends.ends.append((attempt, outcome)))
    yield cluster, ends
    cluster.close()


def test_each_attempt_ends_once(local: tuple[Cluster, Ends]) -> None:
    """A task that returns is its outcome; one that raises is LOST with the exception; a dead worker loses its tasks.

    The task of a dead worker is not run again, and one sent to a worker that has left ends at once.
    """
    cluster, ends = local
    worker = ends.joined()
    address = worker["worker"]
    cluster.submit(act, {"attempt": "s/0/1", "do": "end"}, address)
    cluster.submit(act, {"attempt": "s/1/1", "do": "fail"}, address)
    wait_until(lambda: ends.of("s/0/1") and ends.of("s/1/1"), "both have ended", 30)
    assert ends.of("s/0/1")[0].detail == address
    assert ends.of("s/1/1")[0].reason is ExitReason.LOST
    assert "the agent has a bug" in ends.of("s/1/1")[0].detail

    cluster.submit(act, {"attempt": "s/2/1", "do": "stay"}, address)
    wait_until(lambda: psutil.Process(worker["pid"]).num_threads() > 1, "the task runs", 30)
    os.kill(worker["pid"], signal.SIGKILL)
    wait_until(lambda: ends.of("s/2/1"), "the lost task has ended", 30)
    second = ends.joined()  # the nanny's replacement
    cluster.submit(act, {"attempt": "s/3/1", "do": "end"}, address)
    wait_until(lambda: ends.of("s/3/1"), "what was sent to a worker that is gone has ended", 30)
    assert ends.of("s/3/1")[0].reason is ExitReason.LOST

    cluster.submit(act, {"attempt": "s/4/1", "do": "end"}, second["worker"])
    wait_until(lambda: ends.of("s/4/1"), "the replacement works", 30)
    assert {attempt: len(ends.of(attempt)) for attempt, _ in ends.ends} == {f"s/{n}/1": 1 for n in range(5)}
    assert ends.of("s/2/1")[0].reason is ExitReason.LOST


def test_worker_uses_the_scratch_folder(local: tuple[Cluster, Ends], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing of Dask is written outside the run folder."""
    folders = list(Path(tmp_path_factory.getbasetemp()).glob("dask*/**/worker-*"))
    assert folders

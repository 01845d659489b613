"""What is read of the memory of trials: how often, and what is made of a sample and of a kill by the kernel."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from scheduler.host import vitals
from scheduler.model.samples import ProcessMemory, TreeSample
from scheduler.units import MIB
from scheduler.worker.memory_gauge import MemoryGauge
from scheduler.worker.tree_peak import TreePeak
from scheduler.worker.trial_tree import TrialTree

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def tree_of(pid: int, start_time: float = 1.0) -> TrialTree:
    """A trial that has just begun."""
    return TrialTree(attempt=f"study/{pid}/1", pid=pid, start_time=start_time)


def process(pid: int, size: int) -> ProcessMemory:
    """One that holds so many MiB, all its own, and never held more."""
    held = size * MIB
    return ProcessMemory(pid=pid, start=1.0, footprint_bytes=held, resident_bytes=held, file_bytes=0, peak_bytes=held)


# -- how often --------------------------------------------------------------------------------------------------------


class Looks:
    """Processes as a host has them that does what it is told; `cost_s` goes by with each look."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cost_s: float) -> None:
        self.now, self.cost_s = 0.0, cost_s
        self.keys: list[list[str]] = []
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(vitals, "has_children", lambda pid: pid != 2)
        monkeypatch.setattr(vitals, "processes", self.processes)

    def processes(self, wanted: Mapping[str, tuple[int, Any, Any]]) -> dict[str, list[ProcessMemory]]:
        self.now += self.cost_s
        self.keys.append(list(wanted))
        return {key: [process(pid, 10), process(pid + 100, 5)] for key, (pid, _, _) in wanted.items()}


def test_only_trials_with_children_are_looked_at_and_not_for_more_than_their_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One reading for all that have children; after one that took 20 ms the next is a second away."""
    looks, trees, gauge = Looks(monkeypatch, 0.02), [tree_of(pid) for pid in (1, 2, 3)], MemoryGauge()
    for _ in range(16):
        gauge.beat(trees)
        looks.now += 0.25
    assert looks.keys == [["study/1/1", "study/3/1"]] * 4
    assert [tree.peak.peak_bytes for tree in trees] == [15 * MIB, 0, 15 * MIB]
    assert trees[0].members == {(1, 1.0), (101, 1.0)}
    assert set(trees[0].descendants) == {(101, 1.0)}


# -- what a sample says -----------------------------------------------------------------------------------------------

ALONE = TreeSample(footprint_bytes=90 * MIB, members=((1, 1.0),))
TWO = TreeSample(footprint_bytes=150 * MIB, unmapped_bytes=5 * MIB, members=((1, 1.0), (2, 1.0)))


@pytest.mark.parametrize(
    ("sample", "looked", "used", "peak"),
    [
        (ALONE, [], 90, 100),
        (dataclasses.replace(ALONE, shared_bytes=MIB, footprint_bytes=120 * MIB), [], 120, 120),  # a memfd of 30 MiB
        (TWO, [process(1, 60), process(2, 50)], 115, 110),  # pages that both have count once, a memfd on top
        (TWO, [], 150, 100),  # nobody has looked: the sample's upper bound
        (dataclasses.replace(ALONE, footprint_bytes=None), [], None, 100),
    ],
    ids=["alone", "fills a memfd", "with a child", "with a child nobody looked at", "unreadable"],
)
def test_what_a_trial_holds_and_has_held(
    sample: TreeSample, looked: list[ProcessMemory], used: int | None, peak: int
) -> None:
    """Now, and at most: the kernel's mark of the root's peak is 100 MiB."""
    tree = tree_of(1)
    if looked:
        tree.looked_at(looked)
    assert tree.sampled(sample, 100 * MIB) == (None if used is None else used * MIB)
    assert tree.peak_bytes == peak * MIB


def test_a_peak_stays_and_what_could_not_be_read_takes_nothing_away() -> None:
    """The trial's own word and the kernel's mark are two sources of one number: the larger one."""
    tree = TrialTree(attempt="s/0/1", pid=1, start_time=1.0, peak=TreePeak())
    assert tree.peak_bytes is None
    for said in (50, None, 70, 60):
        tree.reached(None if said is None else said * MIB)
    assert tree.peak_bytes == 70 * MIB


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process of ours that waits."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@linux_only
def test_real_processes_are_measured_with_us(child: subprocess.Popen[bytes]) -> None:
    """A trial's use and peak by its attempt, and the agent with all of them; of one that is gone nothing is said."""
    start = vitals.start_time(child.pid)
    assert start is not None
    here, gone = tree_of(child.pid, start), tree_of(child.pid + 100_000_000)
    measured = MemoryGauge().measure([here, gone], shared_bytes=0)
    assert set(measured.used_bytes) == set(measured.peak_bytes) == {here.attempt}
    assert 0 < measured.used_bytes[here.attempt] < measured.tree_bytes
    assert here.members == {(child.pid, start)}
    shared = MemoryGauge().measure([here], shared_bytes=1 << 50)
    assert shared.tree_bytes == 0  # never less than nothing
    assert (os.getpid(), vitals.start_time(os.getpid())) not in here.members


@pytest.mark.parametrize(("killed", "told"), [(1, True), (0, False), (2, False)])
def test_what_the_kernel_freed_is_told_of_one_victim_only(
    killed: int, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is available after its only kill, that victim held; with others beside it that would say too much."""
    counted = vitals.oom_kills() or 0
    monkeypatch.setattr(vitals, "oom_kills", lambda: counted)
    gauge = MemoryGauge()
    monkeypatch.setattr(vitals, "oom_kills", lambda: counted + killed)
    freed = gauge.freed_bytes()
    assert (freed is not None and freed > 0) is told

"""A trial is its whole process tree: what is learnt of it, and what the ledger sees, has its children in it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scheduler.driver import journal
from scheduler.host import vitals
from scheduler.model.messages import Last
from scheduler.model.samples import ProcessMemory
from scheduler.worker.tree_peak import TreePeak, with_children
from scheduler.worker.witness import Witness, conclude
from tests.test_own_objective import WITHOUT_ESTIMATE, launches_of, schedule, trials_of

pytestmark = pytest.mark.timeout(800)  # whole commands, on a machine that may be busy
MIB = 2**20
ROOT = 1
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def process(
    pid: int, footprint: int | None, *, peak: int | None = None, file: int = 0, resident: int | None = None
) -> ProcessMemory:
    """One process of a tree, in MiB; by default all that it holds is its own and was never more."""
    held = (footprint or 0) + file if resident is None else resident
    return ProcessMemory(
        pid=pid,
        start=1.0,
        footprint_bytes=None if footprint is None else footprint * MIB,
        resident_bytes=held * MIB,
        file_bytes=file * MIB,
        peak_bytes=(held if peak is None else peak) * MIB,
    )


def tree(*looks: list[ProcessMemory]) -> TreePeak:
    """What is known after these looks."""
    found = TreePeak()
    for look in looks:
        found.saw(ROOT, look)
    return found


# -- the rule -------------------------------------------------------------------------------------------------------


def test_what_a_forked_root_shares_is_all_its_own() -> None:
    """A fork server and its other trials each have a part of those pages, by the kernel's count: none is left out."""
    found = TreePeak(shared_bytes=140 * MIB)
    found.saw(ROOT, [process(ROOT, 10 + 140 // 4), process(2, 50)])
    assert found.footprint_bytes is not None and found.footprint_bytes >= (10 + 140 + 50) * MIB
    assert found.peak_bytes >= (10 + 140 + 50) * MIB


def test_processes_are_added_up_and_libraries_counted_once() -> None:
    """Footprints add up; mapped files count once, as a process's own peak has them."""
    found = tree([process(ROOT, 100, file=80), process(2, 50, file=70)])
    assert (found.peak_bytes, found.footprint_bytes) == (230 * MIB, 150 * MIB)


def test_the_most_that_was_seen_stays() -> None:
    """A child that has ended is not forgotten, and a tree of one process is the kernel's to measure."""
    found = tree([process(ROOT, 100), process(2, 900)], [process(ROOT, 100)])
    assert (found.peak_bytes, found.footprint_bytes) == (1000 * MIB, 100 * MIB)
    assert tree([process(ROOT, 100, peak=500)]).peak_bytes == 0


def test_what_rose_and_fell_between_two_looks_counts_once() -> None:
    """A child's own peak tells what it reached between two looks; the next look does not count it again."""
    small = [process(ROOT, 100), process(2, 10)]
    fallen = [process(ROOT, 100), process(2, 10, peak=400)]
    assert tree(small, fallen).peak_bytes == 500 * MIB
    later = tree(small, fallen, [process(ROOT, 100), process(2, 10, peak=400), process(3, 300)])
    assert later.peak_bytes == 500 * MIB, "410 now: the second process is long below its peak"


def test_what_the_root_reached_before_it_had_children_is_not_added() -> None:
    """A root that was large once and then starts a child was never both."""
    found = TreePeak()
    found.saw(ROOT, [process(ROOT, 100, peak=900), process(2, 50)])
    assert found.peak_bytes == 150 * MIB
    found.alone((ROOT, 1.0), 2000 * MIB)
    found.saw(ROOT, [process(ROOT, 100, peak=2000), process(2, 50)])
    assert found.peak_bytes == 150 * MIB
    found.saw(ROOT, [process(ROOT, 100, peak=2500), process(2, 50)])
    assert found.peak_bytes == (2500 + 50) * MIB, "this time it had a child"


def test_a_process_that_cannot_be_read_makes_no_sum_too_small() -> None:
    """None is never taken for nothing."""
    found = tree([process(ROOT, 100), process(2, None)])
    assert (found.peak_bytes, found.footprint_bytes) == (0, None)


@pytest.mark.parametrize(
    ("waited_for", "looks", "peak"),
    [
        (None, [], 100),
        (90, [], 100),  # inherited from the root
        (1700, [], 1800),  # no look saw it
        (1700, [[process(ROOT, 60), process(2, 1700)]], 1760),  # a look saw all of it
        (1700, [[process(ROOT, 60), process(2, 1000)]], 1760),  # a look saw it grow
        (1700, [[process(ROOT, 60), process(2, 10)]], 1790),  # a look saw another one
    ],
)
def test_children_that_no_look_saw(waited_for: int | None, looks: list[list[ProcessMemory]], peak: int) -> None:
    """The kernel keeps the largest peak of those that were waited for; a child inherits its parent's."""
    known = None if waited_for is None else waited_for * MIB
    assert with_children(100 * MIB, tree(*looks), known) == peak * MIB
    last = Last(result={"value": 1.0}, peak_bytes=100 * MIB, children_peak_bytes=known)
    assert conclude(Witness(last=last, tree=tree(*looks))).peak_bytes == peak * MIB


# -- real processes -------------------------------------------------------------------------------------------------

FORKS = """
import os, sys
held = b"x" * (60 << 20)
if os.fork() == 0:
    mine = b"y" * (30 << 20)
    print("ready", flush=True)
    sys.stdin.read()
    os._exit(0)
sys.stdin.read()
os.wait()
"""


@pytest.fixture
def forked() -> Iterator[subprocess.Popen[str]]:
    """A process of 60 MiB and its fork, which adds 30 of its own."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-S", "-c", FORKS], text=True, start_new_session=True, **pipes) as process:
        assert process.stdout is not None and process.stdout.readline().strip() == "ready"
        yield process
        process.kill()


@linux_only
def test_a_fork_shares_what_it_has_not_touched(forked: subprocess.Popen[str]) -> None:
    """Pages of the parent's that a fork only reads are counted once: 90 MiB and an interpreter, not 150."""
    start = vitals.start_time(forked.pid)
    assert start is not None and vitals.has_children(forked.pid)
    found = TreePeak()
    found.saw(forked.pid, vitals.processes({"": (forked.pid, start, ())})[""])
    assert found.footprint_bytes is not None and 90 * MIB < found.footprint_bytes < 115 * MIB
    assert 90 * MIB < found.peak_bytes < 125 * MIB


@linux_only
def test_who_has_no_children_is_told_cheaply() -> None:
    """A process without children, one with, and one that is gone."""
    with subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert not vitals.has_children(child.pid)
        assert vitals.has_children(os.getpid())
        child.kill()
    assert not vitals.has_children(child.pid)


@linux_only
def test_a_childs_peak_is_seen_at_the_next_look() -> None:
    """A child that has held 200 MiB and given them back since the last look: they are in the sum."""
    code = "print('small', flush=True); input(); b = b'x' * (200 << 20); del b; print('done', flush=True); input()"
    found, us = TreePeak(), os.getpid()
    start = vitals.start_time(us)
    assert start is not None
    with subprocess.Popen(
        [sys.executable, "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdout.readline()
        found.saw(us, vitals.processes({"": (us, start, ())})[""])
        before = found.peak_bytes
        child.stdin.write("\n")
        child.stdin.flush()
        child.stdout.readline()
        found.saw(us, vitals.processes({"": (us, start, ())})[""])
        child.kill()
    assert 190 * MIB < found.peak_bytes - before < 230 * MIB


# -- the whole command ----------------------------------------------------------------------------------------------


@linux_only
@pytest.mark.parametrize("how", ["short", "long", "forks"])
def test_a_trial_is_learnt_with_its_children(how: str, tmp_path: Path) -> None:
    """A child of 300 MiB, for under 0.5 s, for 4 s, or a fork: the study learns the tree and reserves for it."""
    training: dict[str, Any] = {
        **WITHOUT_ESTIMATE,
        "sample": "tests.children:sample",
        "objective": f"tests.children:{how}",
        "preload": [],
    }
    done = schedule(tmp_path, training, "--trials", "2", "--slots", "1")
    assert done.returncode == 0, done.stderr
    for trial in trials_of(tmp_path):
        peak, own = trial.user_attrs["footprint.observed_peak_bytes"], trial.user_attrs["metrics"]["own_peak_bytes"]
        assert own < 100 * MIB
        assert own - 30 * MIB + 300 * MIB < peak < own + 330 * MIB
    second = launches_of(tmp_path)[1]
    assert second["reserved_bytes"] > 450 * MIB


@linux_only
def test_a_reservation_grows_with_the_children(tmp_path: Path) -> None:
    """What a child takes is charged while it runs, and the next estimate is corrected by it."""
    functions = {"sample": "tests.children:sample", "objective": "tests.children:long", "preload": []}
    training = {**WITHOUT_ESTIMATE, **functions, "estimate": "tests.children:estimate"}
    done = schedule(tmp_path, training, "--trials", "2", "--slots", "1")
    assert done.returncode == 0, done.stderr
    lines = list(journal.read(tmp_path / "run" / "journal.jsonl"))
    first = [line for line in lines if str(line.get("attempt", "")).endswith("/0/1")]
    (progress,) = [line for line in first if line["event"] == "attempt.progress"]
    assert progress["peak_bytes"] > 300 * MIB
    grown = [line["reserved_bytes"] for line in first if line["event"] == "reservation.resized"]
    assert grown and grown[-1] > 300 * MIB
    before, after = launches_of(tmp_path)
    assert before["reserved_bytes"] == 60 * MIB and after["reserved_bytes"] > 300 * MIB

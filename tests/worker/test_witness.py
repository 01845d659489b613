"""What the end of an attempt was, out of all that was seen of it."""

from __future__ import annotations

import dataclasses
import signal
from typing import Any

import pytest

from scheduler.model import ExitReason, KillRecord
from scheduler.model.messages import last
from scheduler.model.samples import ProcessMemory
from scheduler.worker.tree_peak import TreePeak
from scheduler.worker.witness import Witness, conclude

RESULT = {"type": "result", "result": {"value": 0.5, "epochs": 3, "stop_reason": "completed"}, "peak_bytes": 100}
STOPPED = {"stop_reason": "interrupted"}
KILL = KillRecord(kill_id="k", rule="silent", reason=ExitReason.STALLED)
MEMORY = dataclasses.replace(KILL, reason=ExitReason.EVICTED)


def with_last(seen: dict[str, Any]) -> dict[str, Any]:
    """The witness's fields, the final message parsed as the agent parses it."""
    return {**seen, "last": last(seen["last"])} if "last" in seen else seen


# Seen within its promise a second before the kernel killed it.
LEAPT = {"oom_killed": True, "peak_bytes": 1, "allowed_bytes": 8}


@pytest.mark.parametrize(
    ("seen", "reason", "detail"),
    [
        ({"last": RESULT, "exit_status": 0}, ExitReason.COMPLETED, "completed"),
        ({"last": RESULT, "kill": KILL, "exit_status": -9}, ExitReason.COMPLETED, "completed"),
        ({"last": {**RESULT, "result": {"stop_reason": "pruned"}}}, ExitReason.PRUNED, "pruned"),
        ({"last": {**RESULT, "result": STOPPED, "asked": "drain"}}, ExitReason.INTERRUPTED, "interrupted"),
        ({"last": {**RESULT, "result": STOPPED}, "asked": "drain"}, ExitReason.INTERRUPTED, "interrupted"),
        ({"last": {**RESULT, "result": STOPPED}, "asked": "timeout"}, ExitReason.TIMED_OUT, "interrupted"),
        ({"last": {**RESULT, "result": STOPPED}, "asked": "prune"}, ExitReason.PRUNED, "interrupted"),
        ({"last": RESULT, "asked": "timeout"}, ExitReason.COMPLETED, "completed"),
        ({"last": {**RESULT, "result": STOPPED}}, ExitReason.FAILED, "nobody asked it to leave"),
        ({"last": {**RESULT, "result": {**STOPPED, "value": 0.5}}}, ExitReason.COMPLETED, "interrupted"),
        ({"last": {"type": "error", "error": "x", "started": False}}, ExitReason.NOT_STARTED, "x"),
        ({"last": {"type": "error", "error": "x", "no_room": True}}, ExitReason.NO_ROOM, "x"),
        ({"ended_by": "timeout", "exit_status": -9}, ExitReason.TIMED_OUT, "timeout"),
        ({"last": {**RESULT, "result": {"value": "high"}}}, ExitReason.FAILED, "the value 'high', not a number"),
        ({"last": {"type": "error", "error": "ValueError: bad"}}, ExitReason.FAILED, "ValueError: bad"),
        ({"kill": KILL, "exit_status": -15}, ExitReason.STALLED, "watchdog: silent"),
        ({"ended_by": "orphaned", "exit_status": -9}, ExitReason.LOST, "orphaned"),
        ({"ended_by": "SIGTERM", "exit_status": -9}, ExitReason.INTERRUPTED, "SIGTERM"),
        ({"oom_killed": True, "exit_status": -9}, ExitReason.KERNEL_OOM, "out of memory"),
        ({"oom_killed": True, "peak_bytes": 9, "allowed_bytes": 8}, ExitReason.KERNEL_OOM, "out of memory"),
        ({"oom_killed": True, "peak_bytes": 8, "allowed_bytes": 8}, ExitReason.PREEMPTED, "within its promise"),
        ({**LEAPT, "freed_bytes": 9}, ExitReason.KERNEL_OOM, "out of memory"),
        ({**LEAPT, "freed_bytes": 7}, ExitReason.PREEMPTED, "within its promise"),
        ({"kill": dataclasses.replace(MEMORY, within_promise=True)}, ExitReason.PREEMPTED, "watchdog: silent"),
        ({"kill": dataclasses.replace(MEMORY, within_promise=False)}, ExitReason.EVICTED, "watchdog: silent"),
        ({"kill": dataclasses.replace(KILL, within_promise=True)}, ExitReason.STALLED, "watchdog: silent"),
        ({"exit_status": -signal.SIGSEGV}, ExitReason.FAILED, "SIGSEGV"),
        ({"exit_status": 7}, ExitReason.FAILED, "exit status 7"),
        ({"exit_status": None}, ExitReason.FAILED, "would not die"),
    ],
)
def test_conclude(seen: dict[str, Any], reason: ExitReason, detail: str) -> None:
    """Each way to end has one reason; a durable result wins over a kill that came too late."""
    outcome = conclude(Witness(**with_last(seen)))
    assert outcome.reason is reason
    assert detail in outcome.detail


def test_conclude_keeps_the_largest_peak() -> None:
    """The peak is the larger of what was sampled and what the process said last."""
    assert conclude(Witness(last=last(RESULT), peak_bytes=50)).peak_bytes == 100
    assert conclude(Witness(last=last(RESULT), peak_bytes=500)).peak_bytes == 500
    assert conclude(Witness(exit_status=1)).peak_bytes is None


def test_within_its_promise_means_the_whole_tree() -> None:
    """A kill by the kernel is the trial's own doing when its children are what went over."""
    looks = TreePeak()
    looks.saw(1, [memory(1, 60), memory(2, 900)])
    outcome = conclude(Witness(oom_killed=True, peak_bytes=60, allowed_bytes=500, tree=looks))
    assert outcome.reason is ExitReason.KERNEL_OOM


def memory(pid: int, size: int) -> ProcessMemory:
    """A process that holds so many bytes, all its own."""
    return ProcessMemory(pid=pid, start=1.0, footprint_bytes=size, resident_bytes=size, file_bytes=0, peak_bytes=size)

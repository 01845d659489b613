"""Where a trial is and how an attempt ended: two types, never one."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scheduler.model.study import Json


class TrialState(enum.Enum):
    """Where a trial is."""

    PENDING = "pending"  # sampled, waits for memory
    ADMITTED = "admitted"  # reserved and sent to a worker
    RUNNING = "running"  # its process has started
    FINISHED = "finished"


class ExitReason(enum.Enum):
    """How an attempt ended."""

    COMPLETED = "completed"
    PRUNED = "pruned"  # Optuna's pruner
    STALLED = "stalled"  # watchdog: no CPU, no progress
    EVICTED = "evicted"  # watchdog: the host was under pressure, this one was chosen (or thrashed)
    OVERSHOOT = "overshoot"  # watchdog: far over its reservation
    KERNEL_OOM = "kernel_oom"
    FAILED = "failed"  # exception, NaN, sys.exit, signal: the trial's own
    LOST = "lost"  # its worker, host or driver died
    INTERRUPTED = "interrupted"  # asked to stop; its checkpoint is kept
    NOT_STARTED = "not_started"  # its process never came up: the host's disk, inodes, processes, folder, packages
    NO_ROOM = "no_room"  # while it ran, a disk was full or gone, or a process was not to be had
    PREEMPTED = "preempted"  # killed for memory although within its promise: another took the memory
    TIMED_OUT = "timed_out"  # the limit per trial that the user set


MEMORY_REASONS = frozenset({ExitReason.EVICTED, ExitReason.OVERSHOOT, ExitReason.KERNEL_OOM})
WATCHDOG_REASONS = frozenset({ExitReason.STALLED, ExitReason.EVICTED, ExitReason.OVERSHOOT})


class FinalState(enum.Enum):
    """What the study is told of a trial: Optuna's three final states."""

    COMPLETE = "COMPLETE"
    PRUNED = "PRUNED"
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one attempt ended, complete enough for a post-mortem.

    value: the objective's (of several the first), None unless the trial produced one. values: all of several.
    fatal: its error ends the study (the caller did not ask to catch it).
    peak_bytes: the process's own VmHWM (host); None when it could not be read. device_peak_bytes: as reported.
    detail: one line (exception's last line, signal name, rule of the watchdog).
    kill: the watchdog's record (rule, kill_id, evidence, seconds), empty for any other end.
    environment: of the very process it ran in, with runtime_bytes what that held when it was ready; None: not known.
    result: the objective's own result mapping (metrics, epochs, stop_reason, ...).
    checkpoint: path of the last good checkpoint, None when there is none.
    """

    reason: ExitReason
    value: float | None = None
    values: tuple[float, ...] = ()
    fatal: bool = False
    detail: str = ""
    epochs: int = 0
    duration_s: float = 0.0
    peak_bytes: int | None = None
    device_peak_bytes: int | None = None
    environment: str | None = None
    runtime_bytes: int | None = None
    exit_status: int | None = None
    traceback: str | None = None
    log_tail: str = ""
    checkpoint: str | None = None
    kill: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> Json:
        """A JSON object; `from_json` is the inverse."""
        data = dataclasses.asdict(self)
        data["reason"] = self.reason.value
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Outcome:
        values = tuple(float(value) for value in data.get("values") or ())
        return cls(**{**data, "reason": ExitReason(data["reason"]), "values": values})

"""Where a trial is and how an attempt ended: two types, never one."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scheduler.model.fields import BadMessage, fields_of, finite, read
from scheduler.model.plain import line, plain
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


_SIGNALS = frozenset({"term", "kill"})
_LAST_STEPS = frozenset({"released", "aborted"})
_MAX_STEPS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class KillRecord:
    """What the watchdog did to one attempt's process: one type from its journal to the study.

    reason: as it was ordered; `ended` is what that means for the attempt. within_promise: the victim held no more than
    it was promised; None where nobody could size it. steps: (name, monotonic instant) in order. seconds: from the first
    symptom to confirmed death, None before it.
    """

    kill_id: str
    rule: str
    reason: ExitReason
    within_promise: bool | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    steps: tuple[tuple[str, float], ...] = ()

    @property
    def ended(self) -> ExitReason:
        """How an attempt that died of it ended: one that kept its promise is not to blame for want of memory."""
        kept = self.reason in MEMORY_REASONS and self.within_promise is True
        return ExitReason.PREEMPTED if kept else self.reason

    def has(self, step: str) -> bool:
        return any(name == step for name, _ in self.steps)

    @property
    def signalled(self) -> bool:
        """The victim was sent a signal: its death is our doing."""
        return any(name in _SIGNALS for name, _ in self.steps)

    @property
    def aborted(self) -> bool:
        """It was called off before any signal."""
        return self.has("aborted")

    @property
    def finished(self) -> bool:
        """The memory is back, or the watchdog gave up waiting, or it was called off."""
        return any(name in _LAST_STEPS for name, _ in self.steps)

    def to_json(self) -> Json:
        """Return a JSON object; `from_json` is the inverse."""
        return {
            "kill_id": self.kill_id,
            "rule": self.rule,
            "reason": self.reason.value,
            "within_promise": self.within_promise,
            "evidence": dict(self.evidence),
            "seconds": self.seconds,
            "steps": [list(step) for step in self.steps],
        }

    @classmethod
    def from_json(cls, data: Any) -> KillRecord:
        """Read a record, or what the watchdog's story in the attempt's folder says of it (where each step is a
        mapping).

        Bounded: a trial's own code can write to that folder. Raises BadMessage for what is neither.
        """
        if not isinstance(data, Mapping):
            raise BadMessage(f"no record of a kill: {line(data, 80)!r}")
        try:
            reason = ExitReason(data.get("reason"))
        except (ValueError, TypeError):
            raise BadMessage(f"a kill for the unknown reason {line(data.get('reason'), 80)!r}") from None
        told = data.get("steps")
        steps = told[:_MAX_STEPS] if isinstance(told, Sequence) and not isinstance(told, str | bytes) else ()
        evidence, within = data.get("evidence"), data.get("within_promise")
        seconds = [data.get("seconds"), *(step.get("seconds") for step in steps if isinstance(step, Mapping))]
        return cls(
            kill_id=line(data.get("kill_id") or "", 200),
            rule=line(data.get("rule") or "", 80),
            reason=reason,
            within_promise=within if isinstance(within, bool) else None,
            evidence=plain(evidence) if isinstance(evidence, Mapping) else {},
            seconds=next((number for each in seconds if (number := finite(each)) is not None), None),
            steps=tuple(found for step in steps if (found := _step(step)) is not None),
        )


def _step(told: Any) -> tuple[str, float] | None:
    name = at = None
    if isinstance(told, Mapping):
        name, at = told.get("step"), told.get("at")
    elif isinstance(told, list | tuple) and len(told) == 2:
        name, at = told
    instant = finite(at)
    return None if not isinstance(name, str) or instant is None else (line(name, 40), instant)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one attempt ended, complete enough for a post-mortem.

    value: the objective's (of several the first), None unless the trial produced one. values: all of several.
    fatal: its error ends the study (the caller did not ask to catch it).
    peak_bytes: the process's own VmHWM (host); None when it could not be read. device_peak_bytes: as reported.
    detail: one line (exception's last line, signal name, rule of the watchdog).
    kill: the watchdog's record, None for any other end.
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
    kill: KillRecord | None = None
    result: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> Json:
        """Return a JSON object; `from_json` is the inverse."""
        return fields_of(self)

    @classmethod
    def from_json(cls, data: Any) -> Outcome:
        """Return the inverse of `to_json`. Raises BadMessage."""
        return read(cls, data)

"""What a trial's user attributes say of its end: one place where outcome becomes story.

Pure. Names are dotted and stable, because people query them in the study (README lists them).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scheduler.core import fault
from scheduler.model import AttemptId, ExitReason, Footprint, KillRecord, Outcome
from scheduler.model.plain import line

FLAT_AFTER = "footprint.flat_after_reports"
_EXPLAINED = frozenset({ExitReason.FAILED, ExitReason.LOST, ExitReason.NOT_STARTED, ExitReason.NO_ROOM})
_TRACEBACK_CHARS = 4000  # MySQL's text columns; the whole of it stays in the attempt's folder


def final_attrs(
    outcome: Outcome, footprint: Footprint, attempts: int, *, trusted_peak: bool, earlier_s: float = 0.0
) -> dict[str, Any]:
    """Return the attributes written before the final state.

    earlier_s: how long the attempts before this one ran: `duration_s` is of all, as `attempts` counts them all.
    trusted_peak: the peak was seen after memory went flat or in a whole run (or is a kill's "at least"), so the next
    driver may learn from it; any other is kept under another name, because half a run's peak would teach too little.
    """
    peak = "footprint.observed_peak_bytes" if trusted_peak else "footprint.partial_peak_bytes"
    attrs: dict[str, Any] = {
        "stop_reason": stop_reason(outcome),
        "attempts": attempts,
        "epochs": outcome.epochs,
        "duration_s": round(earlier_s + outcome.duration_s, 3),
        "footprint.predicted_bytes": footprint.host_bytes,
        "footprint.source": footprint.source.value,
        "footprint.samples": footprint.samples,
        peak: outcome.peak_bytes,
        "footprint.environment": outcome.environment,
        "footprint.runtime_bytes": outcome.runtime_bytes,
        "footprint.device_peak_bytes": outcome.device_peak_bytes,
        "checkpoint": outcome.checkpoint,
    }
    if (kill := outcome.kill) is not None:
        attrs |= {
            "watchdog.reason": outcome.reason.value,
            "watchdog.rule": kill.rule,
            "watchdog.kill_id": kill.kill_id,
            "watchdog.seconds": kill.seconds,
            "watchdog.evidence": dict(kill.evidence),
        }
    elif outcome.reason is ExitReason.KERNEL_OOM:
        attrs |= {"watchdog.reason": outcome.reason.value, "watchdog.evidence": {"exit_status": outcome.exit_status}}
    if outcome.reason in _EXPLAINED:
        attrs["error"] = outcome.detail
        if outcome.traceback:
            attrs["traceback"] = outcome.traceback[-_TRACEBACK_CHARS:]
        elif outcome.log_tail:
            attrs["log_tail"] = outcome.log_tail[-_TRACEBACK_CHARS:]
    for key in ("best_epoch", "metrics", "model"):
        if outcome.result.get(key) is not None:
            attrs[key] = outcome.result[key]
    return {name: value for name, value in attrs.items() if value is not None}


def ended_line(
    attempt: AttemptId,
    outcome: Outcome,
    *,
    predicted_bytes: int | None,
    reserved_bytes: int | None = None,
    wait_s: float | None = None,
    worker: str | None = None,
    params: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the fields of `attempt.ended`, the canonical line: all of an attempt in one place."""
    ratio = outcome.peak_bytes / predicted_bytes - 1 if predicted_bytes and outcome.peak_bytes else None
    return {
        "attempt": str(attempt),
        "reason": outcome.reason.value,
        "value": outcome.value,
        "detail": outcome.detail,
        "epochs": outcome.epochs,
        "duration_s": round(outcome.duration_s, 3),
        "wait_s": None if wait_s is None else round(wait_s, 3),
        "worker": worker,
        "predicted_bytes": predicted_bytes,
        "reserved_bytes": reserved_bytes,
        "peak_bytes": outcome.peak_bytes,
        "device_peak_bytes": outcome.device_peak_bytes,
        "error_ratio": None if ratio is None else round(ratio, 4),
        "exit_status": outcome.exit_status,
        "checkpoint": outcome.checkpoint,
        "kill": outcome.kill and outcome.kill.to_json(),
        "traceback": outcome.traceback,
        "params": None if params is None else dict(params),
    }


def ended_outcome(line: Mapping[str, Any]) -> Outcome:
    """Read back what `ended_line` tells of the outcome. Raises KeyError, TypeError, ValueError: it is no such line."""
    names = ("detail", "epochs", "duration_s", "exit_status", "checkpoint", "traceback", "peak_bytes")
    value, told = line["value"], {name: line[name] for name in (*names, "device_peak_bytes")}
    kill = None if line["kill"] is None else KillRecord.from_json(line["kill"])
    return Outcome(reason=ExitReason(line["reason"]), value=value, kill=kill, **told)


def stop_reason(outcome: Outcome) -> str:
    """Why training ended: the objective's own word for a normal end, else the exit reason.

    Not a word that the quota is counted by: an objective that says `does_not_fit` has run all the same.
    """
    own = line(outcome.result.get("stop_reason") or "", 64)
    if outcome.reason is ExitReason.COMPLETED and own and own not in fault.NEVER_RAN:
        return own
    return str(outcome.reason.value)

"""Trials and waits in a person's words: "20M_h3 #17", "memory: needs 31.2 GiB, 12.0 GiB free". Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scheduler.core.trial import Trial
from scheduler.model import AttemptId, Defer, DeferReason, StudySpec, TrialId
from scheduler.model.plain import line
from scheduler.units import gib

MOST_PARAMS = 4


def study_name(name: str, run: str) -> str:
    """Return a study's name without its run's, which all of a run begin with."""
    return name.removeprefix(f"{run}_") or name


def trial_name(trial: TrialId, run: str) -> str:
    return f"{study_name(trial.study, run)} #{trial.number}"


def attempt_name(attempt: AttemptId, run: str) -> str:
    """Return the trial, and which attempt it is where it is not the first."""
    again = f".{attempt.attempt}" if attempt.attempt > 1 else ""
    return f"{trial_name(attempt.trial, run)}{again}"


def params(values: Mapping[str, Any], spec: StudySpec) -> str:
    """Say the shape of a trial of a workload that knows one, else its first parameters."""
    shape = {heading: values[key] for heading, key in spec.shown.shape.items() if key in values}
    chosen = shape or dict(list(values.items())[:MOST_PARAMS])
    return " ".join(f"{line(name, 20)}={_value(value)}" for name, value in chosen.items())


def waits_for(defer: Defer, closed: str) -> str:
    """Say what a trial waits for. closed: why a host is closed, "" when none is."""
    n, reason = defer.numbers, defer.reason
    match reason:
        case DeferReason.MEMORY:
            return f"memory: needs {gib(n['needed_bytes'])}, {gib(max(0, n['headroom_bytes']))} free"
        case DeferReason.LIVE_MEMORY:
            free = n.get("available_bytes", 0) - n.get("unclaimed_bytes", 0) - n.get("reserve_bytes", 0)
            return f"memory that other programs hold: needs {gib(n['needed_bytes'])}, {gib(max(0, free))} free"
        case DeferReason.SLOTS:
            return f"a slot: needs {n['needed_slots']}, {n['free_slots']} of {n['slots']} free"
        case DeferReason.HELD_FOR_HEAD:
            return f"the worker held for a trial of {gib(n['head_bytes'])}"
        case DeferReason.CLOSED if closed:
            return f"{reason.words} ({closed})"
    return reason.words


def needs(trial: Trial) -> str:
    return f" (needs {gib(trial.footprint.host_bytes)})" if trial.footprint.is_known else ""


def _value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else line(value, 24)

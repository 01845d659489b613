"""Trials of a study as our own nouns: rows for reports, observations of memory, trials that a dead driver left.

A part of the study adapter: reads Optuna's frozen trials, writes nothing.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from scheduler.core.attributes import FLAT_AFTER
from scheduler.core.correction import observed
from scheduler.host.registry import boot_id
from scheduler.model import MEMORY_REASONS, Observation, StudySpec, TrialId
from scheduler.model.parameters import PeakObservation
from scheduler.study.distributions import space

HIDDEN_ATTRS = frozenset({"owner", "run"})  # bookkeeping that no table of results needs


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftTrial:
    """A RUNNING trial whose driver is gone. attempt: its first attempt's number (a folder may show later ones).

    retries, ran_s: those it has spent, and how long it ran, under earlier drivers. asked: whether sampling had
    finished. steps: intermediate values it has. folder: its run's folder as that driver saw it, None when unknown.
    lease: what a takeover must still find.
    """

    trial: TrialId
    run: str
    attempt: int = 1
    retries: int = 0
    ran_s: float = 0.0
    asked: bool = True
    steps: int = 0
    attrs: Mapping[str, Any] = field(default_factory=dict)
    folder: str | None = None
    lease: tuple[str, Any] | None = None


def row(trial: FrozenTrial) -> dict[str, Any]:
    """Return a trial as one flat mapping; times are ISO 8601, local."""
    attrs = {key: value for key, value in trial.user_attrs.items() if key not in HIDDEN_ATTRS}
    started, ended = trial.datetime_start, trial.datetime_complete
    return {
        "number": trial.number,
        "state": trial.state.name,
        "value": trial.values[0] if trial.values else None,
        **({} if len(trial.values or ()) < 2 else {f"value.{i}": value for i, value in enumerate(trial.values)}),
        "started": started.isoformat(timespec="seconds") if started else None,
        "ended": ended.isoformat(timespec="seconds") if ended else None,
        "steps": len(trial.intermediate_values),
        "asked.params": tuple(trial.params),  # names, in the order in which they were
        **trial.params,
        **attrs,
    }


def observation(trial: FrozenTrial) -> Observation | None:
    """Return what a finished trial teaches about footprints; None when it says nothing.

    Only a peak that can be trusted is under this name (`story.final_attrs`). A trial killed for memory has shown "at
    least this much". Without a prediction (0) it corrects none, but says what its study's trials take. Of a study that
    an earlier release ran nobody knows in which environment: it stays by itself.
    """
    attrs = trial.user_attrs
    family, peak = attrs.get("footprint.family"), attrs.get("footprint.observed_peak_bytes")
    predicted = attrs.get("footprint.prior_bytes") or 0
    if not trial.state.is_finished() or not (family and peak):
        return None
    return observed(
        family,
        int(predicted),
        int(attrs.get("footprint.prior_runtime_bytes") or 0),
        int(peak),
        environment=attrs.get("footprint.environment"),
        ready_bytes=attrs.get("footprint.runtime_bytes"),
        at_least=attrs.get("watchdog.reason") in {reason.value for reason in MEMORY_REASONS},
    )


def _order_of_end(trial: FrozenTrial) -> tuple[datetime, int]:
    return trial.datetime_complete or datetime.min, trial.number  # noqa: DTZ901 - Optuna keeps local times


def peak_observations(trials: Sequence[FrozenTrial]) -> list[PeakObservation]:
    """Return what trials that nobody had a formula for took with their parameters, in the order in which they ended.

    The same as `core.sizing` learns while they run: whole trials, and as "at least" those killed for memory and pruned.
    """
    found = []
    ended = [t for t in trials if t.state.is_finished() and not t.user_attrs.get("footprint.prior_bytes")]
    for trial in sorted(ended, key=_order_of_end):
        attrs = trial.user_attrs
        killed = attrs.get("watchdog.reason") in {reason.value for reason in MEMORY_REASONS}
        peak = attrs.get("footprint.observed_peak_bytes")
        if trial.state is TrialState.PRUNED:
            peak = peak or attrs.get("footprint.partial_peak_bytes")
        if not isinstance(peak, int) or trial.state is TrialState.FAIL:
            continue
        runtime_bytes, flat_after = attrs.get("footprint.runtime_bytes"), attrs.get(FLAT_AFTER)
        found.append(
            PeakObservation(
                parameters=dict(trial.params),
                space=space(trial.distributions),
                base_bytes=runtime_bytes if isinstance(runtime_bytes, int) else 0,
                peak_bytes=peak,
                at_least=killed or trial.state is TrialState.PRUNED,
                flat_after=flat_after if isinstance(flat_after, int) else None,
            )
        )
    return found


def best_of(spec: StudySpec, trials: Sequence[FrozenTrial]) -> tuple[float, int] | None:
    """(value, number) of the best COMPLETE trial of a study with one objective; None while there is none."""
    best: tuple[float, int] | None = None
    if len(spec.directions) > 1:
        return None
    for trial in trials:
        value = trial.value if trial.state is TrialState.COMPLETE else None
        if value is not None and (best is None or spec.is_better(value, best[0])):
            best = value, trial.number
    return best


def left_trial(study: str, trial: FrozenTrial, folder: str | None, lease: tuple[str, Any] | None = None) -> LeftTrial:
    """Return a RUNNING trial as its attributes tell it."""
    attrs = trial.user_attrs
    return LeftTrial(
        trial=TrialId(study, trial.number),
        run=attrs["run"],
        attempt=attrs.get("attempt", 1),
        retries=attrs.get("retries", 0),
        ran_s=attrs.get("ran_s", 0.0),
        asked="asked_unix" in attrs,
        steps=len(trial.intermediate_values),
        attrs=dict(attrs),
        folder=folder,
        lease=lease,
    )


def is_dead(lease: Mapping[str, Any] | None) -> bool:
    """Whether the lease's driver is known to be gone: on this host, in this boot, no process has its number."""
    if not lease or lease.get("host") != socket.gethostname() or lease.get("boot_id") != boot_id():
        return False
    try:
        os.kill(int(lease["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, KeyError, ValueError):
        return False
    return False

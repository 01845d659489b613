"""Builders: the nouns of `scheduler.model` with sensible defaults, so that a test names only what it is about.

The default worker has 24 GiB and four slots, is empty and open; a default trial needs 1 GiB and one slot.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from scheduler.host import vitals
from scheduler.host.agent_folder import ProcessIdentity
from scheduler.model import (
    AttemptId,
    ExitReason,
    Footprint,
    Observation,
    Outcome,
    Running,
    StudySpec,
    TrialAsked,
    TrialId,
    Waiting,
    WorkerFacts,
    WorkerView,
)
from scheduler.model.frames import AgentConfig
from scheduler.model.messages import Task
from scheduler.units import GIB

WORKER = "tcp://127.0.0.1:4000"


def trial_id(number: int = 0, study: str = "study") -> TrialId:
    """A trial of the study `study`."""
    return TrialId(study, number)


def attempt_id(number: int = 0, attempt: int = 1, study: str = "study") -> AttemptId:
    """An attempt of such a trial."""
    return AttemptId(trial_id(number, study), attempt)


def footprint(host_bytes: int = GIB, **changes: Any) -> Footprint:
    """A prior of that many bytes on a machine without a device."""
    return Footprint(**{"host_bytes": host_bytes, "prior_bytes": host_bytes, **changes})


def waiting(number: int = 0, host_bytes: int | None = GIB, *, study: str = "study", **changes: Any) -> Waiting:
    """A trial in the queue; `host_bytes=None` is one nobody can size. `device_bytes` goes into its footprint."""
    device_bytes = changes.pop("device_bytes", 0)
    size = Footprint.unknown() if host_bytes is None else footprint(host_bytes, device_bytes=device_bytes)
    defaults = {"trial": trial_id(number, study), "footprint": size, "slots": 1, "since": 0.0, "share": 0.0}
    return Waiting(**{**defaults, **changes})


def worker(address: str = WORKER, *, capacity_bytes: int = 24 * GIB, **changes: Any) -> WorkerView:
    """A ledger row. Unless told otherwise the host has free exactly what the ledger has."""
    reserved = changes.get("reserved_bytes", 0)
    slots = changes.get("slots", 4)
    defaults = {
        "address": address,
        "capacity_bytes": capacity_bytes,
        "reserved_bytes": reserved,
        "available_bytes": capacity_bytes - reserved,
        "unclaimed_bytes": 0,
        "reserve_bytes": 0,
        "free_slots": slots,
        "slots": slots,
    }
    return WorkerView(**{**defaults, **changes})


def running(number: int, host_bytes: int = GIB, *, study: str = "study", **changes: Any) -> Running:
    """A running first attempt on the default worker, with an unknown end."""
    defaults = {
        "attempt": attempt_id(number, study=study),
        "worker": WORKER,
        "reserved_bytes": host_bytes,
        "device_reserved_bytes": 0,
        "slots": 1,
    }
    return Running(**{**defaults, **changes})


def busy(*runs: Running, **changes: Any) -> WorkerView:
    """The worker's row while these attempts run on it and use all that they reserved."""
    address = runs[0].worker if runs else WORKER
    slots = changes.get("slots", 4)
    defaults = {
        "reserved_bytes": sum(run.reserved_bytes for run in runs),
        "device_reserved_bytes": sum(run.device_reserved_bytes for run in runs),
        "free_slots": slots - sum(run.slots for run in runs),
    }
    return worker(address, **{**defaults, **changes})


def facts(address: str = WORKER, *, limit_bytes: int = 24 * GIB, **changes: Any) -> WorkerFacts:
    """What an idle worker on an idle host says when it joins."""
    defaults = {
        "address": address,
        "host": "host",
        "slots": 4,
        "total_bytes": limit_bytes,
        "limit_bytes": limit_bytes,
        "available_bytes": limit_bytes,
    }
    return WorkerFacts(**{**defaults, **changes})


def outcome(reason: ExitReason = ExitReason.COMPLETED, **changes: Any) -> Outcome:
    """The end of an attempt; a completed one has a value."""
    value = 0.5 if reason is ExitReason.COMPLETED else None
    return Outcome(**{"reason": reason, "value": value, "duration_s": 1.0, **changes})


def study(name: str = "study", *, quota: int = 3, **changes: Any) -> StudySpec:
    """A study."""
    return StudySpec(**{"name": name, "quota": quota, "slots": 1, **changes})


def asked(number: int = 0, host_bytes: int = GIB, *, study: str = "study", **changes: Any) -> TrialAsked:
    """A sampled trial."""
    defaults = {
        "trial": trial_id(number, study),
        "params": {"d_model": 128},
        "footprint": footprint(host_bytes),
        "family": "patchtst/cpu/glibc",
    }
    return TrialAsked(**{**defaults, **changes})


def observation(predicted_bytes: int = GIB, observed_bytes: int = GIB, **changes: Any) -> Observation:
    """A peak beside its prediction."""
    defaults = {"family": "patchtst/cpu/glibc", "predicted_bytes": predicted_bytes, "observed_bytes": observed_bytes}
    return Observation(**{**defaults, **changes})


def agent_config(**changes: Any) -> AgentConfig:
    """An agent of the run `test` that needs neither torch nor a watchdog; its driver is this test."""
    given: dict[str, Any] = {
        "run": "test",
        "topic": "test",
        "run_id": "run",
        "began_unix": 0.0,
        "driver": dataclasses.asdict(ProcessIdentity.own(vitals.start_time)),
        "away_timeout_s": 60.0,
        "drain_timeout_s": 1.0,
        "environment": "training.runtime:environment",
        "context": {"device": "cpu", "threads": 1},
        "watchdog_mode": "off",
        "preload": (),
    }
    return AgentConfig(**(given | changes))


def task(attempt: str = "s/0/1", **more: Any) -> Task:
    """The task of an attempt that reserves 200 MiB."""
    given = {"objective": "tests.objectives:told", "params": {}, "context": {"device": "cpu"}, "folder": "/nowhere/a"}
    return Task(**{"attempt": attempt, "reserved_bytes": 200 * 2**20, **given, **more})

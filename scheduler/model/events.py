"""What the brain is told: everything that races becomes one of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scheduler.model.ids import AttemptId, TrialId
from scheduler.model.memory import Footprint, Observation, Pressure, WorkerFacts
from scheduler.model.outcome import FinalState, Outcome
from scheduler.model.parameters import PeakObservation, Space
from scheduler.model.queue import Form
from scheduler.model.study import StudySpec


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyOpened:
    """A study is open. counted: its trials that already count towards the quota; observations: of its finished ones.

    completed: how many ended COMPLETE. best: (value, trial number) of the best of these, None while there is none.
    peaks: what its finished trials took with their parameters, in the order in which they ended.
    """

    study: StudySpec
    counted: int = 0
    completed: int = 0
    observations: Sequence[Observation] = ()
    peaks: Sequence[PeakObservation] = ()
    best: tuple[float, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerJoined:
    facts: WorkerFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLost:
    """Nothing more starts there. What runs there may go on: each attempt ends with an event of its own."""

    worker: str
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerVitals:
    """One sample of a worker's host, about once a second. used_bytes: attempt -> footprint now.

    step_s: attempt -> longest pause it lately made between two signs of life; ticks: its steps so far.
    others_unclaimed_bytes: promised to other runs' attempts on this host and not yet taken by them.
    available_bytes: None when the probe failed; swap_used_bytes: None where there is no swap.
    closed_reason: the watchdog closed the host (an unkillable victim).
    """

    worker: str
    available_bytes: int | None
    swap_used_bytes: int | None = None
    pressure: Pressure = Pressure.NORMAL
    closed_reason: str | None = None
    others_unclaimed_bytes: int = 0
    used_bytes: Mapping[AttemptId, int] = field(default_factory=dict)
    peak_bytes: Mapping[AttemptId, int] = field(default_factory=dict)
    step_s: Mapping[AttemptId, float] = field(default_factory=dict)
    ticks: Mapping[AttemptId, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialAsked:
    """A trial was sampled. `attempt`: number of its next attempt; `resume_from`: checkpoint of an earlier one;
    resume_host: whose disk that is on, None where it is not known.

    family: what shares one footprint correction (see Observation). max_epochs: for the predicted duration.
    retries, ran_s: those it spent, and how long it ran, under earlier drivers.
    space: where its parameters come from, by which it is sized where nobody has a formula; None: not known. ahead: of
    a trial that asks while it runs, what it is answered before it asks.
    smaller: forms of it that need less memory, largest first, where its training is the same with them.
    """

    trial: TrialId
    params: Mapping[str, Any]
    footprint: Footprint
    family: str
    attempt: int = 1
    resume_from: str | None = None
    resume_host: str | None = None
    max_epochs: int | None = None
    retries: int = 0
    ran_s: float = 0.0
    space: Space | None = None
    ahead: Mapping[str, Any] = field(default_factory=dict)
    smaller: Sequence[Form] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ParametersAsked:
    """A trial that runs has asked for more than was known before it started. params, space: all it has now."""

    attempt: AttemptId
    params: Mapping[str, Any]
    space: Space


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyStopped:
    """Somebody has said that the study is to end: a trial, a callback, its sampler. What runs runs to its end."""

    study: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AskFailed:
    """A study could not be asked (bad search space, user's sampler raised); never for a storage that is away."""

    study: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaReached:
    """The study has, with what other drivers finished or are running, all the trials it needs. completed: of all."""

    study: str
    completed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptStarted:
    attempt: AttemptId
    worker: str
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRestarted:
    """The checkpoint that the attempt was to go on from cannot be read where it runs.

    checkpoint: the older one that it goes on from, None when it begins at the start. detail: why, in a line.
    """

    attempt: AttemptId
    checkpoint: str | None
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptProgress:
    """An epoch ended. step counts from 1. peak_bytes: the process's own VmHWM so far."""

    attempt: AttemptId
    step: int
    value: float
    peak_bytes: int | None = None
    device_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptSettled:
    """The attempt has passed its first full optimizer step and its first validation: memory is flat from here on."""

    attempt: AttemptId
    peak_bytes: int
    device_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptEnded:
    """The attempt's processes are gone and its memory is back (the agent waits for both)."""

    attempt: AttemptId
    outcome: Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneAdvised:
    """Optuna's pruner wants this trial stopped."""

    attempt: AttemptId
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialTold:
    """The study holds the trial's final state durably."""

    trial: TrialId
    state: FinalState


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialTaken:
    """The trial has its final state from somebody else: another driver took it over while this one was away, say.

    told: what this driver gave it in vain, None when nothing yet.
    """

    trial: TrialId
    told: FinalState | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuitRequested:
    """The user wants to stop: drain first, at once the second time. failed: nobody wants it, it cannot go on."""

    source: str
    now: bool = False
    failed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time passed; nothing else happened."""


Event = (
    StudyOpened
    | WorkerJoined
    | WorkerLost
    | WorkerVitals
    | TrialAsked
    | ParametersAsked
    | StudyStopped
    | AskFailed
    | QuotaReached
    | AttemptStarted
    | AttemptRestarted
    | AttemptProgress
    | AttemptSettled
    | AttemptEnded
    | PruneAdvised
    | TrialTold
    | TrialTaken
    | QuitRequested
    | Tick
)

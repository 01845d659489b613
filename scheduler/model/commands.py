"""What the brain wants done: values, carried out by the dispatcher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scheduler.model.ids import AttemptId, TrialId
from scheduler.model.memory import Correction, Footprint
from scheduler.model.outcome import FinalState
from scheduler.model.queue import DeferReason, Form


@dataclass(frozen=True, slots=True, kw_only=True)
class AskTrial:
    """Sample the study's next trial, its micro-batch sized so that the corrected footprint fits `limit_bytes`.

    device_limit_bytes: the same for the device's pool; None where there is none. correction: its runtime_bytes are 0
    when no worker has said what its trial processes hold. environments: names of what the trial may run in.
    """

    study: str
    limit_bytes: int
    correction: Correction = field(default_factory=Correction)
    environments: tuple[str, ...] = ()
    device_limit_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchAttempt:
    """resume_from: the newest checkpoint, None without any; older: those to fall back on where it cannot be read."""

    attempt: AttemptId
    worker: str
    params: Mapping[str, Any]
    footprint: Footprint
    reserved_bytes: int
    slots: int
    resume_from: str | None
    wait_s: float
    ahead: Mapping[str, Any] = field(default_factory=dict)  # as in TrialAsked
    older: tuple[str, ...] = ()
    retries: int = 0  # spent so far
    ran_s: float = 0.0  # in attempts before this one


@dataclass(frozen=True, slots=True, kw_only=True)
class ReshapeTrial:
    """The trial is to run in this form in the place of a larger one, since there is room for it now.

    Its study must know before it runs: who resumes it goes on with the same parameters.
    """

    trial: TrialId
    form: Form


@dataclass(frozen=True, slots=True, kw_only=True)
class NoteDeferral:
    """Nothing to do but to log: the trial waits for this reason (sent when the reason changes)."""

    trial: TrialId
    reason: DeferReason
    numbers: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoteHost:
    """Nothing to do but to log: nothing starts on this worker for this reason; None: it is open again."""

    worker: str
    reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NoteDrain:
    """Nothing to do but to say: running trials have up to `wait_s` to leave, for the sake of this one, whose steps take
    `step_s`."""

    attempt: AttemptId
    wait_s: float
    step_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ResizeReservation:
    """The ledger changed what it holds for an attempt; the host's watchdog must judge by the same number."""

    attempt: AttemptId
    worker: str
    reserved_bytes: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StopAttempt:
    """Finish the step, write a checkpoint, leave. reason: "prune", "drain" or "timeout"."""

    attempt: AttemptId
    worker: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KillAttempt:
    """End its processes now (second quit, or it would not stop)."""

    attempt: AttemptId
    worker: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportValue:
    attempt: AttemptId
    step: int
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TellTrial:
    """Give the trial its final state. attrs: user attributes, written before it. constraint: > 0 means infeasible.

    values: of an objective with several; empty: `value` is all there is.
    """

    trial: TrialId
    state: FinalState
    value: float | None
    values: tuple[float, ...] = ()
    attrs: Mapping[str, Any] = field(default_factory=dict)
    constraint: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EnqueueRetry:
    """Put the trial's parameters back into the study's queue (idempotent), then tell the old one FAIL.

    Used when this driver will not run it again itself: interrupted by the user. retries, ran_s: those it has spent,
    and how long it has run. resume_host: where the checkpoint is, None where that is not known.
    """

    trial: TrialId
    attempt: int
    resume_from: str | None
    reason: str
    retries: int = 0
    ran_s: float = 0.0
    resume_host: str | None = None
    attrs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class DropCheckpoints:
    """The trial is over and nobody will resume it: its checkpoints, and those it was resumed from, may go."""

    trial: TrialId


@dataclass(frozen=True, slots=True, kw_only=True)
class CloseStudy:
    """No further trial of this study starts. `early`: before its quota, which makes the exit code 1."""

    study: str
    reason: str
    early: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EndBatch:
    """Everything is told; the driver may leave."""

    exit_code: int
    reason: str


Command = (
    AskTrial
    | LaunchAttempt
    | ReshapeTrial
    | NoteDeferral
    | NoteDrain
    | NoteHost
    | ResizeReservation
    | StopAttempt
    | KillAttempt
    | ReportValue
    | TellTrial
    | EnqueueRetry
    | DropCheckpoints
    | CloseStudy
    | EndBatch
)

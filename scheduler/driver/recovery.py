"""What becomes of trials that a dead driver left RUNNING, and of attempts whose worker was lost.

Covers the rule (`decide`), the reader of what an attempt left on disk (`Evidence`), `resume`, which opens a study and
settles it, and `recover`, by which a living driver finds out how a lost attempt really ended. Uses the same
conclusions as a living driver: `witness.conclude`, `fault`, `attributes`. Does not write to the study except through
the store, and ends a process only after checking that it is still the same one.

In order: what the dead driver had decided (its journal); a durable result; a kill by the watchdog; how the dead driver
had seen the attempt end (its journal again: it may have waited to run it once more); nothing at all, which is a lost
attempt and is retried from its checkpoint. A process that still lives is ended first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scheduler.core import fault
from scheduler.core.attributes import ended_line, final_attrs
from scheduler.driver import decisions
from scheduler.host.attempt_folder import AttemptFolder, attempts_of, folders_of, newest_checkpoint
from scheduler.host.registry import HostRegistry
from scheduler.model import (
    AttemptId,
    EnqueueRetry,
    ExitReason,
    FinalState,
    Footprint,
    FootprintSource,
    KillRecord,
    Outcome,
    StudySpec,
    TellTrial,
    TrialId,
)
from scheduler.model.journal_events import JournalEvent
from scheduler.model.messages import Last
from scheduler.study.store import LeftTrial, NotOurs, OpenedStudy, StudyStore
from scheduler.worker.witness import Witness, conclude

END_TIMEOUT_S = 10.0
RECOVER_GRACE_S = 5.0  # a trial whose worker died sees the end of its pipe at once; it may be writing its result
_POLL_S = 0.05

Decided = TellTrial | EnqueueRetry


@dataclass(frozen=True, slots=True, kw_only=True)
class EndProcess:
    """First end this process: its driver is dead, and a trial that still trains must not be given away."""

    trial: TrialId
    pid: int
    start_time: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Remains:
    """What the last attempt of a trial left behind.

    attempt: its number, 0 when none was ever started. result: the last message, durable before the process left.
    kill: the watchdog's record of a kill that was carried out. process: (pid, start_time) while it lives.
    checkpoint: the newest of any attempt; progress: it is the last attempt's own. retries: those spent when it began,
    None where that is not known. ran_s: how long the trial ran, up to that checkpoint. earlier_s: how long the attempts
    before the last one did, as far as the journal tells. reachable: False when the folder is on another host, so
    nothing is known. seen: how the last attempt ended, where its driver lived to see it.
    """

    attempt: int = 0
    result: Last | None = None
    kill: KillRecord | None = None
    process: tuple[int, float] | None = None
    checkpoint: str | None = None
    progress: bool = False
    retries: int | None = None
    ran_s: float = 0.0
    earlier_s: float = 0.0
    log_tail: str = ""
    reachable: bool = True
    seen: Outcome | None = None


def decide(
    left: LeftTrial, remains: Remains, policy: fault.RetryPolicy, decided: Decided | None = None
) -> Decided | EndProcess:
    """Decide what to do about a trial whose driver is gone. decided: what that driver had decided and not yet
    recorded."""
    if remains.process is not None and remains.result is None:
        return EndProcess(trial=left.trial, pid=remains.process[0], start_time=remains.process[1])
    if decided is not None:
        return decided
    checkpoint = remains.checkpoint or left.attrs.get("resume_from")
    if remains.reachable and remains.attempt == 0:
        return EnqueueRetry(
            trial=left.trial,
            attempt=left.attempt,
            resume_from=checkpoint,
            reason="not started",
            retries=left.retries,
            ran_s=left.ran_s,
        )
    attempt = max(remains.attempt, left.attempt)
    outcome = end_of(left, remains)
    spent = left.retries + (attempt - left.attempt) if remains.retries is None else remains.retries
    verdict = fault.judge(outcome, fault.Facts(progress=remains.progress, spent=spent), policy)
    if isinstance(verdict, fault.Final):
        outcome = dataclasses.replace(outcome, reason=verdict.reason)
    trusted = outcome.peak_bytes is not None and outcome.reason is ExitReason.COMPLETED
    attrs = {
        **final_attrs(
            outcome,
            _footprint(left.attrs),
            attempt,
            trusted_peak=trusted,
            earlier_s=left.ran_s + remains.earlier_s,
        ),
        "settled": "after the driver's death",
    }
    if isinstance(verdict, fault.Again):
        return EnqueueRetry(
            trial=left.trial,
            attempt=attempt + 1,
            resume_from=checkpoint,
            reason=outcome.reason.value,
            retries=verdict.spent,
            ran_s=max(left.ran_s, remains.ran_s),
            attrs=attrs,
        )
    value = outcome.value if verdict.state is FinalState.COMPLETE else None
    return TellTrial(trial=left.trial, state=verdict.state, value=value, attrs=attrs, constraint=verdict.constraint)


def end_of(left: LeftTrial, remains: Remains) -> Outcome:
    """How the last attempt of a trial ended, as far as what it left behind tells."""
    if remains.seen is not None and remains.result is None and not remains.kill:
        return dataclasses.replace(remains.seen, log_tail=remains.log_tail)
    return conclude(
        Witness(
            last=remains.result,
            kill=remains.kill,
            ended_by=None if remains.result or remains.kill else "orphaned",
            epochs=left.steps,
            duration_s=remains.result.duration_s if remains.result else 0.0,
            checkpoint=remains.checkpoint or left.attrs.get("resume_from"),
            log_tail=remains.log_tail,
        )
    )


def _footprint(attrs: Mapping[str, Any]) -> Footprint:
    """Return the footprint the trial was asked with, as its attributes say."""
    predicted, prior = attrs.get("footprint.predicted_bytes"), attrs.get("footprint.prior_bytes")
    if not predicted:
        return Footprint.unknown()
    source = FootprintSource.PRIOR if predicted == prior else FootprintSource.CORRECTED
    return Footprint(host_bytes=int(predicted), prior_bytes=int(prior or 0), source=source)


def _is_before(other: AttemptId, trial: TrialId, attempt: int) -> bool:
    return other.trial == trial and other.attempt < attempt


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Reads what attempts left on this host.

    registry: the host's registrations and kills, None when there is none. start_time: pid -> the identity of the
    process that has it now, None when there is no such process (`host.vitals.start_time`). ends: of the attempts that
    the journal of the dead driver knows, how they ended, None for one that was under way (`decisions.ends`).
    """

    registry: HostRegistry | None = None
    start_time: Callable[[int], float | None] = lambda pid: None
    ends: Mapping[AttemptId, Outcome | None] = field(default_factory=dict)

    def of(self, trial: TrialId, run_folder: str | os.PathLike[str] | None) -> Remains:
        """Find what is left of a trial's last attempt under a run folder."""
        if run_folder is None or not (attempts := attempts_of(run_folder)).is_dir():
            return Remains(reachable=False)
        found = folders_of(attempts, trial)
        if not found:
            return Remains()
        attempt, folder = found[-1]
        return Remains(
            attempt=attempt,
            result=folder.result(),
            kill=self._kill(AttemptId(trial, attempt), folder),
            process=self._process(folder.path),
            checkpoint=newest_checkpoint([each for _, each in reversed(found)]),
            progress=folder.has_checkpoint,
            retries=folder.retries,
            ran_s=folder.ran_s,
            log_tail=folder.log_tail(),
            seen=self.ends.get(AttemptId(trial, attempt)),
            earlier_s=sum(end.duration_s for a, end in self.ends.items() if end and _is_before(a, trial, attempt)),
        )

    def _process(self, folder: Path) -> tuple[int, float] | None:
        if self.registry is None:
            return None
        for registration in self.registry.registrations():
            same = os.path.realpath(registration.folder) == os.path.realpath(folder)
            if same and self.start_time(registration.pid) == registration.start_time:
                return registration.pid, registration.start_time
        return None

    def _kill(self, attempt: AttemptId, folder: AttemptFolder) -> KillRecord | None:
        """Return a kill that was carried out: what was only intended, or called off, has ended nobody."""
        written = folder.kill()
        if written is not None and written.signalled and not written.aborted:
            return written
        if self.registry is None:
            return None
        for story in reversed(self.registry.kills()):
            where = story.records[0].get("folder") if story.records else None
            elsewhere = where is not None and os.path.realpath(where) != os.path.realpath(folder.path)
            if story.attempt == str(attempt) and story.signalled and not story.aborted and not elsewhere:
                return story.record
        return None


def end(action: EndProcess, start_time: Callable[[int], float | None], timeout_s: float = END_TIMEOUT_S) -> bool:
    """SIGKILL a trial process and its session, if it is still the same process; True once it is gone."""
    deadline = time.monotonic() + timeout_s
    while start_time(action.pid) == action.start_time:
        # A trial leads its own session, so its group's number is its own; the plain kill is for one that does not.
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(OSError):
                kill(action.pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def resume(
    store: StudyStore,
    spec: StudySpec,
    candidates: Sequence[Mapping[str, Any]],
    *,
    evidence: Evidence,
    policy: fault.RetryPolicy,
    decided: Mapping[TrialId, Decided] | None = None,
    journal: Callable[..., None] | None = None,
) -> OpenedStudy:
    """Open a study and settle what this run's dead driver left in it; what is returned is the state after that.

    decided: what its journal holds of commands that may not have reached the study. journal: called as
    `journal(event, durable=, **fields)` with the same lines as a living driver writes, before the study hears of it.
    Idempotent: after an error in the middle call it again.
    """
    note: Callable[..., None] = journal or (lambda event, **fields: None)
    opened = store.open(spec, candidates)
    for left in opened.left:
        verdict = settle(left, evidence, policy, (decided or {}).get(left.trial))
        if verdict is None:
            continue  # unkillable: it stays RUNNING, and is charged, until a later start finds it dead
        remains = evidence.of(left.trial, left.folder)
        attempt = AttemptId(left.trial, max(remains.attempt, left.attempt))
        if attempt in evidence.ends and evidence.ends[attempt] is None:
            predicted = _footprint(left.attrs).host_bytes or None
            line = ended_line(attempt, end_of(left, remains), predicted_bytes=predicted)
            note(JournalEvent.ATTEMPT_ENDED, durable=True, settled=True, **line)
        name, fields = decisions.write(verdict)
        note(name, durable=True, settled=True, **fields)
        try:
            stands = store.tell(verdict) if isinstance(verdict, TellTrial) else FinalState.FAIL
            if isinstance(verdict, EnqueueRetry):
                store.enqueue_retry(verdict)
        except NotOurs as error:  # another driver has just taken it over
            note(JournalEvent.STUDY_NOT_OURS, subject=str(left.trial), error=str(error))
            continue
        note(JournalEvent.TRIAL_TOLD, durable=True, trial=str(left.trial), state=stands.value)
    return store.open(spec, candidates) if opened.left else opened


def settle(
    left: LeftTrial, evidence: Evidence, policy: fault.RetryPolicy, decided: Decided | None = None
) -> Decided | None:
    """Decide about one trial, ending its process first where it lives. None: it cannot be ended."""
    for _ in range(2):
        verdict = decide(left, evidence.of(left.trial, left.folder), policy, decided)
        if not isinstance(verdict, EndProcess):
            return verdict
        if not end(verdict, evidence.start_time):
            return None
    return None


def recover(attempt: AttemptId, outcome: Outcome, evidence: Evidence, folder: Path) -> Outcome:
    """Find out what the end of an attempt whose worker was lost really was: its process is ended, then its folder is
    read.

    On another host nothing can be read: the outcome stays LOST, and the retry starts from the checkpoint if it is on a
    shared file system.
    """
    deadline = time.monotonic() + RECOVER_GRACE_S
    while (remains := evidence.of(attempt.trial, folder)).process is not None:
        if time.monotonic() > deadline:
            end(
                EndProcess(trial=attempt.trial, pid=remains.process[0], start_time=remains.process[1]),
                evidence.start_time,
            )
            remains = evidence.of(attempt.trial, folder)
            break
        time.sleep(_POLL_S)
    if not remains.reachable or remains.attempt != attempt.attempt:
        return outcome
    checkpoint = remains.checkpoint or outcome.checkpoint
    if remains.result is None and not remains.kill:
        return dataclasses.replace(outcome, checkpoint=checkpoint, log_tail=remains.log_tail)
    seen = Witness(
        last=remains.result,
        kill=remains.kill,
        duration_s=remains.result.duration_s if remains.result else 0.0,
        checkpoint=checkpoint,
        log_tail=remains.log_tail,
    )
    return conclude(seen)

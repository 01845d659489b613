"""What the brain is told, as lines of the journal."""

from __future__ import annotations

from collections.abc import Callable

from scheduler import model as m
from scheduler.core.attributes import ended_line
from scheduler.model.journal_events import JournalEvent

Log = Callable[..., None]  # log(event, durable=False, **fields)


def note(log: Log, event: m.Event, launch: m.LaunchAttempt | None = None) -> None:
    """Write down what happened; vitals and ticks are left out (a journal of days would be nothing else).

    launch: of an attempt that ended, how it was launched, where that is known.
    """
    match event:
        case m.WorkerJoined(facts=facts):
            log(
                JournalEvent.WORKER_JOINED,
                worker=facts.address,
                host=facts.host,
                via=facts.via or None,
                slots=facts.slots,
                limit_bytes=facts.worker_limit_bytes or facts.limit_bytes,
                limit_source=facts.limit_source,
                domain=facts.domain,
                available_bytes=facts.available_bytes,
                overhead_bytes=facts.overhead_bytes,
                environment=None if facts.environment is None else facts.environment.name,
                runtime_bytes=None if facts.environment is None else facts.environment.runtime_bytes,
            )
        case m.WorkerLost(worker=worker, detail=detail):
            log(JournalEvent.WORKER_LEFT, durable=True, worker=worker, detail=detail)
        case m.TrialAsked(trial=trial, params=params, footprint=footprint, attempt=attempt):
            log(
                JournalEvent.TRIAL_ASKED,
                trial=str(trial),
                attempt=attempt,
                params=dict(params),
                predicted_bytes=footprint.host_bytes or None,
            )
        case m.StudyStopped(study=study, source=source):
            log(JournalEvent.STUDY_STOPPING, durable=True, study=study, source=source)
        case m.AskFailed(study=study, detail=detail):
            log(JournalEvent.STUDY_ASK_FAILED, durable=True, study=study, detail=detail)
        case m.AttemptStarted(attempt=attempt, pid=pid):
            log(JournalEvent.ATTEMPT_STARTED, attempt=str(attempt), pid=pid)
        case m.AttemptRestarted(attempt=attempt, checkpoint=checkpoint, detail=detail):
            log(
                JournalEvent.ATTEMPT_RESTARTED,
                durable=True,
                attempt=str(attempt),
                checkpoint=checkpoint,
                detail=detail,
            )
        case m.AttemptProgress(attempt=attempt, step=step, value=value, peak_bytes=peak):
            log(JournalEvent.ATTEMPT_PROGRESS, attempt=str(attempt), step=step, value=value, peak_bytes=peak)
        case m.AttemptEnded(attempt=attempt, outcome=outcome):
            _note_end(log, attempt, outcome, launch)
        case m.TrialTaken(trial=trial):
            log(JournalEvent.TRIAL_TAKEN, durable=True, trial=str(trial))
        case m.TrialTold(trial=trial, state=state):
            log(JournalEvent.TRIAL_TOLD, durable=True, trial=str(trial), state=state.value)
        case m.QuitRequested(source=source, now=now):
            log(JournalEvent.BATCH_QUIT, durable=True, source=source, now=now)
        case _:
            pass


def _note_end(log: Log, attempt: m.AttemptId, outcome: m.Outcome, launch: m.LaunchAttempt | None) -> None:
    line = ended_line(
        attempt,
        outcome,
        predicted_bytes=None if launch is None else launch.footprint.host_bytes or None,
        reserved_bytes=None if launch is None else launch.reserved_bytes,
        wait_s=None if launch is None else launch.wait_s,
        worker=None if launch is None else launch.worker,
        params=None if launch is None else launch.params,
    )
    log(JournalEvent.ATTEMPT_ENDED, durable=True, **line)

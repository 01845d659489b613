"""The brain's state as a Snapshot: what the console and the dashboard draw.

Reads, never changes.
"""

from __future__ import annotations

from scheduler.core.state import BatchState
from scheduler.core.trial import Study
from scheduler.model import DeferReason, TrialState
from scheduler.ui.snapshot import Snapshot, StudyLine, TrialLine, WorkerLine
from scheduler.units import gib


def snapshot(brain: BatchState, *, run: str, now: float, elapsed_s: float, dashboard: str | None) -> Snapshot:
    """Take a snapshot of the whole batch at instant `now` (monotonic)."""
    trials = []
    for row in brain.ledger:
        for attempt, held in row.reservations.items():
            trial = brain.trials.get(attempt.trial)
            started = None if trial is None else trial.started_at
            trials.append(
                TrialLine(
                    attempt=str(attempt),
                    worker=row.facts.address,
                    reserved_bytes=held.host_bytes,
                    used_bytes=held.used_bytes,
                    running_s=0.0 if started is None else now - started,
                    epoch=0 if trial is None else trial.step,
                    epochs=None if trial is None else trial.max_epochs,
                    value=None if trial is None else trial.value,
                )
            )
    return Snapshot(
        run=run,
        studies=tuple(_study(brain, study) for study in brain.studies.values()),
        workers=tuple(
            WorkerLine(
                address=row.facts.address,
                host=row.facts.host,
                capacity_bytes=row.capacity_bytes,
                reserved_bytes=row.reserved_bytes,
                used_bytes=row.facts.overhead_bytes + sum(r.used_bytes for r in row.reservations.values()),
                slots=row.facts.slots,
                free_slots=row.view().free_slots,
                pressure=row.pressure.name.lower(),
                closed_reason=row.closed_reason,
                domain=(seen := row.view()).domain,
                domain_capacity_bytes=row.domain.capacity_bytes if seen.domain else None,
                domain_headroom_bytes=seen.domain_headroom_bytes,
            )
            for row in brain.ledger
        ),
        trials=tuple(trials),
        elapsed_s=elapsed_s,
        draining=brain.draining is not None,
        drain_s=None if brain.drain_ends is None else max(0.0, brain.drain_ends - now),
        dashboard=dashboard,
    )


def _study(brain: BatchState, study: Study) -> StudyLine:
    pending = [brain.trials[t] for t in study.live if brain.trials[t].state is TrialState.PENDING]
    waiting = None
    if pending and (deferred := pending[0].deferred) is not None:
        trial, reason = pending[0], deferred.words
        if deferred is DeferReason.CLOSED:
            closed = next((row.closed_reason for row in brain.ledger if row.closed_reason), "")
            reason = f"{reason} ({closed})" if closed else reason
        size = f" (needs {gib(trial.footprint.host_bytes)})" if trial.footprint.is_known else ""
        waiting = f"waits for {reason}{size}"
    return StudyLine(
        name=study.spec.name,
        done=study.counted,
        quota=study.spec.quota,
        running=len(study.live) - len(pending),
        waiting=waiting,
        best=None if study.best is None else study.best[0],
        closed=study.closed,
    )

"""The brain's state as a Snapshot: what the console and the dashboard draw.

Reads, never changes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from scheduler.core.forecast import Forecast, Span
from scheduler.core.ledger import Reservation, Row
from scheduler.core.state import BatchState
from scheduler.core.trial import Study
from scheduler.model import AttemptId, DeferReason, TrialState
from scheduler.ui import words
from scheduler.ui.snapshot import Eta, Happening, Snapshot, StudyLine, TrialLine, WaitingLine, WorkerLine

UNKNOWN_YET = "unknown until the first trials end"


def snapshot(
    brain: BatchState,
    *,
    run: str,
    now: float,
    elapsed_s: float,
    dashboard: str | None,
    forecast: Forecast | None = None,
    unforeseen: str = UNKNOWN_YET,
    refused: Mapping[str, str] | None = None,
    happenings: tuple[Happening, ...] = (),
    ends: Mapping[str, int] | None = None,
) -> Snapshot:
    """Take a snapshot of the whole batch at instant `now` (monotonic).

    refused: why each study that was not begun was not. ends: how many attempts ended so, by reason.
    """
    seen = _Seen(brain, run, now, forecast)
    foreseen = None if brain.draining or forecast is None else seen.eta(forecast.whole)
    return Snapshot(
        run=run,
        studies=(
            *(seen.study(study) for study in brain.studies.values()),
            *(StudyLine(name=name, done=0, quota=0, refused=why) for name, why in (refused or {}).items()),
        ),
        workers=tuple(_worker(row) for row in brain.ledger),
        trials=tuple(
            seen.trial(row, attempt, held) for row in brain.ledger for attempt, held in row.reservations.items()
        ),
        waiting=seen.waiting(),
        happenings=happenings,
        # Plain dicts: `asdict`, by which the page gets it, makes pairs of a Counter's keys.
        waits=dict(Counter(trial.deferred.value for trial in brain.trials.values() if trial.deferred is not None)),
        ends=dict(ends or {}),
        elapsed_s=elapsed_s,
        eta=foreseen,
        unforeseen="" if foreseen else unforeseen,
        draining=brain.draining is not None,
        drain_s=None if brain.drain_ends is None else max(0.0, brain.drain_ends - now),
        dashboard=dashboard,
    )


class _Seen:
    """What all lines of one snapshot have in common."""

    def __init__(self, brain: BatchState, run: str, now: float, forecast: Forecast | None) -> None:
        self.brain, self.run, self.now, self.forecast = brain, run, now, forecast
        self.closed = next((row.closed_reason for row in brain.ledger if row.closed_reason), "")

    def eta(self, span: Span | None) -> Eta | None:
        """Return what was foreseen a while ago, counted from now."""
        if span is None or self.forecast is None:
            return None
        then = Eta(low_s=span.low_s, middle_s=span.middle_s, high_s=span.high_s)
        return then.later(self.now - self.forecast.at)

    def trial(self, row: Row, attempt: AttemptId, held: Reservation) -> TrialLine:
        trial = self.brain.trials.get(attempt.trial)
        started = None if trial is None else trial.started_at
        state = "starting" if started is None else ""
        if trial is None:
            state = "ending"
        elif trial.killed or trial.stopping is not None:
            state = "ending" if trial.killed else "leaving"
        return TrialLine(
            attempt=str(attempt),
            worker=row.facts.address,
            reserved_bytes=held.host_bytes,
            used_bytes=held.used_bytes,
            running_s=0.0 if started is None else self.now - started,
            epoch=0 if trial is None else trial.step,
            epochs=None if trial is None else trial.max_epochs,
            value=None if trial is None else trial.value,
            within=None if trial is None else trial.within_epoch,
            ticks=0 if trial is None else trial.ticks,
            params="" if trial is None else words.params(trial.params, self.brain.studies[attempt.trial.study].spec),
            state=state,
        )

    def study(self, study: Study) -> StudyLine:
        brain = self.brain
        pending = [brain.trials[t] for t in study.live if brain.trials[t].state is TrialState.PENDING]
        waiting = None
        if pending and (deferred := pending[0].deferred) is not None:
            reason = deferred.words
            if deferred is DeferReason.CLOSED and self.closed:
                reason = f"{reason} ({self.closed})"
            waiting = f"waits for {reason}{words.needs(pending[0])}"
        foreseen = None if self.forecast is None or study.closed else self.forecast.studies.get(study.spec.name)
        return StudyLine(
            name=study.spec.name,
            done=study.counted,
            quota=study.spec.quota,
            running=len(study.live) - len(pending),
            waiting=waiting,
            best=None if study.best is None else study.best[0],
            closed=study.closed,
            eta=None if brain.draining else self.eta(foreseen),
        )

    def waiting(self) -> tuple[WaitingLine, ...]:
        """Return those that wait, the longest first."""
        head = next(iter(self.brain.held.values()), None)
        pending = [trial for trial in self.brain.trials.values() if trial.state is TrialState.PENDING]
        lines = []
        for trial in sorted(pending, key=lambda trial: (trial.since, trial.id)):
            if trial.wait is None:
                continue
            behind = head if trial.wait.reason is DeferReason.HELD_FOR_HEAD and head != trial.id else None
            foreseen = None if self.forecast is None else self.forecast.starts.get(trial.id)
            lines.append(
                WaitingLine(
                    trial=words.trial_name(trial.id, self.run),
                    what=words.waits_for(trial.wait, self.closed),
                    waited_s=self.now - trial.since,
                    behind="" if behind is None else words.trial_name(behind, self.run),
                    still=self.eta(foreseen),
                    params=words.params(trial.params, self.brain.studies[trial.id.study].spec),
                )
            )
        return tuple(lines)


def _worker(row: Row) -> WorkerLine:
    seen = row.view()
    return WorkerLine(
        address=row.facts.address,
        host=row.facts.host,
        capacity_bytes=row.capacity_bytes,
        reserved_bytes=row.reserved_bytes,
        used_bytes=row.facts.overhead_bytes + sum(r.used_bytes for r in row.reservations.values()),
        slots=row.facts.slots,
        free_slots=seen.free_slots,
        pressure=row.pressure.name.lower(),
        closed_reason=row.closed_reason,
        available_bytes=row.available_bytes,
        swap_bytes=row.swap_used_bytes,
        domain=seen.domain,
        domain_capacity_bytes=row.domain.capacity_bytes if seen.domain else None,
        domain_headroom_bytes=seen.domain_headroom_bytes,
    )

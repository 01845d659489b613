"""What is left to do, taken out of the brain: the input of a forecast, which then needs the brain no more.

Cheap, since the driver's loop waits for it; what takes time is `forecast`. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from scheduler.core.durations import Evidence, Took
from scheduler.core.forecast import StudyWork, TrialWork, Work
from scheduler.core.ledger import Row
from scheduler.core.state import BatchState
from scheduler.core.trial import Study
from scheduler.model import Pressure

_LATEST = 64  # of a study's ended trials; its sampler moves on, and so do the sizes it proposes
Past = Mapping[str, Sequence[Took]]  # by study: trials of earlier drivers, or of like runs


def work(brain: BatchState, now: float, past: Past | None = None) -> Work:
    """Take what is left at instant `now` (monotonic seconds). past: what is known from before this driver."""
    trials = []
    for trial in brain.trials.values():
        held = brain.ledger.reservation(trial.attempt_id)
        spec = brain.studies[trial.id.study].spec
        trials.append(
            TrialWork(
                trial=trial.id,
                under=trial.under(now),
                worker=brain.ledger.worker_of(trial.attempt_id),
                host_bytes=0 if held is None else held.host_bytes,
                device_bytes=0 if held is None else held.device_bytes,
                slots=spec.slots if held is None else held.slots,
                waiting=brain.waiting(brain.studies[trial.id.study], trial) if held is None else None,
            )
        )
    return Work(
        studies=tuple(_study(brain, study, trials, (past or {}).get(study.spec.name, ())) for study in _open(brain)),
        trials=tuple(trials),
        rows=tuple((_emptied(row), row.domain.capacity_bytes) for row in brain.ledger),
        now=now,
    )


def _open(brain: BatchState) -> list[Study]:
    return [study for study in brain.studies.values() if study.closed is None or study.live]


def _study(brain: BatchState, study: Study, trials: Sequence[TrialWork], past: Sequence[Took]) -> StudyWork:
    own = [trial for trial in trials if trial.trial.study == study.spec.name]
    ended = (*past, *study.ended)[-_LATEST:]
    waiting = [t.waiting.footprint.host_bytes for t in own if t.waiting and t.waiting.footprint.is_known]
    sizes = tuple(took.size_bytes for took in ended if took.size_bytes) + tuple(
        size for size in (*waiting, *(trial.host_bytes for trial in own if trial.worker)) if size
    )
    bounds = [brain.trials[t].max_epochs for t in study.live]
    over = study.closed is not None or study.stopped is not None
    return StudyWork(
        name=study.spec.name,
        slots=study.spec.slots,
        quota=study.spec.quota,
        counted=study.counted,
        left=0 if over else max(0, study.spec.quota - study.counted - len(study.live)),
        sizes=sizes,
        expected_s=study.expected_s,
        evidence=Evidence(
            ended=ended,
            running=tuple(trial.under for trial in own if trial.worker is not None),
            size_bytes=sum(sizes) // len(sizes) if sizes else 0,
            max_epochs=next((bound for bound in bounds if bound), study.max_epochs),
        ),
    )


def _emptied(row: Row) -> Row:
    """Return the worker as it would be without our trials: open, and with what others hold of its memory now."""
    used = sum(held.used_bytes for other in row.domain.rows.values() for held in other.reservations.values())
    available = row.limit_bytes + row.reserve_bytes if row.available_bytes is None else row.available_bytes + used
    return replace(
        row,
        reservations={},
        available_bytes=available,
        pressure=Pressure.NORMAL,
        closed_reason=None,
        gone=False,
    )

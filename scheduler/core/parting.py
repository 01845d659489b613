"""What is said when a trial leaves the brain: its retry in the queue, and which checkpoints nobody wants any more.

Pure. Does not decide whether it leaves, or how: `fault` does.
"""

from __future__ import annotations

from typing import Any

from scheduler.core.attributes import final_attrs
from scheduler.core.trial import Study, Trial
from scheduler.model import DropCheckpoints, EnqueueRetry, Outcome, TrialId


def requeued(trial: Trial, reason: str, outcome: Outcome | None) -> EnqueueRetry:
    """Return the command that puts the trial back into its study's queue, to go on from where it is.

    outcome: of its last attempt, None when it never ran.
    """
    attrs: dict[str, Any] = {}
    if outcome is not None:
        attempts, earlier_s = trial.attempt - 1, trial.earlier_s
        attrs = final_attrs(outcome, trial.footprint, attempts, trusted_peak=False, earlier_s=earlier_s)
    return EnqueueRetry(
        trial=trial.id,
        attempt=trial.attempt,
        resume_from=trial.resume_from,
        resume_host=trial.saved[0].host if trial.saved else None,
        reason=reason,
        retries=trial.retries,
        ran_s=trial.ran_s,
        attrs=attrs,
    )


def unwanted(study: Study, trial: Trial, value: float | None, keep: str) -> DropCheckpoints | None:
    """Note the trial if it is the study's best; return whose checkpoints may go: its own, or those of the best so far.

    keep: as in `Rules`. A checkpoint of 2B parameters has 24 GB, and a study 50 trials.
    """
    over: int | None = trial.id.number
    is_best = value is not None and (study.best is None or study.spec.is_better(value, study.best[0]))
    if value is not None and len(study.spec.directions) == 1 and is_best:
        over = None if study.best is None else study.best[1]
        study.best = (value, trial.id.number)
        if keep == "none":
            over = trial.id.number
    if over is None or keep == "all":
        return None
    return DropCheckpoints(trial=TrialId(study.spec.name, over))

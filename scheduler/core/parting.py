"""How trials and studies leave the brain: told, put back into the queue, or forgotten, and what that ends.

Pure. Does not decide what an attempt's end means: `fault` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from scheduler.core import fault
from scheduler.core.attributes import FLAT_AFTER, final_attrs
from scheduler.core.expectation import Expectation
from scheduler.core.trial import Rules, Study, Trial
from scheduler.model import (
    CloseStudy,
    Command,
    DropCheckpoints,
    EnqueueRetry,
    FinalState,
    Outcome,
    Reject,
    TellTrial,
    TrialId,
    TrialState,
)


class Parting:
    """One per batch. Takes trials out of the brain's books, and yields the commands that say so."""

    def __init__(
        self, rules: Rules, expectation: Expectation, studies: Mapping[str, Study], trials: dict[TrialId, Trial]
    ) -> None:
        self._rules, self._expectation, self._studies, self._trials = rules, expectation, studies, trials

    def pending(self, study: Study) -> list[Trial]:
        """Those of its trials that wait, in the order in which they were asked."""
        return [self._trials[trial] for trial in sorted(study.pending)]

    # -- a trial ------------------------------------------------------------------------------------------------------

    def finish(
        self, trial: Trial, verdict: fault.Final, outcome: Outcome, now: float, *, trusted_peak: bool
    ) -> Iterator[Command]:
        """Tell its final state, which counts; and close its study when that says that it cannot go on."""
        study, state = self._studies[trial.id.study], verdict.state
        study.misfits_in_row = 0
        study.counted += 1
        study.ended.append(trial.took(now, outcome))
        if state is FinalState.COMPLETE:
            study.completed += 1
            self._expectation.finished(study, trial, outcome.duration_s)
        attrs = final_attrs(
            outcome, trial.footprint, trial.attempt, trusted_peak=trusted_peak, earlier_s=trial.earlier_s
        )
        if trial.started_over is not None:
            attrs["started_over"] = trial.started_over
        if (flat_after := trial.flat_after(outcome)) is not None:
            attrs[FLAT_AFTER] = flat_after
        value = outcome.value if state is FinalState.COMPLETE else None
        self.forget(trial, f"told {state.value}", now)
        yield TellTrial(
            trial=trial.id,
            state=state,
            value=value,
            values=outcome.values if value is not None else (),
            attrs=attrs,
            constraint=verdict.constraint,
        )
        if (over := unwanted(study, trial, value, self._rules.keep_checkpoints)) is not None:
            yield over
        if outcome.fatal and state is FinalState.FAIL:
            self.stop(study, f"trial {trial.id.number} failed: {outcome.detail}", early=True)
        study.failures_in_row = fault.failures_in_row(study.failures_in_row, state)
        if fault.is_broken(study.failures_in_row, self._rules.retry):
            reason = f"{study.failures_in_row} failures in a row; last: {outcome.detail}"
            yield from self.close(study, reason, now, early=True)

    def misfit(self, trial: Trial, never: Reject, now: float) -> Iterator[Command]:
        """No worker can ever hold it: pruned with a constraint, which teaches the sampler; it does not count."""
        study = self._studies[trial.id.study]
        study.misfits_in_row += 1
        attrs = {"stop_reason": "does_not_fit", "does_not_fit": dict(never.numbers)}
        excess = trial.footprint.host_bytes / max(1, never.numbers.get("limit_bytes", 1)) - 1
        self.forget(trial, f"told {FinalState.PRUNED.value}", now)
        yield TellTrial(trial=trial.id, state=FinalState.PRUNED, value=None, attrs=attrs, constraint=max(excess, 1e-3))
        if study.misfits_in_row >= self._rules.max_misfits:
            reason = f"{study.misfits_in_row} trials in a row fit no worker ({never.reason})"
            yield from self.close(study, reason, now, early=True)

    def requeue(self, trial: Trial, reason: str, now: float, outcome: Outcome | None = None) -> Iterator[Command]:
        """Put it back into its study's queue, for a later start. outcome: of its last attempt, None if it never ran."""
        self.forget(trial, f"requeued: {reason}", now)
        yield requeued(trial, reason, outcome)

    def forget(self, trial: Trial, why: str, now: float) -> None:
        """Take it out of the books, without a word."""
        study = self._studies[trial.id.study]
        trial.move(TrialState.FINISHED, now, why)
        del self._trials[trial.id]
        study.live.discard(trial.id)
        study.pending.discard(trial.id)
        study.untold += not trial.taken

    # -- a study ------------------------------------------------------------------------------------------------------

    @staticmethod
    def stop(study: Study, source: str, *, early: bool = False) -> None:
        """Ask it for no further trial; those there are, also one that waits, run to their end."""
        if study.stopped is None and study.closed is None:
            study.stopped, study.closed_early = source, early

    def close(self, study: Study, reason: str, now: float, *, early: bool) -> Iterator[Command]:
        """Start nothing of it any more; what waits is put back into its queue."""
        if study.closed is not None:
            return
        study.closed, study.closed_early = reason, early
        yield CloseStudy(study=study.spec.name, reason=reason, early=early)
        for trial in self.pending(study):
            yield from self.requeue(trial, "study closed", now)


# -- what is said -----------------------------------------------------------------------------------------------------


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

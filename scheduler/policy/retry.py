"""What follows from the end of an attempt: a retry or the trial's final state.

Covers the table from `ExitReason` to what the study is told (DESIGN 11) and the circuit breaker's count. Does not cover
what is found on disk after a crash: see `settle`.
"""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.model import ExitReason, FinalState, Outcome

# > 0 tells the sampler "infeasible". The size carries no information: a killed trial's true excess is unknown.
INFEASIBLE = 1.0
FEASIBLE = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """max_retries: retries of a trial whose worker, host or driver died. The rest paces and ends repeated failure."""

    max_retries: int = 3
    max_consecutive_failures: int = 5
    delay_s: float = 1.0
    max_delay_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Retry:
    """Run it again, from its checkpoint where it has one, not before `delay_s` has passed."""

    delay_s: float


@dataclass(frozen=True, slots=True)
class Final:
    """Tell the study. constraint: > 0 infeasible, 0 feasible, None when nothing was learned about it."""

    state: FinalState
    constraint: float | None


_FINAL = {
    ExitReason.COMPLETED: Final(FinalState.COMPLETE, FEASIBLE),
    ExitReason.PRUNED: Final(FinalState.PRUNED, FEASIBLE),
    ExitReason.STALLED: Final(FinalState.PRUNED, None),
    # FAIL would leave the sampler free to propose the same size again: over-budget trials told FAIL left 79 % of late
    # proposals infeasible, told PRUNED with a constraint 31 %.
    ExitReason.EVICTED: Final(FinalState.PRUNED, INFEASIBLE),
    ExitReason.OVERSHOOT: Final(FinalState.PRUNED, INFEASIBLE),
    ExitReason.KERNEL_OOM: Final(FinalState.PRUNED, INFEASIBLE),
    ExitReason.FAILED: Final(FinalState.FAIL, None),
    ExitReason.LOST: Final(FinalState.FAIL, None),
}


def after(outcome: Outcome, attempt: int, settings: RetryPolicy) -> Retry | Final:
    """What to do about the trial whose attempt number `attempt` (from 1) ended like this.

    Only LOST and INTERRUPTED are run again: these ends say nothing about the trial. The delay after LOST doubles, so
    that a trial which takes its worker down with it does not take the next one at once. INTERRUPTED is nobody's
    failure and has no limit; a driver that is leaving puts the trial into the study's queue instead.
    """
    if outcome.reason is ExitReason.INTERRUPTED:
        return Retry(0.0)
    if outcome.reason is ExitReason.LOST and attempt <= settings.max_retries:
        return Retry(min(settings.max_delay_s, settings.delay_s * 2.0 ** min(attempt - 1, 30)))
    return _FINAL[outcome.reason]


def failures_in_row(before: int, state: FinalState) -> int:
    """The study's count of failures in a row after one more trial reached its final state.

    A retry is not a final state and leaves the count alone. PRUNED resets it, a watchdog's kill too: the training
    function ran, which is what the circuit breaker asks.
    """
    return before + 1 if state is FinalState.FAIL else 0


def is_broken(failures: int, settings: RetryPolicy) -> bool:
    """Whether the study is to be closed after this many failures in a row (0 in the settings: never)."""
    return 0 < settings.max_consecutive_failures <= failures

"""What follows from the end of an attempt."""

from __future__ import annotations

import pytest

from scheduler.model import MEMORY_REASONS, ExitReason, FinalState
from scheduler.policy.retry import Final, Retry, RetryPolicy, after, failures_in_row, is_broken
from tests.builders import outcome

POLICY = RetryPolicy(max_retries=3, max_consecutive_failures=2, delay_s=1.0, max_delay_s=3.0)


@pytest.mark.parametrize(
    ("reason", "state"),
    [
        (ExitReason.COMPLETED, FinalState.COMPLETE),
        (ExitReason.PRUNED, FinalState.PRUNED),
        (ExitReason.STALLED, FinalState.PRUNED),
        (ExitReason.EVICTED, FinalState.PRUNED),
        (ExitReason.OVERSHOOT, FinalState.PRUNED),
        (ExitReason.KERNEL_OOM, FinalState.PRUNED),
        (ExitReason.FAILED, FinalState.FAIL),
    ],
)
def test_final_states(reason: ExitReason, state: FinalState) -> None:
    """Each end but a lost or interrupted one is final at its first attempt, and only memory kills mean infeasible."""
    verdict = after(outcome(reason), 1, POLICY)
    assert isinstance(verdict, Final)
    assert verdict.state is state
    assert ((verdict.constraint or 0.0) > 0) == (reason in MEMORY_REASONS)


def test_every_reason_has_an_answer() -> None:
    """A new way to end cannot be forgotten here."""
    for reason in ExitReason:
        assert isinstance(after(outcome(reason), 99, POLICY), Final | Retry)


def test_lost_is_retried_with_growing_delay_then_fails() -> None:
    """A trial whose worker dies runs max_retries more times, each later than the last, and then fails."""
    verdicts = [after(outcome(ExitReason.LOST), attempt, POLICY) for attempt in (1, 2, 3, 4)]
    assert verdicts == [Retry(1.0), Retry(2.0), Retry(3.0), Final(FinalState.FAIL, None)]


def test_no_retries() -> None:
    """max_retries 0 makes the first loss final."""
    assert after(outcome(ExitReason.LOST), 1, RetryPolicy(max_retries=0)) == Final(FinalState.FAIL, None)


def test_interrupted_is_never_final() -> None:
    """Being stopped by the user costs a trial nothing, however often."""
    assert after(outcome(ExitReason.INTERRUPTED), 50, POLICY) == Retry(0.0)


def test_delay_of_a_late_attempt_is_finite() -> None:
    """The doubling delay stays at its cap, also far out where a power of two would overflow."""
    assert after(outcome(ExitReason.LOST), 5000, RetryPolicy(max_retries=10_000)) == Retry(30.0)


def test_circuit_breaker_counts_failures_in_a_row() -> None:
    """FAIL counts, anything that ran resets, and the limit of 2 is reached by two in a row only."""
    count, broken = 0, []
    for state in (FinalState.FAIL, FinalState.PRUNED, FinalState.FAIL, FinalState.COMPLETE, FinalState.FAIL):
        count = failures_in_row(count, state)
        broken.append(is_broken(count, POLICY))
    assert broken == [False] * 5
    assert is_broken(failures_in_row(count, FinalState.FAIL), POLICY)
    assert not is_broken(10_000, RetryPolicy(max_consecutive_failures=0))

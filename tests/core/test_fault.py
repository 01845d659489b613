"""Whose fault an end is: the table in the README is the table in the code, and what the function makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.core import fault
from scheduler.core.fault import RULES, Again, Facts, Final, RetryPolicy, failures_in_row, is_broken, judge
from scheduler.model import MEMORY_REASONS, ExitReason, FinalState, KillRecord
from tests.builders import outcome

README = Path(__file__).resolve().parents[2] / "scheduler" / "README.md"
POLICY = RetryPolicy(max_retries=3, max_consecutive_failures=2, delay_s=1.0)
NOT_ITS_FAULT = (ExitReason.NOT_STARTED, ExitReason.PREEMPTED, ExitReason.NO_ROOM, ExitReason.INTERRUPTED)
KILL = KillRecord(kill_id="k", rule="pressure", reason=ExitReason.EVICTED, within_promise=True)


def rows() -> list[str]:
    """The table of the README as the data gives it."""
    lines = []
    words: dict[float | None, str] = {fault.INFEASIBLE: "infeasible", fault.FEASIBLE: "feasible"}
    for reason, rule in RULES.items():
        trial = rule.state.value if rule.state else "again, from its checkpoint"
        cells = [
            f"`{reason.value}`",
            rule.what,
            rule.fault.value,
            trial,
            "yes" if rule.counts else "no",
            "only without progress" if rule.spends_retry else "no",
            words.get(rule.constraint, "-"),
            "closed until a probe succeeds" if rule.closes_host else "open",
            f"{rule.believed} times in a row, then `{rule.else_.value}`" if rule.else_ else "always",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def test_the_readme_shows_the_table_that_is_used() -> None:
    """Each row of the data stands in scheduler/README.md word for word, in this order, and no other."""
    text = README.read_text()
    section = text[text.index("## Whose fault") :].split("\n## ")[0]
    written = [line for line in section.splitlines() if line.startswith("| `")]
    assert written == rows()


def test_every_reason_has_a_row() -> None:
    """A new way to end cannot be forgotten here."""
    assert set(RULES) == set(ExitReason)


@pytest.mark.parametrize(
    ("reason", "state"),
    [
        (ExitReason.COMPLETED, FinalState.COMPLETE),
        (ExitReason.PRUNED, FinalState.PRUNED),
        (ExitReason.STALLED, FinalState.PRUNED),
        (ExitReason.TIMED_OUT, FinalState.PRUNED),
        (ExitReason.EVICTED, FinalState.PRUNED),
        (ExitReason.OVERSHOOT, FinalState.PRUNED),
        (ExitReason.KERNEL_OOM, FinalState.PRUNED),
        (ExitReason.FAILED, FinalState.FAIL),
    ],
)
def test_what_is_the_trials_own_is_final_at_once(reason: ExitReason, state: FinalState) -> None:
    """Its own ends are final at the first attempt, and only memory kills mean infeasible."""
    verdict = judge(outcome(reason), Facts(), POLICY)
    assert isinstance(verdict, Final)
    assert (verdict.state, verdict.reason) == (state, reason)
    assert ((verdict.constraint or 0.0) > 0) == (reason in MEMORY_REASONS)


@given(
    reason=st.sampled_from(NOT_ITS_FAULT),
    progress=st.booleans(),
    spent=st.integers(0, 200),
    fruitless=st.integers(0, 10_000),
    retries=st.integers(0, 5),
)
def test_what_is_not_its_fault_costs_it_nothing(
    reason: ExitReason, progress: bool, spent: int, fruitless: int, retries: int
) -> None:
    """However often: it runs again, no retry is spent, and only a host that cannot start anything is closed."""
    facts = Facts(progress=progress, spent=spent, fruitless=fruitless)
    verdict = judge(outcome(reason, kill=KILL), facts, RetryPolicy(max_retries=retries))
    assert isinstance(verdict, Again)
    assert verdict.spent == spent
    assert verdict.closes_host == (reason in (ExitReason.NOT_STARTED, ExitReason.NO_ROOM))
    assert 0 < verdict.delay_s <= 300


def run_through(*ends: tuple[ExitReason, bool]) -> list[Again | Final]:
    """The verdicts on one trial's ends, (reason, progress), one after the other."""
    facts, verdicts = Facts(), []
    for reason, progress in ends:
        verdict = judge(outcome(reason), Facts(progress=progress, spent=facts.spent, fruitless=facts.fruitless), POLICY)
        verdicts.append(verdict)
        if isinstance(verdict, Again):
            facts = Facts(spent=verdict.spent, fruitless=verdict.fruitless)
    return verdicts


def test_lost_without_progress_is_run_again_later_and_later_then_fails() -> None:
    """A trial whose worker dies each time runs max_retries more times, each later than the last, and then fails."""
    *again, last = run_through(*[(ExitReason.LOST, False)] * 4)
    assert [verdict.delay_s for verdict in again if isinstance(verdict, Again)] == [1.0, 2.0, 4.0]
    assert last == Final(FinalState.FAIL, None, ExitReason.LOST)


def test_lost_with_progress_spends_nothing() -> None:
    """A host that dies every hour costs a trial no retry while each attempt leaves a newer checkpoint."""
    verdicts = run_through(*[(ExitReason.LOST, True)] * 50, *[(ExitReason.LOST, False)] * 3)
    assert all(isinstance(verdict, Again) for verdict in verdicts)
    assert [verdict.spent for verdict in verdicts[-4:] if isinstance(verdict, Again)] == [0, 1, 2, 3]


def test_progress_also_resets_the_delay() -> None:
    """What came forward is not made to wait for what failed before."""
    verdicts = run_through((ExitReason.LOST, False), (ExitReason.LOST, False), (ExitReason.LOST, True))
    assert [verdict.delay_s for verdict in verdicts if isinstance(verdict, Again)] == [1.0, 2.0, 1.0]


def test_no_retries() -> None:
    """max_retries 0 makes the first loss without progress final, and leaves everything else alone."""
    none = RetryPolicy(max_retries=0)
    assert isinstance(judge(outcome(ExitReason.LOST), Facts(), none), Final)
    assert isinstance(judge(outcome(ExitReason.LOST), Facts(progress=True), none), Again)


def test_spent_retries_do_not_make_a_full_disk_fatal() -> None:
    """A trial that has none left still waits where the host is at fault."""
    assert isinstance(judge(outcome(ExitReason.NOT_STARTED), Facts(spent=3), POLICY), Again)


def test_the_kernels_victim_is_believed_twice() -> None:
    """The kernel does not say what its victim held: the third kill in a row with nothing to show is its own."""
    *again, last = run_through(*[(ExitReason.PREEMPTED, False)] * 3)
    assert all(isinstance(verdict, Again) for verdict in again)
    assert last == Final(FinalState.PRUNED, fault.INFEASIBLE, ExitReason.KERNEL_OOM)
    believed = run_through(*[(ExitReason.PREEMPTED, False), (ExitReason.PREEMPTED, True)] * 5)
    assert all(isinstance(verdict, Again) for verdict in believed)


def test_a_disk_that_is_always_full_for_one_trial_is_its_own() -> None:
    """Its own error is the only evidence: the sixth in a row with nothing to show is a failure like any other."""
    *again, last = run_through(*[(ExitReason.NO_ROOM, False)] * 6)
    assert all(isinstance(verdict, Again) and verdict.closes_host for verdict in again)
    assert last == Final(FinalState.FAIL, None, ExitReason.FAILED)


def test_delay_of_a_late_attempt_is_finite() -> None:
    """The doubling delay stays at its cap, also far out where a power of two would overflow."""
    verdict = judge(outcome(ExitReason.LOST), Facts(fruitless=5000), POLICY)
    assert isinstance(verdict, Again)
    assert verdict.delay_s == 30.0


def test_circuit_breaker_counts_failures_in_a_row() -> None:
    """FAIL counts, anything that ran resets, and the limit of 2 is reached by two in a row only."""
    count, broken = 0, []
    for state in (FinalState.FAIL, FinalState.PRUNED, FinalState.FAIL, FinalState.COMPLETE, FinalState.FAIL):
        count = failures_in_row(count, state)
        broken.append(is_broken(count, POLICY))
    assert broken == [False] * 5
    assert is_broken(failures_in_row(count, FinalState.FAIL), POLICY)
    assert not is_broken(10_000, RetryPolicy(max_consecutive_failures=0))

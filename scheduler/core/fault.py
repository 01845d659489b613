"""Whose fault the end of an attempt is, and what follows from it: one table, and one function that reads it.

Every path goes through here: the living driver (`state`), the next one (`recovery`), and what the study counts. What is
not the trial's fault costs it nothing: not its place in the quota, not a constraint, and a retry only where nothing
came of the attempt. Does not cover how an end is recognised (`conclude`), nor what is found on disk (`recovery`).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from scheduler.model import MEMORY_REASONS, ExitReason, FinalState, Outcome

# > 0 tells the sampler "infeasible". The size carries no information: a killed trial's true excess is unknown.
INFEASIBLE = 1.0
FEASIBLE = 0.0
# Stop reasons of trials that never ran, although they have a final state: they leave the quota alone.
NEVER_RAN = ("does_not_fit", "ask_failed")


class Fault(enum.Enum):
    """Who answers for the end of an attempt."""

    NOBODY = "nobody"
    TRIAL = "the trial"
    NEIGHBOUR = "another trial or program"
    HOST = "the host"
    CLUSTER = "worker, host, network or driver"
    USER = "the user"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One row. what: how it happens, in words. state: the trial's final state, None where it runs again.

    spends_retry: an attempt that brought no new checkpoint spends one of the trial's retries; without any left the
    trial is FAIL. constraint: what the sampler is told. closes_host: nothing more starts there until a probe says that
    it can. max_delay_s: ends without progress in a row are run again later and later, up to this. believed: where the
    evidence is thin, so many ends without progress in a row are taken for this; the next is `else_`.
    """

    what: str
    fault: Fault
    state: FinalState | None = None
    spends_retry: bool = False
    constraint: float | None = None
    closes_host: bool = False
    max_delay_s: float = 30.0
    believed: int | None = None
    else_: ExitReason | None = None

    @property
    def counts(self) -> bool:
        """Towards the study's quota: what is final does, what runs again does not."""
        return self.state is not None


RULES: Mapping[ExitReason, Rule] = {
    ExitReason.COMPLETED: Rule(
        what="it returned a value", fault=Fault.NOBODY, state=FinalState.COMPLETE, constraint=FEASIBLE
    ),
    ExitReason.PRUNED: Rule(
        what="Optuna's pruner, or the objective by itself",
        fault=Fault.NOBODY,
        state=FinalState.PRUNED,
        constraint=FEASIBLE,
    ),
    ExitReason.FAILED: Rule(
        what="its own exception, NaN, exit, or a signal by its own hand", fault=Fault.TRIAL, state=FinalState.FAIL
    ),
    ExitReason.STALLED: Rule(what="no CPU and no progress for too long", fault=Fault.TRIAL, state=FinalState.PRUNED),
    ExitReason.TIMED_OUT: Rule(what="longer than the limit per trial", fault=Fault.TRIAL, state=FinalState.PRUNED),
    # FAIL would leave the sampler free to propose the same size again: over-budget trials told FAIL left 79 % of late
    # proposals infeasible, told PRUNED with a constraint 31 %.
    ExitReason.EVICTED: Rule(
        what="over its promise or thrashing, on a host under pressure",
        fault=Fault.TRIAL,
        state=FinalState.PRUNED,
        constraint=INFEASIBLE,
    ),
    ExitReason.OVERSHOOT: Rule(
        what="far over its promise", fault=Fault.TRIAL, state=FinalState.PRUNED, constraint=INFEASIBLE
    ),
    ExitReason.KERNEL_OOM: Rule(
        what="killed by the kernel, over its promise", fault=Fault.TRIAL, state=FinalState.PRUNED, constraint=INFEASIBLE
    ),
    # The kernel does not say how much its victim held, and one that leaps from within its promise to far beyond it
    # between two samples looks like a bystander. (The watchdog has measured its own: those are always believed.)
    ExitReason.PREEMPTED: Rule(
        what="killed for memory although within its promise",
        fault=Fault.NEIGHBOUR,
        max_delay_s=300.0,
        believed=2,
        else_=ExitReason.KERNEL_OOM,
    ),
    ExitReason.NOT_STARTED: Rule(
        what="it never came up: disk or inodes full, no process to be had, folder not writable, import fails",
        fault=Fault.HOST,
        closes_host=True,
    ),
    # Only its own error says so, and a trial may have filled the disk itself.
    ExitReason.NO_ROOM: Rule(
        what="while it ran, a disk was full or gone, or no process was to be had",
        fault=Fault.HOST,
        closes_host=True,
        believed=5,
        else_=ExitReason.FAILED,
    ),
    ExitReason.LOST: Rule(
        what="worker, host, scheduler, network or driver gone", fault=Fault.CLUSTER, spends_retry=True
    ),
    ExitReason.INTERRUPTED: Rule(what="asked to leave with its checkpoint", fault=Fault.USER),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """max_retries: of a trial that was lost without progress. The rest paces and ends repeated failure."""

    max_retries: int = 3
    max_consecutive_failures: int = 5
    delay_s: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of the trial besides the end of its attempt.

    progress: the attempt left a checkpoint that is newer than the one it began with. spent: retries spent before.
    fruitless: attempts in a row, before this one, that ended without progress and are run again.
    guessed: what it was given of memory was our guess and not all there is.
    """

    progress: bool = False
    spent: int = 0
    fruitless: int = 0
    guessed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Again:
    """Run it again, from its checkpoint where it has one, not before `delay_s` has passed.

    spent, fruitless: the trial's counts from here on (see `Facts`). closes_host: see `Rule`. alone: with all the memory
    that a host has.
    """

    delay_s: float
    spent: int
    fruitless: int
    closes_host: bool = False
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Final:
    """Tell the study. constraint: > 0 infeasible, 0 feasible, None when nothing was learned about it.

    reason: what the end is taken for; another than the outcome's own where a row of them says more than one.
    """

    state: FinalState
    constraint: float | None
    reason: ExitReason


def judge(outcome: Outcome, facts: Facts, policy: RetryPolicy) -> Again | Final:
    """Decide what follows from this end, by the table."""
    reason, rule = outcome.reason, RULES[outcome.reason]
    doubted = rule.believed is not None and facts.fruitless >= rule.believed and not facts.progress
    if rule.else_ is not None and doubted and not outcome.kill:  # what the watchdog killed it has measured
        reason, rule = rule.else_, RULES[rule.else_]
    if facts.guessed and reason in MEMORY_REASONS:  # the guess was wrong, nothing is known of the trial
        return Again(delay_s=policy.delay_s, spent=facts.spent, fruitless=0, alone=True)
    if rule.state is not None:
        return Final(rule.state, rule.constraint, reason)
    spent = facts.spent + (rule.spends_retry and not facts.progress)
    if spent > policy.max_retries and rule.spends_retry:
        return Final(FinalState.FAIL, None, reason)
    fruitless = 0 if facts.progress else facts.fruitless + 1
    # Doubled each time, so that a trial which takes its worker down with it does not take the next one at once.
    delay_s = min(rule.max_delay_s, policy.delay_s * 2.0 ** min(max(0, fruitless - 1), 30))
    return Again(delay_s=delay_s, spent=spent, fruitless=fruitless, closes_host=rule.closes_host)


def failures_in_row(before: int, state: FinalState) -> int:
    """Return the study's count of failures in a row after one more trial reached its final state.

    What runs again is no final state and leaves the count alone. PRUNED resets it, a watchdog's kill too: the training
    function ran, which is what the circuit breaker asks.
    """
    return before + 1 if state is FinalState.FAIL else 0


def is_broken(failures: int, policy: RetryPolicy) -> bool:
    """Whether the study is to be closed after this many failures in a row (0 in the settings: never)."""
    return 0 < policy.max_consecutive_failures <= failures

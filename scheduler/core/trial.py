"""The brain's own nouns: what it knows of a study and of a trial while they are under way.

Mutable, and mutated by `batch.BatchState` alone. Holds the table of legal transitions; decides nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scheduler.core.admission import MemoryBudget
from scheduler.core.durations import Took, Under
from scheduler.core.fault import Again, Facts, RetryPolicy
from scheduler.core.growth import Growth
from scheduler.core.resume import Saved, remember
from scheduler.model import (
    AttemptId,
    Correction,
    Defer,
    DeferReason,
    ExitReason,
    Footprint,
    FootprintSource,
    Form,
    Outcome,
    StudySpec,
    TrialId,
    TrialState,
)
from scheduler.model.parameters import Space

# A trial's life as a table: where it may go from where it is. Anything else is a bug and raises with its story.
TRANSITIONS: dict[TrialState, frozenset[TrialState]] = {
    TrialState.PENDING: frozenset({TrialState.ADMITTED, TrialState.FINISHED}),
    TrialState.ADMITTED: frozenset({TrialState.RUNNING, TrialState.PENDING, TrialState.FINISHED}),
    TrialState.RUNNING: frozenset({TrialState.PENDING, TrialState.FINISHED}),
    TrialState.FINISHED: frozenset(),
}


class IllegalTransition(RuntimeError):
    """A trial was asked to go where the table does not lead; the message is the trial's story."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What the user decided. reserve_bytes: kept free on each host for the system itself.

    keep_checkpoints: of finished trials: "best" (each study's best trial), "all" or "none". trial_timeout_s: how long a
    trial may run, over all its attempts but what was lost of them; timeout_s: how long this driver may; None: no limit.
    """

    memory_budget: MemoryBudget
    reserve_bytes: int
    retry: RetryPolicy
    max_misfits: int = 20
    drain_timeout_s: float = 20.0
    keep_checkpoints: str = "best"
    trial_timeout_s: float | None = None
    timeout_s: float | None = None


@dataclass(slots=True, kw_only=True)
class Study:
    """A study's place in the batch.

    live: its trials under way; pending: those of them that wait to be placed (kept apart because thousands may run).
    completed: trials that ended COMPLETE, also before this driver. untold: final states sent to the study and not yet
    confirmed durable. expected_s: how long its complete trials took, the median of the latest (`expectation`); ended:
    its latest trials that count, for the forecast.
    """

    spec: StudySpec
    counted: int = 0
    completed: int = 0
    asking: bool = False
    live: set[TrialId] = field(default_factory=set)
    pending: set[TrialId] = field(default_factory=set)
    failures_in_row: int = 0
    misfits_in_row: int = 0
    untold: int = 0
    stopped: str | None = None  # why no trial is asked for any more; those there are run to their end
    closed: str | None = None
    closed_early: bool = False
    best: tuple[float, int] | None = None
    ended: deque[Took] = field(default_factory=lambda: deque(maxlen=64))
    expected_s: float | None = None
    max_epochs: int | None = None  # of the trial asked for last

    @property
    def complete(self) -> bool:
        """Its quota is reached, or it was stopped, and nothing of it is under way."""
        return (self.counted >= self.spec.quota or self.stopped is not None) and not self.live and not self.asking

    @property
    def share(self) -> float:
        """The part of its quota that is done or running: what fair share compares."""
        return (self.counted + len(self.live)) / max(1, self.spec.quota)


@dataclass(slots=True, kw_only=True)
class Trial:
    """A trial this driver asked for and has not finished."""

    id: TrialId
    params: dict[str, Any]
    prior: Footprint
    footprint: Footprint
    family: str
    attempt: int
    max_epochs: int | None
    since: float
    smaller: tuple[Form, ...] = ()  # what it can be instead, largest first, until it has something to go on from
    needs: tuple[Correction, Sequence[Footprint]] | None = None  # of each form, corrected by that
    space: Space | None = None
    ahead: Mapping[str, Any] = field(default_factory=dict)
    alone: bool = False  # what it was guessed to need was wrong: it gets all there is
    saved: tuple[Saved, ...] = ()
    state: TrialState = TrialState.PENDING
    story: list[str] = field(default_factory=list)
    not_before: float = 0.0
    deferred: DeferReason | None = None
    wait: Defer | None = None  # the same with its numbers of now
    launched_at: float | None = None
    started_at: float | None = None
    first_step: int | None = None
    progressed_at: float | None = None
    step: int = 0
    value: float | None = None
    ticks: int = 0  # its steps in the present attempt, as of the host's latest news
    ticks_then: int = 0  # when its latest epoch ended
    settled: bool = False
    growth: Growth = field(default_factory=Growth)
    flat: bool = False  # tightened, since its study's trials grow no more by now
    retries: int = 0
    fruitless: int = 0
    ran_s: float = 0.0
    earlier_s: float = 0.0  # what all attempts before this one ran, also those that left nothing
    started_over: str | None = None
    stopping: str | None = None
    leave_by: float = 0.0
    step_s: float | None = None
    killed: bool = False
    taken: bool = False  # its final state is another driver's: nothing is told of it, nothing of it removed

    @property
    def attempt_id(self) -> AttemptId:
        return AttemptId(self.id, self.attempt)

    def move(self, state: TrialState, now: float, why: str) -> None:
        """Go there, if the table leads there. Raises IllegalTransition with the whole story otherwise."""
        self.story.append(f"{now:.1f} {self.state.value} -> {state.value}: {why}")
        if state not in TRANSITIONS[self.state]:
            raise IllegalTransition(f"{self.id}: {'; '.join(self.story)}")
        self.state = state

    def facts(self, outcome: Outcome) -> Facts:
        """Return what `fault.judge` must know besides the end of the present attempt."""
        progress = outcome.checkpoint is not None and outcome.checkpoint not in [each.path for each in self.saved]
        guessed = self.footprint.is_guess and not self.alone
        return Facts(progress=progress, spent=self.retries, fruitless=self.fruitless, guessed=guessed)

    @property
    def by_parameters(self) -> bool:
        """Nobody has a formula for what it takes: that is learnt from its study's parameters, or given by the user."""
        return not self.prior.is_known or self.prior.source is FootprintSource.GIVEN

    def flat_after(self, outcome: Outcome) -> int | None:
        """Return the report after which its memory grew no more (`growth.over_after`); None where that is not known:
        it did not run from its beginning to its end, or it has a formula."""
        whole = outcome.reason is ExitReason.COMPLETED and self.attempt == 1
        return (
            self.growth.over_after(outcome.peak_bytes) if whole and self.by_parameters and outcome.peak_bytes else None
        )

    @property
    def forms(self) -> tuple[Form, ...]:
        """The smaller ones that it may still take: a training goes on as it began, or its losses would differ."""
        return () if self.saved else self.smaller

    def reshape(self, number: int) -> Form:
        """Become its smaller form of that number, counted from 1. What is larger is gone for good."""
        form = self.smaller[number - 1]
        self.params, self.prior, self.smaller = dict(form.params), form.footprint, self.smaller[number:]
        self.needs = None
        return form

    @property
    def resume_from(self) -> str | None:
        """The newest checkpoint, None when there is none."""
        return self.saved[0].path if self.saved else None

    def began(self, checkpoint: str | None) -> None:
        """Note that the attempt goes on from this checkpoint, or from the start."""
        self.step = next((each.step for each in self.saved if each.path == checkpoint), 0)

    def left(self, checkpoint: str | None, host: str | None) -> None:
        """Note that the attempt has ended and left this checkpoint on this host; maybe the one that it began with."""
        if checkpoint is not None and checkpoint not in [each.path for each in self.saved]:
            self.saved = remember(self.saved, Saved(path=checkpoint, host=host, step=self.step))

    def retry(self, now: float, again: Again, why: str) -> None:
        """Wait for its next attempt, from the checkpoint it has."""
        self.move(TrialState.PENDING, now, why)
        self.attempt += 1
        self.since, self.not_before = now, now + again.delay_s
        self.launched_at = self.started_at = self.first_step = self.progressed_at = self.deferred = self.stopping = None
        self.settled = self.killed = self.flat = False
        self.growth = Growth()
        self.ticks = self.ticks_then = 0
        self.step_s = None

    def ran_until(self, now: float) -> float:
        """How long it has run: earlier attempts that left a checkpoint, and the present one."""
        return self.ran_s + (0.0 if self.started_at is None else now - self.started_at)

    def lasted_s(self, outcome: Outcome, now: float) -> float:
        """How long the present attempt ran; of one that was lost nobody says it, but it was seen to start."""
        return outcome.duration_s or (0.0 if self.started_at is None else now - self.started_at)

    def progressed(self, now: float, step: int, value: float) -> None:
        """Note that an epoch ended."""
        if self.first_step is None:
            self.first_step = step
        self.step, self.value, self.progressed_at = step, value, now
        self.ticks_then = self.ticks

    @property
    def within_epoch(self) -> float | None:
        """The part of the present epoch that is done, by the steps that those before took; None before the first."""
        if self.epochs < 1 or self.ticks_then < 1:
            return None
        return min(0.99, (self.ticks - self.ticks_then) * self.epochs / self.ticks_then)

    @property
    def epochs(self) -> int:
        """How many it has finished in the present attempt; where its reports do not count from 1, their span."""
        return 0 if self.first_step is None else self.step - self.first_step + 1

    def took(self, now: float, outcome: Outcome) -> Took:
        """Return what its end says of how long others will take."""
        epochs = max(outcome.epochs, self.epochs, int(outcome.reason is ExitReason.COMPLETED))
        size = self.footprint.host_bytes if self.footprint.is_known else int(1.5 * (outcome.peak_bytes or 0))
        since = now if self.launched_at is None else self.launched_at
        return Took(epochs=epochs, seconds=self.ran_s + now - since, size_bytes=size)

    def under(self, now: float) -> Under:
        """Return how far it is."""
        ran_s = 0.0 if self.launched_at is None else now - self.launched_at
        if self.progressed_at is None or self.launched_at is None or self.epochs < 1:
            return Under(epochs=self.step, ran_s=ran_s)
        pace_s = (self.progressed_at - self.launched_at) / self.epochs
        done = max(self.step, self.epochs)
        return Under(epochs=done, ran_s=ran_s, pace_s=pace_s, behind_s=now - self.progressed_at)

    def expected_end(self) -> float | None:
        """When it will be over if it trains all its epochs at the pace of those it has done; None before the first.

        Counted from the last finished epoch: taken at any later instant the prediction would run away from a trial that
        is late, and what is always about to end can be passed by others for ever.
        """
        if self.started_at is None or self.progressed_at is None or self.first_step is None or not self.max_epochs:
            return None
        pace_s = (self.progressed_at - self.started_at) / (self.step - self.first_step + 1)
        return self.started_at + pace_s * (self.max_epochs - self.first_step + 1)

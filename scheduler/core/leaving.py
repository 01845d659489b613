"""Who has been asked to leave, and by when: one trial, or all of them while a batch drains.

Pure. A trial hears the request between two steps, then writes a checkpoint: how long that takes is known from the trial
itself, from the pauses between its signs of life. A step of a large model on a loaded machine takes minutes, and ending
it there throws away all since the last checkpoint. Does not cover what follows from its end.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from scheduler.core.ledger import Ledger
from scheduler.core.trial import Rules, Trial
from scheduler.model import Command, KillAttempt, NoteDrain, StopAttempt, TrialState

LONGEST_S = 3600.0  # also for one whose steps take longer: whoever asked may be a machine that shuts down


def allowance_s(floor_s: float, step_s: float | None) -> float:
    """Seconds from the request to the end: a step and a checkpoint, each as long as the longest pause, but at least
    `floor_s` and, unless that is more, an hour at most. step_s: the longest pause, None where none was seen."""
    return max(floor_s, min(LONGEST_S, 2 * (step_s or 0.0)))


class Leaving:
    """What is said to attempts that are to leave. Every method yields the commands that say it.

    source: who asked that the batch drain; None while nobody has. at_once: and that nothing be waited for.
    """

    def __init__(self, rules: Rules, ledger: Ledger) -> None:
        self.source: str | None = None
        self.at_once = False
        self._rules, self._ledger = rules, ledger
        self._since = 0.0

    def drain(self, source: str, now: float) -> None:
        """From now on nothing new starts."""
        self.source, self._since = source, now

    def stop(self, trial: Trial, reason: str, now: float) -> Iterator[Command]:
        """Ask it to write a checkpoint and go, once."""
        worker = self._ledger.worker_of(trial.attempt_id)
        if worker is not None and trial.stopping is None:
            trial.stopping = reason
            trial.leave_by = now + allowance_s(self._rules.drain_timeout_s, trial.step_s)
            yield StopAttempt(attempt=trial.attempt_id, worker=worker, reason=reason)

    def kill(self, trial: Trial, reason: str) -> Iterator[Command]:
        """End it, once."""
        worker = self._ledger.worker_of(trial.attempt_id)
        if worker is not None and not trial.killed:
            trial.killed = True
            yield KillAttempt(attempt=trial.attempt_id, worker=worker, reason=reason)

    def overdue(self, trials: Collection[Trial], now: float) -> Iterator[Command]:
        """Ask whoever is over its time limit to leave; end those who have had time enough for it."""
        limit_s = self._rules.trial_timeout_s
        for trial in trials:
            if limit_s is None or trial.state is not TrialState.RUNNING or trial.ran_until(now) <= limit_s:
                continue
            if trial.stopping is None:
                yield from self.stop(trial, "timeout", now)
            elif now > trial.leave_by:
                yield from self.kill(trial, "timeout")
        for trial in trials if self.source is not None else ():
            if now > max(trial.leave_by, self._since + self._rules.drain_timeout_s):
                yield from self.kill(trial, "drain_timeout")

    def note_drain(self, trials: Collection[Trial], now: float) -> Iterator[Command]:
        """Say for whom a drain takes long, if it does."""
        last = max(trials, key=lambda trial: trial.leave_by, default=None)
        if last is not None and last.step_s and last.leave_by > now + self._rules.drain_timeout_s:
            yield NoteDrain(attempt=last.attempt_id, wait_s=last.leave_by - now, step_s=last.step_s)

    def ends(self, trials: Collection[Trial]) -> float | None:
        """Return the instant at which the last trial has left or is ended; None while nothing drains."""
        if self.source is None:
            return None
        least = self._since + self._rules.drain_timeout_s
        return max((trial.leave_by for trial in trials), default=least)

"""Trials that wait, on their way to a launch: who can never start, who starts now, and why the others do not.

Pure. Who of those that wait comes first, and where, is `placement`; this carries out what it has decided.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from scheduler.core import admission, placement
from scheduler.core.ledger import Ledger, Reservation, Row
from scheduler.core.outlook import Outlook
from scheduler.core.trial import Study, Trial
from scheduler.model import (
    Command,
    Defer,
    LaunchAttempt,
    NoteDeferral,
    Reject,
    ReshapeTrial,
    TrialId,
    TrialState,
    Waiting,
)

# Vitals that open no room to anybody who waits may still move a hold: placed again at most so often. With a thousand
# workers they come a thousand times a second.
REPLACE_S = 0.25


class Starting:
    """One per batch. Every method that says something yields the commands that say it.

    held: worker -> the trial that placement last held it for.
    """

    def __init__(
        self, ledger: Ledger, outlook: Outlook, studies: Mapping[str, Study], trials: Mapping[TrialId, Trial]
    ) -> None:
        self._ledger, self._outlook, self._studies, self._trials = ledger, outlook, studies, trials
        self.held: Mapping[str, TrialId] = {}
        self._placed_at = 0.0
        self._least_bytes: int | None = None  # that any trial which waits for memory could do with

    def never(self, line: Waiting) -> Reject | None:
        """Why no worker could take it, in any of its forms."""
        rejects = []
        for each in (line.footprint, *line.smaller):
            reject = admission.feasible(each, self._ledger.rooms.by_limit(), line.slots)
            if reject is None:
                return None
            rejects.append(reject)
        return rejects[-1]

    def may_follow(self, row: Row, now: float) -> bool:
        """Whether the news of this worker may let somebody start who waits."""
        if self._least_bytes is None:
            return False
        return now - self._placed_at >= REPLACE_S or self._ledger.opens(row, self._least_bytes)

    def place(self, waiting: Sequence[Waiting], now: float) -> Iterator[Command]:
        """Start those for whom there is room, and say of the others what they wait for."""
        self._placed_at, self._least_bytes = now, None
        if not waiting:
            return
        plan = placement.place_in(waiting, self._outlook.running_on, self._ledger.rooms, now)
        self.held = plan.held
        for start in plan.starts:
            yield from self._launch(start, now)
        for trial_id, defer in plan.deferred.items():
            yield from self.defer(self._trials[trial_id], defer)
        self._least_bytes = min((line.least_bytes for line in waiting if line.trial in plan.deferred), default=None)

    @staticmethod
    def defer(trial: Trial, defer: Defer) -> Iterator[Command]:
        """Let it wait; told when the reason changes."""
        trial.wait = defer
        if trial.deferred != defer.reason:
            trial.deferred = defer.reason
            yield NoteDeferral(trial=trial.id, reason=defer.reason, numbers=defer.numbers)

    def _launch(self, start: placement.Start, now: float) -> Iterator[Command]:
        trial = self._trials[start.trial]
        study = self._studies[trial.id.study]
        row = self._ledger.row(start.worker)
        assert row is not None  # placement saw its view
        if start.form:
            yield ReshapeTrial(trial=trial.id, form=trial.reshape(start.form))
        # Placed by what it would need anywhere; here it needs what it does here.
        here = self._outlook.sized(trial, row)
        host_bytes = start.host_bytes
        if here.is_known:
            trial.footprint, host_bytes = here, min(host_bytes, here.host_bytes)
        self._ledger.reserve(
            start.worker,
            Reservation(
                attempt=trial.attempt_id,
                host_bytes=host_bytes,
                device_bytes=start.device_bytes,
                slots=study.spec.slots,
            ),
        )
        trial.move(TrialState.ADMITTED, now, f"attempt {trial.attempt} on {start.worker}")
        trial.launched_at = now
        trial.began(trial.resume_from)
        study.pending.discard(trial.id)
        yield LaunchAttempt(
            attempt=trial.attempt_id,
            worker=start.worker,
            params=trial.params,
            footprint=trial.footprint,
            reserved_bytes=host_bytes,
            slots=study.spec.slots,
            ahead=trial.ahead,
            resume_from=trial.resume_from,
            older=tuple(each.path for each in trial.saved[1:]),
            retries=trial.retries,
            ran_s=trial.ran_s,
            wait_s=now - trial.since,
        )

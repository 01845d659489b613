"""The hold of EASY backfill: one worker kept for the head of the queue, and who may still start there.

Covers when a worker will have room for the head (the shadow time), and what may start on it meanwhile without delaying
the head. Does not choose the head or hand out starts: that is `placement`.

What the hold rests on:
- A running trial with an unknown end counts as ending after all known ones. Until enough is known a trial may start
  beside the head only in what the head will leave over, so what the head waits for can only shrink.
- One that outlived its prediction counts as ending now, so an overrun buys nobody else time.
- A hold must be worth what it idles: while the head has waited for less than some of its own durations, whoever would
  use at least the memory x time until the shadow time that its overrun costs the head may start all the same.
- A host's memory counts less what other programs hold now. Where they leave too little for the head even without our
  trials, nothing is held: waiting for a stranger to quit would idle the host without end. A closed worker, where nobody
  starts anyway, is not held either.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from scheduler.core import admission
from scheduler.model import Defer, DeferReason, Running, Waiting, WorkerView

# A head that has waited this long is no longer passed on the strength of a prediction, only by what fits beside it.
PATIENCE_S = 86_400.0
# For so many of its own expected durations a head is put off where that is worth it; then it is not. Simulated, 40
# trials, 24 seeds: makespan over the lower bound from 1.23 to 1.21 for one study, from 1.153 to 1.147 for ten.
PUT_OFF = 4.0


@dataclass(slots=True, kw_only=True)
class Hold:
    """`worker` is held for `head` until `until`, its shadow time (inf: nobody knows).

    spare_*: what the head leaves over there at that time; `take` charges it. unknown_ends: how many trials with an
    unknown end the head waits for.
    """

    head: Waiting
    worker: str
    until: float
    unknown_ends: int
    spare_bytes: int
    spare_device_bytes: int
    spare_slots: int

    def lets(self, trial: Waiting, worker: str, now: float) -> bool:
        """Whether the trial may start there, on the held worker or on one that shares its memory, without delay for the
        head, or with one that is worth it."""
        return self._ends_before(trial, now) or self._is_worth(trial, now) or self._fits_beside(trial, worker)

    def _fits_beside(self, trial: Waiting, worker: str) -> bool:
        return (
            trial.footprint.is_known
            and trial.footprint.host_bytes <= self.spare_bytes
            and trial.footprint.device_bytes <= self.spare_device_bytes
            and (worker != self.worker or trial.slots <= self.spare_slots)
        )

    def take(self, trial: Waiting, worker: str, now: float) -> None:
        """Charge a trial that starts there and will still run beside the head, or put the head off."""
        if self._ends_before(trial, now):
            return
        if not self._fits_beside(trial, worker) and trial.expected_s is not None:
            self.until = max(self.until, now + trial.expected_s)
        else:
            self.spare_bytes -= trial.footprint.host_bytes
            self.spare_device_bytes -= trial.footprint.device_bytes
            self.spare_slots -= trial.slots if worker == self.worker else 0

    def defer(self, trial: Waiting, now: float) -> Defer:
        """Why the trial may not start here although it fits."""
        numbers = {
            "needed_bytes": trial.footprint.host_bytes,
            "head_bytes": self.head.footprint.host_bytes,
            "spare_bytes": self.spare_bytes,
            "spare_slots": self.spare_slots,
        }
        if math.isfinite(self.until):
            numbers["head_wait_s"] = math.ceil(self.until - now)
        return Defer(DeferReason.HELD_FOR_HEAD, numbers)

    def _ends_before(self, trial: Waiting, now: float) -> bool:
        if trial.expected_s is None or not math.isfinite(self.until) or now - self.head.since > PATIENCE_S:
            return False
        return now + trial.expected_s <= self.until

    def _is_worth(self, trial: Waiting, now: float) -> bool:
        """Whether the memory it uses until the shadow time is worth the time for which the head's will be missing."""
        lasts, head_lasts = trial.expected_s, self.head.expected_s
        if lasts is None or head_lasts is None or not math.isfinite(self.until):
            return False
        used = trial.footprint.host_bytes * (self.until - now)
        missed = self.head.footprint.host_bytes * (now + lasts - self.until)
        return now - self.head.since <= PUT_OFF * head_lasts and used >= missed


def earliest(head: Waiting, options: Iterable[tuple[WorkerView, list[Running]]], now: float) -> Hold | None:
    """Return the hold on the worker where the head can start first, given what runs on each; None when no worker
    qualifies.

    Ends nobody knows come last; among them the worker where the fewest have to end.
    """
    holds = (_hold_on(view, running, head, now) for view, running in options)
    found = [hold for hold in holds if hold is not None]
    return min(found, key=lambda hold: (hold.until, hold.unknown_ends, hold.worker), default=None)


def _hold_on(view: WorkerView, running: list[Running], head: Waiting, now: float) -> Hold | None:
    if admission.closed(view) is not None or admission.never(head.footprint, head.slots, view) is not None:
        return None
    alone = not head.footprint.is_known
    need, need_slots = head.footprint.host_bytes, head.slots
    if alone:
        need, need_slots = admission.least_alone(view.limit_bytes or 0), view.slots
    need_device = head.footprint.device_bytes
    # What ends on another worker of the same memory gives back memory, but neither slots nor this worker's own bound.
    shared, own = admission.room(view), view.own_headroom_bytes
    if view.domain_headroom_bytes is not None:
        shared = min(view.domain_headroom_bytes, admission.live_room(view))
    free_device, free_slots = admission.device_room(view), view.free_slots
    # Of unknown ends the largest first: then the fewest have to end, and a backfill can only lower their number.
    ending = deque(sorted(running, key=lambda run: (_end(run, now), -run.reserved_bytes, run.attempt)))
    until, unknown_ends = now, 0
    while min(shared, own) < need or free_device < need_device or free_slots < need_slots or (alone and ending):
        if not ending:
            return None
        run = ending.popleft()
        here = run.worker == view.address
        shared += run.reserved_bytes
        own += run.reserved_bytes * here
        free_device += run.device_reserved_bytes * (here or view.device_is_shared)
        free_slots += run.slots * here
        until = _end(run, now)
        unknown_ends += math.isinf(until)
    return Hold(
        head=head,
        worker=view.address,
        until=until,
        unknown_ends=unknown_ends,
        spare_bytes=0 if alone else min(shared, own) - need,
        spare_device_bytes=0 if alone else free_device - need_device,
        spare_slots=free_slots - need_slots,
    )


def _end(run: Running, now: float) -> float:
    return math.inf if run.expected_end is None else max(run.expected_end, now)

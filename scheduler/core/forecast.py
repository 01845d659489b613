"""When it will all be over: the queue and what runs, played forward by the real placement on a simulated clock.

`work` takes what is needed out of the brain, `forecast` plays it forward a number of times, each time with durations
drawn anew (`durations`), and sums up. Uses `placement` and the `Ledger` as a run does, so that backfill, fair
share and shared memory count as they will. Does not foresee kills, lost hosts, studies that close early, or what other
programs will take: their memory stays as it is now. Pure: the caller brings time and chance.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from scheduler import model as m
from scheduler.core import placement
from scheduler.core.durations import Beliefs, Evidence, Truth, Under, Uniform
from scheduler.core.ledger import Ledger, Reservation, Row

SAMPLES = 19  # between the second and the eighteenth of nineteen lie 80 % of what such draws give
MOST_ENDS = 2000  # of trials that one play goes through; what is left then goes on at the pace of the latter half


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A duration from now on: it is between low_s and high_s four times in five. middle_s: as often more as less."""

    low_s: float
    middle_s: float
    high_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyWork:
    """A study's part. left: trials to start, those under way and the waiting one not among them. sizes: footprints in
    bytes of its latest trials, None: nobody knows. expected_s: what placement expects of a trial."""

    name: str
    slots: int
    quota: int
    counted: int
    left: int
    sizes: tuple[int, ...] = ()
    expected_s: float | None = None
    evidence: Evidence = field(default_factory=Evidence)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialWork:
    """A trial under way. worker: None while it waits; then `waiting` is how placement sees it."""

    trial: m.TrialId
    under: Under
    worker: str | None
    host_bytes: int = 0
    device_bytes: int = 0
    slots: int = 1
    waiting: m.Waiting | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """All that is left to do. rows: the workers without their reservations. now: monotonic seconds."""

    studies: tuple[StudyWork, ...]
    trials: tuple[TrialWork, ...]
    rows: tuple[tuple[Row, int], ...]
    now: float

    @property
    def is_known(self) -> bool:
        """Whether anything at all is known of how long trials take."""
        return any(study.evidence.ended for study in self.studies)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What is foreseen at the instant `at`. starts: of each waiting trial. busy: (seconds from now, trials that run
    then) in the middle one of the plays; serial: how long it would take one after another."""

    at: float
    whole: Span
    studies: Mapping[str, Span] = field(default_factory=dict)
    starts: Mapping[m.TrialId, Span] = field(default_factory=dict)
    busy: tuple[tuple[float, int], ...] = ()
    serial: Span | None = None


def forecast(work: Work, chance: Uniform, samples: int = SAMPLES) -> Forecast | None:
    """Play `work` forward `samples` times (an odd number from 3). None: nothing is known yet, or nothing can go on."""
    beliefs = Beliefs({study.name: study.evidence for study in work.studies})
    if beliefs.is_empty:
        return None
    plays = []
    for _ in range(samples):
        play = _Play(work, beliefs.truths(chance), chance)
        if not play.run():
            return None
        plays.append(play)
    plays.sort(key=lambda play: play.end)
    starts = {t.trial for t in work.trials if t.worker is None}
    return Forecast(
        at=work.now,
        whole=span([play.end for play in plays]),
        studies={each.name: span([play.study_ends.get(each.name, 0.0) for play in plays]) for each in work.studies},
        starts={trial: span([play.starts.get(trial, play.end) for play in plays]) for trial in starts},
        busy=plays[len(plays) // 2].busy(),
        serial=span([play.serial_s for play in plays]),
    )


def span(values: Sequence[float]) -> Span:
    """Return the middle 80 % of the values, as far as so few tell."""
    ordered, count = sorted(values), len(values)
    edge = round((count + 1) / 10) - 1 if count >= 9 else 0
    return Span(low_s=ordered[edge], middle_s=ordered[count // 2], high_s=ordered[count - 1 - edge])


@dataclass(slots=True)
class _Active:
    """A trial that runs in a play."""

    study: str
    started: float
    pace_s: float
    ends: float
    max_epochs: int | None

    def expected_end(self, now: float) -> float | None:
        """Return what placement would be told of its end: nothing before its first epoch, then all its epochs."""
        if self.max_epochs is None or now < self.started + self.pace_s:
            return None
        return self.started + self.pace_s * self.max_epochs


class _Play:
    """One future. `run`, then `end`, `starts`, `study_ends`; seconds from now."""

    def __init__(self, work: Work, truths: Mapping[str, Truth], chance: Uniform) -> None:
        self.now = 0.0
        self.starts: dict[m.TrialId, float] = {}
        self.study_ends: dict[str, float] = {}
        self.end = 0.0
        self.serial_s = 0.0
        self._chance, self._truths = chance, truths
        self._studies = {study.name: study for study in work.studies}
        self._left = {study.name: study.left for study in work.studies}
        self._counted = {study.name: study.counted for study in work.studies}
        self._live = dict.fromkeys(self._studies, 0)
        self._waiting: dict[str, list[m.Waiting]] = {name: [] for name in self._studies}
        self._active: dict[m.AttemptId, _Active] = {}
        self._ends: list[tuple[float, m.AttemptId]] = []
        self._count: list[tuple[float, int]] = []
        self._drawn = {study.name: 1_000_000_000 for study in work.studies}  # numbers that no real trial has
        self._under = {t.trial: t.under for t in work.trials if t.worker is None}
        self._ledger = Ledger()
        for row, capacity in work.rows:
            self._ledger.join(replace(row, reservations={}), capacity)
        for trial in work.trials:
            self._take_up(trial, work.now)

    def run(self) -> bool:
        """Go to the end; False when something waits for ever."""
        ends, halfway = 0, (0, 0.0)
        self._fill()
        while self._ends:
            self.now, attempt = heapq.heappop(self._ends)
            self._finish(attempt)
            ends += 1
            if ends == MOST_ENDS // 2:
                halfway = (ends, self.now)
            if ends == MOST_ENDS:
                break
            self._fill()
        left = sum(self._left.values()) + sum(len(waiting) for waiting in self._waiting.values())
        if left and ends < MOST_ENDS:
            return False
        self.end = self.now
        if ends == MOST_ENDS:
            per_trial = (self.now - halfway[1]) / (ends - halfway[0])
            self.end += per_trial * (left + len(self._active))
            self.serial_s *= 1 + (left + len(self._active)) / ends
            for name, count in self._left.items():
                if count or self._waiting[name] or self._live[name]:
                    self.study_ends[name] = self.end
        return True

    def busy(self, points: int = 60) -> tuple[tuple[float, int], ...]:
        """How many trials run, at evenly spaced instants: the mean of each stretch, rounded."""
        if not self._count or self.end <= 0:
            return ()
        width, found, index, running = self.end / points, [], 0, 0
        for point in range(points):
            until, area, at = (point + 1) * width, 0.0, point * width
            while index < len(self._count) and self._count[index][0] < until:
                when, count = self._count[index]
                area += running * (max(when, at) - at)
                at, running, index = max(when, at), count, index + 1
            area += running * (until - at)
            found.append((point * width, round(area / width)))
        return tuple(found)

    # -- what happens -------------------------------------------------------------------------------------------------

    def _take_up(self, trial: TrialWork, now: float) -> None:
        """Begin with a trial that is under way."""
        name = trial.trial.study
        self._live[name] += 1
        if trial.worker is None:
            if trial.waiting is not None:
                shifted = trial.waiting.since - now, trial.waiting.prefer_until - now
                self._waiting[name].append(replace(trial.waiting, since=shifted[0], prefer_until=shifted[1]))
            return
        rest_s, pace_s = self._truths[name].rest(trial.under, self._chance)
        attempt = m.AttemptId(trial.trial, 0)
        held = Reservation(attempt=attempt, host_bytes=0, device_bytes=0, slots=trial.slots)
        self._ledger.reserve(trial.worker, held)
        self._ledger.resize(attempt, trial.host_bytes, trial.device_bytes)  # one that grew may be above capacity
        self._begin(attempt, name, -trial.under.ran_s, pace_s, rest_s)

    def _begin(self, attempt: m.AttemptId, name: str, started: float, pace_s: float, rest_s: float) -> None:
        bound = self._studies[name].evidence.max_epochs
        active = _Active(study=name, started=started, pace_s=pace_s, ends=self.now + rest_s, max_epochs=bound)
        self._active[attempt] = active
        self.serial_s += rest_s
        heapq.heappush(self._ends, (active.ends, attempt))
        self._count.append((self.now, len(self._active)))

    def _finish(self, attempt: m.AttemptId) -> None:
        self._ledger.release(attempt)
        name = self._active.pop(attempt).study
        self._live[name] -= 1
        self._counted[name] += 1
        self.study_ends[name] = self.now
        self._count.append((self.now, len(self._active)))

    def _fill(self) -> None:
        """Draw a trial of each study that has none waiting, and start what may start, until nothing may."""
        while True:
            for name, study in self._studies.items():
                if self._left[name] and not self._waiting[name]:
                    self._waiting[name].append(self._ask(study))
            if not self._ledger.rooms.has_slots(1):  # most of the time; placement costs more
                return
            for name, queue in self._waiting.items():
                self._share(name, queue)
            waiting = [trial for queue in self._waiting.values() for trial in queue]
            if not waiting:
                return
            plan = placement.place_in(waiting, self._running_on, self._ledger.rooms, self.now)
            if not plan.starts:
                return
            for start in plan.starts:
                self._start(start)

    def _ask(self, study: StudyWork) -> m.Waiting:
        self._left[study.name] -= 1
        self._live[study.name] += 1
        self._drawn[study.name] += 1
        size = study.sizes[int(self._chance() * len(study.sizes))] if study.sizes else 0
        return m.Waiting(
            trial=m.TrialId(study.name, self._drawn[study.name]),
            footprint=m.Footprint(host_bytes=size, prior_bytes=size) if size else m.Footprint.unknown(),
            slots=study.slots,
            since=self.now,
            share=0.0,
            expected_s=study.expected_s,
        )

    def _share(self, name: str, queue: list[m.Waiting]) -> None:
        share = (self._counted[name] + self._live[name]) / max(1, self._studies[name].quota)
        for index, trial in enumerate(queue):
            if trial.share != share:
                queue[index] = replace(trial, share=share)

    def _running_on(self, address: str) -> list[m.Running]:
        return [
            m.Running(
                attempt=held.attempt,
                worker=address,
                reserved_bytes=held.host_bytes,
                device_reserved_bytes=held.device_bytes,
                slots=held.slots,
                expected_end=self._active[held.attempt].expected_end(self.now),
            )
            for held in self._ledger.running_on(address)
        ]

    def _start(self, start: placement.Start) -> None:
        name = start.trial.study
        queue = self._waiting[name]
        index = next(i for i, trial in enumerate(queue) if trial.trial == start.trial)
        trial = queue.pop(index)
        attempt = m.AttemptId(start.trial, 0)
        self._ledger.reserve(
            start.worker,
            Reservation(
                attempt=attempt, host_bytes=start.host_bytes, device_bytes=start.device_bytes, slots=trial.slots
            ),
        )
        self.starts[start.trial] = self.now
        under = self._under.get(start.trial)
        truth = self._truths[name]
        if under is not None and under.epochs:  # it goes on from its checkpoint
            rest_s, pace_s = truth.rest(under, self._chance)
        else:
            rest_s, pace_s = truth.trial(self._chance)
        self._begin(attempt, name, self.now, pace_s, rest_s)

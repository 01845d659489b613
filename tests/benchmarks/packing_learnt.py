"""A study whose trials nobody can size, packed by what is learnt of them: the product's brain on recorded trials.

Every stream of `tests/benchmarks/data` is a study of its first 60 trials on one host with a budget of 1.25 times its
largest peak, in simulated time: trials last in proportion to the CPU time they took, a minute on average; one holds its
warm process at once, half of its growth and 90 % of it when it had them, the rest in between in a line. Printed, over
all streams, for 2, 3 and 4 slots: the makespan against one trial at a time (median), trials at work on average
(median), and the most that was in use over the budget. Nothing is run and no watchdog acts: what is over 1.00 is what
it would have to deal with. `python -m tests.benchmarks.packing_learnt`.
"""

from __future__ import annotations

import csv
import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

from scheduler import model as m
from scheduler.core.admission import parse_memory_budget
from scheduler.core.fault import RetryPolicy
from scheduler.core.parameter_sizing import ParameterSizing, PeakSource, Prediction
from scheduler.core.state import BatchState
from scheduler.core.trial import Rules
from scheduler.model.parameters import Parameters, PeakObservation, Space
from tests import builders as b
from tests.benchmarks.sizing import DATA, Stream, streams

TRIALS, TIGHT, LOOK_S, MEAN_S = 60, 1.25, 1.0, 60.0


@dataclass(frozen=True, slots=True)
class Trial:
    """One recorded trial. half, most: shares of its time after which 50 and 90 % of its growth were there."""

    seen: PeakObservation
    seconds: float
    half: float
    most: float

    def held(self, ran_s: float) -> int:
        """Bytes it holds after so long."""
        done, growth = min(1.0, ran_s / self.seconds), self.seen.peak_bytes - self.seen.base_bytes
        points = [(0.0, 0.0), (self.half, 0.5), (max(self.half, self.most), 0.9), (1.0, 1.0)]
        share = next(
            (low + (high - low) * (done - begin) / max(end - begin, 1e-9))
            for (begin, low), (end, high) in itertools.pairwise(points)
            if done <= end
        )
        return self.seen.base_bytes + int(share * growth)


@dataclass(slots=True)
class Result:
    """What a study took. busy_s: seconds of trials at work; most_bytes: in use at once."""

    makespan_s: float = 0.0
    busy_s: float = 0.0
    most_bytes: int = 0


def trials_of(stream: Stream) -> list[Trial]:
    """The stream's first trials, their CPU times stretched to a minute on average."""
    with (DATA / f"peaks-{stream.name}.csv").open() as file:
        rows = list(csv.DictReader(file))[:TRIALS]
    stretch = MEAN_S * len(rows) / sum(float(row["cpu"]) for row in rows)
    return [
        Trial(seen, max(stretch * float(row["cpu"]), 0.1), float(row["half"]), float(row["most"]))
        for row, seen in zip(rows, stream.trials, strict=False)
    ]


@dataclass(slots=True)
class Brain:
    """The product's own decisions, with a host that tells it each second what is in use."""

    trials: list[Trial]
    slots: int
    budget_bytes: int
    sizing: Callable[[], ParameterSizing] = ParameterSizing
    result: Result = field(default_factory=Result)
    _events: list[tuple[float, int, m.Event]] = field(default_factory=list)
    _order: itertools.count[int] = field(default_factory=itertools.count)
    _running: dict[m.AttemptId, tuple[Trial, float]] = field(default_factory=dict)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)
    _ended: bool = False

    def run(self) -> Result:
        """Run the study to its end."""
        brain = BatchState(
            Rules(memory_budget=parse_memory_budget("100%"), reserve_bytes=0, retry=RetryPolicy(delay_s=0.0))
        )
        warm = m.Environment(name="recorded", runtime_bytes=max(trial.seen.base_bytes for trial in self.trials))
        self._at(0.0, m.StudyOpened(study=b.study(quota=len(self.trials), define_by_run=True)))
        self._at(0.0, m.WorkerJoined(facts=b.facts(limit_bytes=self.budget_bytes, slots=self.slots, environment=warm)))
        self._at(LOOK_S, self._vitals(0.0))
        while self._events and not self._ended:
            now, _, event = heapq.heappop(self._events)
            if isinstance(event, m.WorkerVitals):
                event = self._vitals(now)
                self._at(now + LOOK_S, event)
            if isinstance(event, m.AttemptEnded):
                _, began = self._running.pop(event.attempt)
                self.result.busy_s += now - began
                self.result.makespan_s = now
            for command in brain.handle(event, now):
                self._carry_out(command, now)
            if isinstance(event, m.StudyOpened):
                brain.sizing._learnt[event.study.name] = self.sizing()
        return self.result

    def _at(self, when: float, event: m.Event) -> None:
        heapq.heappush(self._events, (when, next(self._order), event))

    def _vitals(self, now: float) -> m.WorkerVitals:
        used = {attempt: trial.held(now - began) for attempt, (trial, began) in self._running.items()}
        self.result.most_bytes = max(self.result.most_bytes, sum(used.values()))
        left = max(0, self.budget_bytes - sum(used.values()))
        return m.WorkerVitals(worker=b.WORKER, available_bytes=left, used_bytes=used, peak_bytes=used)

    def _carry_out(self, command: m.Command, now: float) -> None:
        match command:
            case m.AskTrial():
                number = next(self._numbers)
                seen = self.trials[number].seen
                unknown = m.Footprint.unknown()
                self._at(now, b.asked(number, params=dict(seen.parameters), space=seen.space, footprint=unknown))
            case m.LaunchAttempt(attempt=attempt):
                trial = self.trials[attempt.trial.number]
                self._running[attempt] = (trial, now)
                self._at(now, m.AttemptStarted(attempt=attempt, worker=command.worker, pid=1))
                peak, base = trial.seen.peak_bytes, trial.seen.base_bytes
                ended = b.outcome(peak_bytes=peak, runtime_bytes=base, environment="recorded", duration_s=trial.seconds)
                self._at(now + trial.seconds, m.AttemptEnded(attempt=attempt, outcome=ended))
            case m.TellTrial():
                self._at(now, m.TrialTold(trial=command.trial, state=command.state))
            case m.EndBatch():
                self._ended = True


class LargestOnly(ParameterSizing):
    """The rule before: the largest seen x 1.5, whatever the parameters are."""

    def observe(self, seen: PeakObservation) -> None:
        self._largest = max(self._largest, seen.peak_bytes)

    def predict(
        self,
        parameters: Parameters,
        space: Space,
        *,
        base_bytes: int,
        room_bytes: int,
        given_bytes: int | None = None,
    ) -> Prediction:
        """Half as much again as the largest; the whole room before the first."""
        source = PeakSource.LARGEST if self._largest else PeakSource.UNKNOWN
        wanted = int(1.5 * self._largest) if self._largest else room_bytes
        return Prediction(peak_bytes=min(max(wanted, base_bytes), room_bytes), source=source, samples=0)


def at_once(trials: list[Trial], places: int) -> Result:
    """So many at once, in order, whatever they hold: `n_jobs`, and what Dask's `resources=` makes of one number."""
    result, waiting, running = Result(), list(trials), list[tuple[float, int, Trial, float]]()
    now = 0.0
    while waiting or running:
        while waiting and len(running) < places:
            trial = waiting.pop(0)
            heapq.heappush(running, (now + trial.seconds, len(waiting), trial, now))
            result.busy_s += trial.seconds
        until = running[0][0]
        while now < until:
            held = sum(trial.held(now - began) for _, _, trial, began in running)
            result.most_bytes = max(result.most_bytes, held)
            now = min(until, now + LOOK_S)
        result.most_bytes = max(result.most_bytes, sum(trial.held(now - began) for _, _, trial, began in running))
        heapq.heappop(running)
    result.makespan_s = now
    return result


def main() -> None:
    """Print the table."""
    studies = [(trials_of(stream), stream) for stream in streams()]
    print(f"{len(studies)} studies, {sum(len(trials) for trials, _ in studies)} trials")
    print(f"{'slots':5} {'rule':38} {'makespan':>8} {'at work':>8} {'most used / budget':>18} {'studies over':>12}")
    for slots in (2, 3, 4):
        rules: dict[str, Callable[[list[Trial], int], Result]] = {
            "Dask resources=, the worst case known": lambda trials, budget: at_once(
                trials,
                min(slots, budget // max(trial.seen.peak_bytes for trial in trials)),  # noqa: B023
            ),
            "largest seen x 1.5": lambda trials, budget: Brain(trials, slots, budget, LargestOnly).run(),  # noqa: B023
            "ours": lambda trials, budget: Brain(trials, slots, budget).run(),  # noqa: B023
            "study.optimize(n_jobs=slots)": lambda trials, budget: at_once(trials, slots),  # noqa: B023
        }
        for name, rule in rules.items():
            found = []
            for trials, _ in studies:
                budget = int(TIGHT * max(trial.seen.peak_bytes for trial in trials))
                result = rule(trials, budget)
                alone_s = sum(trial.seconds for trial in trials)
                over = result.most_bytes / budget
                found.append((result.makespan_s / alone_s, result.busy_s / result.makespan_s, over))
            makespans, works, overs = zip(*found, strict=True)
            over_count = sum(over > 1 for over in overs)
            print(
                f"{slots:5} {name:38} {median(makespans):8.2f} {median(works):8.2f} {max(overs):18.2f} {over_count:12}"
            )


if __name__ == "__main__":
    main()

"""How good the forecast of the end is, on batches that never were: `python -m tests.benchmarks.eta [BATCHES] [SEED]`.

Each batch drives the real brain (`BatchState`) on a simulated clock; from time to time a forecast is made, and when the
batch is over it is compared with the end. The world is made apart from what the forecast believes: a trial's pace
follows its size by a law of its own with gamma noise, trials stop early by a hazard that differs from study to study
and are pruned by another, the sampler drifts to larger and slower trials, neighbours on a host slow each other down,
attempts fail, stall and are lost and run again. Prints, for each stretch of the run: how often the 80 % range held the
end, the median error of the middle, and the range's width; a simulated figure, not one of a real run. An error is a
part of what was left. `--save FILE` keeps each batch in a line of that file, and takes from there what it has: it can
be stopped and gone on with, and several processes can share the seeds.
"""

from __future__ import annotations

import argparse
import functools
import heapq
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from scheduler import model as m
from scheduler.core.admission import parse_memory_budget
from scheduler.core.fault import RetryPolicy
from scheduler.core.forecast import Forecast, forecast
from scheduler.core.remaining import work
from scheduler.core.state import BatchState
from scheduler.core.trial import Rules
from scheduler.units import GIB
from tests.builders import asked, facts, outcome, study

FIRST, STEP = 0.1, 1.4  # a forecast when a tenth of the trials have ended, and each time the clock has grown by this


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """The truth about a study. pace_s: mean seconds an epoch at `gib`; hazard: of stopping early, at each epoch past
    `patience`."""

    gib: float
    pace_s: float
    shape: float
    patience: int
    hazard: float
    bound: int
    pruned: float
    drift: float


class World:
    """One batch. looks: (instant, forecast) of each that was asked for."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now, self.cost_s = 0.0, 0.0
        self.looks: list[tuple[float, Forecast | None]] = []
        self.ended: float | None = None
        self.queue: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        retry = RetryPolicy(max_retries=3, max_consecutive_failures=10**9)
        rules = Rules(memory_budget=parse_memory_budget("100%"), reserve_bytes=0, retry=retry)
        draw = self.random
        self.kinds = {f"s{n}": self.kind() for n in range(draw.choice((4, 8, 12)))}
        self.quota = draw.choice((30, 50))
        self.trouble = draw.choice((0.0, 0.03, 0.1))
        self.crowd = draw.uniform(0.0, 0.08)  # how much each neighbour on its host slows a trial down
        self.brain = BatchState(rules, studies=len(self.kinds))
        self.numbers: Counter[str] = Counter()
        self.truth: dict[m.TrialId, tuple[float, int, m.ExitReason, int]] = {}
        self.live: dict[m.AttemptId, str] = {}  # attempt -> worker
        for n in range(draw.choice((1, 1, 2, 4))):
            self.at(0, functools.partial(self.tell, m.WorkerJoined(facts=facts(f"w{n}", slots=draw.choice((2, 4, 8))))))
        for name in self.kinds:
            self.at(0, functools.partial(self.tell, m.StudyOpened(study=study(name, quota=self.quota))))
        self.at(1, self.tick)

    def kind(self) -> Kind:
        draw = self.random
        gib = draw.choice((0.4, 1.0, 4.0, 12.0))
        return Kind(
            gib=gib,
            pace_s=draw.uniform(0.3, 3) * 60 * gib ** draw.uniform(0.5, 1.4),
            shape=draw.uniform(3, 16),
            patience=draw.randint(2, 10),
            hazard=draw.uniform(0.02, 0.3),
            bound=draw.choice((20, 50, 100)),
            pruned=draw.choice((0.0, 0.0, 0.2, 0.5)),
            drift=draw.uniform(-0.3, 0.5),
        )

    # -- the clock ----------------------------------------------------------------------------------------------------

    def at(self, after_s: float, what: Callable[[], None]) -> None:
        heapq.heappush(self.queue, (self.now + after_s, next(self.order), what))

    def run(self) -> World:
        while self.ended is None:
            self.now, _, what = heapq.heappop(self.queue)
            what()
        return self

    def tick(self) -> None:
        self.tell(m.Tick())
        self.at(60.0, self.tick)
        done = sum(each.counted for each in self.brain.studies.values()) / (self.quota * len(self.kinds))
        if done >= FIRST and (not self.looks or self.now >= STEP * self.looks[-1][0]):
            began = time.thread_time()
            self.looks.append((self.now, forecast(work(self.brain, self.now), random.Random(len(self.looks)).random)))
            self.cost_s += time.thread_time() - began

    def tell(self, event: m.Event) -> None:
        for command in self.brain.handle(event, self.now):
            match command:
                case m.AskTrial(study=name):
                    self.ask(name)
                case m.LaunchAttempt():
                    self.launch(command)
                case m.TellTrial(trial=trial, state=state):
                    self.at(0.1, functools.partial(self.tell, m.TrialTold(trial=trial, state=state)))
                case m.EndBatch():
                    self.ended = self.now

    # -- the world ----------------------------------------------------------------------------------------------------

    def ask(self, name: str) -> None:
        kind, draw, number = self.kinds[name], self.random, self.numbers[name]
        self.numbers[name] += 1
        gib = min(20.0, kind.gib * draw.uniform(0.6, 1.6))
        progress = number / self.quota
        pace_s = kind.pace_s * (gib / kind.gib) ** 0.8 * draw.gammavariate(kind.shape, 1 / kind.shape)
        pace_s *= 1 + kind.drift * progress
        epochs, reason = kind.patience, m.ExitReason.COMPLETED
        while epochs < kind.bound and draw.random() > kind.hazard:
            epochs += 1
        epochs = min(epochs, kind.bound)
        if number > 5 and draw.random() < kind.pruned:
            epochs, reason = draw.randint(1, max(1, epochs // 2)), m.ExitReason.PRUNED
        trial = m.TrialId(name, number)
        self.truth[trial] = pace_s, epochs, reason, int(gib * GIB)
        event = asked(number, int(gib * GIB * draw.uniform(1.0, 1.1)), study=name, max_epochs=kind.bound)
        self.at(0.1, functools.partial(self.tell, event))

    def launch(self, command: m.LaunchAttempt) -> None:
        attempt = command.attempt
        self.live[attempt] = command.worker
        pace_s, epochs, _, _ = self.truth[attempt.trial]
        self.news(attempt, m.AttemptStarted(attempt=attempt, worker=command.worker, pid=1), 0.5)
        trouble = self.random.random() < self.trouble
        last = self.random.randint(0, epochs - 1) if trouble else epochs
        self.epoch(attempt, 1, last, pace_s, trouble)

    def epoch(self, attempt: m.AttemptId, step: int, last: int, pace_s: float, trouble: bool) -> None:
        """The next epoch of an attempt, or its end."""
        beside = sum(worker == self.live[attempt] for worker in self.live.values()) - 1
        slowed = pace_s * (1 + self.crowd * beside) * self.random.uniform(0.9, 1.1)
        if step > last:
            self.at(1.0 + slowed * self.random.random() * trouble, lambda: self.end(attempt, last, trouble))
            return

        def done() -> None:
            size = self.truth[attempt.trial][3]
            self.tell(m.AttemptProgress(attempt=attempt, step=step, value=1 / step, peak_bytes=size))
            self.epoch(attempt, step + 1, last, pace_s, trouble)

        self.at(slowed, done)

    def news(self, attempt: m.AttemptId, event: m.Event, after_s: float) -> None:
        self.at(after_s, functools.partial(self.tell, event))

    def end(self, attempt: m.AttemptId, epochs: int, trouble: bool) -> None:
        self.live.pop(attempt)
        reason = self.truth[attempt.trial][2]
        if trouble:
            reason = self.random.choice((m.ExitReason.FAILED, m.ExitReason.STALLED, m.ExitReason.LOST))
        self.tell(
            m.AttemptEnded(
                attempt=attempt, outcome=outcome(reason, epochs=epochs, peak_bytes=self.truth[attempt.trial][3])
            )
        )


@dataclass(slots=True)
class Score:
    """Of all forecasts in one stretch of a run."""

    held: list[bool] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    widths: list[float] = field(default_factory=list)
    unknown: int = 0


def played(seed: int) -> dict[str, Any]:
    """One batch: when it ended, and of each forecast (instant, low, middle, high), or (instant,) when none was made."""
    world = World(seed).run()
    looks = [[at] if f is None else [at, f.whole.low_s, f.whole.middle_s, f.whole.high_s] for at, f in world.looks]
    return {"seed": seed, "ended": world.ended, "cost_s": world.cost_s, "looks": looks}


def batches(seeds: range, save: Path | None) -> list[dict[str, Any]]:
    """All of these batches, those that are in the file from there."""
    known: dict[int, dict[str, Any]] = {}
    if save is not None and save.exists():
        known = {each["seed"]: each for each in map(json.loads, save.read_text().splitlines())}
    for seed in seeds:
        if seed not in known:
            known[seed] = played(seed)
            if save is not None:
                with save.open("a") as file:
                    file.write(json.dumps(known[seed]) + "\n")
    return [known[seed] for seed in seeds]


def scores(found: list[dict[str, Any]]) -> dict[float, Score]:
    """By the start of each stretch: 0, 0.25, 0.5, 0.75 of the run."""
    stretches = {start: Score() for start in (0.0, 0.25, 0.5, 0.75)}
    for batch in found:
        for at, *foreseen in batch["looks"]:
            score = stretches[max(start for start in stretches if start <= at / batch["ended"])]
            if not foreseen:
                score.unknown += 1
                continue
            (low, middle, high), left = foreseen, batch["ended"] - at
            score.held.append(low <= left <= high)
            score.errors.append(abs(middle - left) / left)
            score.widths.append((high - low) / left)
    return stretches


def at_half_time(found: list[dict[str, Any]]) -> list[float]:
    """The error of each batch's forecast that was made nearest to half of its time."""
    errors = []
    for batch in found:
        looks = [look for look in batch["looks"] if len(look) > 1]
        if looks:
            at, _, middle, _ = min(looks, key=lambda look: abs(look[0] / batch["ended"] - 0.5))
            errors.append(abs(middle - (batch["ended"] - at)) / (batch["ended"] - at))
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("batches", nargs="?", type=int, default=200)
    parser.add_argument("seed", nargs="?", type=int, default=1)
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    found = batches(range(given.seed, given.seed + given.batches), given.save)
    cost_s = sum(batch["cost_s"] for batch in found) / sum(len(batch["looks"]) for batch in found)
    print(f"{given.batches} simulated batches from seed {given.seed}, {cost_s:.2f} s of CPU a forecast")
    print("part of the run  forecasts  unknown  80 % range held  median error  median width / what was left")
    stretches = scores(found)
    for start, score in stretches.items():
        if not score.held:
            continue
        held = sum(score.held) / len(score.held)
        print(
            f"{start:4.0%} to {start + 0.25:4.0%} {len(score.held):14} {score.unknown:8} {held:16.1%} "
            f"{median(score.errors):13.1%} {median(score.widths):13.1%}"
        )
    late = [held for start, score in stretches.items() if start >= 0.25 for held in score.held]
    print(f"from a quarter of the run on: the 80 % range held the end {sum(late) / len(late):.1%} of the time")
    print(f"nearest to half-time: median error {median(at_half_time(found)):.1%}")


if __name__ == "__main__":
    main()

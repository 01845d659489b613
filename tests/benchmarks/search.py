"""How good the search is beside plain Optuna: regret at 50 trials on surrogates of a training, in simulated time.

Ours goes through the product's own path: `StudyStore` on a real SQLite file (ask, tell, enqueue_retry, open after a
restart) with the project's own `sample`, `micro_batch` and `estimate`. Plain Optuna is `study.ask` and `study.tell` in
memory with the same sampler and search space, in the order in which `optimize(n_jobs=PARALLEL)` would call them: never
killed, never restarted, and where a memory limit hides part of the space it is given the part that fits and no more.
Ours asks when a slot is free, as the driver does for a study that runs alone; `ahead`: and always draws as many more as
the driver does while memory is short. Both see the same noise and durations for
a seed. Run it by hand:

    .venv/bin/python -m tests.benchmarks.search [--seeds 30] [--parallel 2,8] [--only real/kills] [--jobs 2] [--save F]

The whole of it is some 50 minutes of one core. --save appends each run's result to a file of JSON lines, and only what
is not in it is run: stop and start it as you like, but begin another file when the search changes.

Covers what the sampler and the study do to a search. Trains nothing; memory is a limit at asking, not a measurement.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import heapq
import itertools
import json
import math
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Protocol

import optuna
from scipy.stats import t as student

from scheduler.core.asking import LOOK_AHEAD
from scheduler.model import AskTrial, EnqueueRetry, FinalState, StudySpec, TellTrial, TrialAsked, TrialId
from scheduler.study.ask import make_sampler
from scheduler.study.store import Functions, StudyStore
from tests.benchmarks.surrogates import NAMES, Params, Surrogate, best_loss, fitted, surrogate
from training import batch_size, footprint, hpo, search_space

TRIALS = 50
KILLED = 0.1  # of the attempts
ROOMY = 2**50  # bytes
SCENARIOS = ("undisturbed", "kills", "restart", "memory", "ahead")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run of a search."""

    surrogate: str
    parallel: int
    scenario: str
    seed: int


@dataclass(slots=True, kw_only=True)
class Job:
    """A trial that runs. handle: what the side needs to end it."""

    handle: Any
    params: Params


class Side(Protocol):
    """A search: ours or Optuna's. ask: the next trial, None when all have been asked."""

    def ask(self) -> Job | None: ...
    def complete(self, job: Job, value: float) -> None: ...
    def lose(self, job: Job) -> None: ...
    def restart(self) -> None: ...


def context_of(surrogate: Surrogate) -> dict[str, Any]:
    """A study's context as the command makes it."""
    space = search_space.load()["training_search_space"]
    return {"budget": surrogate.budget, "horizon": 1, "target_effective_batch": 256, "training_search_space": space}


def smallest_bytes(params: Params, context: Params) -> int:
    """What a trial takes at the least."""
    return int(footprint.estimate({**params, "micro_batch": 1}, context)["host_bytes"])


def fits(architecture: Params, context: Params, limit_bytes: int) -> bool:
    """Whether some micro-batch of it does."""
    return batch_size.micro_batch(architecture, context, limit_bytes, target_effective_batch=256) is not None


def memory_limit(surrogate: Surrogate) -> int:
    """Bytes that two fifths of the architectures cannot do with."""
    context = context_of(surrogate)
    needs = sorted(smallest_bytes(a, context) for a in hpo.candidates(context))
    return needs[math.ceil(0.6 * len(needs)) - 1]


@dataclass
class Ours:
    """The product: its store on a database file, its functions."""

    surrogate: Surrogate
    case: Case
    folder: Path
    limit_bytes: int
    drivers: int = 0
    store: StudyStore = field(init=False)

    def __post_init__(self) -> None:
        self.spec = StudySpec(name="s", quota=TRIALS, slots=1, context=context_of(self.surrogate))
        self.open()

    def open(self) -> Any:
        """A new driver."""
        functions = Functions(sample=hpo.sample, micro_batch=batch_size.micro_batch, estimate=footprint.estimate)
        url, owner = f"sqlite:///{self.folder}/study.db", f"driver{self.drivers}"
        self.store = StudyStore(
            url, owner=owner, run="r", functions=functions, seed=self.case.seed, pruner="none", folder=self.folder
        )
        self.drivers += 1
        return self.store.open(self.spec, hpo.candidates(self.spec.context))

    def ask(self) -> Job | None:
        asked = self.store.ask(AskTrial(study="s", limit_bytes=self.limit_bytes))
        return Job(handle=asked, params=asked.params) if isinstance(asked, TrialAsked) else None

    def complete(self, job: Job, value: float) -> None:
        self.store.tell(TellTrial(trial=job.handle.trial, state=FinalState.COMPLETE, value=value))

    def lose(self, job: Job) -> None:
        self.retry(job.handle.trial, job.handle.attempt)

    def retry(self, trial: TrialId, attempt: int) -> None:
        """As the driver does for an attempt that was lost."""
        self.store.enqueue_retry(EnqueueRetry(trial=trial, attempt=attempt + 1, resume_from=None, reason="lost"))

    def restart(self) -> None:
        """The driver dies; the next one settles what it left."""
        self.store.close()
        for left in self.open().left:
            self.retry(left.trial, left.attempt)


@dataclass
class Plain:
    """Optuna by itself."""

    surrogate: Surrogate
    case: Case
    limit_bytes: int
    asked: int = 0

    def __post_init__(self) -> None:
        self.context = context_of(self.surrogate)
        self.architectures = [a for a in hpo.candidates(self.context) if fits(a, self.context, self.limit_bytes)]
        self.study = optuna.create_study(sampler=make_sampler(self.case.seed, self.architectures))

    def ask(self) -> Job | None:
        if self.asked == TRIALS:
            return None
        self.asked += 1
        trial = self.study.ask()
        return Job(handle=trial, params=hpo.sample(trial, self.context, self.architectures, lambda params: 1))

    def complete(self, job: Job, value: float) -> None:
        self.study.tell(job.handle, value)

    def lose(self, job: Job) -> None:
        raise NotImplementedError("undisturbed")

    def restart(self) -> None:
        raise NotImplementedError("undisturbed")


def simulate(
    side: Side, surrogate: Surrogate, case: Case, *, disturbed: bool, ahead: int = 0
) -> list[tuple[float, float]]:
    """Run a search to its end; per completed trial, in order of ending: the value shown and the loss behind it.

    ahead: trials asked that wait for a place to run.
    """
    chance = random.Random(f"{case.surrogate} {case.scenario} {case.seed}")
    running: list[tuple[float, int, Job]] = []
    waiting: list[Job] = []
    done: list[tuple[float, float]] = []
    now, launched, restarts = 0.0, 0, int(disturbed and case.scenario == "restart")
    kills = KILLED if disturbed and case.scenario == "kills" else 0.0

    def launch(job: Job) -> None:
        nonlocal launched
        # What a training takes differs by a factor of some three; drawn by order, so that both sides have the same.
        lasts = random.Random(f"{case.seed} {launched}").lognormvariate(0, 0.5)
        heapq.heappush(running, (now + lasts, launched, job))
        launched += 1

    while True:
        while len(running) + len(waiting) < case.parallel + ahead and (job := side.ask()) is not None:
            waiting.append(job)
            if len(running) < case.parallel:
                launch(waiting.pop(0))
        if not running:
            return done
        now, _, job = heapq.heappop(running)
        if waiting:
            launch(waiting.pop(0))
        if chance.random() < kills:
            side.lose(job)
            continue
        value = surrogate.trained(job.params, case.seed)
        side.complete(job, value)
        done.append((value, surrogate.loss(job.params)))
        if restarts and len(done) == TRIALS // 2:
            restarts, running, waiting = 0, [], []
            side.restart()


def regret(done: Sequence[tuple[float, float]], best: float) -> float:
    """How far the loss of the trial with the best value shown lies above the best there is."""
    return min(done)[1] - best


def limit_of(case: Case, stand_in: Surrogate) -> int:
    """Bytes that a trial may take."""
    return memory_limit(stand_in) if case.scenario == "memory" else ROOMY


@functools.cache
def best_there_is(case: Case) -> float:
    """The lowest loss of the architectures that fit."""
    stand_in, fitting = surrogate(case.surrogate, case.seed), None
    if case.scenario == "memory":
        limit, context = memory_limit(stand_in), context_of(stand_in)
        fitting = tuple(n for n, a in enumerate(hpo.candidates(context)) if fits(a, context, limit))
    return best_loss(stand_in, fitting)


@functools.cache
def undisturbed(case: Case) -> float:
    """Regret of plain Optuna."""
    stand_in = surrogate(case.surrogate, case.seed)
    theirs = simulate(Plain(stand_in, case, limit_of(case, stand_in)), stand_in, case, disturbed=False)
    assert len(theirs) == TRIALS, (case, len(theirs))
    return regret(theirs, best_there_is(case))


def play(case: Case) -> tuple[float, float]:
    """Regret of ours and of plain Optuna."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    stand_in = surrogate(case.surrogate, case.seed)
    limit = limit_of(case, stand_in)
    # Kills and restarts happen to ours alone: the same run of Optuna's is beside all of them.
    plain = case if case.scenario == "memory" else dataclasses.replace(case, scenario="undisturbed")
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    try:
        ours = Ours(stand_in, case, folder, limit)
        mine = simulate(ours, stand_in, case, disturbed=True, ahead=LOOK_AHEAD * (case.scenario == "ahead"))
        ours.store.close()
    finally:
        shutil.rmtree(folder)
    assert len(mine) == TRIALS, (case, len(mine))
    return regret(mine, best_there_is(plain)), undisturbed(plain)


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval of paired differences (Student)."""
    half = float(student.ppf(0.975, len(differences) - 1)) * stdev(differences) / math.sqrt(len(differences))
    return fmean(differences), fmean(differences) - half, fmean(differences) + half


def spread(cases: Sequence[Any], work: Callable[[Any], Any], jobs: int) -> Iterator[Any]:
    """The work on all cases, in their order, in so many processes."""
    if jobs == 1:
        yield from map(work, cases)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(work, cases)


Regrets = tuple[float, float]


def played(cases: Sequence[Case], jobs: int, save: Path | None) -> Iterator[Regrets]:
    """The regrets of all cases, in their order; those in the file are taken from there."""
    known: dict[Case, Regrets] = {}
    if save is not None and save.exists():
        for line in save.read_text().splitlines():
            row = json.loads(line)
            known[Case(**row["case"])] = (row["ours"], row["plain"])
    found = spread([case for case in cases if case not in known], play, jobs)
    for case in cases:
        if case not in known:
            known[case] = next(found)
            if save is not None:
                ours, plain = known[case]
                with save.open("a") as file:
                    print(json.dumps({"case": dataclasses.asdict(case), "ours": ours, "plain": plain}), file=file)
        yield known[case]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line per surrogate, parallelism and scenario: regrets x 1000, and the paired difference."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.search")
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--parallel", default="2,8")
    parser.add_argument("--only", default="", help="a part of surrogate/scenario")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--save", type=Path, metavar="FILE", help="results so far; what is in it is not run again")
    options = parser.parse_args(arguments)
    if "real" in NAMES:
        print("real:", fitted()[2])
    print(f"regret x 1000 at {TRIALS} trials, {options.seeds} seeds; difference: ours - plain, mean [95 % interval]")
    print(f"{'surrogate':10}{'parallel':>9} {'scenario':12}{'ours':>8}{'plain':>8}{'difference':>24}", flush=True)
    lines = [
        Case(surrogate=name, parallel=int(parallel), scenario=scenario, seed=0)
        for name in NAMES
        for parallel in options.parallel.split(",")
        for scenario in SCENARIOS
        if options.only in f"{name}/{scenario}"
    ]
    cases = [dataclasses.replace(line, seed=seed) for line in lines for seed in range(options.seeds)]
    results = played(cases, options.jobs, options.save)
    for line in lines:
        found = list(itertools.islice(results, options.seeds))
        mean, low, high = interval([1000 * (mine - theirs) for mine, theirs in found])
        ours, plain = (1000 * fmean(side) for side in zip(*found, strict=True))
        print(
            f"{line.surrogate:10}{line.parallel:>9} {line.scenario:12}{ours:8.2f}{plain:8.2f}"
            f"{mean:+9.2f} [{low:+.2f}, {high:+.2f}]{'  WORSE' if low > 0 else ''}",
            flush=True,
        )


if __name__ == "__main__":
    main()

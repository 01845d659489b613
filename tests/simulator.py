"""A cluster that never was: drives the real brain through a simulated clock and re-checks its promises.

Covers sampling, launches, progress, ends of every kind, lost workers, other programs' memory, pruning and quitting, all
seeded. Keeps its own books, apart from the brain's ledger, and compares. Not covered: Dask, Optuna and real processes.
By hand: `.venv/bin/python -m tests.simulator [TRIALS] [WORKERS]` prints how long the brain takes at that size.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

from scheduler import model as m
from scheduler.core.admission import parse_memory_budget
from scheduler.core.fault import RetryPolicy
from scheduler.core.state import BatchState
from scheduler.core.trial import Rules
from scheduler.units import GIB
from tests.builders import asked, facts, outcome, study

EPOCHS = 3
ENDS = (m.ExitReason.FAILED, m.ExitReason.EVICTED, m.ExitReason.STALLED, m.ExitReason.LOST, m.ExitReason.INTERRUPTED)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What the simulated trials are like. bytes_of, seconds_of: study name and source of chance -> one trial's truth.

    trouble: share of attempts that end in one of ENDS, evenly. lost_every_s: mean time between losses of a worker (it
    comes back), 0: never. vitals_s: how often each host reports, 0: never. over: by what part of the truth estimates
    are above it, at most. epoch_s: how long an epoch of a trial takes, 0: each trial has three. strangers: largest
    share of a host that other programs take for a while. check_every: events between two checks of all invariants.
    """

    bytes_of: Callable[[str, random.Random], int]
    seconds_of: Callable[[str, random.Random], float]
    trouble: float = 0.0
    lost_every_s: float = 0.0
    vitals_s: float = 0.0
    over: float = 0.1
    epoch_s: float = 0.0
    strangers: float = 0.0
    check_every: int = 1


class BrokenPromise(AssertionError):
    """The brain did what it must never do; the message tells what and when."""


@dataclasses.dataclass(slots=True)
class _Attempt:
    launch: m.LaunchAttempt
    reserved: int
    true_bytes: int
    ending: bool = False


class Simulation:
    """One batch from its first study to its end. Same arguments, same run."""

    def __init__(
        self, world: World, studies: Iterable[m.StudySpec], workers: Iterable[m.WorkerFacts], seed: int
    ) -> None:
        self.world, self.random = world, random.Random(seed)
        rules = Rules(
            memory_budget=parse_memory_budget("100%"),
            reserve_bytes=0,
            retry=RetryPolicy(max_retries=3, max_consecutive_failures=10**9),
        )
        self.brain = BatchState(rules)
        self.handle = self.brain.handle  # a test may record what passes
        self.now, self.events, self.brain_s = 0.0, 0, 0.0
        self.facts = {fact.address: fact for fact in workers}
        self._domains: dict[str, list[m.WorkerFacts]] = defaultdict(list)
        for fact in self.facts.values():
            self._domains[fact.domain or fact.address].append(fact)
        self.specs = {spec.name: spec for spec in studies}
        self.finals: dict[m.TrialId, m.FinalState] = {}
        self.counted: Counter[str] = Counter()  # what fits no worker gets a final state but does not count
        self.requeued: set[m.TrialId] = set()
        self.waits: list[float] = []
        self.ended: m.EndBatch | None = None
        self._numbers: Counter[str] = Counter()
        self._truth: dict[m.TrialId, tuple[int, float]] = {}
        self._live: dict[m.AttemptId, _Attempt] = {}
        self._on: dict[str, set[m.AttemptId]] = defaultdict(set)
        self._launched: set[m.AttemptId] = set()
        self._queue: list[tuple[float, int, m.Event | Callable[[], None]]] = []
        self._order = 0
        for fact in self.facts.values():
            self.at(0.0, m.WorkerJoined(facts=fact))
            if world.vitals_s:
                self.at(self.random.uniform(0, world.vitals_s), functools.partial(self._vitals, fact.address))
        for spec in self.specs.values():
            self.at(0.0, m.StudyOpened(study=spec))
        self.at(1.0, self._tick)
        if world.lost_every_s:
            self.at(self.random.expovariate(1 / world.lost_every_s), self._lose)

    def at(self, after_s: float, what: m.Event | Callable[[], None]) -> None:
        """Let it happen that many seconds from now."""
        self._order += 1
        heapq.heappush(self._queue, (self.now + after_s, self._order, what))

    def run(self, limit_s: float = 1e9) -> Simulation:
        """Go on until the brain ends the batch. Raises BrokenPromise, also when it has not ended after `limit_s`."""
        while self.ended is None:
            if not self._queue or self.now > limit_s:
                raise BrokenPromise(f"not over at {self.now:.0f} s: {self.brain.trials}")
            self.step()
        if self._live:
            raise BrokenPromise(f"the batch ended while attempts run: {sorted(map(str, self._live))}")
        return self

    def step(self) -> None:
        """Let the next thing happen."""
        self.now, _, what = heapq.heappop(self._queue)
        if callable(what):
            what()
        else:
            self.tell(what)

    def tell(self, event: m.Event) -> None:
        """One event to the brain; carry out what it answers; look at the invariants."""
        self.events += 1
        begin = time.thread_time()
        commands = self.handle(event, self.now)
        self.brain_s += time.thread_time() - begin
        for command in commands:
            self._carry_out(command)
        if self.events % self.world.check_every == 0:
            self._check()

    # -- commands ---------------------------------------------------------------------------------------------------

    def _carry_out(self, command: m.Command) -> None:
        match command:
            case m.AskTrial():
                number = self._numbers[command.study]
                self._numbers[command.study] += 1
                trial = m.TrialId(command.study, number)
                size = self.world.bytes_of(command.study, self.random)
                self._truth[trial] = (size, self.world.seconds_of(command.study, self.random))
                guess = int(size * self.random.uniform(1.0, 1 + self.world.over))
                self.at(0.02, asked(number, guess, study=command.study, max_epochs=self._epochs(trial)))
            case m.LaunchAttempt():
                self._launch(command)
            case m.ResizeReservation():
                if command.attempt in self._live:
                    self._live[command.attempt].reserved = command.reserved_bytes
            case m.StopAttempt() | m.KillAttempt():
                reason = m.ExitReason.PRUNED if command.reason == "prune" else m.ExitReason.INTERRUPTED
                self.at(0.5, lambda: self._end(command.attempt, reason))
            case m.TellTrial():
                if command.trial in self.finals or command.trial in self.requeued:
                    raise BrokenPromise(f"{command.trial} is told {command.state} after {self.finals}")
                self.finals[command.trial] = command.state
                if command.attrs.get("stop_reason") != "does_not_fit":
                    self.counted[command.trial.study] += 1
                self.at(0.02, m.TrialTold(trial=command.trial, state=command.state))
            case m.EnqueueRetry():
                self.requeued.add(command.trial)
                self.at(0.02, m.TrialTold(trial=command.trial, state=m.FinalState.FAIL))
            case m.EndBatch():
                self.ended = command
            case m.ReportValue() | m.CloseStudy() | m.NoteDeferral():
                pass

    def _launch(self, command: m.LaunchAttempt) -> None:
        fact = self.facts[command.worker]
        attempt = command.attempt
        if attempt in self._launched:
            raise BrokenPromise(f"{attempt} is launched twice")
        if any(other.trial == attempt.trial for other in self._live):
            raise BrokenPromise(f"{attempt} is launched while another attempt of it runs")
        here = [self._live[other] for other in self._on[command.worker]]
        own = fact.overhead_bytes + command.reserved_bytes + sum(other.reserved for other in here)
        slots = command.slots + sum(other.launch.slots for other in here)
        if own > (fact.worker_limit_bytes or fact.limit_bytes) or slots > fact.slots:
            raise BrokenPromise(f"{attempt} overfills {command.worker}: {own} bytes, {slots} slots")
        shared = command.reserved_bytes + sum(live.reserved for live in self._sharing(fact))
        shared += sum(other.overhead_bytes for other in self._beside(fact))
        if shared > fact.limit_bytes:
            raise BrokenPromise(f"{attempt} overfills the memory of {fact.domain or fact.address}: {shared} bytes")
        size, seconds = self._truth[attempt.trial]
        self._launched.add(attempt)
        self._live[attempt] = _Attempt(command, command.reserved_bytes, size)
        self._on[command.worker].add(attempt)
        self.waits.append(command.wait_s)
        self.at(0.01, lambda: self._news(attempt, m.AttemptStarted(attempt=attempt, worker=command.worker, pid=1)))
        reason, until = m.ExitReason.COMPLETED, seconds
        if self.random.random() < self.world.trouble:
            reason, until = self.random.choice(ENDS), seconds * self.random.random()
        epochs = self._epochs(attempt.trial)
        for step in range(1, epochs + 1):
            progress = m.AttemptProgress(attempt=attempt, step=step, value=1 / step, peak_bytes=size)
            if (after := seconds * step / (epochs + 0.1)) < until:
                self.at(0.02 + after, functools.partial(self._news, attempt, progress))
        if seconds / epochs < until:
            settled = m.AttemptSettled(attempt=attempt, peak_bytes=size)
            self.at(0.03 + seconds / epochs, lambda: self._news(attempt, settled))
        self.at(0.05 + until, lambda: self._end(attempt, reason))

    def _epochs(self, trial: m.TrialId) -> int:
        return max(1, round(self._truth[trial][1] / self.world.epoch_s)) if self.world.epoch_s else EPOCHS

    def _beside(self, fact: m.WorkerFacts) -> list[m.WorkerFacts]:
        """All workers that draw from its memory, itself among them."""
        return self._domains[fact.domain or fact.address]

    def _sharing(self, fact: m.WorkerFacts) -> list[_Attempt]:
        """What runs in that memory."""
        return [self._live[a] for other in self._beside(fact) for a in sorted(self._on[other.address])]

    # -- what happens in the world ----------------------------------------------------------------------------------

    def _news(self, attempt: m.AttemptId, event: m.Event) -> None:
        if attempt in self._live:
            self.tell(event)

    def _end(self, attempt: m.AttemptId, reason: m.ExitReason) -> None:
        live = self._live.pop(attempt, None)
        if live is None:
            return
        self._on[live.launch.worker].discard(attempt)
        seconds = self._truth[attempt.trial][1]
        self.tell(
            m.AttemptEnded(attempt=attempt, outcome=outcome(reason, peak_bytes=live.true_bytes, duration_s=seconds))
        )

    def _tick(self) -> None:
        self.tell(m.Tick())
        self.at(1.0, self._tick)

    def _lose(self) -> None:
        """A host dies with all that ran on it; the dispatcher reports each attempt lost; it comes back later."""
        address = self.random.choice(sorted(self.facts))
        self.tell(m.WorkerLost(worker=address))
        for attempt in sorted(self._on[address]):
            self._end(attempt, m.ExitReason.LOST)
        self.at(3.0, m.WorkerJoined(facts=self.facts[address]))
        self.at(self.random.expovariate(1 / self.world.lost_every_s), self._lose)

    def _vitals(self, address: str) -> None:
        fact = self.facts[address]
        used = {attempt: self._live[attempt].true_bytes for attempt in sorted(self._on[address])}
        taken = sum(live.true_bytes for live in self._sharing(fact))
        taken += sum(other.overhead_bytes for other in self._beside(fact))
        stranger = int(fact.limit_bytes * self.random.uniform(0, self.world.strangers))
        available = max(0, fact.limit_bytes - taken - stranger)
        failed = self.random.random() < self.world.trouble / 10
        self.tell(
            m.WorkerVitals(
                worker=address,
                available_bytes=None if failed else available,
                pressure=m.Pressure(int(self.random.random() < self.world.trouble)),
                used_bytes=used,
                peak_bytes=used,
            )
        )
        self.at(self.world.vitals_s, lambda: self._vitals(address))

    # -- promises ---------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        self.brain.check()
        held = {attempt: held for row in self.brain.ledger for attempt, held in row.reservations.items()}
        if held.keys() != self._live.keys():
            odd = sorted(map(str, held.keys() ^ self._live.keys()))
            raise BrokenPromise(f"at {self.now:.2f} s the ledger and the running attempts differ: {odd}")
        for attempt, reservation in held.items():
            if reservation.host_bytes != self._live[attempt].reserved:
                raise BrokenPromise(f"{attempt}: the ledger changed its reservation and told nobody")
        for trial in self.brain.trials.values():
            fresh = trial.since >= self.now or trial.not_before > self.now
            if trial.state is m.TrialState.PENDING and not fresh and trial.deferred is None:
                raise BrokenPromise(f"{trial.id} waits without a reason at {self.now:.2f} s: {trial.story}")


def phase6a(quota: int) -> list[m.StudySpec]:
    """Twelve studies, four budgets and three horizons."""
    return [
        study(f"{budget}_h{horizon}", quota=quota) for budget in ("2M", "20M", "200M", "2B") for horizon in (1, 3, 5)
    ]


GIB_OF = {"2M": (0.3, 0.6), "20M": (0.5, 1.5), "200M": (2.5, 6.0), "2B": (15.0, 21.0)}
SECONDS_OF = {"2M": (10, 60), "20M": (30, 120), "200M": (100, 400), "2B": (400, 1200)}


def bytes_of(name: str, source: random.Random) -> int:
    """A trial of a study of `phase6a`, sized for a host of 24 GiB."""
    return int(source.uniform(*GIB_OF[name.split("_")[0]]) * GIB)


def seconds_of(name: str, source: random.Random) -> float:
    """How long it takes."""
    return source.uniform(*SECONDS_OF[name.split("_")[0]])


def large(trials: int, workers: int, vitals_s: float = 0.0) -> Simulation:
    """24 studies of small and middle-sized trials on many hosts."""
    names = [f"{('2M', '20M', '200M')[n % 3]}_{n}" for n in range(24)]
    specs = [study(name, quota=max(1, trials // len(names))) for name in names]
    hosts = [facts(f"w{n:04d}", host=f"host{n}", slots=4) for n in range(workers)]
    return Simulation(
        World(bytes_of=bytes_of, seconds_of=seconds_of, vitals_s=vitals_s, check_every=10**9), specs, hosts, seed=1
    )


if __name__ == "__main__":
    simulation = large(*(int(arg) for arg in (*sys.argv[1:3], *("10000", "100")[len(sys.argv) - 1 :])))
    simulation.run()
    print(
        f"{len(simulation.finals)} trials, {len(simulation.facts)} workers, {simulation.events} events: "
        f"{simulation.brain_s:.1f} s in the brain, {simulation.brain_s / simulation.events * 1e6:.0f} us an event, "
        f"{simulation.now:.0f} s simulated"
    )

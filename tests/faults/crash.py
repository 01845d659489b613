"""The crash campaign: a run of 12 small studies is killed at random moments and started again until it is done.

`python -m tests.faults.crash --kills 500 --seed 1` runs as many rounds as it takes; each round is a run folder of its
own, on this machine or (every third) on a Dask cluster started by hand. At the end of a round everything that was
promised is checked from outside: the database, the journal, the results on disk, what the trials themselves noted, and
/proc. The list of kills follows from the seed; their moments also from the machine, as in life.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scheduler.driver import decisions, journal
from tests.faults.sandbox import Process, Sandbox, read_lines, until

EPOCHS, TRIALS, SLOTS = 10, 10, 2
KILLS_PER_ROUND = 50
# What a dying program is in the middle of: the moments at which something could be lost or done twice.
MOMENTS = (
    "batch.started",
    "worker.joined",
    "study.opened",
    "trial.asked",
    "attempt.launched",
    "attempt.started",
    "attempt.ended",
    "trial.ended",
    "trial.requeued",
    "trial.told",
    "study.closed",
)
FIND_S = 8.0  # for a victim of the wanted role to be there
ROUND_S = 300.0  # from the last kill to the end of the run


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """One kill: `delay_s` after the next journal line of name `after` (None: after the kill before), one of `role`."""

    role: str
    after: str | None
    delay_s: float
    pick: float

    def __str__(self) -> str:
        return f"{self.role} {self.delay_s:.3f} s after {self.after or 'the last one'}"


def kills(seed: int, count: int, *, cluster: bool) -> list[Kill]:
    """A seeded list of kill points, spread over all that runs."""
    rng = random.Random(f"{seed}/{cluster}")
    weights = {"driver": 9, "worker": 4, "watchdog": 3, "trial": 5, "spare": 2}
    if cluster:
        weights |= {"driver": 7, "nanny": 4}
    found = []
    for _ in range(count):
        role = rng.choices(list(weights), list(weights.values()))[0]
        if rng.random() < 0.5:
            after, delay_s = rng.choice(MOMENTS), rng.choice((0.0, 0.0, rng.uniform(0, 0.02), rng.uniform(0, 0.3)))
        else:
            after, delay_s = None, rng.uniform(0.0, 5.0 if role == "driver" else 2.0)
        found.append(Kill(role=role, after=after, delay_s=delay_s, pick=rng.random()))
    return found


@dataclass(slots=True)
class Report:
    """What a round found. problems: every promise that was broken, in words."""

    done: collections.Counter[str] = field(default_factory=collections.Counter)
    starts: int = 0
    epochs_done: int = 0
    epochs_begun: int = 0
    epochs_needed: int = 0
    finished: collections.Counter[str] = field(default_factory=collections.Counter)
    retried: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return self.done.total()

    def add(self, other: Report) -> None:
        """Sum up."""
        self.done += other.done
        self.finished += other.finished
        for name in ("starts", "epochs_done", "epochs_begun", "epochs_needed", "retried", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.problems += other.problems

    def __str__(self) -> str:
        spread = ", ".join(f"{role} {n}" for role, n in sorted(self.done.items()))
        return (
            f"{self.kills} kills ({spread}), {self.starts} starts of the driver, {self.seconds:.0f} s; "
            f"{dict(self.finished)} trials, {self.retried} requeued; {self.epochs_done} epochs trained and "
            f"{self.epochs_begun} begun where {self.epochs_needed} were needed; {len(self.problems)} problems"
        )


class Round:
    """One run from its first start to its quotas, through a list of kills."""

    def __init__(self, root: Path, plan: Sequence[Kill], *, cluster: bool = False, trials: int = TRIALS) -> None:
        self.box = Sandbox(root, trials=trials, max_epochs=EPOCHS, slots=SLOTS)
        self.plan, self.cluster, self.trials = plan, cluster, trials
        self.report = Report(epochs_needed=12 * trials * EPOCHS)
        self.driver: subprocess.Popen[Any] | None = None
        self.address: str | None = None
        self.nanny: subprocess.Popen[Any] | None = None
        self.over = False

    def run(self) -> Report:
        """Kill, start again, and check at the end."""
        began = time.monotonic()
        with self.box:
            if self.cluster:
                self.address, _, (self.nanny,) = self.box.start_cluster()
            self._keep_up()
            for kill in self.plan:
                self._carry_out(kill)
                if self.over:
                    break
            self._finish()
            if self.cluster:
                self._leave_cluster()
            self._check()
        self.report.seconds = time.monotonic() - began
        return self.report

    # -- the kills --------------------------------------------------------------------------------------------------

    def _carry_out(self, kill: Kill) -> None:
        if kill.after is not None:
            path = self.box.folder / "journal.jsonl"
            offset = path.stat().st_size if path.exists() else 0
            needle = f'"event": "{kill.after}"'.encode()
            deadline = time.monotonic() + FIND_S
            while time.monotonic() < deadline and self._keep_up():
                with contextlib.suppress(OSError), path.open("rb") as file:
                    file.seek(offset)
                    if needle in file.read():
                        break
                time.sleep(0.002)
            time.sleep(kill.delay_s)
        else:
            deadline = time.monotonic() + kill.delay_s
            while time.monotonic() < deadline and self._keep_up():
                time.sleep(min(0.05, max(0.0, deadline - time.monotonic())))
        victim = self._victim(kill)
        if victim is not None and victim.kill():
            self.report.done[victim.role] += 1

    def _victim(self, kill: Kill) -> Process | None:
        deadline = time.monotonic() + FIND_S
        while time.monotonic() < deadline and self._keep_up():
            if kill.role == "driver":
                found = [p for p in self.box.processes() if self.driver is not None and p.pid == self.driver.pid]
            elif kill.role == "nanny":
                found = [p for p in self.box.processes() if self.nanny is not None and p.pid == self.nanny.pid]
            else:
                found = self.box.of_role(kill.role)
            if found:
                return found[int(kill.pick * len(found))]
            time.sleep(0.05)
        return None

    def _keep_up(self) -> bool:
        """Start again what was killed, as a person or a service manager does; False once the run is over."""
        if self.cluster and self.address is not None and (self.nanny is None or self.nanny.poll() is not None):
            self.nanny = self.box.start_worker(self.address)
        status = None if self.driver is None else self.driver.poll()
        if self.driver is not None and status is None:
            return True
        if status == 0:
            self.over = True
            return False
        if status is not None and status != -9:
            self.report.problems.append(f"the driver ended with {status} by itself: {self._last_words()}")
            if sum("by itself" in problem for problem in self.report.problems) > 5:
                raise AssertionError("\n".join(self.report.problems))
        self.driver = self.box.start(*(["--cluster", self.address] if self.address is not None else []))
        self.report.starts += 1
        return True

    def _last_words(self) -> str:
        return self.box.log.read_text(errors="replace")[-1500:]

    def _finish(self) -> None:
        deadline = time.monotonic() + ROUND_S
        while self._keep_up():
            if time.monotonic() > deadline:
                self.report.problems.append(f"not over {ROUND_S} s after the last kill: {self._last_words()}")
                return
            time.sleep(0.05)

    def _leave_cluster(self) -> None:
        """After the run the cluster is as it was: nothing of ours runs on it."""
        try:
            until(lambda: not ({"trial", "spare", "watchdog"} & {p.role for p in self.box.processes()}), 10, "left")
        except AssertionError:
            self.report.problems.append(f"left on the cluster: {self.box.processes()}")
        for process in self.box.processes():
            if process.role in ("scheduler", "nanny", "worker"):
                process.kill()

    # -- the promises -----------------------------------------------------------------------------------------------

    def _check(self) -> None:
        box, problems = self.box, self.report.problems
        left = [p for p in box.processes() if p.role != "other"]
        with contextlib.suppress(AssertionError):  # those of a driver that was killed have 5 s
            until(lambda: not box.processes(), 5, "the last process to leave")
            left = []
        problems += [f"{process} is left" for process in left]
        trials = box.trials()
        self.report.retried = sum("retried" in t["attrs"] for t in trials)
        self.report.finished = collections.Counter(t["state"] for t in trials if "retried" not in t["attrs"])
        problems += quota_problems(trials, self.trials)
        problems += replay_problems(trials, box.folder)
        problems += result_problems(box.folder)
        problems += self._epoch_problems()
        if registered := list((box.root / "host" / "attempts").glob("*.json")):
            problems.append(f"registrations left: {[path.name for path in registered]}")

    def _epoch_problems(self) -> Iterable[str]:
        report = self.report
        notes = collections.Counter(line["what"] for line in self.box.epochs())
        report.epochs_done, report.epochs_begun = notes["done"], notes["begun"]
        if report.epochs_done < report.epochs_needed:
            yield f"{report.epochs_done} epochs trained, but {report.epochs_needed} were needed"
        if report.epochs_done - report.epochs_needed > report.kills:
            yield f"{report.epochs_done - report.epochs_needed} epochs trained twice in {report.kills} kills"
        # A kill of the driver or the worker ends as many epochs under way as there are slots.
        if report.epochs_begun - report.epochs_needed > SLOTS * report.kills:
            yield f"{report.epochs_begun - report.epochs_needed} epochs begun in vain in {report.kills} kills"


def quota_problems(trials: Sequence[dict[str, Any]], quota: int, studies: int = 12) -> Iterable[str]:
    """Each study has exactly its quota of final states, nothing is under way, no parameter set has two results."""
    counted: collections.Counter[str] = collections.Counter()
    results: collections.Counter[tuple[str, float]] = collections.Counter()
    for trial in trials:
        name = f"{trial['study']}/{trial['number']}"
        if trial["state"] not in ("COMPLETE", "PRUNED", "FAIL"):
            yield f"{name} is left {trial['state']}"
        elif "retried" not in trial["attrs"]:
            counted[trial["study"]] += 1
            results[trial["study"], trial["params"].get("learning_rate", -1.0)] += 1
            if trial["state"] != "COMPLETE":
                yield f"{name} ended {trial['state']}: {trial['attrs'].get('error')}"
    if len(counted) != studies:
        yield f"{len(counted)} studies of {studies}"
    yield from (f"{study} has {n} trials instead of {quota}" for study, n in counted.items() if n != quota)
    yield from (f"{key} has {n} results" for key, n in results.items() if n != 1)


def replay_problems(trials: Sequence[dict[str, Any]], folder: Path) -> Iterable[str]:
    """The journal alone gives the final states that the database has."""
    replayed = decisions.final_states(journal.read(folder / "journal.jsonl"))
    stored = {f"{t['study']}/{t['number']}": t["state"] for t in trials}
    for trial in sorted(replayed.keys() | stored.keys()):
        if replayed.get(trial) != stored.get(trial):
            yield f"{trial} is {stored.get(trial)} in the database, {replayed.get(trial)} in the journal"


def result_problems(folder: Path) -> Iterable[str]:
    """No parameter set was run to completion twice: at most one durable result each."""
    completed: dict[tuple[str, float], list[str]] = {}
    for path in (folder / "attempts").glob("*/result.json"):
        message = json.loads(path.read_text())
        spec = json.loads((path.parent / "spec.json").read_text())
        if message["type"] == "result" and message["result"].get("stop_reason") == "completed":
            key = (spec["attempt"].split("/")[0], spec["params"]["learning_rate"])
            completed.setdefault(key, []).append(path.parent.name)
    return [f"{key} was completed by {names}" for key, names in completed.items() if len(names) > 1]


def campaign(root: Path, count: int, seed: int, *, say: Any = print) -> Report:
    """Rounds until `count` kills were carried out."""
    total, number = Report(), 0
    while total.kills < count:
        number += 1
        cluster = number % 3 == 0
        wanted = min(KILLS_PER_ROUND, count - total.kills)
        plan = kills(seed * 1000 + number, wanted, cluster=cluster)
        report = Round(root / f"round{number}", plan, cluster=cluster).run()
        total.add(report)
        say(f"round {number}{' (cluster)' if cluster else ''}: {report}")
        for problem in report.problems:
            say(f"  PROBLEM: {problem}")
    return total


def main() -> int:
    """The command line; 0 when every promise was kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--root", type=Path, help="keep what the rounds leave here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="headroom-crash-") as scratch:
        total = campaign(
            arguments.root or Path(scratch), arguments.kills, arguments.seed, say=lambda t: print(t, flush=True)
        )
    print(total)
    return 1 if total.problems else 0


if __name__ == "__main__":
    sys.exit(main())


__all__ = ["Kill", "Report", "Round", "campaign", "kills", "read_lines"]

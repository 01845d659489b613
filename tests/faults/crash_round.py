"""One run of the crash campaign: from its first start to its quotas, through a list of events.

Covers carrying events out, starting again what ended (as a person or a service manager does), and asking for the
promises after each event and at the end. Which events there are is `crash_plan`, what is promised `crash_promises`.
"""

from __future__ import annotations

import collections
import contextlib
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from tests.faults import crash_promises as promises
from tests.faults.crash_plan import AWAY_TIMEOUT_S, EPOCHS, LEASE_S, SLOTS, STUDIES, TRIALS, Allowance, Event, Kind
from tests.faults.sandbox import Disk, Network, Process, Sandbox, stop_between_transactions
from tests.waiting import until

BUDGET_BYTES = 400 * 2**20  # two trials fit until one of them has settled, whatever the warm spare and the agent hold
FIND_S = 8.0  # for a victim of the wanted role, or for the moment, to be there
TWICE_S = 30.0  # for the next worker
END_S = 90.0  # for a driver that was asked to stop
ROUND_S = 300.0  # from the last event to the end of the run
ROLES = {
    Kind.AGENT: "agent",
    Kind.TRIAL: "trial",
    Kind.SPARE: "spare",
    Kind.FORK_SERVER: "fork server",
    Kind.WATCHDOG: "watchdog",
    Kind.WORKER: "worker",
}
# What a driver says that is started on a full disk, or on a cluster that is just being started itself.
_EARLY = ("No space left", "the cluster has no worker", "no Dask scheduler answers")
OURS = {"driver", "agent", "watchdog", "trial", "spare", "fork server"}


@dataclass(slots=True)
class Report:
    """What a round found. problems: every promise that was broken, in words. skipped: what it could not do, and why."""

    done: collections.Counter[Kind] = field(default_factory=collections.Counter)
    on_cluster: int = 0
    starts: int = 0
    epochs_done: int = 0
    epochs_begun: int = 0
    epochs_needed: int = 0
    looks: int = 0
    reads: int = 0
    completed: int = 0
    ends: collections.Counter[str] = field(default_factory=collections.Counter)
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def events(self) -> int:
        return self.done.total()

    def add(self, other: Report) -> None:
        """Sum up."""
        self.done += other.done
        self.ends += other.ends
        for name in ("on_cluster", "starts", "epochs_done", "epochs_begun", "epochs_needed", "looks", "reads"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.completed += other.completed
        self.seconds += other.seconds
        self.problems += other.problems
        self.skipped |= other.skipped

    def __str__(self) -> str:
        ends = ", ".join(f"{n} {reason}" for reason, n in sorted(self.ends.items()))
        return (
            f"{self.events} events in {self.seconds:.0f} s, {self.starts} starts of the driver; {self.completed} "
            f"trials COMPLETE; attempts: {ends}; {self.epochs_done} epochs trained and {self.epochs_begun} begun where "
            f"{self.epochs_needed} were needed; {len(self.problems)} problems"
        )


class Round:
    """One run and what is done to it. root: a folder of its own. trials: of each study."""

    def __init__(
        self,
        root: Path,
        plan: Sequence[Event],
        *,
        cluster: bool = False,
        disk: Disk | None = None,
        network: Network | None = None,
        trials: int = TRIALS,
    ) -> None:
        settings: dict[str, Any] = {"memory_budget": str(BUDGET_BYTES), "reserve_bytes": "1MiB", "lease_s": LEASE_S}
        settings |= {"away_timeout_s": AWAY_TIMEOUT_S, "drain_timeout_s": 20}
        self.box = Sandbox(root, trials=trials, max_epochs=EPOCHS, slots=SLOTS, **settings)
        self.plan, self.cluster, self.disk, self.trials = plan, cluster, disk, trials
        self.box.network = network
        self.report = Report(epochs_needed=STUDIES * trials * EPOCHS)
        self.driver: subprocess.Popen[Any] | None = None
        self.address: str | None = None
        self.scheduler: subprocess.Popen[Any] | None = None
        self.nanny: subprocess.Popen[Any] | None = None
        self.rival: Sandbox | None = None
        self.over = False
        self.held = False  # a driver that ends is not to be started again just now
        self.broken: set[str] = set()  # what was found in the database
        self.slow = 0  # events that kept driver and agents apart for long, besides those that are meant to

    def run(self) -> Report:
        """Do it all, and check after each event and at the end."""
        began = time.monotonic()
        with self.box, promises.Watch(self.box, SLOTS) as watch:
            if self.cluster:
                self.address, self.scheduler, (self.nanny,) = self.box.start_cluster()
            self._keep_up()
            for event in self.plan:
                problems = len(self.report.problems)
                self._carry_out(event)
                self._check_database()
                found = self.report.problems
                found[problems:] = [f"{problem} (after {event})" for problem in found[problems:]]
                if self.over:
                    break
            self._finish()
            self._leave()
            self.report.problems += watch.problems
            self.report.looks = watch.looks
            self._check()
        self.report.seconds = time.monotonic() - began
        self.report.on_cluster = self.report.events if self.cluster else 0
        return self.report

    # -- the events -------------------------------------------------------------------------------------------------

    def _carry_out(self, event: Event) -> None:
        self._wait_for(event)
        if self.over:
            return
        act: Callable[[Event], bool] = {
            Kind.DRIVER: self._kill_driver,
            Kind.NANNY: self._kill_nanny,
            Kind.WORKER_TWICE: self._kill_twice,
            Kind.SCHEDULER: self._restart_scheduler,
            Kind.DISK: self._fill,
            Kind.DISK_DRIVER: self._fill,
            Kind.INODES: self._fill,
            Kind.STOPPED: self._stop_driver,
            Kind.PAUSED: self._stop_driver,
            Kind.TAKEN: self._take_over,
            Kind.QUIT: self._quit,
            Kind.QUIT_DRIVER: self._quit,
            Kind.NETWORK: self._cut,
        }.get(event.kind, self._kill)
        if act(event):
            self.report.done[event.kind] += 1

    def _wait_for(self, event: Event) -> None:
        if event.after is None:
            self._pass(event.delay_s)
            return
        path = self.box.folder / "journal.jsonl"
        offset = path.stat().st_size if path.exists() else 0
        needle = f'"event": "{event.after}"'.encode()
        deadline = time.monotonic() + FIND_S
        while time.monotonic() < deadline and self._keep_up():
            with contextlib.suppress(OSError), path.open("rb") as file:
                file.seek(offset)
                if needle in file.read():
                    break
            time.sleep(0.002)
        time.sleep(event.delay_s)

    def _pass(self, seconds: float) -> None:
        """Let time pass, and keep the run up meanwhile."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._keep_up():
            time.sleep(min(0.05, max(0.0, deadline - time.monotonic())))

    def _find(self, find: Callable[[], list[Process]], pick: float = 0.0, wait_s: float = FIND_S) -> Process | None:
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline and self._keep_up():
            if found := find():
                return found[int(pick * len(found))]
            time.sleep(0.05)
        return None

    def _kill(self, event: Event) -> bool:
        victim = self._find(lambda: self.box.of_role(ROLES[event.kind]), event.pick)
        return victim is not None and victim.kill()

    def _kill_twice(self, event: Event) -> bool:
        first = self._find(lambda: self.box.of_role("worker"))
        if first is None or not first.kill():
            return False
        second = self._find(lambda: [p for p in self.box.of_role("worker") if p.pid != first.pid], wait_s=TWICE_S)
        if second is None:
            if not self.over:
                self.report.problems.append(f"no worker within {TWICE_S} s after one was killed: {self._last_words()}")
            return False
        return second.kill()

    def _started(self, process: subprocess.Popen[Any] | None) -> list[Process]:
        return [p for p in self.box.processes() if process is not None and p.pid == process.pid]

    def _kill_driver(self, event: Event) -> bool:
        victim = self._find(lambda: self._started(self.driver))
        return victim is not None and victim.kill()

    def _kill_nanny(self, event: Event) -> bool:
        victim = self._find(lambda: self._started(self.nanny))
        return victim is not None and victim.kill()

    def _restart_scheduler(self, event: Event) -> bool:
        assert self.scheduler is not None and self.address is not None
        began = time.monotonic()
        self.scheduler.kill()
        self.scheduler.wait()
        self._pass(event.length_s)
        self.scheduler = self.box.start_scheduler(int(self.address.rpartition(":")[2]))
        until(self._scheduler_listens, 60, "the scheduler listens again")
        if time.monotonic() - began > AWAY_TIMEOUT_S / 2:
            self.slow += 1
        return True

    def _scheduler_listens(self) -> bool:
        assert self.address is not None
        host, _, port = self.address.removeprefix("tcp://").rpartition(":")
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1.0):
            return True
        return False

    def _fill(self, event: Event) -> bool:
        assert self.disk is not None
        take = self.disk.take_inodes if event.kind is Kind.INODES else self.disk.fill
        deadline = time.monotonic() + event.length_s
        self.held = True
        try:
            while time.monotonic() < deadline and self._keep_up():
                take()  # again and again: what the run gives back is taken as well
                if event.kind is Kind.DISK_DRIVER and self.driver is not None and event.pick < 0.5:
                    self.driver.kill()
                time.sleep(0.1)
            if event.kind is Kind.DISK_DRIVER and self.driver is not None:
                self.driver.kill()
                self.driver.wait()
        finally:
            self.disk.empty()
            self.held = False
        return not self.over

    def _stop_driver(self, event: Event) -> bool:
        victim = self._find(lambda: self._started(self.driver))
        if victim is None or not victim.kill(signal.SIGSTOP):
            return False
        time.sleep(event.length_s)  # what is tested is this very time
        return victim.kill(signal.SIGCONT)

    def _take_over(self, event: Event) -> bool:
        """The driver is stopped; another run on the same studies takes its trials over, and is asked to stop."""
        if self._find(lambda: self.box.of_role("trial") if self._is_up() else [], wait_s=30.0) is None:
            return False
        assert self.driver is not None
        stop_between_transactions(self.driver, self.box.database)
        rival = self.rival = self.rival or self.box.rival()
        before = len(rival.events("study.takeover"))

        def taken() -> bool:
            return len(rival.events("study.takeover")) > before

        other = rival.start()
        try:
            with contextlib.suppress(AssertionError):  # nothing was under way then
                until(lambda: taken() or other.poll() is not None, 30, "a takeover")
            other.send_signal(signal.SIGTERM)
            if (status := other.wait(END_S)) not in (130, 0):
                self.report.problems.append(f"the other driver ended with {status}: {rival.log.read_text()[-800:]}")
        except subprocess.TimeoutExpired:
            self.report.problems.append(f"the other driver is not over: {rival.log.read_text()[-800:]}")
            other.kill()
        finally:
            self.driver.send_signal(signal.SIGCONT)
        if not taken():  # not carried out, but the driver was away all the same
            self.slow += 1
        return taken()

    def _quit(self, event: Event) -> bool:
        """As by `q`: SIGTERM, SIGINT, or the file STOP."""
        if self._find(lambda: self._started(self.driver) if self._is_up() else [], wait_s=30.0) is None:
            return False
        assert self.driver is not None
        self.held = True
        if event.pick < 0.3:
            (self.box.folder / "STOP").touch()
        else:
            self.driver.send_signal(signal.SIGTERM if event.pick < 0.7 else signal.SIGINT)
        if event.kind is Kind.QUIT_DRIVER:
            time.sleep(event.length_s)
            self.driver.kill()
            self.driver.wait()
        try:
            status = self.driver.wait(END_S)
        except subprocess.TimeoutExpired:
            self.report.problems.append(f"not over {END_S} s after it was asked to stop: {self._last_words()}")
            self.driver.kill()
            status = self.driver.wait()
        self.held = False
        if status == 130:
            self._check_stopped()
        elif status not in (0, -9):
            self.report.problems.append(f"asked to stop, the driver ended with {status}: {self._last_words()}")
        if status == 130:
            self.driver = None  # its end is explained
        return True

    def _is_up(self) -> bool:
        """The driver has begun: its handlers are in place."""
        began = self.box.events("batch.started")
        return bool(began) and self.driver is not None and began[-1]["driver_pid"] == self.driver.pid

    def _check_stopped(self) -> None:
        """After a stop nothing of ours runs and nothing is under way in the study."""
        with contextlib.suppress(AssertionError):
            until(lambda: not self._left(), 20, "nothing left")
        self.report.problems += [f"{process} is left after a stop" for process in self._left()]
        if self._has_opened():  # else it was stopped before it had settled what an earlier one left
            running = [f"{t['study']}/{t['number']}" for t in self.box.trials() if t["state"] == "RUNNING"]
            self.report.problems += [f"{trial} is RUNNING after a stop" for trial in running]

    def _left(self) -> list[Process]:
        mine = OURS if self.cluster else OURS | {"worker", "nanny", "scheduler"}
        return [p for p in self.box.processes() if p.role in mine]

    def _cut(self, event: Event) -> bool:
        assert self.box.network is not None
        self.box.network.cut()
        try:
            self._pass(event.length_s)
        finally:
            self.box.network.mend()
        return True

    # -- keeping it up ----------------------------------------------------------------------------------------------

    def _keep_up(self) -> bool:
        """Start again what ended, as a person or a service manager does; False once the run is over."""
        if self.cluster and self.address is not None and (self.nanny is None or self.nanny.poll() is not None):
            self.nanny = self.box.start_worker(self.address)
        status = None if self.driver is None else self.driver.poll()
        if self.driver is not None and status is None:
            return True
        if status == 0:
            self.over = True
            return False
        if status is not None and status != -9 and self._is_excused(status):
            self.driver = None
        elif status is not None and status != -9:
            self.report.problems.append(f"the driver ended with {status} by itself: {self._last_words()}")
            if sum("by itself" in problem for problem in self.report.problems) > 5:
                raise AssertionError("\n".join(self.report.problems))
            self.driver = None
        if not self.held:
            self.driver = self.box.start(*(["--cluster", self.address] if self.address is not None else []))
            self.report.starts += 1
        return True

    def _is_excused(self, status: int) -> bool:
        """It was just being started on a full disk, or on a cluster that was just being started itself, and said so in
        a line; or its cluster was away for longer than it waits. What else has begun goes on whatever happens."""
        words = self.box.log.read_text(errors="replace")
        if status == 1 and " cluster.lost " in words and self.cluster:  # away for longer than it waits, and said so
            self.slow += 1
            return True
        early = status == 2 and not self._has_opened() and "Traceback" not in words
        return early and any(each in words for each in _EARLY)

    def _has_opened(self) -> bool:
        """The driver that was started last has settled what an earlier one left. (By its log: the journal's disk may
        be full.)"""
        return self.box.log.read_text(errors="replace").count(" study.opened ") >= STUDIES

    def _last_words(self) -> str:
        return self.box.log.read_text(errors="replace")[-800:]

    def _finish(self) -> None:
        deadline = time.monotonic() + ROUND_S
        while self._keep_up():
            if time.monotonic() > deadline:
                self.report.problems.append(f"not over {ROUND_S} s after the last event: {self._last_words()}")
                return
            time.sleep(0.05)

    def _leave(self) -> None:
        """After the run nothing of ours runs, and a cluster is as it was: what is left of it is ended here."""
        with contextlib.suppress(AssertionError):
            until(lambda: not self._left(), 20, "nothing left")
        self.report.problems += [f"{process} is left" for process in self._left()]
        for process in self.box.processes():
            if self.cluster and process.role in ("scheduler", "nanny", "worker"):
                process.kill()

    # -- the promises -----------------------------------------------------------------------------------------------

    def _check_database(self) -> None:
        """What is true at any time, read by plain Optuna beside the driver."""
        if not self.box.database.exists() or not self.box.events("study.opened"):
            return
        for attempt in range(3):
            try:
                studies = promises.read_by_optuna(self.box.database)
                break
            except SQLAlchemyError as error:
                if attempt == 2:
                    self.report.problems.append(f"Optuna cannot read the database: {error}")
                    return
        self.report.reads += 1
        fresh = set(promises.charged(studies, self.trials)) - self.broken
        self.broken |= fresh
        self.report.problems += sorted(fresh)

    def _check(self) -> None:
        box, report = self.box, self.report
        with contextlib.suppress(AssertionError):
            until(lambda: not box.processes(), 10, "the last process to leave")
        report.problems += [f"{process} is left" for process in box.processes()]
        runs = [box, self.rival] if self.rival is not None else [box]
        folders = [run.folder for run in runs]
        trials, notes = box.trials(), box.epochs()
        reasons = promises.ended(record for run in runs for record in run.journal())
        report.ends = collections.Counter(reasons.values())
        report.completed = sum(t["state"] == "COMPLETE" for t in trials)
        counted = collections.Counter(note["what"] for note in notes)
        report.epochs_done, report.epochs_begun = counted["done"], counted["begun"] - counted["left"]
        self._check_database()
        report.problems += promises.quota_problems(trials, self.trials)
        report.problems += promises.replay_problems(trials, *folders)
        report.problems += promises.end_problems(reasons, Allowance.of(report.done, self.slow))
        # A driver that was stopped goes on with what it had until it is told that it was taken over: for nothing.
        taken = promises.taken_over(trials, self.rival.journal()) if self.rival is not None else set()
        own = [note for note in notes if (note["study"], note["rate"]) not in taken]
        report.problems += promises.result_problems(*folders, taken=taken)
        report.problems += promises.epoch_problems(own, reasons)
        report.problems += promises.vain_problems(own, report.epochs_needed - EPOCHS * len(taken), reasons)
        report.problems += promises.retry_problems(trials, notes, reasons)
        for run in runs:
            report.problems += promises.admission_problems(run.journal(), BUDGET_BYTES)
        report.problems += self._left_on_the_host()

    def _left_on_the_host(self) -> Iterator[str]:
        host = self.box.root / "host"
        # (A worker that was killed right after it made its agent's folder leaves that: it goes after ten minutes.)
        left = [*(host / "attempts").glob("*"), *(host / "agents").glob("*/agent.json")]
        if left:
            yield f"left in the host registry: {[str(path.relative_to(host)) for path in left]}"
        with contextlib.closing(sqlite3.connect(self.box.database)) as connection:
            (answer,) = connection.execute("PRAGMA integrity_check").fetchone()
            if answer != "ok":
                yield f"the database is damaged: {answer}"

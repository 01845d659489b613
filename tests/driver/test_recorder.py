"""The recorder against real outages: a database locked by another process, a full disk, a read-only one."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scheduler.core.fault import RetryPolicy
from scheduler.driver import recovery
from scheduler.driver.recorder import Recorder
from scheduler.model import (
    AskFailed,
    AskTrial,
    AttemptId,
    EnqueueRetry,
    Event,
    FinalState,
    PruneAdvised,
    QuotaReached,
    ReportValue,
    TellTrial,
    TrialAsked,
    TrialId,
    TrialTaken,
    TrialTold,
)
from scheduler.model.calls import Answer
from scheduler.study.store import Functions, NotOurs, StudyStore
from tests.study.test_study import ARCHITECTURES, FUNCTIONS, STUDY, spec, states, store_at, told
from tests.waiting import wait_until

ASK = AskTrial(study=STUDY, limit_bytes=100)


class Driver:
    """A recorder with what it posts and notes, and short delays."""

    def __init__(self, store: StudyStore, **settings: Any) -> None:
        self.store, self.events, self.notes = store, list[Event | Answer](), list[tuple[str, dict[str, Any]]]()
        store.open(spec(), ARCHITECTURES)
        self.recorder = Recorder(
            store,
            self.events.append,
            journal=lambda event, **fields: self.notes.append((event, fields)),
            **{"first_delay_s": 0.05, "max_delay_s": 0.2, "parked_s": 0.1, **settings},
        )

    def wait(self, kind: type, count: int = 1, timeout_s: float = 30.0) -> list[Any]:
        """The events of a kind, once there are so many."""
        wait_until(lambda: len(self.of(kind)) >= count, f"{count} x {kind.__name__} in {self.events}", timeout_s)
        return self.of(kind)

    def of(self, kind: type) -> list[Any]:
        """The events of a kind so far."""
        return [event for event in self.events if isinstance(event, kind)]

    def noted(self) -> list[str]:
        """The names of what was noted."""
        return [event for event, _ in self.notes]

    def ask(self) -> TrialId:
        """Ask for a trial and wait for it."""
        before = len(self.of(TrialAsked))
        self.recorder.submit(ASK)
        trial: TrialId = self.wait(TrialAsked, before + 1)[-1].trial
        return trial


Start = Callable[..., Driver]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts drivers and closes them."""
    drivers: list[Driver] = []

    def start(store: StudyStore, **settings: Any) -> Driver:
        drivers.append(Driver(store, **settings))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.recorder.close(0)
        driver.store.close()


def report(trial: TrialId, step: int, value: float = 0.5) -> ReportValue:
    """A report of the first attempt."""
    return ReportValue(attempt=AttemptId(trial, 1), step=step, value=value)


def test_commands_are_carried_out_in_order(tmp_path: Path, start: Start) -> None:
    """Ask, reports, tell: the events come back, the tell does not overtake its reports, the retry is queued."""
    driver = start(store_at(tmp_path / "study.db"))
    first, second = driver.ask(), driver.ask()
    for step in range(1, 6):
        driver.recorder.submit(report(first, step))
    driver.recorder.submit(told(first))
    driver.recorder.submit(EnqueueRetry(trial=second, attempt=2, resume_from=None, reason="interrupted"))
    assert driver.wait(TrialTold, 2) == [
        TrialTold(trial=first, state=FinalState.COMPLETE),
        TrialTold(trial=second, state=FinalState.FAIL),
    ]
    assert driver.store.rows(STUDY)[0]["steps"] == 5
    assert driver.recorder.flush(5) and driver.recorder.pending == 0
    assert driver.notes == []


def test_the_pruner_is_heard(tmp_path: Path, start: Start) -> None:
    """A hopeless trial is advised to stop."""
    driver = start(store_at(tmp_path / "study.db"))
    for _ in range(5):
        trial = driver.ask()
        driver.recorder.submit(report(trial, 4, 0.1))
        driver.recorder.submit(told(trial, 0.1))
    driver.recorder.submit(report(driver.ask(), 4, 9.0))
    assert driver.wait(PruneAdvised)[0].step == 4


LOCK = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_locked_database_is_waited_for(tmp_path: Path, start: Start) -> None:
    """Another process holds the lock for longer than any timeout: nothing is lost, and the caller never waits."""
    file = tmp_path / "study.db"
    driver = start(store_at(file))
    trial = driver.ask()
    locker = subprocess.Popen([sys.executable, "-c", LOCK, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert locker.stdin is not None and locker.stdout is not None
    assert locker.stdout.readline() == b"locked\n"
    for step in range(1, 1001):  # were one to wait for the database, it would wait until the locker ends: for ever
        driver.recorder.submit(report(trial, step))
    driver.recorder.submit(told(trial))
    driver.recorder.submit(ASK)
    wait_until(lambda: "study.unavailable" in driver.noted(), "the outage is noticed", 30)
    assert driver.recorder.pending <= 4, "a thousand reports are one entry"
    assert driver.recorder.down_s is not None
    locker.stdin.close()
    locker.wait(10)
    driver.wait(TrialTold)
    driver.wait(TrialAsked, 2)
    assert driver.store.rows(STUDY)[0]["steps"] == 1000
    assert driver.noted() == ["study.unavailable", "study.available"]
    assert driver.recorder.down_s is None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mount.returncode != 0:
        pytest.skip(f"cannot mount a small file system: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_waited_for(small_disk: Path, start: Start) -> None:
    """No space left: progress is held and written, in order, once there is space."""
    driver = start(store_at(small_disk / "study.db"))
    trial = driver.ask()
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError:
            pass
    # SQLite finds room in pages it has already: what must be written is more than that.
    driver.recorder.submit(report(trial, 1))
    driver.recorder.submit(told(trial, attrs={f"story{n}": "x" * 15_000 for n in range(20)}))
    wait_until(lambda: "study.unavailable" in driver.noted(), "the outage is noticed", 30)
    assert "full" in driver.notes[0][1]["error"]
    assert driver.of(TrialTold) == []
    filler.unlink()
    driver.wait(TrialTold)
    row = driver.store.rows(STUDY)[0]
    assert (row["state"], row["steps"], len(row["story19"])) == ("COMPLETE", 1, 15_000)


def test_a_read_only_disk_is_waited_for(small_disk: Path, start: Start) -> None:
    """A file system that has been remounted read-only, as after a disk error."""
    store = store_at(small_disk / "study.db")
    driver = start(store)
    trial = driver.ask()
    assert driver.recorder.flush(10)
    rdb = store._connect()
    rdb.engine.dispose()  # a file that is open for writing would stop the mount from changing
    assert rdb._keeper is not None
    rdb._keeper.close()
    remount = ["mount", "-o", "remount,ro", str(small_disk)]
    wait_until(
        lambda: subprocess.run(remount, capture_output=True, check=False).returncode == 0, "the disk is read-only"
    )
    driver.recorder.submit(told(trial))
    wait_until(lambda: "study.unavailable" in driver.noted(), "the outage is noticed", 30)
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    driver.wait(TrialTold)
    assert states(small_disk / "study.db") == ["COMPLETE"]


def test_close_returns_what_an_outage_kept_back(tmp_path: Path, start: Start) -> None:
    """Closing during an outage does not hang; what is unwritten is returned, asks excepted."""
    file = tmp_path / "study.db"
    driver = start(store_at(file))
    trial = driver.ask()
    with subprocess.Popen([sys.executable, "-c", LOCK, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as locker:
        assert locker.stdout is not None and locker.stdout.readline() == b"locked\n"
        for command in (report(trial, 1), report(trial, 2), told(trial), ASK):
            driver.recorder.submit(command)
        assert driver.recorder.close(0.5) == [report(trial, 1), report(trial, 2), told(trial)]
        with pytest.raises(RuntimeError):
            driver.recorder.submit(ASK)
        locker.kill()


def test_an_error_that_is_not_the_storages_is_not_repeated(tmp_path: Path, start: Start) -> None:
    """A sampler that raises and a trial that does not exist: reported once, and the next command goes on."""
    calls = []

    def broken(*_: Any) -> dict[str, Any]:
        calls.append(1)
        raise KeyError("learning_rate")

    driver = start(store_at(tmp_path / "study.db", functions=Functions(sample=broken)))
    driver.recorder.submit(ASK)
    (failed,) = driver.wait(AskFailed)
    assert (failed.study, calls) == (STUDY, [1]) and "learning_rate" in failed.detail
    missing = TrialId(STUDY, 99)
    driver.recorder.submit(report(missing, 1))
    driver.recorder.submit(told(missing))
    assert driver.wait(TrialTold) == [TrialTold(trial=missing, state=FinalState.FAIL)]
    assert driver.noted() == ["study.rejected"] * 3


def test_an_ask_waits_while_another_driver_runs_the_rest(tmp_path: Path, start: Start) -> None:
    """The quota's last trials run elsewhere: the ask is answered when one is lost, or when the quota is reached."""
    file = tmp_path / "study.db"
    other = start(store_at(file, owner="driver2", run="run2"))
    theirs = [other.ask() for _ in range(10)]
    driver = start(store_at(file))
    driver.recorder.submit(ASK)
    wait_until(lambda: driver.recorder.pending == 1 and driver.recorder.flush(0), "the ask is parked")
    other.recorder.submit(EnqueueRetry(trial=theirs[0], attempt=2, resume_from=None, reason="lost"))
    assert driver.wait(TrialAsked)[0].attempt == 2
    driver.recorder.submit(ASK)
    for trial in theirs[1:]:
        other.recorder.submit(told(trial))
    driver.recorder.submit(told(driver.of(TrialAsked)[0].trial))
    assert driver.wait(QuotaReached) == [QuotaReached(study=STUDY, completed=10)]


def test_draining_answers_every_ask_at_once(tmp_path: Path, start: Start) -> None:
    """Parked, queued and later asks get their answer, also while the database is locked, and begin no trial."""
    file = tmp_path / "study.db"
    other = start(store_at(file, owner="driver2", run="run2"))
    for _ in range(10):
        other.ask()
    driver = start(store_at(file), parked_s=60)
    driver.recorder.submit(ASK)
    wait_until(lambda: driver.recorder.pending == 1 and driver.recorder.flush(0), "the ask is parked")
    driver.recorder.drain()
    driver.recorder.submit(ASK)
    driver.wait(QuotaReached, 2)
    assert driver.of(TrialAsked) == []


def test_a_dead_drivers_trials_are_taken_over(tmp_path: Path, start: Start) -> None:
    """Its lease stands still: the trial with a result becomes COMPLETE, the other is queued again, both noted."""
    file, folder = tmp_path / "study.db", tmp_path / "their run"
    gone = store_at(file, owner="driver2", run="run2", folder=folder)
    gone.open(spec(), ARCHITECTURES)
    done = gone.ask(ASK)
    gone.ask(ASK)
    assert isinstance(done, TrialAsked)
    result = folder / "attempts" / AttemptId(done.trial, 1).slug / "result.json"
    result.parent.mkdir(parents=True)
    result.write_text('{"type": "result", "result": {"value": 0.25, "epochs": 2, "stop_reason": "completed"}}')
    lost = folder / "attempts" / AttemptId(TrialId(STUDY, 1), 1).slug
    lost.mkdir()
    gone.close()
    store = store_at(file, lease_s=0.3)
    driver = start(
        store, renew_s=0.1, settle=lambda left: recovery.settle(left, recovery.Evidence(), RetryPolicy(max_retries=3))
    )
    wait_until(lambda: driver.noted().count("study.takeover") == 2, f"both are taken over: {driver.notes}", 30)
    assert states(file) == ["COMPLETE", "FAIL", "WAITING"]
    assert driver.ask() == TrialId(STUDY, 2)
    assert driver.of(TrialAsked)[0].attempt == 2


def take_over(store: StudyStore, file: Path, trial: TrialId) -> None:
    """What another driver does to a trial of this one once its lease has run out: it queues it again."""
    other = store_at(file, owner="driver2", run="run2", lease_s=0.0)
    other.open(spec(), ARCHITECTURES)
    retry = EnqueueRetry(trial=trial, attempt=2, resume_from=None, reason="lost")

    def taken() -> bool:
        left = next(left for left in other.expired() if left.trial == trial)
        try:
            return other.enqueue_retry(retry, left=left) is not None
        except NotOurs:  # its lease was renewed in this very moment
            return False

    wait_until(taken, "the trial is taken over")
    other.close()


@pytest.mark.parametrize("word", ["a report", "its result", "its retry", "nothing"])
def test_a_driver_that_was_away_learns_which_of_its_trials_were_taken(tmp_path: Path, start: Start, word: str) -> None:
    """Whatever it says first of such a trial, or nothing for a while: told once, the study's state stands, no other
    trial is touched."""
    file = tmp_path / "study.db"
    driver = start(store_at(file), renew_s=0.2 if word == "nothing" else 60.0)
    taken, kept = driver.ask(), driver.ask()
    take_over(driver.store, file, taken)
    told_in_vain = None
    if word == "a report":
        driver.recorder.submit(report(taken, 1))
    elif word == "its result":
        driver.recorder.submit(told(taken))
        told_in_vain = FinalState.COMPLETE
    elif word == "its retry":
        driver.recorder.submit(EnqueueRetry(trial=taken, attempt=2, resume_from=None, reason="interrupted"))
    if word == "its retry":  # both want the same, and it has been done
        assert driver.wait(TrialTold) == [TrialTold(trial=taken, state=FinalState.FAIL)]
    else:
        assert driver.wait(TrialTaken) == [TrialTaken(trial=taken, told=told_in_vain)]
    driver.recorder.submit(told(kept))
    driver.wait(TrialTold)
    assert driver.recorder.flush(10)
    assert states(file) == ["FAIL", "COMPLETE", "WAITING"]
    assert len(driver.of(TrialTaken)) == (word != "its retry")
    assert driver.of(AskFailed) == []


def test_a_trial_that_is_taken_while_it_is_sampled_is_asked_again(tmp_path: Path, start: Start) -> None:
    """The driver stood still in the middle of an ask: it gets another trial, and its study is not closed."""
    file = tmp_path / "study.db"
    stolen: list[int] = []

    def sample(trial: Any, context: Any, architectures: Any, fit: Any) -> dict[str, Any]:
        if not stolen:
            stolen.append(trial.number)
            take_over(store, file, TrialId(STUDY, trial.number))
        assert FUNCTIONS.sample is not None
        return dict(FUNCTIONS.sample(trial, context, architectures, fit))

    store = store_at(file, functions=Functions(sample=sample, micro_batch=FUNCTIONS.micro_batch))
    driver = start(store)
    trial = driver.ask()
    assert stolen == [0] and trial.number != 0
    assert driver.of(AskFailed) == []


def test_many_threads_may_submit(tmp_path: Path, start: Start) -> None:
    """Reports from several threads all arrive."""
    driver = start(store_at(tmp_path / "study.db", functions=FUNCTIONS, pruner="none"))
    trials = [driver.ask() for _ in range(4)]

    def submit(trial: TrialId) -> None:
        for step in range(100):
            driver.recorder.submit(report(trial, step))

    threads = [threading.Thread(target=submit, args=(trial,)) for trial in trials]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for trial in trials:
        driver.recorder.submit(TellTrial(trial=trial, state=FinalState.COMPLETE, value=1.0))
    driver.wait(TrialTold, 4)
    assert [row["steps"] for row in driver.store.rows(STUDY)] == [100] * 4
    assert os.path.exists(tmp_path / "study.db")

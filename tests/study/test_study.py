"""The study store on real databases: sampling, ownership, idempotence, races and deaths of real processes."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy

from scheduler.model import (
    AskTrial,
    AttemptId,
    Correction,
    EnqueueRetry,
    FinalState,
    HeadroomError,
    QuotaReached,
    ReshapeTrial,
    StudySpec,
    TellTrial,
    TrialAsked,
    TrialId,
    UsageError,
)
from scheduler.study.sampling import Fits, Sampling
from scheduler.study.store import Functions, NotOurs, StudyStore, StudyUnavailable, check
from tests.waiting import free_port, wait_until

PROJECT = Path(__file__).resolve().parents[2]
STUDY = "toy_2M_h1"


class Misfit(Exception):
    """What a sampler raises when no micro-batch fits."""

    def __init__(self, params: Mapping[str, Any], needed_bytes: int) -> None:
        super().__init__(f"{needed_bytes} bytes needed")
        self.params, self.needed_bytes = dict(params), needed_bytes


def sample(trial: Any, context: Mapping[str, Any], architectures: Any, fit: Any) -> dict[str, Any]:
    """A search space of one architecture index and one number; its footprint is d_model bytes per sample."""
    index = trial.suggest_int("architecture", 0, len(architectures) - 1)
    params = {**architectures[index], "rate": trial.suggest_float("rate", 1e-5, 1e-2, log=True), "epochs": 9}
    size = fit(params)
    if size is None:
        raise Misfit(params, params["d_model"])
    return {**params, "micro_batch": size}


def micro_batch(params: Any, context: Any, limit_bytes: int, **_: Any) -> int | None:
    """As many samples as fit."""
    return limit_bytes // params["d_model"] or None


def estimate(params: Any, context: Any) -> dict[str, Any]:
    """d_model bytes per sample."""
    return {"host_bytes": params["d_model"] * params["micro_batch"], "device_bytes": 0, "family": "toy"}


FUNCTIONS = Functions(sample=sample, micro_batch=micro_batch, estimate=estimate)
ARCHITECTURES = [{"d_model": d} for d in range(1, 21)]


def spec(quota: int = 10) -> StudySpec:
    """A study of toy trials."""
    return StudySpec(name=STUDY, quota=quota, slots=1, context={"max_epochs": 5, "seed": 0})


def store_at(url: str | Path, owner: str = "driver1", run: str = "run1", **settings: Any) -> StudyStore:
    """A store on a database file (or any URL)."""
    url = f"sqlite:///{url}" if isinstance(url, Path) else url
    return StudyStore(url, owner=owner, run=run, functions=settings.pop("functions", FUNCTIONS), **settings)


def ask(store: StudyStore, limit: int = 100) -> TrialAsked:
    """Ask, and insist on a trial."""
    asked = store.ask(AskTrial(study=STUDY, limit_bytes=limit))
    assert isinstance(asked, TrialAsked)
    return asked


def told(trial: TrialId, value: float | None = 1.0, state: FinalState = FinalState.COMPLETE, **more: Any) -> TellTrial:
    """A final state."""
    return TellTrial(trial=trial, state=state, value=value, **more)


def states(url: Path) -> list[str]:
    """The states of all trials as Optuna itself sees them."""
    study = optuna.load_study(study_name=STUDY, storage=f"sqlite:///{url}")
    return [trial.state.name for trial in study.trials]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where the study is kept."""
    return tmp_path / "study.db"


@pytest.fixture
def store(file: Path) -> Iterator[StudyStore]:
    """An open store."""
    store = store_at(file)
    store.open(spec(), ARCHITECTURES)
    yield store
    store.close()


@pytest.mark.parametrize("created_with", [{"recipe": "bf16_adam8bit"}, {}])
def test_a_study_of_another_recipe_is_refused(file: Path, created_with: dict[str, str]) -> None:
    """One per study for its whole life, whoever opens it: one line with both; a study from before there were any has
    fp32 AdamW's."""
    first = dataclasses.replace(spec(), context={**spec().context, **created_with})
    one = store_at(file)
    one.open(first, ARCHITECTURES)
    one.close()
    other = store_at(file, owner="driver2", run="run2")
    there = created_with.get("recipe", "fp32_adamw")
    with pytest.raises(UsageError, match=f"exists with recipe {there}, now it is adam8bit: give --recipe {there}"):
        other.open(dataclasses.replace(spec(), context={**spec().context, "recipe": "adam8bit"}), ARCHITECTURES)
    other.open(dataclasses.replace(spec(), context={**spec().context, "recipe": there}), ARCHITECTURES)
    other.close()


# -- check -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nonsense", "not a database URL"),
        ("sqlite://", "in memory"),
        ("sqlite:////etc/hostname/x/study.db", "there is no folder /etc/hostname/x: correct it, or mkdir -p"),
        (f"postgresql+psycopg2://u@127.0.0.1:{free_port()}/x", "needs a driver|cannot be reached"),
    ],
)
def test_check_refuses_in_one_line(url: str, says: str) -> None:
    """A storage that cannot work is refused with what was seen, in one line."""
    with pytest.raises(UsageError, match=says) as caught:
        check(url)
    assert "\n" not in str(caught.value)


def test_check_refuses_a_file_that_is_something_else(tmp_path: Path) -> None:
    """A text file, or a folder, at the database's place is named, not overwritten."""
    (tmp_path / "notes.txt").write_text("buy milk and some bread")
    with pytest.raises(UsageError, match="not an SQLite database"):
        check(f"sqlite:///{tmp_path}/notes.txt")
    with pytest.raises(UsageError, match="not a writable file"):
        check(f"sqlite:///{tmp_path}")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder in which not even root can create a file")
def test_check_tries_what_root_is_told_it_may_do() -> None:
    """A folder that looks writable, and takes no file, is told at once and not after a minute of tries."""
    with pytest.raises(UsageError, match=r"cannot be created at /proc/.*x\.db: no file in /proc"):
        check("sqlite:////proc/x.db")


def test_check_creates_nothing(tmp_path: Path) -> None:
    """A storage that would work is not created by asking."""
    check(f"sqlite:///{tmp_path}/study.db")
    assert list(tmp_path.iterdir()) == []


# -- asking ------------------------------------------------------------------------------------------------------------


def test_what_was_sampled_is_readable_in_optuna(store: StudyStore, file: Path) -> None:
    """Architecture, micro-batch, footprint and intermediate values are in the study, and it runs in WAL."""
    asked = ask(store)
    store.report(AttemptId(asked.trial, 1), {1: 0.5, 2: 0.25})
    store.tell(told(asked.trial, 0.25, attrs={"stop_reason": "completed", "duration_s": 1.5}))
    trial = optuna.load_study(study_name=STUDY, storage=f"sqlite:///{file}").trials[0]
    assert trial.state.name == "COMPLETE" and trial.value == 0.25
    assert trial.intermediate_values == {1: 0.5, 2: 0.25}
    assert trial.user_attrs["d_model"] == asked.params["d_model"]
    assert trial.user_attrs["micro_batch"] == asked.params["micro_batch"]
    assert trial.user_attrs["footprint.predicted_bytes"] == asked.footprint.host_bytes
    assert trial.user_attrs["stop_reason"] == "completed"
    assert asked.max_epochs == 5
    with sqlite3.connect(file) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_only_architectures_that_fit_are_proposed(store: StudyStore, file: Path) -> None:
    """Twenty architectures of which three fit: nothing else is ever proposed, also when less fits than before."""
    for limit in (20, 3, 3, 3, 3, 2, 2, 2, 1, 1):
        asked = ask(store, limit)
        assert asked.params["d_model"] <= limit
        store.tell(told(asked.trial))
    assert store.ask(AskTrial(study=STUDY, limit_bytes=3)) == QuotaReached(study=STUDY, completed=10)
    assert states(file) == ["COMPLETE"] * 10


def sample_without_a_list(trial: Any, context: Mapping[str, Any], architectures: Any, fit: Any) -> dict[str, Any]:
    """A user's sampler that chooses the architecture itself."""
    params = {"d_model": trial.suggest_int("d_model", 1, 20)}
    size = fit(params)
    if size is None:
        raise Misfit(params, params["d_model"])
    return {**params, "micro_batch": size}


def test_what_does_not_fit_is_pruned_with_a_constraint_and_does_not_count(file: Path) -> None:
    """Of what a user's own sampler proposes some does not fit: told so, outside the quota, and asked again."""
    functions = Functions(sample=sample_without_a_list, micro_batch=micro_batch, estimate=estimate)
    store = store_at(file, functions=functions)
    store.open(spec())
    for _ in range(10):
        asked = ask(store, limit=10)
        assert asked.params["d_model"] <= 10
        store.tell(told(asked.trial))
    assert store.ask(AskTrial(study=STUDY, limit_bytes=10)) == QuotaReached(study=STUDY, completed=10)
    trials = optuna.load_study(study_name=STUDY, storage=f"sqlite:///{file}").trials
    misfits = [t for t in trials if t.user_attrs.get("stop_reason") == "does_not_fit"]
    assert misfits and len(trials) == 10 + len(misfits)
    assert all(t.state.name == "PRUNED" and max(t.constraints.values()) > 0 for t in misfits)


def test_when_nothing_fits_the_ask_fails_and_leaves_nothing_running(store: StudyStore, file: Path) -> None:
    """No architecture fits: an error that says so, and no trial stays RUNNING."""
    with pytest.raises(HeadroomError, match="none of the 20 architectures"):
        store.ask(AskTrial(study=STUDY, limit_bytes=0))
    assert states(file) == ["PRUNED"]


def test_a_sampler_that_raises_fails_its_trial_outside_the_quota(file: Path) -> None:
    """The user's sampler raises: the trial is FAIL, is not counted, and the error comes through."""

    def broken(*_: Any) -> dict[str, Any]:
        raise KeyError("learning_rate")

    store = store_at(file, functions=Functions(sample=broken))
    store.open(spec(), ARCHITECTURES)
    with pytest.raises(KeyError):
        ask(store)
    assert states(file) == ["FAIL"]
    assert store.open(spec(), ARCHITECTURES).counted == 0


def test_an_ask_repeated_after_an_outage_goes_on_with_the_same_trial(file: Path) -> None:
    """The storage fails while sampling: the next ask continues that trial instead of leaving it RUNNING."""
    outages = [StudyUnavailable("database is locked")]

    def interrupted(trial: Any, *rest: Any) -> dict[str, Any]:
        trial.suggest_float("rate", 1e-5, 1e-2, log=True)
        if outages:
            raise outages.pop()
        return sample(trial, *rest)

    store = store_at(file, functions=Functions(sample=interrupted, micro_batch=micro_batch, estimate=estimate))
    store.open(spec(), ARCHITECTURES)
    with pytest.raises(StudyUnavailable):
        ask(store)
    assert ask(store).trial.number == 0
    assert ask(store).trial.number == 1


def test_a_restart_does_not_change_what_is_proposed(tmp_path: Path) -> None:
    """Same seed and study: a run restarted after each trial proposes the same parameters, and none of them twice."""

    def proposals(file: Path, restart: bool) -> list[float]:
        store, rates = store_at(file, seed=7), []
        store.open(spec(), ARCHITECTURES)
        for n in range(4):
            if restart:
                store.close()
                store = store_at(file, seed=7, owner=f"driver{n}")
                store.open(spec(), ARCHITECTURES)
            asked = ask(store)
            rates.append(asked.params["rate"])
            store.tell(told(asked.trial, asked.params["rate"]))
        return rates

    once = proposals(tmp_path / "a.db", restart=False)
    assert proposals(tmp_path / "b.db", restart=True) == once
    assert len(set(once)) == 4


def test_the_list_of_architectures_stays_as_created(file: Path, store: StudyStore) -> None:
    """An index means the same architecture for ever: another list later is ignored, with a note."""
    opened = store_at(file, owner="driver2").open(spec(), ARCHITECTURES[:3])
    assert opened.architectures == ARCHITECTURES
    assert "keeps the 20 architectures" in opened.notes[0]


# -- final states ------------------------------------------------------------------------------------------------------


def test_telling_twice_keeps_the_first_state(store: StudyStore, file: Path) -> None:
    """The recorder may repeat a tell: the state that stands is returned and nothing changes."""
    asked = ask(store)
    assert store.tell(told(asked.trial, 0.5)) is FinalState.COMPLETE
    assert store.tell(told(asked.trial, None, FinalState.PRUNED)) is FinalState.COMPLETE
    assert store.best(STUDY) is not None and store.rows(STUDY)[0]["value"] == 0.5


def test_a_result_that_is_no_number_is_a_failure(store: StudyStore) -> None:
    """COMPLETE with NaN would be refused by Optuna: it is told FAIL with the reason."""
    asked = ask(store)
    assert store.tell(told(asked.trial, float("nan"))) is FinalState.FAIL
    assert store.rows(STUDY)[0]["stop_reason"] == "no_value"
    assert store.best(STUDY) is None


def test_a_pruned_trial_gets_its_last_intermediate_value(store: StudyStore) -> None:
    """As Optuna's own tell does, so that the sampler learns from it."""
    asked = ask(store)
    store.report(AttemptId(asked.trial, 1), {1: 0.9, 2: 0.8})
    store.tell(told(asked.trial, None, FinalState.PRUNED))
    assert store.rows(STUDY)[0]["value"] == 0.8


def test_a_trial_of_another_run_is_not_touched(store: StudyStore, file: Path) -> None:
    """Tell, report and retry of a trial that this run did not ask change nothing."""
    asked = ask(store)
    other = store_at(file, owner="driver2", run="run2")
    other.open(spec(), ARCHITECTURES)
    with pytest.raises(NotOurs):
        other.tell(told(asked.trial))
    with pytest.raises(NotOurs):
        other.enqueue_retry(EnqueueRetry(trial=asked.trial, attempt=2, resume_from=None, reason="lost"))
    with pytest.raises(NotOurs):
        other.report(AttemptId(asked.trial, 1), {1: 0.5})
    assert states(file) == ["RUNNING"]


def test_the_median_pruner_advises_and_none_does_not(tmp_path: Path) -> None:
    """A trial far above five finished ones is to be stopped, unless the pruner is `none`."""
    for pruner, advised in (("median", True), ("none", False)):
        store = store_at(tmp_path / f"{pruner}.db", pruner=pruner)
        store.open(spec(), ARCHITECTURES)
        for _ in range(6):
            asked = ask(store)
            store.report(AttemptId(asked.trial, 1), dict.fromkeys(range(1, 10), 0.1))
            store.tell(told(asked.trial, 0.1))
        last = AttemptId(ask(store).trial, 1)
        assert any(store.report(last, {step: 9.0}) for step in range(1, 10)) is advised, pruner
        store.close()


# -- retries -----------------------------------------------------------------------------------------------------------


def test_a_retry_is_enqueued_once_with_its_parameters_and_checkpoint(store: StudyStore, file: Path) -> None:
    """Enqueued twice it is queued once; it carries fixed parameters, its curve, its attempt and its checkpoint."""
    asked = ask(store)
    store.report(AttemptId(asked.trial, 1), {1: 0.9, 2: 0.8})
    retry = EnqueueRetry(
        trial=asked.trial, attempt=2, resume_from="/ckpt.pt", reason="lost", retries=1, attrs={"epochs": 2}
    )
    assert store.enqueue_retry(retry) == store.enqueue_retry(retry) == 1
    waiting = optuna.load_study(study_name=STUDY, storage=f"sqlite:///{file}").trials[1]
    assert states(file) == ["FAIL", "WAITING"]
    assert waiting.system_attrs["fixed_params"]["rate"] == asked.params["rate"]
    assert store.open(spec(), ARCHITECTURES).counted == 0
    again = ask(store, limit=1000)
    assert (again.trial.number, again.attempt, again.resume_from, again.retries) == (1, 2, "/ckpt.pt", 1)
    assert again.params == asked.params, "also the micro-batch, though a larger one would fit now"
    store.tell(told(again.trial))
    assert states(file) == ["FAIL", "COMPLETE"] and store.rows(STUDY)[1]["steps"] == 2


def test_interruptions_by_the_user_are_not_lost_attempts(store: StudyStore) -> None:
    """Quitting in the evening, every evening, does not use up a trial's retries."""
    for attempt in range(2, 7):
        trial = ask(store).trial
        store.enqueue_retry(EnqueueRetry(trial=trial, attempt=attempt, resume_from=None, reason="interrupted"))
    assert ask(store).retries == 0


def die_in_commit(file: str, fail_at: str) -> None:
    """(In a child.) SIGKILL itself in the middle of the transaction that retries, just before or after its commit."""
    store = store_at(Path(file))
    store.open(spec(), ARCHITECTURES)
    asked = ask(store)
    engine = store._connect().storage.engine

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if fail_at == "before":
        sqlalchemy.event.listen(engine, "commit", die)
    else:
        sqlalchemy.event.listen(engine, "checkin", die)
    store._connect().requeue(store._open[STUDY].id, asked.trial.number, "run1", attrs={}, successor_attrs={})


@pytest.mark.parametrize("fail_at", ["before", "after"])
def test_death_between_enqueue_and_tell_leaves_both_or_neither(file: Path, fail_at: str) -> None:
    """A driver killed inside the retry: the next one finds the old trial and no copy, or the copy and no old trial."""
    child = _python(f"from tests.study.test_study import die_in_commit; die_in_commit({str(file)!r}, {fail_at!r})")
    assert child.wait(60) == -signal.SIGKILL
    assert states(file) == (["RUNNING"] if fail_at == "before" else ["FAIL", "WAITING"])
    store = store_at(file, owner="driver2")
    for left in store.open(spec(), ARCHITECTURES).left:
        store.enqueue_retry(EnqueueRetry(trial=left.trial, attempt=2, resume_from=None, reason="lost"))
    assert states(file) == ["FAIL", "WAITING"]
    assert ask(store).trial.number == 1


def _python(code: str, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT, **options)


# -- several drivers ---------------------------------------------------------------------------------------------------


def race(url: str, run: str, quota: int) -> None:
    """(In a child.) Run trials until the quota is reached, repeating what an outage interrupted."""
    store = store_at(url, owner=run, run=run)
    while True:
        try:
            store.open(spec(quota), ARCHITECTURES)
            break
        except StudyUnavailable:
            continue
    _meet("open")  # until all have opened it: one that starts a second earlier would run the whole quota alone
    asked: Any = None
    first = True
    while not isinstance(asked, QuotaReached):
        try:
            asked = store.ask(AskTrial(study=STUDY, limit_bytes=100))
            if first:  # none goes on before each has one: on a busy machine one may run them all before the other wakes
                _meet("asked")
                first = False
            if isinstance(asked, TrialAsked):
                store.report(AttemptId(asked.trial, 1), {1: 0.5})
                store.tell(told(asked.trial, attrs={"by": run, "ran": asked.trial.number}))
        except StudyUnavailable:
            continue


def _meet(word: str) -> None:
    """(In a child.) Say that this point is reached, and wait until every driver has reached it."""
    print(word, flush=True)
    sys.stdin.readline()


def _race(url: str, drivers: int = 2, quota: int = 20) -> None:
    code = "from tests.study.test_study import race; race({!r}, {!r}, {})"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    children = [_python(code.format(url, f"run{n}", quota), **pipes) for n in range(drivers)]
    for word in (b"open\n", b"asked\n"):
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == word
        for child in children:
            assert child.stdin is not None
            child.stdin.write(b"go\n")
            child.stdin.flush()
    assert [child.wait(100) for child in children] == [0] * drivers
    for child in children:
        child.communicate()
    store = store_at(url, owner="reader", run="reader")
    store.open(spec(quota), ARCHITECTURES)
    rows = store.rows(STUDY)
    store.close()
    assert [row["state"] for row in rows] == ["COMPLETE"] * quota, "the quota, not one more, and none RUNNING"
    assert [row["ran"] for row in rows] == list(range(quota)), "each trial was run by the driver it was given to"
    assert {row["by"] for row in rows} == {f"run{n}" for n in range(drivers)}


def test_two_drivers_on_one_study_reach_its_quota_together(file: Path) -> None:
    """Two processes race on one SQLite file: exactly the quota is run, each trial by one of them."""
    _race(f"sqlite:///{file}")


def test_two_drivers_on_postgresql() -> None:
    """The same on a real PostgreSQL server, which has row locks where SQLite locks the file."""
    pytest.importorskip("psycopg", reason="no PostgreSQL driver installed")
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not binaries:
        pytest.skip("no PostgreSQL server installed")
    with tempfile.TemporaryDirectory(prefix="pg") as folder:
        as_user = []
        if os.getuid() == 0:  # the server refuses to run as root
            os.chmod(folder, 0o777)
            as_user = ["runuser", "-u", "nobody", "--"]
        data, port, where = f"{folder}/data", free_port(), binaries[-1].parent
        subprocess.run([*as_user, where / "initdb", "-A", "trust", "-U", "me", "-D", data], check=True, stdout=-3)
        server = subprocess.Popen([*as_user, where / "postgres", "-D", data, "-p", str(port), "-h", "127.0.0.1",
                                   "-k", folder], stderr=subprocess.DEVNULL)  # fmt: skip
        url = f"postgresql+psycopg://me@127.0.0.1:{port}/postgres"
        try:
            wait_until(lambda: _reachable(url), "PostgreSQL accepts connections", 30)
            _race(url)
        finally:
            server.terminate()
            server.wait(30)
        with pytest.raises(UsageError, match="cannot be reached"):
            check(url)


def _reachable(url: str) -> bool:
    try:
        check(url)
    except UsageError:
        return False
    return True


class Clock:
    """A clock that is moved by hand."""

    now = 0.0

    def __call__(self) -> float:
        """Seconds."""
        return self.now


def test_a_trial_is_taken_over_only_after_its_lease_stood_still(file: Path, store: StudyStore) -> None:
    """A lease that is renewed is alive, whatever its timestamp; one that stands still for lease_s is not."""
    asked, clock = ask(store), Clock()
    other = store_at(file, owner="driver2", run="run2", lease_s=300, clock=clock)
    assert other.open(spec(), ARCHITECTURES).running_elsewhere == 1
    assert other.expired() == []
    clock.now = 299.0
    store.renew()
    assert other.expired() == []
    clock.now = 500.0
    assert other.expired() == []
    clock.now = 600.0
    (left,) = other.expired()
    retry = EnqueueRetry(trial=asked.trial, attempt=2, resume_from=None, reason="lost")
    store.renew()
    with pytest.raises(NotOurs):
        other.enqueue_retry(retry, left=left)  # it came back in the last moment
    assert states(file) == ["RUNNING"]
    other.expired()
    clock.now = 1000.0
    (left,) = other.expired()
    assert other.enqueue_retry(retry, left=left) == 1
    with pytest.raises(NotOurs):  # the driver that was cut off learns of it
        store.report(AttemptId(asked.trial, 1), {1: 0.5})
    with pytest.raises(NotOurs):  # and its late result does not stand
        store.tell(told(asked.trial))
    assert ask(other).attempt == 2


def test_a_driver_known_dead_is_waited_for_less(file: Path) -> None:
    """On the same host and boot a missing process is certain; its own restart still gets a minute."""
    child = _python(
        f"from tests.study.test_study import *\n"
        f"s = store_at(Path({str(file)!r})); s.open(spec(), ARCHITECTURES); ask(s)"
    )
    assert child.wait(60) == 0
    clock = Clock()
    other = store_at(file, owner="driver2", run="run2", lease_s=300, clock=clock)
    other.open(spec(), ARCHITECTURES)
    assert other.expired() == []
    clock.now = 61.0
    assert [left.trial.number for left in other.expired()] == [0]


def test_a_trial_that_another_program_left_running_is_not_waited_for(store: StudyStore, file: Path) -> None:
    """A RUNNING trial without an owner is left alone, and the quota is reached without it."""
    optuna.load_study(study_name=STUDY, storage=f"sqlite:///{file}").ask()
    for _ in range(10):
        store.tell(told(ask(store).trial))
    assert store.ask(AskTrial(study=STUDY, limit_bytes=100)) == QuotaReached(study=STUDY, completed=10)
    assert states(file).count("RUNNING") == 1


def test_a_restart_finds_what_was_left_and_what_was_learnt(store: StudyStore, file: Path) -> None:
    """The next driver of the run gets its RUNNING trials, the count and the observed peaks."""
    done, killed, left = (ask(store).trial for _ in range(3))
    store.tell(told(done, attrs={"footprint.observed_peak_bytes": 123}))
    memory = {"footprint.observed_peak_bytes": 456, "watchdog.reason": "overshoot"}
    store.tell(told(killed, None, FinalState.PRUNED, attrs=memory, constraint=1.0))
    opened = store_at(file, owner="driver2").open(spec(), ARCHITECTURES)
    assert opened.counted == 2
    assert [found.trial for found in opened.left] == [left]
    assert [(o.observed_bytes, o.at_least, o.family) for o in opened.observations] == [
        (123, False, "toy"),
        (456, True, "toy"),
    ]


def test_peaks_that_nobody_predicted_are_known_after_a_restart(file: Path) -> None:
    """Without an estimator a finished trial still says what its study takes: the next driver need not measure again."""
    unsized = store_at(file, functions=Functions(sample=lambda trial, *_: {"rate": trial.suggest_float("rate", 0, 1)}))
    unsized.open(spec(), ARCHITECTURES)
    done = ask(unsized).trial
    unsized.tell(told(done, attrs={"footprint.observed_peak_bytes": 123}))
    (known,) = store_at(file, owner="driver2").open(spec(), ARCHITECTURES).observations
    assert (known.observed_bytes, known.predicted_bytes) == (123, 0)


# -- where a trial will run --------------------------------------------------------------------------------------------


def runtime_estimate(params: Any, context: Any) -> dict[str, Any]:
    """The ready process, and d_model bytes per sample."""
    runtime_bytes = context.get("runtime_bytes", 1000)
    above = params["d_model"] * params["micro_batch"]
    return {"host_bytes": runtime_bytes + above, "runtime_bytes": runtime_bytes, "family": "toy"}


def runtime_micro_batch(params: Any, context: Any, limit_bytes: int, **_: Any) -> int | None:
    """As many samples as fit beside the ready process."""
    return (limit_bytes - context.get("runtime_bytes", 1000)) // params["d_model"] or None


@pytest.mark.parametrize("correction", [Correction(), Correction(lines=((40.0, 2.0),), samples=3)])
def test_sized_for_the_runtime_and_the_correction_of_where_it_runs(file: Path, correction: Correction) -> None:
    """Estimator and micro-batch see what the workers' processes hold; what comes out, corrected, just fits."""
    functions = Functions(sample=sample, micro_batch=runtime_micro_batch, estimate=runtime_estimate)
    with contextlib.closing(store_at(file, functions=functions)) as store:
        store.open(spec(), ARCHITECTURES)
        correction = dataclasses.replace(correction, runtime_bytes=5000)
        command = AskTrial(study=STUDY, limit_bytes=5400, correction=correction, environments=("torch-1/glibc",))
        asked = store.ask(command)
        assert isinstance(asked, TrialAsked)
    above = asked.params["d_model"] * asked.params["micro_batch"]
    assert asked.footprint.prior_bytes == 5000 + above and asked.footprint.runtime_bytes == 5000
    (offset, slope) = correction.lines[0]
    assert asked.footprint.host_bytes == 5000 + offset + slope * above
    assert 5400 - slope * asked.params["d_model"] < asked.footprint.host_bytes <= 5400


def test_an_observation_knows_where_it_was_made(store: StudyStore, file: Path) -> None:
    """Environment and runtime of the process itself stand beside the peak, and a restart reads them with it."""
    first, old = ask(store).trial, ask(store).trial
    attrs = {"footprint.observed_peak_bytes": 123, "footprint.prior_bytes": 1100, "footprint.prior_runtime_bytes": 1000}
    here = {"footprint.environment": "torch-1/glibc", "footprint.runtime_bytes": 60}
    store.tell(told(first, attrs=attrs | here))
    store.tell(told(old, attrs={"footprint.observed_peak_bytes": 456, "footprint.prior_bytes": 400}))
    seen, before = store_at(file, owner="driver2").open(spec(), ARCHITECTURES).observations
    assert (seen.predicted_bytes, seen.observed_bytes, seen.runtime_bytes) == (160, 123, 60)
    assert seen.environment == "torch-1/glibc"
    assert (before.predicted_bytes, before.observed_bytes, before.runtime_bytes) == (400, 456, 0)
    assert before.environment == ""  # written by a release that did not know it


# -- forms of a trial --------------------------------------------------------------------------------------------------


def cut_sample(trial: Any, context: Any, architectures: Any, fit: Any) -> dict[str, Any]:
    """A toy trial whose effective batch is 64, however it is cut."""
    params = sample(trial, context, architectures, lambda params: min(64, fit(params)))
    return {**params, "accumulation_steps": 64 // params["micro_batch"], "effective_batch": 64}


def test_half_and_a_quarter_of_the_micro_batch_are_forms_of_the_same_trial(file: Path) -> None:
    """Everything but the cut is equal, each needs less, nothing more is written to the study for them."""
    functions = Functions(sample=cut_sample, micro_batch=micro_batch, estimate=estimate)
    with contextlib.closing(store_at(file, functions=functions)) as store:
        store.open(spec(), [{"d_model": 2}])
        asked = ask(store, limit=1000)
        batches = [form.params["micro_batch"] for form in asked.smaller]
        assert (asked.params["micro_batch"], batches) == (64, [32, 16])
        assert [form.footprint.host_bytes for form in asked.smaller] == [64, 32]
        for form in asked.smaller:
            assert form.params["micro_batch"] * form.params["accumulation_steps"] == 64
            cut = ("micro_batch", "accumulation_steps")
            assert {k: v for k, v in form.params.items() if k not in cut} == {
                k: v for k, v in asked.params.items() if k not in cut
            }
        store.reshape(ReshapeTrial(trial=asked.trial, form=asked.smaller[1]))
        store.enqueue_retry(EnqueueRetry(trial=asked.trial, attempt=2, resume_from="/there", reason="lost"))
        again = ask(store, limit=1000)
        assert again.resume_from == "/there"
        assert (again.params["micro_batch"], again.smaller) == (16, ())  # as it began, and nothing else


def test_a_sampler_that_does_not_say_what_stays_equal_is_asked_for_one_form_only(store: StudyStore) -> None:
    """Where the micro-batch is the batch, half of it is another training."""
    assert ask(store).smaller == ()


def test_what_is_known_to_fit_is_not_asked_again(file: Path) -> None:
    """Eighty trials into falling and rising limits: as many architectures fit as the function says, seldom asked."""
    asked: list[int] = []

    def counted(params: Any, context: Any, limit_bytes: int, **_: Any) -> int | None:
        asked.append(limit_bytes)
        return micro_batch(params, context, limit_bytes)

    fits, functions = Fits(), Functions(sample=sample, micro_batch=counted, estimate=None)
    for limit in [*range(20, 0, -1), *range(1, 21)] * 2:
        command = AskTrial(study=STUDY, limit_bytes=limit)
        found = Sampling.of(functions, {}, command, fits).fitting(ARCHITECTURES)
        assert [each["d_model"] for each in found] == list(range(1, limit + 1))
    assert len(asked) < 20 * 12


def test_a_trial_takes_few_statements_of_the_database(file: Path) -> None:
    """For asking, a report and the end, however long the study: each costs some tenth of a millisecond."""
    store = store_at(file)
    store.open(spec(quota=40), ARCHITECTURES)
    counted, costs = [0], []

    def count(*_: Any) -> None:
        counted[0] += 1

    sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", count)
    try:
        for number in range(30):
            before = counted[0]
            trial = ask(store).trial
            store.report(AttemptId(trial, 1), {1: 0.5})
            attrs = {f"attribute {n}": n for n in range(20)}
            store.tell(told(trial, 1 / (number + 1), attrs=attrs))
            costs.append(counted[0] - before)
    finally:
        sqlalchemy.event.remove(sqlalchemy.Engine, "before_cursor_execute", count)
    assert max(costs[15:]) <= 45, costs  # through Optuna's ORM it was 120
    store.close()


def test_a_report_is_judged_as_the_pruner_judges_the_study(file: Path) -> None:
    """Each answer is that of the same pruner on the study as plain Optuna reads it."""
    store = store_at(file, pruner="median")
    store.open(spec(quota=20), ARCHITECTURES)
    plain = optuna.load_study(study_name=STUDY, storage=f"sqlite:///{file}")
    pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=3)
    said = []
    for number in range(9):
        trial = ask(store).trial
        for step in range(1, 7):
            stop = store.report(AttemptId(trial, 1), {step: (number * 7 % 5) / step})
            assert stop == pruner.prune(plain, plain.get_trials()[trial.number])
            said.append(stop)
        store.tell(told(trial, float(number)))
    assert any(said) and not all(said)
    store.close()

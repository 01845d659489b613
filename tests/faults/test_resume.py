"""Faults of a whole run, end to end through the real command: who dies, what is left, and that the next start goes on.

The trials are those of `tiny` (epochs of 50 ms); the processes, pipes, locks, databases and signals are real.
"""

from __future__ import annotations

import collections
import contextlib
import os
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.faults.crash import quota_problems, replay_problems, result_problems
from tests.faults.sandbox import REPO, TINY, Sandbox
from tests.waiting import until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

SMALL: dict[str, Any] = {"budgets": ["2M"], "horizons": [1, 3], "trials": 2, "max_epochs": 60}
START_S = 60.0  # a loaded machine takes long to import Dask and Optuna
DRAIN_S = 60.0  # how long is waited, not how long it may take: the machine may be loaded
GONE_S = 30.0


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Sandbox]:
    """A sandbox with two small studies."""
    with Sandbox(tmp_path / "run", **SMALL) as sandbox:
        yield sandbox


def training(box: Sandbox, epochs: int = 4) -> None:
    """Wait until trials have trained so many epochs more than now, and two of them have a checkpoint."""
    before = box.done()

    def trained() -> bool:
        attempts = {line["attempt"] for line in box.epochs() if line["what"] == "done"}
        return box.done() >= before + epochs and len(attempts) >= 2

    until(trained, START_S, lambda: f"{epochs} epochs; {tail(box)}")


def tail(box: Sandbox) -> str:
    """What the driver said last."""
    return box.log.read_text(errors="replace")[-3000:] if box.log.exists() else ""


def ends(driver: subprocess.Popen[Any], box: Sandbox, timeout_s: float) -> int:
    """The driver's exit code."""
    until(lambda: driver.poll() is not None, timeout_s, lambda: f"the end of the driver; it said {tail(box)}")
    return int(driver.returncode)


def nothing_left(box: Sandbox, timeout_s: float = GONE_S) -> None:
    """No process of the run lives after so long."""
    until(lambda: not box.processes(), timeout_s, lambda: f"all processes gone: {box.processes()}")


def goes_on(box: Sandbox, *arguments: str, kills: int = 0) -> None:
    """Start again, quicker; the run reaches its quotas with nothing done twice."""
    driver = box.start(*arguments, environment={"CRASH_EPOCH_S": "0.005"})
    assert ends(driver, box, 120) == 0, tail(box)
    keeps_its_promises(box, kills=kills)


def keeps_its_promises(box: Sandbox, kills: int = 0) -> None:
    """Quotas, replay, results, epochs."""
    studies = len(box.settings["budgets"]) * len(box.settings["horizons"])
    trials = box.trials()
    problems = [
        *quota_problems(trials, box.settings["trials"], studies),
        *replay_problems(trials, box.folder),
        *result_problems(box.folder),
    ]
    assert not problems, "\n".join(problems)
    needed = studies * box.settings["trials"] * box.settings["max_epochs"]
    assert needed <= box.done() <= needed + kills


# -- a second driver ---------------------------------------------------------------------------------------------------


def test_a_second_driver_on_a_run_folder_is_refused_with_the_pid_of_the_first(box: Sandbox) -> None:
    """It exits with 2 and one line that names the pid; the first goes on unharmed."""
    first = box.start()
    until(lambda: box.events("batch.started"), START_S, "the start of the first")
    second = subprocess.run(
        box.command(), cwd=REPO, env=box.environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert second.returncode == 2
    assert f"pid {first.pid}" in second.stderr and len(second.stderr.strip().splitlines()) == 1, second.stderr
    assert ends(first, box, 120) == 0, tail(box)
    keeps_its_promises(box)
    nothing_left(box)


# -- a clean stop ------------------------------------------------------------------------------------------------------


def left_resumable(box: Sandbox) -> None:
    """After a stop nothing is RUNNING, what was under way waits with its checkpoint, and the user is told."""
    trials = box.trials()
    assert {t["state"] for t in trials} <= {"COMPLETE", "WAITING", "FAIL"}, trials
    waiting = [t for t in trials if t["state"] == "WAITING"]
    assert any("resume_from" in t["attrs"] for t in waiting), waiting
    assert all("retried" in t["attrs"] for t in trials if t["state"] == "FAIL")


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGHUP", "STOP"])
def test_a_stop_drains_and_the_next_start_goes_on(box: Sandbox, how: str) -> None:
    """Without a terminal: trials checkpoint and leave within seconds, a summary says what remains, 130, no loss."""
    driver = box.start()
    training(box)
    if how == "STOP":
        (box.folder / "STOP").touch()
    else:
        driver.send_signal(signal.Signals[how])
    assert ends(driver, box, DRAIN_S) == 130, tail(box)
    nothing_left(box)
    left_resumable(box)
    said = tail(box)
    assert "trials remain" in said and "bin/schedule --config" in said, said
    assert "\x1b[" not in said  # no terminal: plain lines
    goes_on(box)


class Window:
    """A tmux window in which the command runs, on a server of its own."""

    def __init__(self, box: Sandbox) -> None:
        marks = {k: v for k, v in box.environment.items() if k.startswith(("HEAD", "CRASH"))}
        exported = " ".join(f"{key}={shlex.quote(value)}" for key, value in marks.items())
        script = box.root / "in_tmux.sh"
        command = f"cd {REPO}; {exported} {shlex.join(box.command())}; echo ended with $?; stty -a | tr ';' '\\n'"
        # As in a shell that a person uses: Ctrl-C ends the command, not the shell.
        script.write_text(f"trap : INT\n{command}\nexec sleep 60\n")
        self.tmux = ["tmux", "-L", f"headroom-{os.getpid()}", "-f", "/dev/null"]
        environment = {**os.environ, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}
        self.do("new-session", "-d", "-x", "140", "-y", "60", f"sh {script}", environment=environment)

    def do(self, *words: str, environment: Mapping[str, str] | None = None) -> str:
        """A command to the server; returns what it prints."""
        return subprocess.run([*self.tmux, *words], capture_output=True, text=True, env=environment, check=False).stdout

    def screen(self) -> str:
        """What stands in the window and above it."""
        return self.do("capture-pane", "-p", "-S", "-200")


@pytest.fixture
def window(box: Sandbox) -> Iterator[Window]:
    """The command in a window; the server is ended."""
    window = Window(box)
    yield window
    window.do("kill-server")


@pytest.mark.parametrize("key", ["q", "C-c"])
def test_a_key_drains_in_tmux(box: Sandbox, window: Window, key: str) -> None:
    """q and Ctrl-C (which the terminal sends to every process of the run) drain; the terminal is usable afterwards."""
    training(box)
    until(lambda: "q: stop" in window.screen(), 30, lambda: f"the tables: {window.screen()}")
    window.do("send-keys", key)
    until(lambda: "ended with" in window.screen(), DRAIN_S, lambda: f"the end: {window.screen()}")
    said = window.screen()
    assert "ended with 130" in said, said
    assert "trials remain" in said and "Traceback" not in said, said
    until(
        lambda: " icanon" in window.screen() and " echo" in window.screen(), 5, lambda: f"as it was: {window.screen()}"
    )
    nothing_left(box)
    left_resumable(box)
    reasons = {r["reason"] for r in box.events("attempt.ended")}
    assert reasons == {"interrupted"}, reasons  # not lost: the worker outlived the key
    goes_on(box)


def test_a_closed_terminal_drains(box: Sandbox, window: Window) -> None:
    """The window is closed: what runs is put back with its checkpoint, nothing stays behind."""
    training(box)
    window.do("kill-session")
    nothing_left(box, DRAIN_S + GONE_S)
    left_resumable(box)
    assert box.events("batch.ended"), box.journal()[-3:]
    goes_on(box, kills=1)


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    """Trials that hear no request are ended by the second SIGTERM, not by the drain's limit; the run is resumable."""
    settings = {**SMALL, "drain_timeout_s": 600, "training": {"objective": f"{TINY}:ignores_stop"}}
    with Sandbox(tmp_path / "run", **settings) as box:
        driver = box.start()
        training(box)
        driver.send_signal(signal.SIGTERM)
        until(lambda: box.events("batch.quit"), 30, "the first signal heard")
        assert driver.poll() is None
        driver.send_signal(signal.SIGTERM)
        assert ends(driver, box, DRAIN_S) == 130, tail(box)
        nothing_left(box)
        left_resumable(box)
        goes_on(box, kills=2)  # each of the two may have been between an epoch and its checkpoint


def test_a_signal_before_the_first_trial_stops_the_start(box: Sandbox) -> None:
    """A SIGTERM while the driver still starts up is heard; the run can be started again."""
    driver = box.start()
    until(lambda: box.events("batch.started"), START_S, "the start")
    driver.send_signal(signal.SIGTERM)
    assert ends(driver, box, DRAIN_S) == 130, tail(box)
    nothing_left(box)
    goes_on(box)


def test_a_signal_after_the_end_does_not_replace_the_exit_code(tmp_path: Path) -> None:
    """SIGTERMs while the command, its results printed, takes itself apart: it ends with its own code all the same."""
    with Sandbox(tmp_path / "run", **{**SMALL, "max_epochs": 1, "trials": 1}) as box:
        driver = box.start()
        until(lambda: "results in" in tail(box), START_S, lambda: f"the results: {tail(box)}", every_s=0.002)
        while driver.poll() is None:
            driver.send_signal(signal.SIGTERM)
            time.sleep(0.001)
        assert driver.returncode == 0, tail(box)


# -- what dies ---------------------------------------------------------------------------------------------------------


def test_a_lost_worker_costs_nothing(box: Sandbox) -> None:
    """Its trials go on in their agent, which the worker that the nanny starts carries for."""
    driver = box.start()
    training(box)
    assert box.of_role("worker")[0].kill()
    assert ends(driver, box, 120) == 0, tail(box)
    assert {r["reason"] for r in box.events("attempt.ended")} == {"completed"}
    assert len(box.events("worker.joined")) == 2  # the same agent, twice
    keeps_its_promises(box)
    nothing_left(box)


def test_a_lost_agent_costs_no_epoch(box: Sandbox) -> None:
    """Its trials die with it and are run again from their checkpoints in the agent that the worker starts anew."""
    driver = box.start()
    training(box)
    assert box.of_role("agent")[0].kill()
    assert ends(driver, box, 120) == 0, tail(box)
    lost = [r for r in box.events("attempt.ended") if r["reason"] == "lost"]
    assert lost and all(r["checkpoint"] for r in lost)
    again = [r for r in box.events("attempt.launched") if r["attempt"].endswith("/2")]
    assert again and all(r["resume_from"] for r in again)
    keeps_its_promises(box, kills=1)
    nothing_left(box)


def test_another_worker_of_the_host_carries_for_a_lost_one(box: Sandbox) -> None:
    """With two workers the trials of the one that died go on, and the other carries what they say."""
    address, _, workers = box.start_cluster(2)
    driver = box.start("--cluster", address)
    training(box)
    victim = workers[0]
    for process in box.processes():
        if process.pid == victim.pid:
            process.kill()
    until(lambda: victim.poll() is not None, 30, "its death")
    assert ends(driver, box, 120) == 0, tail(box)
    keeps_its_promises(box)


def test_the_loss_of_the_dask_scheduler_is_a_clear_end(tmp_path: Path) -> None:
    """When it does not come back in time the driver says so and ends with 1, and no trial survives that by 5 s; a new
    cluster goes on with the run."""
    with Sandbox(tmp_path / "run", **SMALL, away_timeout_s=6) as box:
        scheduler_is_lost(box)


def scheduler_is_lost(box: Sandbox) -> None:
    """Kill the scheduler for good; then go on with another one."""
    address, scheduler, workers = box.start_cluster()
    driver = box.start("--cluster", address)
    training(box)
    scheduler.kill()
    assert ends(driver, box, 60) == 1, tail(box)
    ours = {"trial", "spare", "fork server", "agent", "watchdog"}
    until(lambda: not {p.role for p in box.processes()} & ours, GONE_S, lambda: f"{box.processes()}")
    assert "the Dask scheduler" in tail(box) and "Traceback" not in tail(box), tail(box)
    for worker in workers:
        worker.kill()
    address, _, _ = box.start_cluster()
    goes_on(box, "--cluster", address, kills=1)


def test_a_dask_scheduler_that_comes_back_goes_on(box: Sandbox) -> None:
    """Started again on its port, with a worker (the old one ends with its scheduler): nothing was lost."""
    address, scheduler, _ = box.start_cluster()
    driver = box.start("--cluster", address)
    training(box)
    scheduler.kill()
    scheduler.wait()
    box.start_scheduler(int(address.rpartition(":")[2]))
    box.start_worker(address)
    assert ends(driver, box, 120) == 0, tail(box)
    assert {r["reason"] for r in box.events("attempt.ended")} == {"completed"}
    keeps_its_promises(box)


def test_no_trial_survives_a_driver_killed_on_a_cluster(box: Sandbox) -> None:
    """SIGKILL to the driver: its trials, spares, agents and watchdog on workers of its host are gone within 5 s."""
    address, _, _ = box.start_cluster()
    driver = box.start("--cluster", address)
    training(box)
    driver.kill()
    ours = {"trial", "spare", "fork server", "agent", "watchdog"}
    until(lambda: not {p.role for p in box.processes()} & {"trial"}, GONE_S, lambda: f"trials gone: {box.processes()}")
    until(lambda: not {p.role for p in box.processes()} & ours, GONE_S, lambda: f"the rest gone: {box.processes()}")
    goes_on(box, "--cluster", address, kills=1)


def test_no_process_survives_a_driver_killed_on_this_machine(box: Sandbox) -> None:
    """SIGKILL to the driver: everything is gone within 5 s."""
    driver = box.start()
    training(box)
    driver.kill()
    nothing_left(box)
    goes_on(box, kills=1)


# -- two drivers, one study --------------------------------------------------------------------------------------------


def pair(tmp_path: Path, **settings: Any) -> tuple[Sandbox, Sandbox, Path]:
    """Two run folders of one name with one database."""
    database = tmp_path / "shared.db"
    both = [
        Sandbox(tmp_path / name, **{**SMALL, "storage": f"sqlite:///{database}", **settings}) for name in ("one", "two")
    ]
    return both[0], both[1], database


def run_of(box: Sandbox) -> str:
    return (box.folder / "run_id").read_text().strip()


def test_two_drivers_share_a_study(tmp_path: Path) -> None:
    """Both work, the quota is exact, and each finishes its own trials only."""
    one, two, database = pair(tmp_path, trials=4, max_epochs=20)
    with one, two:
        drivers = [(box, box.start()) for box in (one, two)]
        for box, driver in drivers:
            assert ends(driver, box, 150) == 0, tail(box)
        trials = one.trials(database)
        problems = list(quota_problems(trials, 4, 2))
        assert not problems, problems
        share = collections.Counter(t["attrs"]["run"] for t in trials)
        assert set(share) == {run_of(one), run_of(two)}, share
        for box in (one, two):
            mine = {f"{t['study']}/{t['number']}" for t in trials if t["attrs"]["run"] == run_of(box)}
            launched = {r["attempt"].rpartition("/")[0] for r in box.events("attempt.launched")}
            assert launched == mine
        assert one.done() + two.done() == 2 * 4 * 20


def test_trials_of_a_driver_that_is_gone_are_taken_over_after_its_lease(tmp_path: Path) -> None:
    """The other driver finishes them from their checkpoints; not before, and not while it lives."""
    one, two, database = pair(tmp_path, horizons=[1], trials=2, lease_s=4)
    with one, two:
        first = one.start(environment={"CRASH_EPOCH_S": "0.5"})  # 30 s each: long enough for the second to see them
        training(one)
        second = two.start()
        until(lambda: two.events("study.opened"), START_S, "the second driver")
        time_alive = time.monotonic()
        until(lambda: time.monotonic() - time_alive > 1.0, 5, "a while with both")
        assert not two.events("study.takeover")
        first.kill()
        assert ends(second, two, 120) == 0, tail(two)
        assert two.events("study.takeover")
        problems = list(quota_problems(two.trials(database), 2, 1))
        assert not problems, problems
        assert one.done() + two.done() <= 2 * 60 + 1
        assert two.done() < 2 * 60  # from their checkpoints


# -- the database ------------------------------------------------------------------------------------------------------


def outage_is_survived(box: Sandbox, driver: subprocess.Popen[Any], end: Any, database: Path, outage_s: float) -> None:
    """Training goes on through the outage, and all is written after it."""
    until(lambda: box.events("study.unavailable"), outage_s, lambda: f"the outage noticed: {tail(box)}")
    training(box, 10)
    end()
    until(lambda: box.events("study.available"), 40, lambda: f"the end of the outage noticed: {tail(box)}")
    assert ends(driver, box, 120) == 0, tail(box)
    studies = len(box.settings["horizons"])
    trials = box.trials(database)
    problems = [*quota_problems(trials, box.settings["trials"], studies), *replay_problems(trials, box.folder)]
    assert not problems, problems
    assert box.done() == studies * box.settings["trials"] * box.settings["max_epochs"]
    connection = sqlite3.connect(database)
    with contextlib.closing(connection):
        values = connection.execute("SELECT COUNT(*) FROM trial_intermediate_values").fetchone()[0]
    assert values == box.done()


def test_a_database_that_is_locked_for_20_s_stops_no_training(tmp_path: Path) -> None:
    """The trials train on, their values are held, and written when the lock is gone."""
    with Sandbox(tmp_path / "run", **{**SMALL, "max_epochs": 400, "trials": 1}) as box:
        driver = box.start()
        training(box)
        lock = sqlite3.connect(box.database, isolation_level=None, timeout=30)
        lock.execute("BEGIN EXCLUSIVE")
        since, before = time.monotonic(), box.done()

        def end() -> None:
            until(lambda: time.monotonic() - since > 20, 25, "20 s")
            assert box.done() - before > 20 / 0.05 / 2  # at least one of two trials' worth at full speed
            lock.execute("ROLLBACK")
            lock.close()

        outage_is_survived(box, driver, end, box.database, 15)


def test_a_second_signal_ends_a_drain_that_waits_for_the_database(tmp_path: Path) -> None:
    """While the study is locked a drain waits for it; the second signal does not, and the next start writes it."""
    with Sandbox(tmp_path / "run", **SMALL) as box:
        driver = box.start()
        training(box)
        lock = sqlite3.connect(box.database, isolation_level=None, timeout=30)
        lock.execute("BEGIN EXCLUSIVE")
        driver.send_signal(signal.SIGTERM)
        until(lambda: len(box.events("trial.requeued")) >= 2, DRAIN_S, lambda: f"the drain: {tail(box)}")
        assert driver.poll() is None
        driver.send_signal(signal.SIGTERM)
        assert ends(driver, box, DRAIN_S) == 130, tail(box)
        assert "Traceback" not in tail(box)
        lock.execute("ROLLBACK")
        lock.close()
        nothing_left(box)
        goes_on(box)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a file system needs root")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=False)


def test_a_full_disk_under_the_database_stops_no_training(tmp_path: Path, small_disk: Path) -> None:
    """SQLite cannot write, training goes on, and all is written once there is room."""
    database = small_disk / "study.db"
    settings = {**SMALL, "max_epochs": 200, "trials": 1, "storage": f"sqlite:///{database}"}
    with Sandbox(tmp_path / "run", **settings) as box:
        driver = box.start()
        training(box)
        filler = small_disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(b"\0" * 4096)
        outage_is_survived(box, driver, filler.unlink, database, 30)


def test_a_full_disk_under_the_run_folder_loses_no_line(tmp_path: Path, small_disk: Path) -> None:
    """What the journal cannot write is held and written once there is room; no trial pays for it."""
    settings = {**SMALL, "max_epochs": 200, "trials": 1, "storage": f"sqlite:///{tmp_path / 'study.db'}"}
    with Sandbox(tmp_path / "run", **settings, training={"objective": f"{TINY}:objective"}) as box:
        (small_disk / "runs").mkdir()
        (box.root / "runs").symlink_to(small_disk / "runs")
        driver = box.start()
        training(box)
        filler = small_disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(b"\0" * 4096)
        until(lambda: not box.of_role("trial") or driver.poll() is not None, 30, "a trial that cannot checkpoint ends")
        filler.unlink()
        assert ends(driver, box, 120) == 0, tail(box)
        assert "Traceback" not in tail(box), tail(box)
        trials = box.trials(tmp_path / "study.db")
        problems = [*quota_problems(trials, 1, 2), *replay_problems(trials, box.folder)]
        assert not problems, problems
        assert "disk full" in tail(box), tail(box)


# -- what users do wrong -----------------------------------------------------------------------------------------------


def test_a_study_that_only_fails_is_closed_and_the_others_go_on(tmp_path: Path) -> None:
    """Five failures in a row close it with the last line of the traceback; the other reaches its quota; exit 1."""
    settings = {**SMALL, "trials": 8, "max_epochs": 3}
    with Sandbox(tmp_path / "run", **settings, training={"objective": f"{TINY}:picky"}) as box:
        assert ends(box.start(), box, 120) == 1, tail(box)
        closed = {r["study"]: r for r in box.events("study.closed")}
        assert closed["crash_2M_h1"]["early"] and "not to my taste" in closed["crash_2M_h1"]["reason"]
        assert not closed["crash_2M_h3"]["early"]
        states = collections.Counter((t["study"], t["state"]) for t in box.trials() if "retried" not in t["attrs"])
        assert states["crash_2M_h3", "COMPLETE"] == 8
        assert 5 <= states["crash_2M_h1", "FAIL"] <= 6  # one more may have been running
        assert "not to my taste" in tail(box)
        nothing_left(box)


def test_users_mistakes_are_outcomes(tmp_path: Path) -> None:
    """Each has its reason in the study, costs no slot, and leaves the others alone."""
    settings = {**SMALL, "horizons": [1, 2, 3, 4, 5, 6, 7, 8], "trials": 1, "max_epochs": 3}
    with Sandbox(tmp_path / "run", **settings, training={"objective": f"{TINY}:mistakes"}) as box:
        assert ends(box.start(), box, 120) == 1, tail(box)  # of some studies nothing completed
        trials = {int(t["study"].rpartition("h")[2]): t for t in box.trials()}
        for horizon, words in {
            1: "RuntimeError: the learning rate was silly",
            2: "NonFiniteLoss",
            3: "SystemExit: 0",
            4: "SIGSEGV",
            6: "number",
            7: "exit status 7",
        }.items():
            trial = trials[horizon]
            assert trial["state"] == "FAIL", trial
            assert words in trial["attrs"]["error"], trial
            assert trial["attrs"].get("traceback") or trial["attrs"].get("log_tail") or horizon == 7, trial
        assert "string_at" in trials[4]["attrs"]["log_tail"]  # the stack of the segfault
        assert trials[5]["state"] == trials[8]["state"] == "COMPLETE"
        flood = box.folder / "attempts" / "crash_2M_h5.t0000.a1" / "trial.log"
        assert flood.stat().st_size <= 64 * 2**20
        nothing_left(box)


if sys.platform != "linux":
    pytestmark.append(pytest.mark.skip(reason="reads /proc"))

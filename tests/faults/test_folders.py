"""Folders and files that are taken away, moved, damaged or stale under a run: noticed, told in a line, nothing wasted.

Real commands with the trials of `tiny`.
"""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.faults.crash import quota_problems
from tests.faults.sandbox import Sandbox, stop_between_transactions
from tests.faults.test_resume import SMALL, START_S, ends, keeps_its_promises, nothing_left, pair, tail, training
from tests.waiting import until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Sandbox]:
    """A sandbox with two small studies."""
    with Sandbox(tmp_path / "run", **SMALL) as sandbox:
        yield sandbox


# -- the host registry -------------------------------------------------------------------------------------------------


def test_a_registry_that_is_removed_is_made_again(box: Sandbox) -> None:
    """A cleaner of /tmp takes the folder: the trials that run are watched by a new one, and the next ones start."""
    driver = box.start()
    training(box)
    (box.root / "host").rename(box.root / "cleared")  # at once: a folder in use is never empty for long
    shutil.rmtree(box.root / "cleared")
    until(lambda: box.events("registry.remade"), 20, lambda: f"the loss noticed: {tail(box)}")
    registered = box.root / "host" / "attempts"
    until(
        lambda: len(list(registered.glob("*.json"))) == 2, 10, lambda: f"both registered: {list(registered.iterdir())}"
    )
    until((box.root / "host" / "host.json").exists, 20, "the watchdog goes by it")
    until(lambda: list((box.root / "host" / "agents").glob("*/socket")), 20, "the agent can be found")
    assert ends(driver, box, 120) == 0, tail(box)
    keeps_its_promises(box)
    nothing_left(box)


# -- the run folder and its database -----------------------------------------------------------------------------------

NOTICED_S = 30.0  # "within seconds", on a loaded machine, with the end of what runs


def ends_with_one_line(box: Sandbox, driver: Any, *words: str) -> str:
    """The driver ends with 1, no traceback, and a last line that says what happened and how to go on."""
    assert ends(driver, box, NOTICED_S) == 1, tail(box)
    said = tail(box)
    assert "Traceback" not in said, said
    last = said.strip().splitlines()[-1]
    assert last.startswith("headroom: ") and all(word in last for word in words), said
    nothing_left(box, 20)
    return last


def obey(line: str) -> None:
    """Do what the line says must be done before the command is given again."""
    command = line.rpartition("to go on: ")[2].rpartition(", then give")[0]
    subprocess.run(["sh", "-euc", command], check=True)


SLOW = {"CRASH_EPOCH_S": "0.4"}  # a trial then lasts longer than it takes to notice anything
FAST = {"CRASH_EPOCH_S": "0.001"}


def goes_on_from(box: Sandbox, before: int) -> None:
    """The same command finishes with what was done before: at most the epochs under way are done again."""
    assert ends(box.start(environment=FAST), box, 150) == 0, tail(box)
    problems = list(quota_problems(box.trials(), box.settings["trials"], 2))
    assert not problems, problems
    assert box.done() <= 2 * 2 * box.settings["max_epochs"] + 2, f"{before} epochs were done before"


def test_a_run_folder_that_is_removed_ends_the_run(box: Sandbox) -> None:
    """Nothing new starts, no ghost of the folder is made, and what the studies held is saved beside it."""
    driver = box.start(environment=SLOW)
    training(box)
    shutil.rmtree(box.folder, ignore_errors=True)
    shutil.rmtree(box.folder, ignore_errors=True)
    line = ends_with_one_line(box, driver, f"run folder {box.folder} was removed", "rescued", "give the same command")
    assert not box.folder.exists()
    obey(line)
    assert {t["state"] for t in box.trials()} & {"RUNNING", "WAITING"}
    epochs = box.done()
    assert ends(box.start(environment=FAST), box, 150) == 0, tail(box)
    assert box.done() > epochs


def test_a_run_folder_that_is_moved_ends_the_run(box: Sandbox) -> None:
    """It says where the folder is now; moved back, the run goes on from its checkpoints."""
    driver = box.start(environment=SLOW)
    training(box)
    moved = box.root / "moved away"
    box.folder.rename(moved)
    line = ends_with_one_line(box, driver, f"was moved to {moved}", "mv ", "give the same command")
    assert not box.folder.exists()
    before = box.done()
    obey(line)
    goes_on_from(box, before)


@pytest.mark.parametrize("how", ["removed", "moved", "replaced"])
def test_a_database_that_is_taken_away_ends_the_run(box: Sandbox, how: str) -> None:
    """Trials checkpoint and leave; what the database held is saved; put back, the run goes on without a loss."""
    driver = box.start(environment=SLOW)
    training(box)
    if how == "moved":
        box.database.rename(box.root / "elsewhere.db")
    else:
        box.database.unlink()
    if how == "replaced":
        sqlite3.connect(box.database).close()
        box.database.touch()
    line = ends_with_one_line(box, driver, f"study database {box.database} was {how}", "give the same command")
    before = box.done()
    left = [r for r in box.events("attempt.ended") if r["reason"] == "interrupted"]
    assert len(left) == 2 and all(r["checkpoint"] for r in left), left
    obey(line)
    states = [t["state"] for t in box.trials() if "retried" not in t["attrs"]]
    assert "WAITING" in states and "RUNNING" not in states, states  # what was under way is queued, in the copy too
    goes_on_from(box, before)


def test_a_run_folder_that_is_removed_at_the_very_end_is_no_success(tmp_path: Path) -> None:
    """All trials are done, the results have nowhere to go: 1, with the table on stdout."""
    with Sandbox(tmp_path / "run", **SMALL, training={"objective": "tests.faults.test_folders:removes"}) as box:
        driver = box.start(environment={"REMOVES": str(box.folder)})
        ends_with_one_line(box, driver, "was removed")


def removes(task: Mapping[str, Any], progress: Any) -> dict[str, Any]:
    """An objective that takes its own run folder away and succeeds."""
    shutil.rmtree(os.environ["REMOVES"], ignore_errors=True)
    return {"value": 1.0}


# -- a driver that was stopped -----------------------------------------------------------------------------------------


def test_a_driver_stopped_past_its_lease_leaves_its_trials_to_who_took_them(tmp_path: Path) -> None:
    """It notices for each trial, ends that attempt without a word to the study, and goes on with what is left: both end
    with 0, the quota is exact, and no parameter set is completed twice."""
    one, two, database = pair(tmp_path, horizons=[1], trials=6, lease_s=3)
    with one, two:
        first = one.start(environment={"CRASH_EPOCH_S": "0.3"})  # 18 s a trial
        training(one)
        second = two.start()
        until(lambda: two.events("study.opened"), START_S, "the second driver")
        stop_between_transactions(first, database)
        until(lambda: len(two.events("study.takeover")) >= 2, 60, lambda: f"the takeover: {tail(two)}")
        first.send_signal(signal.SIGCONT)
        until(lambda: one.events("trial.taken"), 60, lambda: f"it notices: {tail(one)}")
        for box, driver in ((one, first), (two, second)):
            assert ends(driver, box, 150) == 0, tail(box)
            assert "Traceback" not in tail(box)
        trials = two.trials(database)
        problems = list(quota_problems(trials, 6, 1))
        assert not problems, problems
        rates = [t["params"]["learning_rate"] for t in trials if t["state"] == "COMPLETE"]
        assert len(rates) == len(set(rates)) == 6
        for box in (one, two):
            assert not [r for r in box.events("study.closed") if r["early"]], box.events("study.closed")
            nothing_left(box, 20)


# -- what an earlier run left ------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="a disk of one's own needs root")
def test_what_a_deleted_run_left_on_another_host_is_in_nobodys_way(tmp_path: Path) -> None:
    """The run folder is removed where the driver is and begun anew; the worker's own disk still has the attempts of the
    same names, with claims, results and checkpoints. They are set aside: no trial is lost, none is believed."""
    with Sandbox(tmp_path / "run", **{**SMALL, "horizons": [1], "max_epochs": 5}) as box:
        (box.root / "runs").mkdir()
        address, _, _ = box.start_cluster(0)
        worker = [sys.executable, "-m", "dask", "worker", address, "--nworkers", "1", "--nthreads", "2"]
        worker += ["--memory-limit", "0", "--no-dashboard", "--local-directory", str(box.root / "dask")]
        script = f'mount -t tmpfs tmpfs {box.root}/runs && exec "$@"'
        with open(box.root / "worker.log", "ab") as log:
            box.spawn(["unshare", "--mount", "sh", "-c", script, "sh", *worker], log)
        for _ in range(2):
            shutil.rmtree(box.folder, ignore_errors=True)
            assert ends(box.start("--cluster", address), box, 120) == 0, tail(box)
        assert {record["reason"] for record in box.events("attempt.ended")} == {"completed"}
        notes = [record["text"] for record in box.events("attempt.note")]
        assert len([text for text in notes if "was left by another run" in text]) == 2, notes
        assert box.done() == 2 * 2 * 5

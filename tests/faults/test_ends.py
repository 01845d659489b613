"""How whole runs end: the exit code and the table say what was done, and no end of an attempt goes untold."""

from __future__ import annotations

import signal
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from tests.faults.sandbox import REPO, Sandbox
from tests.faults.test_resume import START_S, ends, goes_on, keeps_its_promises, nothing_left, tail, training
from tests.waiting import until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

RUDE = "tests.faults.rude"
SMALL: dict[str, Any] = {"budgets": ["2M"], "horizons": [1, 3], "trials": 2, "max_epochs": 60}


def test_a_search_in_which_every_trial_fails_is_no_success(tmp_path: Path) -> None:
    """Quota reached, nothing completed: exit 1, and the table shows the error's last line."""
    with Sandbox(tmp_path / "run", **SMALL, training={"objective": f"{RUDE}:fails"}) as box:
        assert ends(box.start(), box, 100) == 1, tail(box)
        assert "no trial completed; last: ValueError: the learning rate was silly" in tail(box), tail(box)
        assert len(box.events("attempt.launched")) == 4
        assert "no trial completed in crash_2M_h1, crash_2M_h3" in box.events("batch.ended")[-1]["reason"]
        nothing_left(box)


def test_a_refused_study_makes_the_code_1(tmp_path: Path) -> None:
    """Its smallest trial fits nowhere; the other study runs to its quota all the same."""
    settings = {**SMALL, "budgets": ["2M", "20M"], "horizons": [1], "max_epochs": 2}
    with Sandbox(tmp_path / "run", **settings, training={"estimate": f"{RUDE}:huge_20m"}) as box:
        assert ends(box.start(), box, 100) == 1, tail(box)
        assert [t["state"] for t in box.trials()] == ["COMPLETE", "COMPLETE"]
        assert "study crash_20M_h1 cannot run" in tail(box)


def test_results_that_cannot_be_written_are_no_success(tmp_path: Path) -> None:
    """A folder stands where results.csv belongs: exit 1 with a line; once it is gone the same command writes them."""
    with Sandbox(tmp_path / "run", **{**SMALL, "max_epochs": 2}) as box:
        (box.folder / "results.csv").mkdir(parents=True)
        assert ends(box.start(), box, 100) == 1, tail(box)
        assert "cannot write the results" in tail(box) and "Traceback" not in tail(box), tail(box)
        (box.folder / "results.csv").rmdir()
        goes_on(box)
        assert (box.folder / "results.csv").is_file()


def test_a_trial_over_its_limit_is_pruned_and_the_next_one_runs(tmp_path: Path) -> None:
    """One leaves when asked, one must be ended; both are PRUNED `timed_out`, count, and say nothing about memory."""
    settings = {**SMALL, "trials": 1, "trial_timeout": "2s", "drain_timeout_s": 2.0}
    with Sandbox(tmp_path / "run", **settings, training={"objective": f"{RUDE}:endless"}) as box:
        assert ends(box.start(), box, 100) == 1, tail(box)  # nothing completed
        trials = box.trials()
        assert [(t["state"], t["attrs"]["stop_reason"]) for t in trials] == [("PRUNED", "timed_out")] * 2
        killed = {r["attempt"] for r in box.events("attempt.killing")}
        assert killed == {"crash_2M_h3/0/1"}
        with sqlite3.connect(box.database) as connection:
            found = connection.execute("SELECT count(*) FROM trial_system_attributes WHERE key LIKE 'constraint%'")
            assert found.fetchone() == (0,)
        nothing_left(box)


def test_the_limit_of_the_command_drains_it_with_124(tmp_path: Path) -> None:
    """Trials leave with their checkpoints, the user is told how to go on, and the next start does."""
    with Sandbox(tmp_path / "run", **SMALL) as box:
        driver = box.start("--timeout", "4s", environment={"CRASH_EPOCH_S": "0.2"})
        assert ends(driver, box, 100) == 124, tail(box)
        assert "to go on where it stopped" in tail(box)
        assert {t["state"] for t in box.trials()} <= {"WAITING", "FAIL"}
        nothing_left(box)
        goes_on(box)


def test_an_objective_that_breaks_while_the_run_lasts_costs_no_trial(tmp_path: Path) -> None:
    """A file saved half-edited: nothing starts until it can be imported again, with that as the reason, and then all
    goes on to the quota without a failure."""
    module = tmp_path / "mine" / "edited.py"
    module.parent.mkdir()
    sound = "from tests.faults.tiny import objective\n"
    module.write_text(sound)
    with Sandbox(tmp_path / "run", **{**SMALL, "trials": 3}, training={"objective": "edited:objective"}) as box:
        driver = box.start(environment={"PYTHONPATH": f"{module.parent}:{REPO}"})
        training(box)
        module.write_text("def objective(task, progress:\n")
        until(lambda: "host.closed" in tail(box), 60, lambda: f"the host closed: {tail(box)}")
        reason = box.events("host.closed")[0]["reason"]
        assert "edited:objective" in reason and "SyntaxError" in reason
        module.write_text(sound)
        assert ends(driver, box, 120) == 0, tail(box)
        keeps_its_promises(box)
        assert {r["reason"] for r in box.events("attempt.ended")} == {"completed", "not_started"}
        nothing_left(box)


def test_attempts_that_a_dead_driver_left_have_an_end_in_the_journal(tmp_path: Path) -> None:
    """Each attempt that was launched has its line `attempt.ended`, once, whoever wrote it."""
    with Sandbox(tmp_path / "run", **SMALL) as box:
        driver = box.start()
        training(box)
        driver.send_signal(signal.SIGKILL)
        driver.wait(START_S)
        goes_on(box, kills=2)
        launched = [r["attempt"] for r in box.events("attempt.launched")]
        ended = [r["attempt"] for r in box.events("attempt.ended")]
        assert sorted(launched) == sorted(ended)
        settled = [r for r in box.events("attempt.ended") if r.get("settled")]
        assert len(settled) == 2 and {r["reason"] for r in settled} == {"lost"}
        assert all(r["checkpoint"] and r["predicted_bytes"] for r in settled)

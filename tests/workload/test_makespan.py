"""The dry run's forecast: how long a plan will take, from the journals of earlier runs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from scheduler.cli.schedule import foresee
from scheduler.core.durations import Took
from scheduler.driver import history
from scheduler.settings.load import load
from scheduler.settings.schema import Settings
from scheduler.units import GIB
from scheduler.workload import makespan, plan
from scheduler.workload.studies import meaning
from tests.builders import facts


def settings(folder: Path, **given: Any) -> Settings:
    """Two studies of 2M, with run folders in `folder`."""
    return load({"budgets": "2M", "horizons": "1,3", "trials": 10, "runs_dir": str(folder), **given}, environ={})


def earlier(folder: Path, name: str, took: list[dict[str, Any]], **given: Any) -> None:
    """What an earlier run of that name left."""
    ours = settings(folder, name=name, **given)
    run = folder / name
    run.mkdir(parents=True, exist_ok=True)
    (run / "meaning.json").write_text(json.dumps(meaning(ours)))
    lines = [json.dumps({"v": 1, "unix": 0.0, "event": "attempt.ended", **each}) for each in took]
    (run / "journal.jsonl").write_text("\n".join([*lines, '{"torn": ']))


def ended(number: int, seconds: float, *, study: str = "old_2M_h1", attempt: int = 1, **more: Any) -> dict[str, Any]:
    """A line of the journal."""
    return {
        "attempt": f"{study}/{number}/{attempt}",
        "reason": "completed",
        "epochs": 5,
        "duration_s": seconds,
        "reserved_bytes": GIB,
        "checkpoint": None,
        **more,
    }


def test_trials_that_meant_the_same_count_whatever_the_run_was_called(tmp_path: Path) -> None:
    """Another name and seed are no matter; another limit of epochs, budget or horizon, or a broken line are."""
    earlier(tmp_path, "old", [ended(0, 60.0), {"attempt": 7, "reason": "?"}, ended(1, 90.0)], seed=7)
    earlier(tmp_path, "other", [ended(0, 5.0, study="other_2M_h1")], max_epochs=2)
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "journal.jsonl").write_text("nothing\n")
    found = history.past(settings(tmp_path, name="new", budgets="2M,20M"))
    took = [Took(epochs=5, seconds=seconds, size_bytes=GIB) for seconds in (60.0, 90.0)]
    assert found == {"new_2M_h1": took}


def test_a_trial_that_was_lost_counts_once_with_all_its_attempts(tmp_path: Path) -> None:
    """What it did before its checkpoint is part of what it took; the loss itself is no trial."""
    lost = ended(0, 40.0, reason="lost", checkpoint="/c")
    earlier(
        tmp_path, "old", [lost, ended(0, 20.0, attempt=2), ended(1, 30.0, reason="lost"), ended(1, 60.0, attempt=2)]
    )
    found = history.past(settings(tmp_path, name="new"))
    assert [took.seconds for took in found["new_2M_h1"]] == [60.0, 60.0]


def test_the_makespan_is_that_of_the_plan_on_its_workers() -> None:
    """Ten trials of a minute each in two studies: on four slots some 5 minutes, one after another 20."""
    made = plan.make(settings(Path("/nowhere"), threads=1), [facts("w", slots=4)])
    past = {spec.name: [Took(epochs=5, seconds=60.0, size_bytes=GIB)] * 30 for spec in made.runnable}
    found = makespan.foresee(made, past, random.Random(0).random)
    assert found is not None and found.serial is not None
    assert found.whole.middle_s == pytest.approx(300, rel=0.35)
    assert found.serial.middle_s == pytest.approx(1200, rel=0.35)
    told = makespan.lines(found, made, 60)
    assert told[0].startswith("makespan: about ") and "20 trials" in told[0] and "60 trials of earlier runs" in told[0]
    assert "times as long" in told[1]
    assert told[2].startswith("at once: 4 until ")


def test_without_an_earlier_run_the_makespan_is_unknown(tmp_path: Path) -> None:
    """No number is made up, and the line says when there will be one."""
    ours = settings(tmp_path)
    lines, program = foresee(ours, plan.make(ours, [facts("w")]))
    assert lines == [makespan.UNKNOWN] and program is None


def test_of_a_run_that_was_begun_what_is_left_is_foreseen(tmp_path: Path) -> None:
    """Seven of its twenty trials count: the database had three, four have ended since; one lost, one too large and one
    that another driver has taken do not."""
    ours = settings(tmp_path, name="old", threads=1)
    made = plan.make(ours, [facts("w", slots=1)])
    done = [ended(number, 60.0, study=f"old_2M_h{h}") for h in (1, 3) for number in range(30)]
    earlier(tmp_path, "old", done, threads=1)
    whole, _ = foresee(ours, made)
    assert "for 20 trials" in whole[0]
    told = [{"event": "study.opened", "study": "old_2M_h1", "counted": 3, "quota": 10}]
    told += [{"event": "study.opened", "study": "old_2M_h3", "counted": 0, "quota": 10}]
    reasons = {3: "completed", 4: "completed", 5: "stalled", 6: "evicted", 7: "does_not_fit", 8: "completed"}
    told += [
        {"event": "trial.ended", "trial": f"old_2M_h1/{n}", "attrs": {"stop_reason": why}} for n, why in reasons.items()
    ]
    told += [{"event": "trial.taken", "trial": "old_2M_h1/8"}, {"event": "trial.requeued", "trial": "old_2M_h1/9"}]
    earlier(tmp_path, "old", [*done, *told], threads=1)
    assert history.counted(ours) == {"old_2M_h1": 7, "old_2M_h3": 0}
    lines, program = foresee(ours, made)
    assert "for the 13 trials left of 20" in lines[0]
    assert program is not None
    assert program["one_after_another_s"]["middle"] == pytest.approx(13 * 60, rel=0.35)


def test_a_run_that_is_over_has_nothing_left(tmp_path: Path) -> None:
    """Said as such; not in seconds."""
    ours = settings(tmp_path, name="old")
    opened = [{"event": "study.opened", "study": f"old_2M_h{h}", "counted": 10, "quota": 10} for h in (1, 3)]
    earlier(tmp_path, "old", [ended(0, 60.0), *opened])
    lines, _ = foresee(ours, plan.make(ours, [facts("w")]))
    assert lines == ["makespan: nothing is left to do, all 20 trials of this run have ended"]

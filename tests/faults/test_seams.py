"""Whole runs of objectives that disturb whoever runs them: they end as what they are, and nobody else ends of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import optuna
import pytest

from tests.faults.rude import BY_HORIZON
from tests.faults.sandbox import Sandbox
from tests.faults.test_resume import ends, nothing_left, tail

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

RUDE = "tests.faults.rude"
SOUND = len(BY_HORIZON) + 1  # the horizon of the study that trains
COMPLETE = {
    *("huge_result", "says_does_not_fit", "forked_child_returns", "forked_child_exits", "closes_everything"),
    *("writes_to_the_pipe", "bad_path"),
}


def test_nothing_that_an_objective_says_ends_the_driver_or_its_worker(tmp_path: Path) -> None:
    """One trial of each kind, two at once: each ends by itself, one worker lives through it all, and Optuna
    itself reads the results. The same command again finds nothing to do, whatever lies in the attempts' folders."""
    settings: dict[str, Any] = {"budgets": ["2M"], "horizons": [*BY_HORIZON, SOUND], "trials": 1, "max_epochs": 3}
    with Sandbox(tmp_path / "run", **settings, training={"objective": f"{RUDE}:objective"}) as box:
        assert ends(box.start(), box, 200) == 1, tail(box)  # of some studies nothing completed
        check(box)
        launched = len(box.events("attempt.launched"))
        assert ends(box.start(), box, 100) == 1, tail(box)
        assert len(box.events("attempt.launched")) == launched
        nothing_left(box)


def check(box: Sandbox) -> None:
    """Every trial as it must be, told once, and everything that is left can be read."""
    assert "Traceback" not in tail(box), tail(box)
    assert len(box.events("worker.joined")) == 1, "a worker died"
    trials = {int(t["study"].rpartition("h")[2]): t for t in box.trials()}
    for horizon, name in BY_HORIZON.items():
        trial = trials[horizon]
        wanted = "COMPLETE" if name in COMPLETE else "FAIL"
        assert trial["state"] == wanted, (name, trial)
        if wanted == "FAIL":
            assert trial["attrs"]["error"], name
    assert trials[SOUND]["state"] == "COMPLETE"
    assert all(r["reason"] != "interrupted" for r in box.events("attempt.ended"))
    for horizon in trials:
        study = optuna.load_study(study_name=f"crash_2M_h{horizon}", storage=f"sqlite:///{box.database}")
        for told in study.trials:
            json.dumps(told.user_attrs).encode()
            assert -777.0 not in (*told.intermediate_values.values(), told.value), horizon
    with open(box.folder / "results.csv", encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) >= len(trials)
    full_disk = next(h for h, name in BY_HORIZON.items() if name == "full_disk")
    attempts = [r for r in box.events("attempt.ended") if r["attempt"].startswith(f"crash_2M_h{full_disk}/")]
    assert [r["reason"] for r in attempts] == ["no_room"] * 6, "its own error is believed five times, not for ever"

"""A trial's size that was only guessed, in a host whose memory is limited for real: nobody pays for a wrong guess.

Real processes in a cgroup, an objective that knows nothing of us, the whole scheduler with the real thresholds, except
that what is "far over" is scaled down with the memory. What the policy does with trials that promised nothing is
`test_victims`; whose fault an end is, `test_fault`.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from tests.faults import swelling
from tests.faults.sandbox import Sandbox
from tests.waiting import until

pytestmark = pytest.mark.faults
MIB = 2**20


@pytest.fixture
def box(tmp_path: Path, group: Path) -> Iterator[Sandbox]:
    """One study of the objective in a database of its own, inside the cgroup."""
    url = f"sqlite:///{tmp_path / 'theirs.db'}"
    settings = {"objective": f"{swelling.__file__}:objective", "study": "theirs", "storage": url, "max_retries": 0}
    made = Sandbox(tmp_path / "box", **settings, watchdog={"far_over_extra_bytes": 64 * MIB, "over_extra_bytes": 0})
    made.cgroup = group
    with made:
        yield made


def run(box: Sandbox, *sizes: int, slots: int, **environment: str) -> list[optuna.trial.FrozenTrial]:
    """Run trials of these sizes (MiB), in this order, to the end; the study's trials as plain Optuna reads them."""
    study = optuna.create_study(study_name="theirs", storage=box.settings["storage"])
    for size in sizes:
        study.enqueue_trial({"mib": size})
    driver = box.start("--trials", str(len(sizes)), "--slots", str(slots), environment=environment)
    assert driver.wait(300) == 0, box.log.read_text()
    return optuna.load_study(study_name="theirs", storage=box.settings["storage"]).trials


def killed_by_the_kernel(group: Path) -> int:
    """How often the kernel's killer has acted in this cgroup."""
    lines = (group / "memory.oom_control").read_text().split()
    return int(lines[lines.index("oom_kill") + 1])


def launches(box: Sandbox) -> dict[str, dict[str, Any]]:
    """attempt -> its launch."""
    return {event["attempt"]: event for event in box.events("attempt.launched")}


def constraints(box: Sandbox) -> list[float]:
    """What the sampler was told of trials that did not fit."""
    with contextlib.closing(sqlite3.connect(box.settings["storage"].removeprefix("sqlite:///"))) as connection:
        rows = connection.execute("SELECT value_json FROM trial_system_attributes WHERE key LIKE 'constraint%'")
        return [float(value) for (text,) in rows for value in text.strip("[]").split(",") if value]


def test_a_trial_many_times_its_guess_is_charged_more_and_completes_on_a_quiet_host(box: Sandbox, group: Path) -> None:
    """A trial of 1,000 MiB after one of 60: nearly three times its guess, far over what any promise would allow;
    nobody ends it, nor the small one beside it."""
    first, large, last = run(box, 60, 1000, 60, slots=2)
    assert {each.state for each in (first, large, last)} == {optuna.trial.TrialState.COMPLETE}
    begun = launches(box)
    assert [event["attempt"].rpartition("/")[2] for event in box.events("attempt.ended")] == ["1"] * 3
    guess = begun["theirs/1/1"]
    assert guess["source"] == "learnt" and guess["reserved_bytes"] < 400 * MIB
    grown = [e for e in box.events("reservation.resized") if e["reason"] == "over_reservation"]
    assert max(event["reserved_bytes"] for event in grown if event["attempt"] == "theirs/1/1") > 1000 * MIB
    assert large.user_attrs["footprint.observed_peak_bytes"] > 1000 * MIB
    assert killed_by_the_kernel(group) == 0 and list((box.folder / "attempts").glob("*/kill.json")) == []
    assert all(value <= 0 for value in constraints(box))


def test_who_is_ended_for_memory_on_a_guess_runs_again_with_all_there_is_and_pays_nothing(
    box: Sandbox, group: Path
) -> None:
    """Two trials that were guessed small grow beyond the host together: the watchdog ends one before the kernel would,
    that one runs again alone, both complete; no constraint, no retry spent, nothing pruned or failed."""
    trials = run(box, 60, 1100, 1100, slots=2, SWELL_MIB_PER_S="60")
    assert [each.state for each in trials] == [optuna.trial.TrialState.COMPLETE] * 3
    ended = {event["attempt"]: event["reason"] for event in box.events("attempt.ended")}
    memory = [attempt for attempt, reason in ended.items() if reason != "completed"]
    assert memory, f"nobody was ended, so nothing was tried: {ended}"
    assert {ended[attempt] for attempt in memory} <= {"evicted", "preempted", "overshoot"}
    assert killed_by_the_kernel(group) == 0
    begun = launches(box)
    for attempt in memory:
        again = begun[f"{attempt.rpartition('/')[0]}/{int(attempt.rpartition('/')[2]) + 1}"]
        assert again["source"] == "unknown" and again["reserved_bytes"] > 1200 * MIB
    assert all(value <= 0 for value in constraints(box))
    assert all("watchdog.reason" not in each.user_attrs for each in trials)


def test_a_trial_nobody_can_size_waits_for_another_runs_memory_and_starts_once(box: Sandbox, group: Path) -> None:
    """The other run's trial was promised most of the host and has not taken it: the first trial of this one waits with
    that reason, and is launched when the other has ended; never before, only to be refused by its host."""
    other = box.rival()
    other.cgroup = group
    url = f"sqlite:///{other.root / 'others.db'}"
    optuna.create_study(study_name="others", storage=url).enqueue_trial({"mib": 60})
    optuna.create_study(study_name="theirs", storage=box.settings["storage"]).enqueue_trial({"mib": 60})
    large = ["--storage", url, "--study", "others", "--memory", "1200MiB", "--trials", "1", "--slots", "1"]
    holds = other.start(*large, environment={"SWELL_UNTIL": str(other.root / "over")})
    until(lambda: other.events("attempt.started"), 120, other.log.read_text)
    waits = box.start("--trials", "1", "--slots", "1")
    until(lambda: box.events("trial.deferred") or box.events("attempt.launched"), 120, box.log.read_text)
    assert [event["reason"] for event in box.events("trial.deferred")] == ["live_memory"], box.log.read_text()
    (other.root / "over").touch()
    assert holds.wait(120) == 0, other.log.read_text()
    assert waits.wait(120) == 0, box.log.read_text()
    assert [event["attempt"] for event in box.events("attempt.launched")] == ["theirs/0/1"]
    (trial,) = optuna.load_study(study_name="theirs", storage=box.settings["storage"]).trials
    assert trial.state is optuna.trial.TrialState.COMPLETE

"""A kill seen from the study: the whole scheduler runs, trial 0 goes wrong, and everything around it must be right.

The host's side of a kill has its own tests (test_watchdog_faults); here it is the ledger, the journal, the study and
the trials that come after.
"""

from __future__ import annotations

import html
import json
import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.sandbox import Sandbox
from tests.waiting import until

pytestmark = pytest.mark.faults

FAST = {
    "mode": "on",
    "sample_s": 0.3,
    "host_sample_s": 0.3,
    "stall_after_s": 3.0,
    "stall_unproven_s": 6.0,
    "stall_bucket_s": 1.0,
    "over_after_s": 0.5,
    "over_first_after_s": 1.0,
    "far_over_extra_bytes": 2**28,
    "stall_grace_s": 1.0,
    "cooldown_s": 1.0,
    "memory_back_after_s": 5.0,
}


def sandbox(root: Path, bad: str, **watchdog: Any) -> Sandbox:
    """One study of three short trials, the first of which goes wrong."""
    functions = {name: f"tests.faults.bad:{name}" for name in ("objective", "sample", "candidates", "estimate")}
    made = Sandbox(
        root,
        budgets=["2M"],
        horizons=[1],
        trials=3,
        max_epochs=3,
        watchdog={**FAST, **watchdog},
        training=functions,
    )
    made.environment["BAD"] = bad
    return made


@pytest.fixture
def made() -> Iterator[list[Sandbox]]:
    """Sandboxes that are ended whatever happens."""
    all_: list[Sandbox] = []
    yield all_
    for each in all_:
        each.end_all()


def finish(box: Sandbox, driver: Any, timeout_s: float = 90) -> dict[int, dict[str, Any]]:
    """Wait for the driver; the study's trials by number, none of them RUNNING, none told twice."""
    assert driver.wait(timeout_s) == 0, box.log.read_text()
    trials = {trial["number"]: trial for trial in box.trials()}
    assert {trial["state"] for trial in trials.values()} <= {"COMPLETE", "PRUNED"}
    told = [event["trial"] for event in box.events("trial.told")]
    assert len(told) == len(set(told))
    until(lambda: not box.processes(), 10, "no process of the run is left")
    return trials


def check_kill(box: Sandbox, trials: dict[int, dict[str, Any]], reason: str) -> dict[str, Any]:
    """Trial 0 was pruned by the watchdog, once, with its story, and the others were not touched."""
    assert [trials[n]["state"] for n in sorted(trials)] == ["PRUNED", "COMPLETE", "COMPLETE"]
    attrs = trials[0]["attrs"]
    assert attrs["watchdog.reason"] == reason
    assert attrs["watchdog.kill_id"]
    assert attrs["watchdog.seconds"] > 0
    assert attrs["watchdog.evidence"]
    kills = [json.loads(line) for line in (box.root / "host" / "kills.jsonl").read_text().splitlines()]
    # An intent that the re-check called off (a loaded machine's sampling gap) is no kill: nothing was signalled.
    assert len({line["kill_id"] for line in kills if line["step"] in ("term", "kill")}) == 1
    ended = next(event for event in box.events("attempt.ended") if event["reason"] == reason)
    released = next(line for line in kills if line["step"] == "released")
    assert ended["unix"] >= released["unix"], "the reservation was given back before the memory was"
    story = json.loads(next((box.folder / "attempts").glob("*t0000.a1/kill.json")).read_text())
    assert story["kill_id"] == attrs["watchdog.kill_id"]
    words = next((box.folder / "attempts").glob("*t0000.a1/kill.txt")).read_text()
    assert words.startswith("Trial 0 of crash_2M_h1 was ended, because ")
    because = words.partition("because ")[2].partition(".\n")[0]
    report = html.unescape((box.folder / "report.html").read_text())
    assert f"because {because}. " in report, "the report that the run left tells it in the same words"
    assert "The fault was its own" in report
    return dict(attrs)


def test_deadlocked_trial_becomes_pruned_and_the_study_goes_on(tmp_path: Path, made: list[Sandbox]) -> None:
    """0 % CPU without progress: killed, PRUNED with its evidence, no constraint, and the quota is reached."""
    made.append(box := sandbox(tmp_path / "box", "deadlock"))
    trials = finish(box, box.start())
    check_kill(box, trials, "stalled")


def test_overshoot_is_pruned_as_infeasible_and_teaches(tmp_path: Path, made: list[Sandbox]) -> None:
    """Far over its reservation: killed, PRUNED with a constraint, and the next trial is estimated higher."""
    made.append(box := sandbox(tmp_path / "box", "grow"))
    trials = finish(box, box.start("--slots", "1"))
    attrs = check_kill(box, trials, "overshoot")
    launches = {event["attempt"]: event for event in box.events("attempt.launched")}
    first, later = (launches[f"crash_2M_h1/{number}/1"] for number in (0, 2))
    assert later["predicted_bytes"] > first["predicted_bytes"]
    assert attrs["footprint.observed_peak_bytes"] > first["predicted_bytes"]
    with sqlite3.connect(box.database) as connection:
        constraints = connection.execute(
            "SELECT value_json FROM trial_system_attributes WHERE key LIKE 'constraint%'"
        ).fetchall()
    assert any("1" in row[0] for row in constraints)


def test_locked_database_delays_the_word_not_the_memory(tmp_path: Path, made: list[Sandbox]) -> None:
    """While the study is locked the victim dies and its memory is free; PRUNED is written later, once."""
    made.append(box := sandbox(tmp_path / "box", "deadlock"))
    driver = box.start()
    until(lambda: box.events("attempt.progress"), 300, "a trial has reported")
    lock = sqlite3.connect(box.database, isolation_level=None, timeout=30)
    lock.execute("BEGIN EXCLUSIVE")
    try:
        until(lambda: [e for e in box.events("attempt.ended") if e["reason"] == "stalled"], 300, "the victim is gone")
        until(lambda: box.events("study.unavailable"), 300, "the driver has noticed the lock")
        assert [e for e in box.events("trial.told") if e["trial"].endswith("/0")] == []
    finally:
        lock.execute("ROLLBACK")
        lock.close()
    check_kill(box, finish(box, driver), "stalled")


def test_observe_kills_nobody_and_says_what_it_would_have(tmp_path: Path, made: list[Sandbox]) -> None:
    """With --watchdog observe the stalled trial lives on; what would have been done is written down."""
    made.append(box := sandbox(tmp_path / "box", "deadlock", mode="observe"))
    driver = box.start()
    said = until(lambda: box.events("watchdog.would_kill"), 300, "an observation in the run's journal")
    assert said[0]["attempt"] == "crash_2M_h1/0/1"
    assert said[0]["reason"] == "stalled"
    assert all(event["reason"] == "completed" for event in box.events("attempt.ended"))
    assert driver.poll() is None
    assert box.of_role("trial")
    driver.send_signal(signal.SIGTERM)
    until(lambda: box.events("batch.quit"), 120, "the first signal was seen")
    driver.send_signal(signal.SIGTERM)  # a deadlocked trial does not answer the first
    assert driver.wait(60) == 130


def test_kernel_oom_kill_is_told_as_such(tmp_path: Path, made: list[Sandbox]) -> None:
    """Inside a memory limit a trial that outruns everyone is killed by the kernel: PRUNED, and the study goes on."""
    root = Path("/sys/fs/cgroup/memory")
    if os.geteuid() != 0 or not (root / "cgroup.procs").exists():
        pytest.skip("needs root and the v1 memory controller")
    group = root / f"headroom-test-{os.getpid()}"
    made.append(box := sandbox(tmp_path / "box", "leap"))
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(2**30))
        box.starts += 1
        into = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
        with open(box.log, "wb") as log:
            driver = box.spawn([*into, *box.command()], log)
        trials = finish(box, driver, timeout_s=120)
        attrs = trials[0]["attrs"]
        assert trials[0]["state"] == "PRUNED"
        assert attrs["watchdog.reason"] in ("kernel_oom", "overshoot", "evicted"), attrs
        limits = {event["limit_bytes"] for event in box.events("worker.joined")}
        assert limits == {2**30}, "the limit that counts is the cgroup's, not the host's"
    finally:
        box.end_all()
        deadline = time.monotonic() + 10
        while group.exists() and time.monotonic() < deadline:
            try:
                group.rmdir()
            except OSError:
                time.sleep(0.1)

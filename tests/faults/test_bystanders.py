"""Memory runs out for real, inside a cgroup limit, and it is somebody's fault: that one ends, in time, and nobody else.

Real processes and, unless a test says otherwise, the real thresholds. The whole scheduler stands at the end: a trial
that was preempted runs again and counts nothing. Which of several victims the policy picks is `test_victims`.
"""

from __future__ import annotations

import dataclasses
import json
import sqlite3
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scheduler.model import ExitReason
from tests.faults.sandbox import Sandbox
from tests.faults.watchdog_harness import HEALTHY, MIB, Host, Trial, host
from tests.waiting import until

pytestmark = pytest.mark.faults

TAKE = """
import os, sys, time
def take(mib, per_s):
    piece, at, blocks = 4, time.monotonic(), []
    for _ in range(0, mib, piece):
        blocks.append(b"\\xff" * (piece << 20))
        at += piece / per_s
        time.sleep(max(0.0, at - time.monotonic()))
    return blocks
"""
# Takes so much and keeps it; shared memory is written, so that no RSS shows it.
FILL = """
tick()
fd = {open}
for _ in range({mib}):
    os.write(fd, bytes(1 << 20))
    time.sleep(0.01)
{close}
while True:
    tick(); time.sleep(0.3)
"""


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Host]:
    """A host with the real thresholds and no watchdog yet."""
    with host(tmp_path) as made:
        made.limits = {}
        made.registry.thresholds({})
        yield made


def kernel_kills(group: Path) -> int:
    """How often the kernel's killer has acted in this cgroup."""
    lines = (group / "memory.oom_control").read_text().split()
    return int(lines[lines.index("oom_kill") + 1])


def neighbours(here: Host, group: Path, count: int, mib: int) -> list[Trial]:
    """Healthy trials that hold so much of a promise that is a little larger."""
    script = f"block = hold({mib})\n" + HEALTHY
    return [
        here.trial(f"neighbour{n}", script, reservation_bytes=int(1.1 * mib + 30) * MIB, cgroup=group)
        for n in range(count)
    ]


def closed_for(here: Host, word: str) -> str:
    """Wait until admission is closed for this reason, and return it."""
    return str(
        until(
            lambda: (r := here.registry.pressure()) and (r.closed_reason or "").startswith(word) and r.closed_reason,
            60.0,
            f"admission is closed: {word}",
        )
    )


# -- time that is left ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_s", [50, 400])
def test_growing_trial_is_ended_before_the_kernel_acts(here: Host, per_s: int) -> None:
    """A trial that grows on and on in 2 GiB is evicted before the kernel's killer, and its neighbours live."""
    group = here.cgroup("memory", f"grow{per_s}", limit_in_bytes=2048 * MIB)
    here.running(cgroup=group)
    beside = neighbours(here, group, 2, 600)
    grower = here.trial(
        "grower", f"tick()\n{TAKE}\ntake(2000, {per_s})\n" + HEALTHY, reservation_bytes=300 * MIB, cgroup=group
    )
    assert grower.done.wait(120.0)
    assert kernel_kills(group) == 0
    assert grower.story is not None and grower.story.reason in (ExitReason.EVICTED, ExitReason.OVERSHOOT)
    assert grower.story.evidence["within_promise"] is False
    here.check(victims=1, bystanders=tuple(beside))


# -- strangers ------------------------------------------------------------------------------------------------------


def test_stranger_takes_most_of_the_memory_and_no_trial_is_ended(here: Host) -> None:
    """Another program takes 1.2 of 2 GiB: admission closes, the healthy trial within its promise lives."""
    group = here.cgroup("memory", "stranger", limit_in_bytes=2048 * MIB)
    here.running(cgroup=group)
    trial = here.trial("healthy", "block = hold(690)\n" + HEALTHY, reservation_bytes=720 * MIB, cgroup=group)
    here.foreign(TAKE + "blocks = take(1216, 150)\ntime.sleep(600)", group)
    said = closed_for(here, "within_promise")
    assert f"of {720 * MIB} promised" in said
    # Longer than the window in which a level that lasts leads to a kill.
    assert not trial.done.wait(20.0), trial.state
    assert kernel_kills(group) == 0
    here.check(victims=0, bystanders=(trial,), new_trial=False)


def test_stranger_that_takes_it_all_preempts_the_least_work(here: Host) -> None:
    """When the kernel would be next, the youngest within its promise is preempted; the record has the numbers."""
    group = here.cgroup("memory", "all", limit_in_bytes=2048 * MIB)
    here.running(cgroup=group)
    old, young = neighbours(here, group, 2, 450)
    for trial in (old, young):  # as the agent does: before any stranger of their size the kernel takes the trials
        Path(f"/proc/{trial.process.pid}/oom_score_adj").write_text("500")
    here.registry.register(dataclasses.replace(old.registration, launched=time.monotonic() - 3600.0))
    here.foreign(TAKE + "blocks = take(952, 200), take(250, 20)\ntime.sleep(600)", group)
    assert young.done.wait(60.0)
    assert young.story is not None and young.story.reason is ExitReason.PREEMPTED
    record = young.story.records[0]
    assert record["within_promise"] is True
    assert record["footprint_bytes"] <= record["promised_bytes"]
    assert record["evidence"]["ours_held_bytes"] <= record["evidence"]["ours_promised_bytes"]
    assert kernel_kills(group) == 0
    here.check(victims=1, bystanders=(old,), new_trial=False)


# -- shared memory --------------------------------------------------------------------------------------------------


@pytest.fixture
def name() -> Iterator[Path]:
    """A name of our own on the tmpfs."""
    path = Path("/dev/shm") / f"headroom-test-{uuid.uuid4().hex}"
    yield path
    path.unlink(missing_ok=True)


@pytest.mark.parametrize("kind", ["memfd", "file", "closed file"])
def test_filler_of_shared_memory_is_ended_not_its_neighbour(here: Host, name: Path, kind: str) -> None:
    """A trial of some 26 MiB of RSS that fills a memfd or a file on /dev/shm is seen to hold it, and is the victim."""
    if kind == "memfd":
        opened, closing = "os.memfd_create('x')", ""
    else:
        opened = f"os.open({str(name)!r}, os.O_CREAT | os.O_WRONLY)"
        closing = "os.close(fd)" if kind == "closed file" else ""
    group = here.cgroup("memory", "shared", limit_in_bytes=1024 * MIB)
    here.running(cgroup=group)
    beside = neighbours(here, group, 1, 280)
    filler = here.trial(
        "filler", FILL.format(open=opened, mib=750, close=closing), reservation_bytes=100 * MIB, cgroup=group
    )
    assert filler.done.wait(90.0)
    assert filler.story is not None and filler.story.reason in (ExitReason.EVICTED, ExitReason.OVERSHOOT)
    assert filler.story.evidence["shared_bytes"] > 200 * MIB
    assert kernel_kills(group) == 0
    assert not beside[0].done.wait(1.0)
    here.check(victims=1, bystanders=tuple(beside), new_trial=False)


def test_shared_memory_of_a_stranger_is_nobodys_of_ours(here: Host) -> None:
    """What another program puts into shared memory is not charged to a trial: admission closes, nobody is ended."""
    group = here.cgroup("memory", "theirs", limit_in_bytes=1024 * MIB)
    here.running(cgroup=group)
    beside = neighbours(here, group, 2, 250)
    here.foreign(
        "import os, time\nfd = os.memfd_create('x')\n"
        "for _ in range(430):\n    os.write(fd, bytes(1 << 20)); time.sleep(0.01)\ntime.sleep(600)",
        group,
    )
    closed_for(here, "within_promise")
    assert not beside[0].done.wait(17.0) and not beside[1].done.is_set()
    here.check(victims=0, bystanders=tuple(beside), new_trial=False)


# -- the whole scheduler --------------------------------------------------------------------------------------------


@pytest.fixture
def made(group: Path) -> Iterator[list[Sandbox]]:
    """Sandboxes that are ended whatever happens, before their cgroup is taken away."""
    all_: list[Sandbox] = []
    yield all_
    for each in all_:
        each.end_all()


def sandbox(root: Path, group: Path, *, hold: int, promise: int, **settings: Any) -> Sandbox:
    """One study of trials that hold so much of such a promise (MiB), inside the cgroup."""
    functions = {name: f"tests.faults.holder:{name}" for name in ("objective", "sample", "candidates", "estimate")}
    box = Sandbox(root, **{"budgets": ["2M"], "horizons": [1], "max_epochs": 10, "training": functions, **settings})
    box.environment.update(HOLD_MIB=str(hold), PROMISE_MIB=str(promise))
    box.cgroup = group
    return box


def at_work(*boxes: Sandbox) -> list[tuple[float, int]]:
    """(instant, how many attempts were under way then), at each start and end, over all these runs."""
    marks = []
    for box in boxes:
        begun = {event["attempt"] for event in box.events("attempt.started")}
        marks += [(event["unix"], 1) for event in box.events("attempt.started")]
        marks += [(event["unix"], -1) for event in box.events("attempt.ended") if event["attempt"] in begun]
    count, found = 0, []
    for at, change in sorted(marks):
        count += change
        found.append((at, count))
    return found


def test_preempted_trial_goes_on_from_its_checkpoint_and_counts_nothing(
    tmp_path: Path, made: list[Sandbox], group: Path
) -> None:
    """A stranger takes all memory: one trial is preempted, waits, goes on from its checkpoint, and all complete."""
    watchdog = {"mode": "on", "clear_after_s": 2.0}
    box = sandbox(tmp_path / "box", group, hold=450, promise=520, trials=2, max_epochs=50, watchdog=watchdog)
    made.append(box)
    box.environment["CRASH_EPOCH_S"] = "0.4"
    driver = box.start()
    until(lambda: len(box.events("attempt.progress")) >= 6, 60.0, "two trials train")
    free = f"free = (2048 << 20) - int(open('{group}/memory.usage_in_bytes').read()) >> 20\n"
    # All but some MiB at once, the rest slowly, so that it is the watchdog that acts and not the kernel.
    script = free + TAKE + "a, b = take(free - 100, 400), take(150, 15)\ntime.sleep(600)"
    with open(tmp_path / "stranger.log", "wb") as log:
        stranger = box.spawn([sys.executable, "-S", "-c", script], log)
    ended = until(lambda: box.events("attempt.ended"), 90.0, "an attempt has ended")
    stranger.kill()
    stranger.wait()
    assert [event["reason"] for event in ended] == ["preempted"], ended
    record = json.loads(next((box.folder / "attempts").glob("*/kill.json")).read_text())
    assert record["within_promise"] is True and record["footprint_bytes"] <= record["promised_bytes"]
    assert driver.wait(180) == 0, box.log.read_text()
    assert [trial["state"] for trial in box.trials()] == ["COMPLETE"] * 2
    again = [e for e in box.events("attempt.launched") if e["attempt"].endswith("/2")]
    assert len(again) == len(box.events("attempt.ended")) - 2 >= 1
    assert all(event["resume_from"] for event in again)
    with sqlite3.connect(box.database) as connection:
        values = connection.execute("SELECT value_json FROM trial_system_attributes WHERE key LIKE 'constraint%'")
        assert all(json.loads(row[0]) <= 0 for row in values.fetchall())


def test_two_workers_of_one_host_are_given_its_memory_once(tmp_path: Path, made: list[Sandbox], group: Path) -> None:
    """On 2 GiB two workers offer two slots each; two trials of 850 MiB never run at once, and all complete."""
    box = sandbox(tmp_path / "box", group, hold=780, promise=850, budgets=["2M", "20M"], trials=1)
    made.append(box)
    box.environment["CRASH_EPOCH_S"] = "0.3"
    address, _, _ = box.start_cluster(workers=2)
    driver = box.start("--cluster", address)
    assert driver.wait(180) == 0, box.log.read_text()
    joined = box.events("worker.joined")
    assert len({event["worker"] for event in joined}) == 2
    assert len({event["domain"] for event in joined}) == 1
    assert {(event["limit_source"], event["limit_bytes"]) for event in joined} == {("cgroup", 2048 * MIB)}
    assert max(count for _, count in at_work(box)) == 1
    assert [event["reason"] for event in box.events("attempt.ended")] == ["completed"] * 2


@pytest.mark.parametrize("at_once", [True, False])
def test_two_drivers_on_one_host_see_what_the_other_has_promised(
    tmp_path: Path, made: list[Sandbox], group: Path, at_once: bool
) -> None:
    """Two runs on 2 GiB, the second while a trial of the first holds most of it: two of 850 MiB never run at once, and
    all complete. What the other's trial holds is no reason to say that ours will never fit."""
    boxes = [sandbox(tmp_path / name, group, hold=780, promise=850, trials=2) for name in ("one", "two")]
    made.extend(boxes)
    for box in boxes:
        box.environment.update(HEADROOM_HOST_DIR=str(tmp_path / "host"), CRASH_EPOCH_S="0.3")
    drivers = [boxes[0].start()]
    if not at_once:
        until(lambda: boxes[0].events("attempt.progress"), 120, "a trial of the first holds its memory")
    drivers.append(boxes[1].start())
    for box, driver in zip(boxes, drivers, strict=True):
        assert driver.wait(180) == 0, box.log.read_text()
    assert max(count for _, count in at_work(*boxes)) == 1
    for box in boxes:
        assert [trial["state"] for trial in box.trials()] == ["COMPLETE"] * 2
        assert {e["reason"] for e in box.events("attempt.ended")} <= {"completed", "not_started"}


def test_limit_of_a_dask_worker_bounds_it(tmp_path: Path, made: list[Sandbox], group: Path) -> None:
    """`dask worker --memory-limit` rules where it is the smallest, the log says so, and trials are placed by it."""
    box = sandbox(tmp_path / "box", group, hold=40, promise=900, trials=2)
    made.append(box)
    address, _, _ = box.start_cluster(workers=0)
    said = box.root / "worker.log"
    box.start_worker(address, memory_limit="1400MiB")
    until(lambda: "Registered to" in said.read_text(), 60.0, "the large worker is there for the plan")
    small = box.start_worker(address, memory_limit="800MiB")
    until(lambda: said.read_text().count("Registered to") == 2, 60.0, "both workers are there")
    driver = box.start("--cluster", address)
    assert driver.wait(180) == 0, box.log.read_text()
    joined = {event["worker"]: event for event in box.events("worker.joined")}
    assert {event["limit_source"] for event in joined.values()} == {"dask"}
    assert sorted(event["limit_bytes"] // MIB for event in joined.values()) == [800, 1400]
    launched = {joined[event["worker"]]["limit_bytes"] for event in box.events("attempt.launched")}
    assert launched == {1400 * MIB} and small.poll() is None

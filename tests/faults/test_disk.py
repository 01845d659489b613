"""Hosts on which nothing can be started: disk or inodes full, read-only, no process to be had. No trial pays for it.

Real file systems and a real limit on processes: root on Linux; skipped where a file system cannot be mounted.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.crash import quota_problems, replay_problems, result_problems
from tests.faults.sandbox import Sandbox
from tests.faults.test_resume import ends, nothing_left, tail, training
from tests.waiting import until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]

SETTINGS: dict[str, Any] = {"budgets": ["2M"], "horizons": [1, 3], "trials": 5, "max_epochs": 24}
PIDS = Path("/sys/fs/cgroup/pids")


def mount(path: Path, *options: str) -> None:
    """A mount of our own; the test is skipped where that is not allowed."""
    done = subprocess.run(["mount", *options, str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting a file system needs root: {done.stderr.strip()}")


def must_mount(*arguments: str) -> None:
    """A mount that is possible where the fixture's was: a skip here would hide what is tested."""
    subprocess.run(["mount", *arguments], check=True)


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Sandbox]:
    """A sandbox whose run folder lies on a file system of 64 MiB and 600 inodes of its own."""
    runs = tmp_path / "run" / "runs"
    runs.mkdir(parents=True)
    mount(runs, "-t", "tmpfs", "-o", "size=64m,nr_inodes=600", "tmpfs")
    try:
        with Sandbox(tmp_path / "run", **SETTINGS) as sandbox:
            yield sandbox
    finally:
        subprocess.run(["umount", "-l", str(runs)], check=False)


def fill_inodes(folder: Path) -> Callable[[], None]:
    """Take every inode; returns what gives them back."""
    folder.mkdir()
    with contextlib.suppress(OSError):
        for number in range(10_000):
            (folder / str(number)).touch()
    return lambda: shutil.rmtree(folder)


def fill_disk(folder: Path) -> Callable[[], None]:
    """Take every byte; returns what gives them back."""
    with contextlib.suppress(OSError), folder.open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)
    return folder.unlink


def outage(box: Sandbox, driver: Any, restore: Callable[[], object], seconds: float, words: str) -> None:
    """Wait until the host is closed for this reason, let the outage last, end it, and see the host open again."""
    opened = len(box.events("host.opened"))
    try:
        until(lambda: words in tail(box), 60, lambda: f"the host closed for {words!r}: {tail(box)}")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert driver.poll() is None, tail(box)
            time.sleep(0.2)
    finally:
        restore()
    until(lambda: len(box.events("host.opened")) > opened, 60, lambda: f"the host opened: {tail(box)}")


def nobody_paid(box: Sandbox, driver: Any) -> None:
    """The run reaches its quotas with 0: no trial failed, none spent a retry."""
    assert ends(driver, box, 150) == 0, tail(box)
    assert "Traceback" not in tail(box), tail(box)
    trials = box.trials()
    problems = [*quota_problems(trials, SETTINGS["trials"], 2), *replay_problems(trials, box.folder)]
    problems += result_problems(box.folder)
    assert not problems, problems
    assert not any("retries" in trial["attrs"] for trial in trials), "a retry was spent"
    assert not any(r["reason"] in ("lost", "failed") for r in box.events("attempt.ended"))
    nothing_left(box)


def test_inodes_full_for_15_s_then_a_file_system_that_is_read_only(box: Sandbox) -> None:
    """No file can be made under the run folder; then nothing can be written there, as ext4 has it after an error. Each
    time the host is closed with that word and the path, and then goes on."""
    driver = box.start()
    training(box)
    outage(box, driver, fill_inodes(box.root / "runs" / "filler"), 15, f"no inodes left: {box.folder}")
    training(box)
    attempts = box.folder / "attempts"
    frozen = box.root / "frozen"
    frozen.mkdir()
    # In a place of its own first: a mount through which a trial has a file open for writing cannot be made read-only.
    must_mount("--bind", str(attempts), str(frozen))
    try:
        must_mount("-o", "remount,bind,ro", str(frozen))
        must_mount("--bind", str(frozen), str(attempts))
    finally:
        subprocess.run(["umount", "-l", str(frozen)], check=True)
    unmount = ["umount", "-l", str(attempts)]
    words = f"file system is read-only: {attempts}"
    outage(box, driver, lambda: subprocess.run(unmount, check=True), 5, words)
    nobody_paid(box, driver)


def test_disk_full_for_60_s(box: Sandbox) -> None:
    """No byte is left under the run folder for a minute: the same."""
    driver = box.start()
    training(box)
    outage(box, driver, fill_disk(box.root / "runs" / "filler"), 60, f"disk full: {box.folder}")
    nobody_paid(box, driver)


def test_a_start_without_room_for_the_workers_own_files_is_one_line(box: Sandbox) -> None:
    """The disk gets full while the command starts: it ends with 2 and says what and where; the next start goes on."""
    scratch = box.folder / "dask"
    scratch.mkdir(parents=True)
    mount(scratch, "-t", "tmpfs", "-o", "nr_inodes=1", "tmpfs")
    try:
        assert ends(box.start(), box, 60) == 2, tail(box)
    finally:
        subprocess.run(["umount", "-l", str(scratch)], check=True)
    assert "Traceback" not in tail(box) and f"cannot use {scratch}" in tail(box), tail(box)
    assert "No space left on device" in tail(box), tail(box)
    nobody_paid(box, box.start())


def test_no_process_to_be_had_and_dasks_scratch_cleared_away(box: Sandbox) -> None:
    """A limit on processes is reached: what runs goes on, nothing else starts until there is one again. Then somebody's
    clean-up takes the worker's own folder."""
    group = PIDS / f"headroom-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no limit on processes can be set here: {error}")
    try:
        driver = box.start()
        training(box)
        for process in box.processes():
            if process.role in ("worker", "nanny", "agent", "fork server"):
                (group / "cgroup.procs").write_text(str(process.pid))
        spare = box.of_role("spare")
        (group / "pids.max").write_text("1")
        for process in spare:  # the next trial needs a process that is not to be had
            process.kill()
        outage(box, driver, lambda: _lift(group), 5, "no process to be had")
        training(box)
        shutil.rmtree(box.folder / "dask")
        nobody_paid(box, driver)
    finally:
        box.end_all()
        until(
            lambda: _removed(group), 60, lambda: f"its group is empty: {(group / 'cgroup.procs').read_text().split()}"
        )


def _lift(group: Path) -> None:
    (group / "pids.max").write_text("max")


def _removed(group: Path) -> bool:
    """A process that is ending has no name and no environment any more, but is in its group until it is reaped."""
    with contextlib.suppress(OSError):
        group.rmdir()
    return not group.exists()

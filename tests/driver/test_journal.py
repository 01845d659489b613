"""The journal on a real disk: torn lines, a full disk, and what a restart reads out of it."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from scheduler.driver import decisions
from scheduler.driver.journal import Journal, read
from scheduler.driver.lock import DriverLock
from scheduler.model import EnqueueRetry, FinalState, TellTrial, TrialId, UsageError


def test_lines_come_back_in_order(tmp_path: Path) -> None:
    """What was written is read back, with a version and a time on each line."""
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write("worker.joined", slots=2)
    journal.write("trial.told", durable=True, trial="s/0", state="COMPLETE")
    journal.close()
    records = list(read(tmp_path / "journal.jsonl"))
    assert [r["event"] for r in records] == ["worker.joined", "trial.told"]
    assert all(r["v"] == 1 and r["unix"] > 0 for r in records)


@pytest.mark.parametrize("torn", [b'{"event": "half', b'{"event": "whole"}', b"\xff\xfe\x00"])
def test_a_torn_last_line_is_dropped_and_the_next_one_is_whole(tmp_path: Path, torn: bytes) -> None:
    """A crash in the middle of a write costs that line at most."""
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"event": "first"}\n' + torn)
    journal = Journal(path)
    assert journal.was_torn
    journal.write("next")
    journal.close()
    events = [r["event"] for r in read(path)]
    assert events[0] == "first"
    assert events[-1] == "next"


def test_no_file_is_no_record(tmp_path: Path) -> None:
    """A run that never started has nothing to replay."""
    assert list(read(tmp_path / "none.jsonl")) == []


def test_threads_do_not_mix_their_lines(tmp_path: Path) -> None:
    """Every line is whole, whoever writes."""
    journal = Journal(tmp_path / "journal.jsonl")

    def write(n: int) -> None:
        for _ in range(50):
            journal.write("line", n=n, text="x" * 5000)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal.close()
    assert sorted(r["n"] for r in read(tmp_path / "journal.jsonl")) == sorted([0, 1, 2, 3] * 50)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mount = tmp_path / "small"
    mount.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)], check=False)
    if done.returncode:
        pytest.skip("cannot mount a tmpfs here")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_holds_lines_back_and_loses_none(small_disk: Path) -> None:
    """Writing goes on without an error; once there is room everything is there, in order and whole."""
    (small_disk / "fill").write_bytes(b"x" * 48 * 1024)
    journal = Journal(small_disk / "journal.jsonl")
    for number in range(40):
        journal.write("line", durable=True, n=number, text="x" * 1000)
    assert journal.held > 0
    assert not journal.flush()
    (small_disk / "fill").unlink()
    assert journal.flush()
    journal.close()
    assert [r["n"] for r in read(small_disk / "journal.jsonl")] == list(range(40))


TELL = TellTrial(trial=TrialId("run/2M", 3), state=FinalState.PRUNED, value=None, attrs={"a": 1}, constraint=1.0)
RETRY = EnqueueRetry(trial=TrialId("run/2M", 4), attempt=2, resume_from="/c", reason="lost", attrs={})


def test_decisions_are_told_again_until_they_are_confirmed(tmp_path: Path) -> None:
    """What was decided and not confirmed comes back as the very same command."""
    journal = Journal(tmp_path / "journal.jsonl")
    for command in (TELL, RETRY):
        name, fields = decisions.write(command)
        journal.write(name, durable=True, **fields)
    assert decisions.outstanding(read(journal.path)) == {TELL.trial: TELL, RETRY.trial: RETRY}
    journal.write("trial.told", trial=str(TELL.trial), state="PRUNED")
    assert decisions.outstanding(read(journal.path)) == {RETRY.trial: RETRY}
    journal.close()


def test_a_decision_that_does_not_parse_is_left_to_the_evidence() -> None:
    """A line of another version is skipped, not fatal."""
    assert decisions.outstanding([{"event": "trial.ended", "trial": "s/0", "state": "SOMETHING"}]) == {}


def test_the_second_driver_is_refused_with_the_pid_of_the_first(tmp_path: Path) -> None:
    """The lock names its holder, and is free again once that has let go."""
    first = DriverLock(tmp_path / "driver.lock")
    with pytest.raises(UsageError, match=rf"driver with pid {os.getpid()}"):
        DriverLock(tmp_path / "driver.lock")
    first.release()
    DriverLock(tmp_path / "driver.lock").release()

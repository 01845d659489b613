"""The watchdog process without faults: it starts, watches, publishes and leaves; and its parts on their own.

What it does when things go wrong is in `faults/test_watchdog_faults.py`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from scheduler.host import vitals
from scheduler.host.registry import HostRegistry, Registration
from scheduler.host.signals import catches, never, send
from scheduler.model import Pressure
from scheduler.watchdog import watchdog
from scheduler.watchdog.election import Election
from tests.waiting import wait_until

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def registry(tmp_path: Path) -> HostRegistry:
    """An empty registry."""
    return HostRegistry(tmp_path / "host")


def registration(process: subprocess.Popen[Any], folder: Path) -> Registration:
    """An agent's registration of this process."""
    return Registration(
        attempt="s/1/1",
        slug="s.t0001.a1",
        pid=process.pid,
        start_time=vitals.start_time(process.pid) or 0.0,
        reservation_bytes=2**30,
        folder=str(folder),
        launched=time.monotonic(),
        owner_start=vitals.start_time(os.getpid()),
    )


def test_start_watch_leave(registry: HostRegistry, tmp_path: Path) -> None:
    """Started as an agent starts it: it publishes what a trial takes, and leaves when all others have."""
    registry.thresholds({"sample_s": 0.2, "host_sample_s": 0.2})
    process = watchdog.start(registry.root)
    trial = subprocess.Popen(["sleep", "600"], start_new_session=True)
    reg = registration(trial, tmp_path)
    try:
        registry.register(reg)
        registry.tick(reg, 1, time.monotonic())
        reading = wait_until(lambda: (r := registry.pressure()) and r.used_bytes and r, "a reading with the trial")
        assert reading.level in Pressure and reg.key in reading.used_bytes
        assert reading.closed_reason is None
        assert process.stdin is not None
        process.stdin.close()
        trial.kill()
        trial.wait()
        registry.deregister(reg)
        assert process.wait(20) == 0
        log = [json.loads(line) for line in Path(registry.root, "watchdog.log").read_text().splitlines()]
        assert {"watchdog.elected", "policy.read", "watchdog.left"} <= {line["event"] for line in log}
        assert not registry.kills()
    finally:
        for each in (trial, process):
            if each.poll() is None:
                each.kill()
            each.wait()


def test_standby_waits_and_leaves_with_its_agent(registry: HostRegistry) -> None:
    """A second one does nothing while the first lives, and leaves when its own agent does."""
    first, second = watchdog.start(registry.root), None
    try:
        wait_until(registry.pressure, "the first publishes")
        second = watchdog.start(registry.root)
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(1.0)
        assert second.stdin is not None
        second.stdin.close()
        assert second.wait(10) == 0
        first.send_signal(signal.SIGTERM)
        assert first.wait(10) == 0
    finally:
        for each in (first, second):
            if each is not None:
                each.kill()
                each.wait()


def test_it_imports_nothing_large() -> None:
    """No torch, dask, optuna, pydantic: it must stay small and answer while the host swaps."""
    code = (
        "import sys, scheduler.watchdog\n"
        "names = {m.split('.')[0] for m in sys.modules}\n"
        "print(sorted(names & {'torch', 'dask', 'distributed', 'optuna', 'pydantic', 'numpy', 'asyncio', 'yaml'}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_signals_hit_only_the_process_meant() -> None:
    """Another start time under the same pid, this process, its parent and init are never signalled."""
    process = subprocess.Popen(["sleep", "600"])
    start = vitals.start_time(process.pid)
    try:
        assert start is not None
        assert not send((process.pid, start + 1.0), signal.SIGKILL, vitals.start_time)
        for pid in never():
            assert not send((pid, vitals.start_time(pid) or 0.0), 0, vitals.start_time)
        assert process.poll() is None
        assert send((process.pid, start), signal.SIGKILL, vitals.start_time)
        assert process.wait(10) == -signal.SIGKILL
        assert not send((process.pid, start), signal.SIGKILL, vitals.start_time)
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_only_a_process_that_handles_it_is_asked_for_its_stack() -> None:
    """SIGUSR1 kills a process without a handler: it must be known to have one."""
    script = "import faulthandler, signal\n{}print('up', flush=True)\ninput()"
    for line, expected in (("", False), ("faulthandler.register(signal.SIGUSR1)\n", True)):
        process = subprocess.Popen(
            [sys.executable, "-c", script.format(line)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None
            process.stdout.readline()
            assert catches(process.pid, signal.SIGUSR1) is expected
        finally:
            process.kill()
            process.communicate()


def test_a_removed_lock_file_ends_the_term(registry: HostRegistry) -> None:
    """When a cleaner of /tmp takes the lock away, its holder notices, so that there are not two."""
    first, second = Election(registry), Election(registry)
    assert first.won() and not second.won() and first.won()
    os.unlink(os.path.join(registry.root, "watchdog.lock"))
    assert second.won()
    assert not first.won() and second.won()


def test_a_policy_that_cannot_be_read_keeps_the_old_one(registry: HostRegistry) -> None:
    """Nonsense in the thresholds does not end the watchdog nor change what it judges by."""
    one = watchdog.Watchdog(registry)
    registry.thresholds({"stall_after_s": 5.0})
    one.take_over(time.monotonic())
    assert one.evaluator.thresholds.stall_after_s == 5.0
    registry.thresholds({"stall_after_s": "soon"})
    os.utime(os.path.join(registry.root, "policy.json"), ns=(1, 1))
    one.turn(time.monotonic())
    assert one.evaluator.thresholds.stall_after_s == 5.0


def test_kills_left_by_another_boot_are_closed(registry: HostRegistry) -> None:
    """After a restart of the machine an unfinished kill is finished: its victim is gone."""
    registry.record("k1", "intent", 1.0, attempt="s/1/1", pid=os.getpid(), start_time=1.0, boot_id="another", folder="")
    registry.record("k1", "term", 2.0)
    watchdog.Watchdog(registry).take_over(time.monotonic())
    (story,) = registry.kills()
    assert story.finished and story.has("dead")


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong argument gives one line and exit code 2."""
    assert watchdog.main(["--root"]) == 2
    assert "usage" in capsys.readouterr().err

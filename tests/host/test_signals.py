"""Signals to real processes: only to the one that is meant, and what is learnt of it before it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scheduler.host import signals, vitals
from tests.waiting import wait_until

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
WITH_STACKS = """
import faulthandler, signal, sys, time
faulthandler.register(signal.SIGUSR1, file=open(sys.argv[1], "a"))
def stands_here():
    print(flush=True)
    time.sleep(600)
stands_here()
"""
WITHOUT = "import time; print(flush=True); time.sleep(600)"


class Started:
    """A process that has begun, with its identity."""

    def __init__(self, code: str, log: Path) -> None:
        self.popen = subprocess.Popen([sys.executable, "-c", code, str(log)], stdout=subprocess.PIPE)
        assert self.popen.stdout is not None
        self.popen.stdout.readline()
        self.pid = self.popen.pid
        self.identity = (self.pid, vitals.start_time(self.pid) or 0.0)

    def end(self) -> None:
        """End and reap it."""
        self.popen.kill()
        self.popen.communicate()


@pytest.fixture
def stacks(tmp_path: Path) -> Iterator[Started]:
    """One that shows its stacks on SIGUSR1, as a trial does."""
    started = Started(WITH_STACKS, tmp_path / "log")
    yield started
    started.end()


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Started]:
    """One that SIGUSR1 would kill."""
    started = Started(WITHOUT, tmp_path / "log")
    yield started
    started.end()


@linux_only
def test_the_stack_of_a_process_is_asked_for_and_read(stacks: Started, tmp_path: Path) -> None:
    """Only what it writes after it was asked; beside it where it stands in the kernel."""
    log = tmp_path / "log"
    log.write_text("what it had printed before\n")
    request = signals.StackRequest(stacks.identity, log, vitals.start_time)
    assert request.asked and "State" in request.kernel["status"]
    answer = wait_until(lambda: (found := request.answer()) and "stands_here" in found and found, "its stack is there")
    assert "printed before" not in answer


@linux_only
def test_who_would_die_of_the_question_is_not_asked(plain: Started, tmp_path: Path) -> None:
    """A function may have taken the handler away: then nothing is known of its stack, and it lives."""
    request = signals.StackRequest(plain.identity, tmp_path / "log", vitals.start_time)
    assert not request.asked and request.answer() is None
    assert plain.popen.poll() is None
    assert not signals.catches(plain.pid, signal.SIGUSR1)
    assert not signals.catches(plain.pid + 100_000_000, signal.SIGUSR1)


def test_of_a_log_that_was_cut_meanwhile_the_end_is_read(tmp_path: Path, stacks: Started) -> None:
    """A bounded log starts anew when it is full, and is shorter than when the process was asked."""
    log = tmp_path / "log"
    log.write_text("x" * 100_000)
    request = signals.StackRequest(stacks.identity, log, vitals.start_time)
    wait_until(lambda: log.stat().st_size > 100_000, "its stack is written")
    log.write_text("the last words\n")
    assert request.answer() == "the last words"


def test_another_process_of_that_number_is_left_alone(plain: Started) -> None:
    """Its start time is not the one that was known: neither signalled nor freed of its memory."""
    pid, start = plain.identity
    assert not signals.send((pid, start + 1.0), signal.SIGKILL, vitals.start_time)
    assert not signals.release_memory((pid, start + 1.0), vitals.start_time)
    assert plain.popen.poll() is None
    gone = (pid + 100_000_000, start)
    assert signals.send_all([(pid, start), gone], signal.SIGKILL, vitals.start_time) == 1
    assert plain.popen.wait(30) == -signal.SIGKILL
    assert not signals.send((pid, start), signal.SIGKILL, vitals.start_time)


def test_without_a_pidfd_the_number_is_signalled_after_the_same_check(
    plain: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old kernel, or a container that forbids it."""
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    assert not signals.send((plain.pid, plain.identity[1] + 1.0), signal.SIGTERM, vitals.start_time)
    assert signals.send(plain.identity, signal.SIGTERM, vitals.start_time)
    assert plain.popen.wait(30) == -signal.SIGTERM


def test_nobody_signals_itself_or_whoever_started_it() -> None:
    """Whatever a registration says."""
    for pid in (1, os.getpid(), os.getppid()):
        assert not signals.send((pid, vitals.start_time(pid) or 0.0), 0, vitals.start_time)

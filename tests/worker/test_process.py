"""What the end of an attempt means (`conclude`), and the trial process seen through its pipes."""

from __future__ import annotations

import signal
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from scheduler.files.bounded_log import LIMIT_BYTES
from scheduler.worker.trial_process import TrialProcess, TrialStartError
from tests.waiting import wait_until

Module = Callable[[str], TrialProcess]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Module:
    """Write a stand-in for the trial's module: real processes, made to misbehave."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(body: str) -> TrialProcess:
        (tmp_path / "stand_in.py").write_text("import sys, os, time, json\n" + textwrap.dedent(body))
        return TrialProcess.start(environment={}, log=tmp_path / "log", module="stand_in")

    return write


def test_process_that_dies_before_ready_is_explained(module: Module) -> None:
    """The error says that it died, how, and what it wrote last."""
    process = module("sys.exit('no such device')")
    with pytest.raises(TrialStartError, match=r"ended with status 1.*no such device"):
        process.wait_ready(30)
    process.close()


def test_process_that_never_gets_ready_is_ended(module: Module) -> None:
    """A process that says nothing is killed at the deadline."""
    process = module("time.sleep(600)")
    with pytest.raises(TrialStartError, match="did not get ready"):
        process.wait_ready(1)
    assert process.close() == -signal.SIGKILL


@pytest.mark.parametrize("said", ["2", "null", "true", '"1"', "[1]"])
def test_a_process_of_another_version_is_refused_in_one_line(module: Module, said: str) -> None:
    """It says what is spoken on which side and what to do; no field of a message that is not ours is looked at."""
    line = '{"type": "ready", "protocol": ' + said + ', "rss_bytes": "much"}'
    process = module(f"print({line!r}, flush=True)\ntime.sleep(600)")
    with pytest.raises(TrialStartError) as refused:
        process.wait_ready(30)
    assert "speaks protocol" in str(refused.value) and "install the same version" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert process.close() == -signal.SIGKILL


def test_messages_end_with_the_process_although_a_grandchild_holds_the_pipe(module: Module) -> None:
    """A forked grandchild that keeps stdout open must not keep the slot."""
    process = module(
        """
        print(json.dumps({"type": "ready"}), flush=True)
        if os.fork() == 0:
            time.sleep(600)
        print(json.dumps({"type": "result", "pid": os.getpid()}), flush=True)
        os._exit(0)
        """
    )
    started = time.monotonic()
    assert [message["type"] for message in process.messages()] == ["ready", "result"]
    assert time.monotonic() - started < 30
    assert process.close() == 0
    wait_until(lambda: not _session(process.pid), "the grandchild of the session is dead")


def test_lines_that_are_no_protocol_are_dropped(module: Module) -> None:
    """Half a line, binary rubbish and other JSON do not disturb what follows."""
    process = module(
        r"""
        os.write(1, b'\xff\xfe rubbish\n[1, 2]\n"text"\n{"type": "progress", "step": 1}\n{"type": "torn')
        """
    )
    assert [message["type"] for message in process.messages()] == ["progress"]
    process.close()


def test_send_to_a_dead_process_is_false(module: Module) -> None:
    """Whoever writes to a trial that is gone is told so, not interrupted."""
    process = module("pass")
    assert list(process.messages()) == []
    assert process.send({"cmd": "stop"}) is False
    process.close()


def test_kill_takes_the_whole_session(module: Module) -> None:
    """SIGKILL reaches children in the same session too."""
    process = module(
        """
        import subprocess
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(json.dumps({"type": "ready", "protocol": 1, "rss_bytes": child.pid}), flush=True)
        time.sleep(600)
        """
    )
    child = psutil.Process(process.wait_ready(30).rss_bytes)
    process.kill()
    assert process.close() == -signal.SIGKILL
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, "the child is dead")


def test_a_closed_process_signals_nobody(module: Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it is reaped its number may belong to another process: neither kill nor close touches it again."""
    process = module("pass")
    assert process.close() == 0
    sent: list[int] = []
    monkeypatch.setattr("os.killpg", lambda pid, number: sent.append(pid))
    monkeypatch.setattr("os.kill", lambda pid, number: sent.append(pid))
    process.kill()
    assert process.close() == 0
    assert sent == []


def _session(pid: int) -> list[int]:
    if sys.platform != "linux":
        return []
    found = []
    for process in psutil.process_iter(["pid", "status"]):
        try:
            stat = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(stat[3]) == pid and stat[0] != "Z":
            found.append(process.pid)
    return found


def test_output_goes_to_the_spares_log_then_to_the_attempts(module: Module, tmp_path: Path) -> None:
    """What was written before a log was named stays with the spare; raw writes, children, and the last words of a
    process that dies of a signal are all in the attempt's."""
    process = module(
        """
        import faulthandler, subprocess
        faulthandler.enable(file=2)
        os.write(2, b"before\\n")
        print(json.dumps({"type": "ready", "protocol": 1}), flush=True)
        sys.stdin.readline()
        os.write(2, b"raw\\n")
        subprocess.run(["sh", "-c", "echo child >&2"])
        os.write(2, b"x" * 500_000 + b"last words\\n")
        os.abort()
        """
    )
    process.wait_ready(30)
    process.log_to(tmp_path / "attempt.log")
    process.send({})
    assert list(process.messages()) == []
    assert process.close() == -signal.SIGABRT
    assert (tmp_path / "log").read_text() == "before\n"
    text = (tmp_path / "attempt.log").read_text()
    assert text.startswith("raw\nchild\nxxx") and "last words" in text and "Fatal Python error: Aborted" in text


def test_a_grandchild_that_writes_for_ever_does_not_keep_the_attempt(module: Module, tmp_path: Path) -> None:
    """It holds both pipes and never stops: the attempt ends with its process all the same, its own words kept."""
    process = module(
        """
        os.write(2, b"mine\\n")
        if os.fork() == 0:
            os.setsid()
            while True:
                try:
                    os.write(2, b"y" * 1000)
                except OSError:
                    os._exit(0)
        os.write(1, b'{"type": "result"}\\n')
        os._exit(0)
        """
    )
    assert [message["type"] for message in process.messages()] == ["result"]
    assert process.close() == 0
    assert (tmp_path / "log").read_bytes().startswith((b"mine\n", b"y"))
    assert b"mine\n" in (tmp_path / "log").read_bytes()


def test_who_closes_the_protocol_is_read_on(module: Module, tmp_path: Path) -> None:
    """A function that closes our pipe and then prints more than a pipe holds is not left waiting for a reader."""
    process = module(
        """
        os.close(1)
        for _ in range(50):
            os.write(2, b"y" * 100_000)
        os._exit(7)
        """
    )
    assert list(process.messages()) == []
    assert process.close() == 7
    assert (tmp_path / "log").stat().st_size == 5_000_000


def test_a_flood_does_not_delay_messages(module: Module, tmp_path: Path) -> None:
    """Its messages are read between two looks at its output; what is over the log's limit is left out of it."""
    process = module(
        """
        for n in range(100):
            os.write(1, b'{"type": "progress", "step": %d}\\n' % n)
            os.write(2, b"y" * 2**20)
        """
    )
    assert [message["step"] for message in process.messages()] == list(range(100))
    assert process.close() == 0
    assert (tmp_path / "log").stat().st_size <= LIMIT_BYTES
    assert b"bytes left out: a log is kept to 64 MiB" in (tmp_path / "log").read_bytes()

"""The trial process, run for real: its protocol, and everything a user's function may do to it."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from training import hpo
from training.processes import ORPHANED

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 60.0
Json = dict[str, Any]


class Process:
    """A trial process and what it says."""

    def __init__(self, folder: Path, *arguments: str, stderr: int | None = None) -> None:
        self.folder = folder
        self.stderr = (folder / "output").open("wb")
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "training.trial", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr if stderr is None else stderr,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
            start_new_session=True,
        )
        self.messages: queue.Queue[Json | None] = queue.Queue()
        self.heard: list[Json] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.messages.put(json.loads(line))
        self.messages.put(None)

    def wait_for(self, kind: str) -> Json:
        """The next message of a kind; fails at the end of output or after the deadline."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            message = self.messages.get(timeout=max(0.01, deadline - time.monotonic()))
            if message is None:
                raise AssertionError(f"no {kind!r}; heard {self.heard}; log: {self.log()}")
            self.heard.append(message)
            if message["type"] == kind:
                return message

    def give(self, objective: str, **task: Any) -> None:
        """Hand over a task."""
        base = {"protocol": 1, "attempt": "study/7/1", "params": {"a": 1}, "context": {}, "resume_from": None}
        folder = str(self.folder / "attempt")
        self.send({**base, "objective": objective, "folder": folder, "threads": 1, **task})

    def send(self, message: Json) -> None:
        """Write one line to its stdin."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(json.dumps(message).encode() + b"\n")
        self.popen.stdin.flush()

    def ended(self) -> int:
        """Wait for its end; every message is in `heard` then."""
        status = self.popen.wait(DEADLINE_S)
        while (message := self.messages.get(timeout=DEADLINE_S)) is not None:
            self.heard.append(message)
        return status

    def log(self) -> str:
        """What its log holds so far."""
        return (self.folder / "output").read_text(errors="replace")

    def result_file(self) -> Json:
        """The durable result."""
        result: Json = json.loads((self.folder / "attempt" / "result.json").read_text())
        return result

    def close(self) -> None:
        """Kill it if it is still there."""
        if self.popen.poll() is None:
            os.killpg(self.popen.pid, signal.SIGKILL)
            self.popen.wait()
        self.close_stdin()
        self.stderr.close()

    def close_stdin(self) -> None:
        """Let it see that whoever started it is gone."""
        assert self.popen.stdin is not None
        self.popen.stdin.close()


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    """A ready trial process, killed at the end."""
    started = Process(tmp_path)
    yield started
    started.close()


def last_of(process: Process) -> Json:
    """The one final message."""
    finals = [message for message in process.heard if message["type"] in {"result", "error"}]
    assert len(finals) == 1 and process.heard[-1] == finals[0], process.heard
    return finals[0]


def real_task(**context: Any) -> Json:
    """A small real trial: the first 2M architecture's data, with a far smaller model."""
    params = {"d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": 32, "dropout": 0.1, "learning_rate": 1e-3}
    params |= {"weight_decay": 1e-3, "warmup_steps": 5, "epochs": 2, "micro_batch": 128, "accumulation_steps": 2}
    base = {"budget": "2M", "horizon": 1, "data": None, "max_epochs": None, "max_steps": None, "device": "cpu"}
    base |= {"seed": 0, "early_stopping": {"patience": 10, "min_delta": 0.001}}
    return {"params": params, "context": {**base, **context}}


def test_protocol_from_ready_to_result(process: Process) -> None:
    """A good objective gives ready, started, ticks, progress, settled and one result, which is durable first."""
    ready = process.wait_for("ready")
    assert ready["protocol"] == 1 and ready["pid"] == process.popen.pid
    assert 0 < ready["rss_bytes"] <= ready["peak_bytes"]
    assert ready["environment"].count("/") == 1
    process.give("objectives:good")
    assert process.ended() == 0
    kinds = [message["type"] for message in process.heard]
    assert kinds == ["ready", "started", "tick", "progress", "progress", "progress", "settled", "result"]
    last = last_of(process)
    assert last["result"] == {"value": 0.25, "epochs": 3, "stop_reason": "completed", "metrics": {"seen": {"a": 1}}}
    assert last["peak_bytes"] >= ready["peak_bytes"] and last["duration_s"] >= 0
    assert (last["environment"], last["runtime_bytes"]) == (ready["environment"], ready["rss_bytes"])
    assert process.result_file() == last


def test_real_trial_trains_on_the_sample(process: Process) -> None:
    """The real objective trains a small model on the real data, says so per epoch, and leaves a checkpoint."""
    process.give("training.hpo:objective", **real_task())
    assert process.ended() == 0, process.log()
    result = last_of(process)["result"]
    assert result["stop_reason"] == "completed" and result["epochs"] == 2 and 0 < result["value"] < 2
    steps = [message["step"] for message in process.heard if message["type"] == "progress"]
    assert steps == [1, 2]
    checkpoints = [message["path"] for message in process.heard if message["type"] == "checkpoint"]
    assert len(checkpoints) == 2 and Path(checkpoints[-1]).exists()
    assert "epoch 2: train" in process.log()


def test_real_trial_drains_and_resumes_to_the_same_result(tmp_path: Path) -> None:
    """Stopped by `drain` and resumed in another process, a trial has the losses of one never stopped."""

    def run(name: str, *, drain: bool = False, resume_from: str | None = None) -> Process:
        folder = tmp_path / name
        folder.mkdir()
        process = Process(folder)
        task = real_task()
        task["params"]["epochs"] = 6
        process.give("training.hpo:objective", **task, resume_from=resume_from)
        if drain:
            process.wait_for("progress")
            process.send({"cmd": "stop", "reason": "drain"})
        assert process.ended() == 0, process.log()
        process.close()
        return process

    whole = last_of(run("whole"))["result"]
    first = run("first", drain=True)
    assert last_of(first)["result"]["stop_reason"] == "interrupted"
    checkpoint = [message["path"] for message in first.heard if message["type"] == "checkpoint"][-1]
    second = run("second", resume_from=checkpoint)
    resumed = last_of(second)["result"]
    assert resumed["metrics"]["val_losses"] == whole["metrics"]["val_losses"]
    assert resumed["metrics"]["train_losses"] == whole["metrics"]["train_losses"]
    assert resumed["value"] == whole["value"] and resumed["metrics"]["resumed_epoch"] >= 1
    announced = next(message for message in second.heard if message["type"] == "checkpoint")
    assert announced["path"] == checkpoint, "until it writes its own, the old checkpoint is the last good one"


def test_torn_checkpoint_starts_over_and_says_so(process: Process, tmp_path: Path) -> None:
    """A checkpoint that is no checkpoint is rejected in log and result, and the trial runs from its beginning."""
    torn = tmp_path / "torn.pt"
    torn.write_bytes(b"PK\x03\x04 half a file")
    process.give("training.hpo:objective", **real_task(max_steps=2), resume_from=str(torn))
    assert process.ended() == 0
    metrics = last_of(process)["result"]["metrics"]
    assert str(torn) in metrics["checkpoint_rejected"] and metrics["resumed_epoch"] is None
    assert "starting over" in process.log()


def test_trial_process_stays_small(process: Process) -> None:
    """Neither pandas nor torch's compiler is imported: together they would take 145 MiB of every trial."""
    process.give("objectives:real_and_modules", **real_task(max_steps=3))
    assert process.ended() == 0
    assert last_of(process)["result"]["metrics"]["large"] == []


@pytest.mark.parametrize(
    ("name", "error"), [("raises", "RuntimeError: the learning rate was silly"), ("exits", "SystemExit: 0")]
)
def test_mistakes_become_errors(process: Process, name: str, error: str) -> None:
    """An exception and sys.exit() alike are an error with a traceback, durable, exit status 1."""
    process.give(f"objectives:{name}")
    assert process.ended() == 1
    last = last_of(process)
    assert last["type"] == "error" and last["error"].startswith(error)
    assert "Traceback" in last["traceback"] and last["traceback"] in process.log()
    assert process.result_file() == last


@pytest.mark.parametrize(("name", "number"), [("aborts", signal.SIGABRT), ("segfaults", signal.SIGSEGV)])
def test_crashes_leave_a_stack_in_the_log(process: Process, name: str, number: int) -> None:
    """A process that dies of a signal sends no result; its log has the Python stack."""
    process.give(f"objectives:{name}")
    assert process.ended() == -number
    assert not [message for message in process.heard if message["type"] in {"result", "error"}]
    assert "Fatal Python error" in process.log() and name in process.log()


def test_prints_go_to_the_log(process: Process) -> None:
    """Prints, raw writes to descriptor 1 and a child's output land in the log, not in the protocol."""
    process.give("objectives:prints")
    assert process.ended() == 0
    assert last_of(process)["result"]["value"] == 0.5
    assert '"value": -1' in process.log() and "from a child" in process.log()


def test_endless_print_can_be_stopped(process: Process) -> None:
    """A function that prints for ever still hears `stop`."""
    process.give("objectives:floods")
    process.wait_for("started")
    process.send({"cmd": "stop", "reason": "drain"})
    assert process.ended() == 0
    assert last_of(process)["result"] == {"value": None, "stop_reason": "interrupted"}


@pytest.fixture
def unread(tmp_path: Path) -> Iterator[tuple[Process, Callable[[], None]]]:
    """(a ready trial process, what closes the reading end of its output's pipe)."""
    reader, writer = os.pipe()
    started = Process(tmp_path, stderr=writer)
    os.close(writer)
    yield started, lambda: os.close(reader)
    started.close()


def test_a_failure_without_a_reader_is_no_word_of_the_functions(unread: tuple[Process, Callable[[], None]]) -> None:
    """Whoever read its output is gone, the end of stdin not here yet: a print fails, and nothing is said of that."""
    process, close_reader = unread
    process.give("objectives:prints_until_it_fails")
    process.wait_for("tick")
    close_reader()
    assert process.ended() == ORPHANED
    assert not (process.folder / "attempt" / "result.json").exists()
    assert not [message for message in process.heard if message["type"] in {"result", "error"}]


def test_a_result_without_a_reader_is_kept(unread: tuple[Process, Callable[[], None]]) -> None:
    """What was computed although nobody read its output any more is durable."""
    process, close_reader = unread
    process.give("objectives:returns_when_asked")
    process.wait_for("tick")
    close_reader()
    process.send({"cmd": "stop", "reason": "drain"})
    assert process.ended() == 0
    assert process.result_file()["result"]["value"] == 0.5


@pytest.mark.parametrize(("reason", "stop_reason"), [("drain", "interrupted"), ("prune", "pruned")])
def test_stop_is_heard(process: Process, reason: str, stop_reason: str) -> None:
    """`stop` reaches the training function with its reason."""
    process.give("objectives:waits")
    process.wait_for("tick")
    process.send({"cmd": "stop", "reason": reason})
    assert process.ended() == 0
    assert last_of(process)["result"]["stop_reason"] == stop_reason


def test_input_does_not_take_the_commands(process: Process) -> None:
    """A function that reads stdin finds it empty."""
    process.give("objectives:reads_stdin")
    assert process.ended() == 0
    assert last_of(process)["result"]["metrics"]["stdin"] == ""


def test_bare_number_is_a_result(process: Process) -> None:
    """An objective may return its value alone."""
    process.give("objectives:bare_number")
    assert process.ended() == 0
    assert last_of(process)["result"] == {"value": 0.5, "stop_reason": "completed"}


def test_users_talib_still_knows_pandas(process: Process) -> None:
    """That our own TA-Lib does without pandas is invisible to a user's function."""
    process.give("objectives:uses_pandas_and_talib")
    assert process.ended() == 0, process.log()
    assert last_of(process)["result"]["value"] == 2.5


def test_orphan_leaves_while_torch_computes(process: Process) -> None:
    """The end of stdin ends the process at once, also while it computes and hears nothing."""
    process.give("objectives:computes")
    process.wait_for("tick")
    process.close_stdin()
    assert process.ended() == ORPHANED


def test_orphan_takes_its_children_along(process: Process) -> None:
    """Processes that a user's function started die with it."""
    process.give("objectives:has_child")
    process.wait_for("tick")
    child = int((process.folder / "attempt" / "child").read_text())
    process.close_stdin()
    assert process.ended() == ORPHANED
    deadline = time.monotonic() + DEADLINE_S
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "the child is still alive"
        os.sched_yield()


@pytest.mark.skipif(sys.platform != "linux", reason="only on Linux are children ended")
def test_what_a_function_makes_of_its_childrens_end_is_no_result(process: Process) -> None:
    """When nobody waits any more its children are ended first: that it fails of that is not its own fault."""
    process.give("objectives:has_children")
    process.wait_for("tick")
    process.close_stdin()
    assert process.ended() == ORPHANED
    assert not (process.folder / "attempt" / "result.json").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux hands orphans to a subreaper")
def test_what_escapes_the_session_stays_below_and_ends_with_the_trial(process: Process) -> None:
    """A daemon that the training function left behind is the trial's to end, whatever session it is in."""
    process.give("objectives:leaves_a_daemon")
    assert process.ended() == 0
    result = last_of(process)["result"]
    assert result["value"] == 1.0
    daemon = int(result["metrics"]["children"][0])
    deadline = time.monotonic() + DEADLINE_S
    while Path(f"/proc/{daemon}").exists() and "Z" not in Path(f"/proc/{daemon}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "the daemon lives on"
        os.sched_yield()


def test_spare_leaves_quietly_without_a_task(process: Process) -> None:
    """A spare that is not needed any more ends with status 0."""
    process.wait_for("ready")
    process.close_stdin()
    assert process.ended() == 0


def test_foreign_thread_does_not_keep_the_process(process: Process) -> None:
    """A thread that the function left behind does not keep the process after its result."""
    process.give("objectives:leaves_thread")
    assert process.ended() == 0


def test_ctrl_c_is_ignored(process: Process) -> None:
    """SIGINT in the terminal is for the driver; the trial goes on."""
    process.give("objectives:waits")
    process.wait_for("tick")
    process.popen.send_signal(signal.SIGINT)
    process.send({"cmd": "stop", "reason": "drain"})
    assert process.ended() == 0


def test_stack_on_demand(process: Process) -> None:
    """SIGUSR1 writes the stacks of all threads into the log and changes nothing else."""
    process.give("objectives:waits")
    process.wait_for("tick")
    process.popen.send_signal(signal.SIGUSR1)
    deadline = time.monotonic() + DEADLINE_S
    while "in waits" not in process.log():
        assert time.monotonic() < deadline
        process.wait_for("tick")
    process.send({"cmd": "stop", "reason": "drain"})
    assert process.ended() == 0


def test_folder_that_cannot_be_made_is_an_error(process: Process, tmp_path: Path) -> None:
    """Without a folder there is no place for a result: an error, not silence."""
    (tmp_path / "file").write_text("")
    process.give("objectives:good", folder=str(tmp_path / "file" / "attempt"))
    assert process.ended() == 1
    assert last_of(process)["error"].startswith("OSError:")


def test_estimator_and_objective_share_the_candidates() -> None:
    """A candidate has all that the objective needs to build its model."""
    candidate = hpo.candidates({"budget": "2M"})[0]
    model = hpo.build_model({**candidate, "dropout": 0.0}, {}, 25)
    assert sum(p.numel() for p in model.parameters()) == candidate["param_count"]


def test_preload_names_what_is_imported(tmp_path: Path) -> None:
    """A spare told to preload nothing does not load torch, and runs a user's objective all the same."""
    process = Process(tmp_path, "--preload=")
    try:
        ready = process.wait_for("ready")
        process.give("objectives:good")
        assert process.ended() == 0 and last_of(process)["result"]["value"] == 0.25
        assert ready["peak_bytes"] < 60 * 2**20  # torch alone is some 200 MiB
    finally:
        process.close()

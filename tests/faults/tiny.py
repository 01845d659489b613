"""A user's training functions for the crash tests: epochs of some 50 ms, a real checkpoint after each, no torch.

Every epoch that is begun and every one that is done leaves a line in the file that CRASH_EPOCHS names, written before
anything else can happen: so the tests count what was really computed, whatever was killed and whatever was recorded.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MIB = 2**20


def candidates(context: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Forty architectures that differ in their index alone."""
    return [{"d_model": 64 + i, "n_layers": 2, "n_heads": 2, "d_ff": 128, "param_count": 1000 + i} for i in range(40)]


def sample(
    trial: Any, context: Mapping[str, Any], architectures: Sequence[Mapping[str, Any]], fit: Any
) -> dict[str, Any]:
    """An architecture and a learning rate, which two trials never share; the epochs are the context's."""
    index = trial.suggest_int("architecture", 0, len(architectures) - 1)
    rate = trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True)
    return {**architectures[index], "learning_rate": rate, "micro_batch": 1, "epochs": context["max_epochs"] or 10}


def estimate(params: Mapping[str, Any], context: Mapping[str, Any]) -> dict[str, Any]:
    """What such a process takes: the interpreter."""
    return {"host_bytes": 60 * MIB, "device_bytes": 0, "components": {"runtime": 60 * MIB}, "family": "tiny/cpu"}


def objective(task: Mapping[str, Any], progress: Any) -> dict[str, Any]:
    """Train: the loss of an epoch follows from the one before, so that a resume from anything else shows."""
    params = task["params"]
    path = Path(task["folder"]) / "checkpoint.safetensors"
    state = {"epoch": 0, "loss": 1.0, "rate": params["learning_rate"]}
    if task["resume_from"]:
        state = json.loads(Path(task["resume_from"]).read_text())
        assert state["rate"] == params["learning_rate"], "resumed from another trial's checkpoint"
    first = state["epoch"]
    pause = float(os.environ.get("CRASH_EPOCH_S", "0.05"))
    while state["epoch"] < params["epochs"]:
        note(task, "begun", state["epoch"] + 1)
        until = time.monotonic() + pause
        while (left := until - time.monotonic()) > 0:
            progress.tick()
            if progress.stop_requested:
                reason = {"drain": "interrupted", "prune": "pruned"}[progress.stop_requested]
                note(task, "left", state["epoch"] + 1)
                return {"value": state["loss"], "epochs": state["epoch"], "stop_reason": reason}
            time.sleep(min(left, 0.01))
        state = {**state, "epoch": state["epoch"] + 1, "loss": state["loss"] * 0.9 + params["learning_rate"]}
        note(task, "done", state["epoch"])
        write(path, state)
        progress.checkpoint(str(path), state["epoch"])
        progress.report(state["epoch"], state["loss"])
        if state["epoch"] == first + 1:
            progress.settled()
    return {"value": state["loss"], "epochs": state["epoch"], "metrics": {"resumed_epoch": first}}


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Replace a file, durably."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("w") as file:
        json.dump(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def note(task: Mapping[str, Any], what: str, epoch: int) -> None:
    """One line, in one write."""
    path = os.environ.get("CRASH_EPOCHS")
    if path:
        line = {"study": task["attempt"].split("/")[0], "rate": task["params"]["learning_rate"]}
        line |= {"attempt": task["attempt"], "what": what, "epoch": epoch, "pid": os.getpid()}
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(fd, json.dumps(line).encode() + b"\n")
        os.close(fd)


# -- objectives that make trouble --------------------------------------------------------------------------------------


def slow(task: Mapping[str, Any], progress: Any) -> dict[str, Any]:
    """Train in steps that hear nothing until they are over: an epoch is one of them."""
    return objective(task, _Slow(progress))


class _Slow:
    """Asks for a stop to be heard only right after an epoch."""

    def __init__(self, progress: Any) -> None:
        self._progress, self._epochs, self._seen = progress, 0, 0
        self._heard: str | None = None
        self.report, self.settled = progress.report, progress.settled

    def tick(self) -> None: ...

    def checkpoint(self, path: str, step: int) -> None:
        self._progress.checkpoint(path, step)
        self._epochs += 1

    @property
    def stop_requested(self) -> str | None:
        if self._seen != self._epochs:
            self._seen, self._heard = self._epochs, self._progress.stop_requested
        return self._heard


def ignores_stop(task: Mapping[str, Any], progress: Any) -> dict[str, Any]:
    """Train, but hear no request to stop."""
    return objective(task, _IgnoresStop(progress))


class _IgnoresStop:
    stop_requested = None

    def __init__(self, progress: Any) -> None:
        self.tick, self.report = progress.tick, progress.report
        self.settled, self.checkpoint = progress.settled, progress.checkpoint


def picky(task: Mapping[str, Any], progress: Any) -> dict[str, Any]:
    """Raise at horizon 1, train otherwise."""
    if task["context"]["horizon"] == 1:
        raise ValueError("horizon 1 is\nnot to my taste")
    return objective(task, progress)


def mistakes(task: Mapping[str, Any], progress: Any) -> Any:
    """A user's mistakes, one per horizon; what is none of them trains."""
    match task["context"]["horizon"]:
        case 1:
            raise RuntimeError("the learning rate was silly")
        case 2:
            progress.report(1, float("nan"))
        case 3:
            sys.exit(0)
        case 4:
            ctypes.string_at(0)
        case 5:
            print("about to print a lot")
            until = time.monotonic() + 3.0
            while time.monotonic() < until:
                print("x" * 10_000)
            return 0.5
        case 6:
            return "no number"
        case 7:
            os._exit(7)
    return objective(task, progress)


FLOOD_BYTES = 500 * MIB


def floods(task: Mapping[str, Any], progress: Any) -> float:
    """Write 500 MiB: prints, a child that inherits stderr, and raw writes; say what is left of it at the end."""
    print("the first line", flush=True)
    line = "x" * 999 + "\n"
    for _ in range(FLOOD_BYTES // 4 // 1000):
        progress.tick()
        sys.stderr.write(line)
    child = f"import os\nfor _ in range({FLOOD_BYTES // 2 // 1000}): os.write(2, b'y' * 999 + bytes([10]))"
    subprocess.run([sys.executable, "-c", child], check=True)
    for _ in range(FLOOD_BYTES // 4 // 10_000):
        progress.tick()
        os.write(1, line.encode() * 10)
    print("the last line", flush=True)
    return 0.5

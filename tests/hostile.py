"""Objectives that disturb whoever runs them, by accident or not: what they say must end nobody but themselves."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from training.progress import Progress
    from training.protocol import TrialProgress


def bad_name(task: Mapping[str, Any], progress: Progress) -> NoReturn:
    """Fail with a file name that is no UTF-8, as a listing of an old disk gives it."""
    raise ValueError(f"no such file: {os.fsdecode(b'caf' + bytes([0xE9]))}\x1b[2J")


def no_words(task: Mapping[str, Any], progress: Progress) -> NoReturn:
    """Fail with an error that cannot be shown."""

    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("mute")

    raise Mute


def huge_step(task: Mapping[str, Any], progress: Progress) -> float:
    """Report a step that no database holds."""
    progress.report(2**70, 0.5)
    return 1.0


def huge_value(task: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Return an integer of 6,000 digits."""
    return {"value": 10**6000}


def huge_result(task: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Return a sound value and beside it what no reader could take."""
    loop: list[Any] = []
    loop.append(loop)
    nested: list[Any] = []
    for _ in range(50_000):
        nested = [nested]
    metrics = {"digits": 10**6000, "nan": float("nan"), 7: "seven", "loop": loop, "deep": nested, "half": "\udc80"}
    return {"value": 0.25, "metrics": metrics, "series": ["x" * 1000] * 100_000}


def says_interrupted(task: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Say that it was interrupted, although nobody asked it to leave."""
    return {"value": None, "stop_reason": "interrupted"}


def says_does_not_fit(task: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Use a word that the quota is counted by."""
    return {"value": 0.5, "stop_reason": "does_not_fit"}


def forked_child_returns(task: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """A child that was forked comes back first, with a result of its own; the parent's is 0.5."""
    child = os.fork()
    if child == 0:
        progress.report(1, -777.0)
        return {"value": -777.0}
    os.waitpid(child, 0)
    return {"value": 0.5}


def forked_child_returns_alone(task: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """A child that was forked comes back with a result of its own, and its parent dies without a word."""
    child = os.fork()
    if child == 0:
        return {"value": -777.0}
    os.waitpid(child, 0)
    os._exit(9)


def forked_child_exits(task: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """A child that was forked leaves by sys.exit, as a careless library does."""
    child = os.fork()
    if child == 0:
        sys.exit("child says no")
    _, status = os.waitpid(child, 0)
    return {"value": float(os.waitstatus_to_exitcode(status))}


def closes_everything(task: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Close what it did not open, as a function that makes a daemon does, and open files of its own."""
    os.closerange(3, 65_536)
    own = Path(task["folder"]) / "own"
    files = [own.open("a") for _ in range(1200)]
    progress.report(1, 0.5)
    progress.tick()
    text = own.read_text()
    del files
    return {"value": float(len(text))}


def writes_to_the_pipe(task: Mapping[str, Any], progress: TrialProgress) -> dict[str, Any]:
    """Find the protocol's pipe and write into it whatever there is."""
    pipe = progress._outbox._descriptor
    for junk in (
        {"type": "progress", "step": "one", "value": None},
        {"type": "progress", "step": 2**70, "value": 1e308},
        {"type": "started"},
        {"type": "started", "peak_bytes": 2**70},
        {"type": "settled"},
        {"type": "checkpoint", "path": 5},
        {"type": "note", "text": {"a": ["\udcff"]}},
        {"type": "result", "result": [1]},
        {"type": ["result"]},
        {"kind": "nothing"},
        [1, 2],
    ):
        os.write(pipe, json.dumps(junk).encode() + b"\n")
    os.write(pipe, b'{"type": "tick", "n": 1' + b"0" * 5000 + b"}\n")
    os.write(pipe, b"[" * 60_000 + b"\n" + b"\xff\x00 no line at all ")
    os.write(pipe, b"x" * 9_000_000)
    os.write(pipe, b"\n")
    progress.report(3, 0.3)
    return {"value": 0.5}


def leaves_rubbish(task: Mapping[str, Any], progress: Progress) -> NoReturn:
    """Write into its folder what the next driver will read, and die without a word."""
    folder = Path(task["folder"])
    (folder / "result.json").write_text('{"type": "result", "result": "no"}')
    (folder / "kill.json").write_text('{"reason": ["evicted"], "evidence": 5}')
    (folder / "spec.json").write_text("[" * 50_000)
    os._exit(9)


def bad_path(task: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Announce a checkpoint whose name is no UTF-8."""
    progress.checkpoint(os.path.join(task["folder"], "caf\udce9.pt"), 1)
    return {"value": 0.5}


def full_disk(task: Mapping[str, Any], progress: Progress) -> float:
    """Write until there is no room, on a device that never has any."""
    with open("/dev/full", "w") as file:
        file.write("x" * 100_000)
    return 0.5


NAMES = [name for name, found in list(globals().items()) if callable(found) and found.__module__ == __name__]

"""For objectives that want more: the attempt they run in. `from scheduler import attempt`; nothing happens elsewhere.

    folder = attempt.folder                 # a folder of its own; elsewhere the current one
    if attempt.resume_from:                 # the checkpoint of an attempt before this one, or None
        model.load(attempt.resume_from)
    ...
    model.save(folder / "checkpoint.pt")
    attempt.checkpointed(folder / "checkpoint.pt")   # what the next attempt goes on from
    attempt.tick()                          # "still at work", for a step that neither computes nor reports
    if attempt.stop_requested: ...          # asked to leave: save now, the next `trial.report` leaves

So the same file runs under plain Optuna. A checkpoint called `checkpoint`, with any suffix, is found after the death of
the driver, too; any other is known to a driver that lives. Write it under another name and rename it: then it is whole.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_task: Mapping[str, Any] = {}
_progress: Any = None


def begin(task: Mapping[str, Any], progress: Any) -> None:
    """Know the attempt that this process is. Called by whoever runs the objective."""
    global _task, _progress
    _task, _progress = task, progress


def checkpointed(path: str | os.PathLike[str], step: int = 0) -> None:
    """Say that a checkpoint is complete at this path: the trial's next attempt is given it as `resume_from`."""
    if _progress is not None:
        _progress.checkpoint(os.path.abspath(path), step)


def tick() -> None:
    """Say that it is at work."""
    if _progress is not None:
        _progress.tick()


def __getattr__(name: str) -> Any:
    match name:
        case "folder":
            return Path(_task.get("folder") or ".")
        case "resume_from":
            found = _task.get("resume_from")
            return None if found is None else Path(found)
        case "stop_requested":
            return _progress is not None and _progress.stop_requested is not None
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

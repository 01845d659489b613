"""Checkpoints of finished trials: finding and removing them.

Whether one may go is the brain's decision. Works in the run folder as this host sees it; on another host's own disk
nothing is removed.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from scheduler.files.durable import read_json
from scheduler.model import AttemptId, TrialId

PATTERN = "checkpoint.pt*"  # with the halves that a killed process left behind


def drop(attempts: Path, trial: TrialId) -> list[Path]:
    """Remove the checkpoints of all attempts of a trial, and of the attempts that it was resumed from.

    Only files below `attempts` are touched. Returns what was removed; what cannot be removed stays.
    """
    slug = re.compile(re.escape(AttemptId(trial, 0).slug.removesuffix("0")) + r"\d+")
    todo = [path for path in attempts.iterdir() if slug.fullmatch(path.name)] if attempts.is_dir() else []
    seen: set[Path] = set()
    removed = []
    while todo:
        folder = todo.pop()
        if folder in seen:
            continue
        seen.add(folder)
        before = (read_json(str(folder / "spec.json")) or {}).get("resume_from")
        if isinstance(before, str) and before and Path(before).parent.parent == attempts:
            todo.append(Path(before).parent)
        for path in folder.glob(PATTERN):
            with contextlib.suppress(OSError):
                path.unlink()
                removed.append(path)
    return removed

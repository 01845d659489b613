"""How long trials took in earlier runs, read from their journals: what a forecast goes by before its own first ends.

A run counts for a study where its trials meant the same (`meaning.json`), whatever the run's name and seed; this run's
own folder, from before it was stopped, is one of them; `counted` says how far that one is. Reads only; what cannot be
read is passed over.
"""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scheduler.core import fault
from scheduler.core.durations import Took
from scheduler.driver import journal
from scheduler.model import AttemptId, ExitReason
from scheduler.model.journal_events import JournalEvent
from scheduler.settings.schema import Settings
from scheduler.workload.studies import meaning

MOST_RUNS = 20  # the latest
_LEFT_OUT = ("seed",)
_AGAIN = {ExitReason.LOST, ExitReason.INTERRUPTED, ExitReason.NOT_STARTED, ExitReason.NO_ROOM, ExitReason.PREEMPTED}


def past(settings: Settings) -> dict[str, list[Took]]:
    """Return by study of `settings` the trials of runs in the same folder that meant the same, oldest first."""
    wanted = {name: _compared(name, settings.name, each) for name, each in meaning(settings).items()}
    found: dict[str, list[Took]] = defaultdict(list)
    with contextlib.suppress(OSError):
        folders = [each for each in settings.runs_dir.iterdir() if (each / "journal.jsonl").is_file()]
        folders.sort(key=lambda each: ((each / "journal.jsonl").stat().st_mtime, each.name))
        for folder in folders[-MOST_RUNS:]:
            same = _same(folder, wanted)
            if same:
                for study, took in _ended(folder / "journal.jsonl"):
                    for name in same.get(study, ()):
                        found[name].append(took)
    return dict(found)


def counted(settings: Settings) -> dict[str, int]:
    """Return by study how many trials of this very run count towards its quota, as its journal has it."""
    found: dict[str, set[str]] = defaultdict(set)
    before: dict[str, int] = {}
    with contextlib.suppress(OSError):
        for record in journal.read(settings.run_folder / "journal.jsonl"):
            with contextlib.suppress(KeyError, ValueError, TypeError, AttributeError):
                match record["event"]:
                    case JournalEvent.STUDY_OPENED:  # the database knew it better
                        before[record["study"]] = int(record["counted"])
                        found[record["study"]].clear()
                    case JournalEvent.TRIAL_ENDED if record["attrs"].get("stop_reason") not in fault.NEVER_RAN:
                        found[_study_of(record)].add(record["trial"])
                    case JournalEvent.TRIAL_TAKEN:
                        found[_study_of(record)].discard(record["trial"])
    return {study: count + len(found[study]) for study, count in before.items()}


def _study_of(record: Mapping[str, Any]) -> str:
    return str(record["trial"]).rpartition("/")[0]


def _same(folder: Path, wanted: Mapping[str, str]) -> dict[str, list[str]]:
    """Study of that run -> those of ours whose trials mean the same."""
    try:
        told = json.loads((folder / "meaning.json").read_text(encoding="utf-8"))
        theirs = {name: _compared(name, folder.name, each) for name, each in told.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
    return {name: [own for own, key in wanted.items() if key == each] for name, each in theirs.items()}


def _compared(name: str, run: str, means: Mapping[str, Any]) -> str:
    """Return what two studies must have in common; what tells a study from the others of its run is in its name."""
    own = name.removeprefix(f"{run}_") if name.startswith(f"{run}_") else ""
    return json.dumps([own, {k: v for k, v in means.items() if k not in _LEFT_OUT}], sort_keys=True, default=str)


def _ended(path: Path) -> list[tuple[str, Took]]:
    found, before_s = [], defaultdict[str, float](float)
    for record in journal.read(path):
        if record["event"] != JournalEvent.ATTEMPT_ENDED:
            continue
        with contextlib.suppress(KeyError, ValueError, TypeError):
            attempt, reason = AttemptId.parse(record["attempt"]), ExitReason(record["reason"])
            seconds = float(record["duration_s"])
            if reason in _AGAIN:  # what it did is done; a checkpoint keeps it
                before_s[str(attempt.trial)] += seconds if record.get("checkpoint") else 0.0
                continue
            epochs = max(int(record["epochs"]), int(reason is ExitReason.COMPLETED))
            size = int(record.get("reserved_bytes") or record.get("predicted_bytes") or 0)
            took = Took(epochs=epochs, seconds=before_s.pop(str(attempt.trial), 0.0) + seconds, size_bytes=size)
            found.append((attempt.trial.study, took))
    return found

"""What the page `/headroom` knows: per run its last snapshot, how it ended, and a history of its memory.

Time is an argument; nothing is drawn or sent here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from scheduler.model import Json
from scheduler.ui.dashboard.history import History
from scheduler.ui.snapshot import Eta, Happening, Snapshot, StudyLine, TrialLine, WaitingLine, WorkerLine

VERSION = 4  # of the message; a page left by another version of ours shows nothing rather than nonsense
SILENT_AFTER_S = 10.0
MAX_RUNS = 20


@dataclass(slots=True, kw_only=True)
class Run:
    """One driver's run. seen: when its last snapshot came; ended: why it left, None while it has not said so."""

    key: str
    snapshot: Snapshot
    first: float
    seen: float
    ended: str | None = None
    history: History = field(default_factory=History)

    def is_silent(self, now: float) -> bool:
        return self.ended is None and now - self.seen > SILENT_AFTER_S

    def state(self, now: float) -> tuple[str, str]:
        """Return a few words and how to colour them: good, warn, bad or none."""
        if self.ended is not None:
            return f"ended: {self.ended}", ""
        if self.is_silent(now):
            return "stale", "bad"
        return ("draining", "warn") if self.snapshot.draining else ("running", "good")

    def take(self, snapshot: Snapshot, now: float, sent_unix: float) -> None:
        """Take its state, sent at `sent_unix` by the driver's clock."""
        self.snapshot, self.seen = snapshot, now
        self.history.take(snapshot, now, sent_unix)


class Board:
    """All runs that one Dask scheduler has heard of. Times are monotonic seconds, given by the caller."""

    def __init__(self) -> None:
        self._runs: dict[str, Run] = {}

    def take(self, message: Json, now: float) -> None:
        """One message of a driver. Raises ValueError, KeyError or TypeError when it is not one of ours."""
        if message["version"] != VERSION:
            raise ValueError(f"a driver's message has version {message['version']}, this page reads {VERSION}")
        key, snapshot = str(message["key"]), _snapshot(message["snapshot"])
        run = self._runs.get(key)
        if run is None:
            run = self._runs[key] = Run(key=key, snapshot=snapshot, first=now, seen=now)
            self._succeed(run, now)
        run.take(snapshot, now, float(message["unix"]))
        run.ended = message["ended"]

    def runs(self, now: float) -> list[Run]:
        """Those at work first, then the latest."""
        return sorted(self._runs.values(), key=lambda r: (r.ended is not None or r.is_silent(now), -r.first))

    def find(self, key: str, name: str, now: float) -> Run | None:
        """Find the run with that key, or of that name, or else the first one; None when there is none."""
        runs = self.runs(now)
        named = (run for run in runs if run.snapshot.run == name)
        return self._runs.get(key) or next(named, None) or next(iter(runs), None)

    def _succeed(self, run: Run, now: float) -> None:
        """Give a run that is started again the place, and the history, of its driver that is gone."""
        for old in list(self._runs.values()):
            is_over = old.ended is not None or old.is_silent(now)
            if old is not run and is_over and old.snapshot.run == run.snapshot.run:
                run.history = self._runs.pop(old.key).history
        for old in self.runs(now)[MAX_RUNS:]:
            del self._runs[old.key]


def _snapshot(data: Json) -> Snapshot:
    parts = {
        "studies": tuple(StudyLine(**_with_eta(line, "eta")) for line in data["studies"]),
        "workers": tuple(WorkerLine(**line) for line in data["workers"]),
        "trials": tuple(TrialLine(**line) for line in data["trials"]),
        "waiting": tuple(WaitingLine(**_with_eta(line, "still")) for line in data["waiting"]),
        "happenings": tuple(Happening(**line) for line in data["happenings"]),
    }
    return Snapshot(**{**_with_eta(data, "eta"), **parts})


def _with_eta(line: Json, key: str) -> Json:
    return {**line, key: None if line[key] is None else Eta(**line[key])}

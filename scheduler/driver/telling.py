"""What people are told of a run while it lasts: the journal's lines as sentences, the picture, the page, the commands.

One way for everything that happens: an event goes to the journal, and from there to whoever looks on. Nothing here
decides anything, and nothing that goes wrong here touches the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any

from scheduler import model as m
from scheduler.cluster.client import Cluster
from scheduler.cluster.dashboard import PageFeed
from scheduler.core.forecast import Forecast
from scheduler.core.state import BatchState
from scheduler.driver import history
from scheduler.driver.forecaster import Forecaster
from scheduler.driver.hooks import Hooks
from scheduler.driver.journal import Journal
from scheduler.host.attempt_folder import KILL, AttemptFolder
from scheduler.model.journal_events import JournalEvent
from scheduler.settings.schema import Settings
from scheduler.ui import log, story, view
from scheduler.ui.console import View
from scheduler.ui.snapshot import Happening
from scheduler.workload.plan import Plan

_OOM = m.ExitReason.KERNEL_OOM.value
MOST_HAPPENINGS = 40
FORECAST_NOTED_EVERY_S = 600.0


class Telling:
    """Keeps what the views show, and calls the user's own commands."""

    def __init__(self, settings: Settings, plan: Plan, view_: View, journal: Journal) -> None:
        self._settings, self._view, self._journal = settings, view_, journal
        self._began = time.monotonic()
        self._dashboard: str | None = None
        self._page: PageFeed | None = None
        self._happenings: deque[Happening] = deque(maxlen=MOST_HAPPENINGS)
        self._ends: Counter[str] = Counter()
        self._refused = {each.spec.name: each.refusal for each in plan.studies if each.refusal is not None}
        self._forecaster = Forecaster(lambda: history.past(settings), self._foreseen, self._not_foreseen)
        self._noted_at: float | None = None
        self._hooks = Hooks(
            on_kill=settings.on_kill,
            on_end=settings.on_end,
            run=settings.name,
            folder=str(settings.run_folder.absolute()),
            note=lambda text: self.log(JournalEvent.HOOK_FAILED, note=text),
        )

    def log(self, event: JournalEvent, durable: bool = False, **fields: Any) -> None:
        """One event to the journal as JSON, and to the user as a readable line or a sentence."""
        self._journal.write(event, durable=durable, **fields)
        told = story.tell(event, fields, self._settings.name, time.time(), self._story_from_here)
        if event is JournalEvent.ATTEMPT_ENDED:
            self._ends[str(fields["reason"])] += 1
        if told is not None:
            self._happenings.append(told)
            self._view.happened(told)
            if event is JournalEvent.ATTEMPT_ENDED and (fields.get("kill") or fields["reason"] == _OOM):
                path = self._story(m.AttemptId.parse(fields["attempt"]))
                self._hooks.killed(told.text, {**fields, "story": path})
        if event not in self._view.shows:
            log.show(event, fields)

    def open_page(self, cluster: Cluster, key: str) -> None:
        """Put the page on the cluster's dashboard, where it has one, and say where that is."""
        if cluster.dashboard:
            self._page = PageFeed(cluster, key=key, log=self.log)
            self._dashboard = self._page.start(cluster.dashboard)
            self.log(JournalEvent.DASHBOARD_READY, url=self._dashboard)

    def show(self, brain: BatchState) -> None:
        """Draw the batch as it is now, for the console and the page."""
        now = time.monotonic()
        self._forecaster.look(brain, now)
        picture = view.snapshot(
            brain,
            run=self._settings.name,
            now=now,
            elapsed_s=now - self._began,
            dashboard=self._dashboard,
            forecast=self._forecaster.latest,
            refused=self._refused,
            happenings=tuple(self._happenings),
            ends=self._ends,
        )
        self._view.update(picture)
        if self._page is not None:
            self._page.update(picture)

    def close_page(self, reason: str) -> None:
        """Tell the page how the run ended."""
        if self._page is not None:
            self._page.end(reason)

    def over(self, code: int, reason: str, brain: BatchState | None = None) -> None:
        """Call the command of the user's that wants to know of the end."""
        studies = [] if brain is None else list(brain.studies.values())
        done = [
            {"study": each.spec.name, "done": each.counted, "quota": each.spec.quota, "best": (each.best or [None])[0]}
            for each in studies
        ]
        text = f"run {self._settings.name} has ended: {reason}"
        elapsed_s = round(time.monotonic() - self._began, 1)
        self._hooks.ended(text, {"exit_code": code, "reason": reason, "elapsed_s": elapsed_s, "studies": done})

    def _story(self, attempt: m.AttemptId) -> str | None:
        """Return where a kill is told, None where that lies on another host."""
        path = AttemptFolder.of(self._settings.run_folder, attempt).path / KILL
        readable = path.with_suffix(".txt")
        return str(readable if readable.exists() else path) if path.exists() else None

    def _story_from_here(self, attempt: m.AttemptId) -> str | None:
        """Return the same as somebody types it who is where the command was given."""
        path = self._story(attempt)
        with contextlib.suppress(OSError, ValueError):  # the working directory is gone
            if path is not None and Path(path).is_relative_to(Path.cwd()):
                return os.path.relpath(path)
        return path

    def _foreseen(self, found: Forecast) -> None:
        """Keep a forecast now and then, so that it can be compared with what came."""
        if self._noted_at is not None and time.monotonic() - self._noted_at < FORECAST_NOTED_EVERY_S:
            return
        self._noted_at = time.monotonic()
        whole, now = found.whole, time.time() - (time.monotonic() - found.at)
        ends = {f"{k}_unix": round(now + v) for k, v in dataclasses.asdict(whole).items()}
        self._journal.write(JournalEvent.BATCH_FORECAST, **{k.replace("_s_unix", "_unix"): v for k, v in ends.items()})

    def _not_foreseen(self, error: str) -> None:
        self.log(JournalEvent.BATCH_NO_FORECAST, error=error)

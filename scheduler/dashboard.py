"""The page `/headroom` on the Dask dashboard: how snapshots travel from the driver to it, and what it keeps of them.

Three parts: `PageFeed` in the driver sends a snapshot a second as a Dask event; `HeadroomPage`, a plugin on the Dask
scheduler (our own or somebody else's), puts it on a `Board`, one entry per run; `page` draws the board. Nothing here
can disturb a run: a failure is logged once, and the run goes on without the page.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from distributed import Scheduler, SchedulerPlugin

from scheduler import page
from scheduler.adapters.cluster import Cluster
from scheduler.model import HeadroomError, Json
from scheduler.snapshot import Snapshot, StudyLine, TrialLine, WorkerLine

PATH = "/headroom"
TOPIC = "headroom-page"
VERSION = 1  # of the message; a page left by another version of ours shows nothing rather than nonsense
SILENT_AFTER_S = 10.0
HISTORY_S = 1800.0
HISTORY_STEP_S = 5.0
MAX_RUNS = 20
INSTALL_TIMEOUT_S = 5.0
RETRY_S = 30.0
FAREWELL_S = 2.0

logger = logging.getLogger(__name__)


# -- what the page knows --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Totals over a run's workers at one moment (monotonic seconds of the Dask scheduler)."""

    at: float
    used_bytes: int
    reserved_bytes: int
    capacity_bytes: int


@dataclass(slots=True, kw_only=True)
class Run:
    """One driver's run. seen: when its last snapshot came; ended: why it left, None while it has not said so."""

    key: str
    snapshot: Snapshot
    first: float
    seen: float
    ended: str | None = None
    history: deque[Point] = field(default_factory=deque)

    def is_silent(self, now: float) -> bool:
        return self.ended is None and now - self.seen > SILENT_AFTER_S

    def state(self, now: float) -> tuple[str, str]:
        """A few words and how to colour them: good, warn, bad or none."""
        if self.ended is not None:
            return f"ended: {self.ended}", ""
        if self.is_silent(now):
            return "stale", "bad"
        return ("draining", "warn") if self.snapshot.draining else ("running", "good")

    def points(self) -> list[Point]:
        """The history and, as its last point, the present."""
        return [*self.history, self._present()]

    def take(self, snapshot: Snapshot, now: float) -> None:
        self.snapshot, self.seen = snapshot, now
        if not self.history or now - self.history[-1].at >= HISTORY_STEP_S:
            self.history.append(self._present())
        while self.history[0].at < now - HISTORY_S:
            self.history.popleft()

    def _present(self) -> Point:
        workers = self.snapshot.workers
        return Point(
            at=self.seen,
            used_bytes=sum(w.used_bytes or 0 for w in workers),
            reserved_bytes=sum(w.reserved_bytes for w in workers),
            capacity_bytes=sum(w.capacity_bytes for w in workers),
        )


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
        run.take(snapshot, now)
        run.ended = message["ended"]

    def runs(self, now: float) -> list[Run]:
        """Those at work first, then the latest."""
        return sorted(self._runs.values(), key=lambda r: (r.ended is not None or r.is_silent(now), -r.first))

    def find(self, key: str, name: str, now: float) -> Run | None:
        """The run with that key, or of that name, or else the first one; None when there is none."""
        runs = self.runs(now)
        named = (run for run in runs if run.snapshot.run == name)
        return self._runs.get(key) or next(named, None) or next(iter(runs), None)

    def _succeed(self, run: Run, now: float) -> None:
        """A run that is started again takes the place, and the history, of its driver that is gone."""
        for old in list(self._runs.values()):
            is_over = old.ended is not None or old.is_silent(now)
            if old is not run and is_over and old.snapshot.run == run.snapshot.run:
                run.history = self._runs.pop(old.key).history
        for old in self.runs(now)[MAX_RUNS:]:
            del self._runs[old.key]


def _snapshot(data: Json) -> Snapshot:
    parts = {
        "studies": tuple(StudyLine(**line) for line in data["studies"]),
        "workers": tuple(WorkerLine(**line) for line in data["workers"]),
        "trials": tuple(TrialLine(**line) for line in data["trials"]),
    }
    return Snapshot(**{**data, **parts})


# -- on the Dask scheduler ------------------------------------------------------------------------------------------


class HeadroomPage(SchedulerPlugin):
    """Adds the page to the dashboard and listens to drivers. One per Dask scheduler, whoever registers it first.

    It stays when a driver leaves, so that the page can say how the run ended.
    """

    name = "headroom-page"
    idempotent = True

    async def start(self, scheduler: Scheduler) -> None:
        """Raises HeadroomError when this scheduler has no dashboard that a page could be added to."""
        self._scheduler, self.board = scheduler, Board()
        self._failed = False
        # Nothing is awaited: two drivers that register at the same moment get one page.
        try:
            from bokeh.server.tornado import BokehTornado
            from distributed.dashboard.core import BokehApplication
            from distributed.dashboard.scheduler import template_variables
        except ImportError as error:
            raise HeadroomError(f"the Dask scheduler has no bokeh ({error})") from None
        boards = [each for each in scheduler.http_application.applications if isinstance(each, BokehTornado)]
        if not boards:
            raise HeadroomError("the Dask scheduler runs without its dashboard")
        shared = template_variables(scheduler)
        if PATH.strip("/") not in shared["pages"]:
            shared["pages"].append(PATH.strip("/"))  # the bar at the top of all of Dask's pages
        application = BokehApplication(
            {PATH: functools.partial(_open, self)}, scheduler, prefix=boards[0].prefix, template_variables=shared
        )
        scheduler.http_application.add_application(application)
        application.initialize(scheduler.loop)
        application.start()

    def log_event(self, topic: str, msg: Any) -> None:
        """Called for every event on the cluster, so other topics must cost nothing."""
        if topic == TOPIC:
            self.guard(lambda: self.board.take(msg, time.monotonic()))
            # The scheduler would keep the last 1000 snapshots; nobody asks for them.
            self.guard(lambda: self._scheduler._broker.truncate(TOPIC))

    def guard(self, function: Callable[[], None]) -> None:
        """Run `function`; the first failure is logged, none goes further."""
        try:
            function()
        except Exception:
            if not self._failed:
                self._failed = True
                logger.warning("the Headroom page fails; runs are not affected", exc_info=True)


def _open(plugin: HeadroomPage, scheduler: Scheduler, extra: Json, doc: Any) -> None:
    page.open_document(plugin.board, time.monotonic, plugin.guard, extra, doc)


# -- in the driver --------------------------------------------------------------------------------------------------


class PageFeed:
    """Sends a run's snapshots to the page, from a thread of its own: a scheduler that hangs holds up nobody.

    key: names this run among all on the cluster. log: `log(event, **fields)`, called at most once with a failure.
    """

    def __init__(self, cluster: Cluster, *, key: str, log: Callable[..., None]) -> None:
        self._cluster, self._key, self._log = cluster, key, log
        self._latest: Snapshot | None = None
        self._ended: str | None = None
        self._wake, self._tried, self._done = threading.Event(), threading.Event(), threading.Event()
        self._installed = self._hopeless = self._complained = False
        self._next_try = 0.0

    def start(self, dashboard: str) -> str:
        """Put the page up; returns its address, or `dashboard` (Dask's own first page) when that cannot be done."""
        threading.Thread(target=self._run, name="headroom-page", daemon=True).start()
        self._tried.wait(INSTALL_TIMEOUT_S)
        return dashboard.removesuffix("/status") + PATH if self._installed else dashboard

    def update(self, snapshot: Snapshot) -> None:
        """The state of the run now; an earlier one that is not sent yet is dropped."""
        self._latest = snapshot
        self._wake.set()

    def end(self, reason: str) -> None:
        """Tell the page that the run is over, and why; waits 2 s at most."""
        self._ended = reason
        self._wake.set()
        self._done.wait(FAREWELL_S)

    def _run(self) -> None:
        self._install()
        self._tried.set()
        ended = None
        while not self._hopeless and ended is None:
            self._wake.wait()
            self._wake.clear()
            ended = self._ended
            self._send(ended)
        self._done.set()

    def _send(self, ended: str | None) -> None:
        if not self._installed and time.monotonic() >= self._next_try:
            self._install()
        if not self._installed or self._latest is None:
            return
        message = {"version": VERSION, "key": self._key, "ended": ended}
        try:
            self._cluster.publish(TOPIC, {**message, "snapshot": dataclasses.asdict(self._latest)})
        except Exception as error:
            # The plugin is lost with a scheduler that was started again.
            self._installed, self._next_try = False, time.monotonic() + RETRY_S
            self._complain(error)

    def _install(self) -> None:
        try:
            self._cluster.install(HeadroomPage())
            self._installed = True
        except OSError as error:  # Dask's for a scheduler out of reach; it may come back
            self._next_try = time.monotonic() + RETRY_S
            self._complain(error)
        except Exception as error:  # it has no bokeh, or no Headroom: asking again would only fill its log
            self._hopeless = True
            self._complain(error)

    def _complain(self, error: Exception) -> None:
        if not self._complained:
            self._complained = True
            self._log("dashboard.no_page", error=f"{type(error).__name__}: {error}".splitlines()[0])

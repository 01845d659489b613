"""The page `/headroom` on the Dask dashboard: how snapshots travel from the driver to it, and what it keeps of them.

Three parts: `PageFeed` in the driver sends a snapshot a second as a Dask event; `HeadroomPage`, a plugin on the Dask
scheduler (our own or somebody else's), puts it on a `Board`, one entry per run; `ui.dashboard` draws the board. Nothing
here can disturb a run: a failure is logged once, and the run goes on without the page.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from distributed import Scheduler, SchedulerPlugin

from scheduler.cluster.client import Cluster
from scheduler.model import HeadroomError, Json
from scheduler.model.journal_events import JournalEvent
from scheduler.ui.dashboard.runs import VERSION, Board
from scheduler.ui.snapshot import Snapshot

PATH = "/headroom"
TOPIC = "headroom-page"
INSTALL_TIMEOUT_S = 5.0
RETRY_S = 30.0
END_SENT_TIMEOUT_S = 2.0

logger = logging.getLogger(__name__)


# -- on the Dask scheduler ------------------------------------------------------------------------------------------


class HeadroomPage(SchedulerPlugin):
    """Adds the page to the dashboard and listens to drivers. One per Dask scheduler, whoever registers it first.

    It stays when a driver leaves, so that the page can say how the run ended.
    """

    name = "headroom-page"
    idempotent = True

    async def start(self, scheduler: Scheduler) -> None:
        """Begin; raise HeadroomError when this scheduler has no dashboard that a page could be added to."""
        self._scheduler, self.board = scheduler, Board()
        self._failed = False
        self._open: weakref.WeakKeyDictionary[Any, Callable[[], None]] = weakref.WeakKeyDictionary()
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
        # A scheduler of somebody else's environment may have none: Dask's own metrics are not there then either.
        with contextlib.suppress(ImportError):
            from scheduler.cluster import metrics

            metrics.publish(self.board)

    def log_event(self, topic: str, msg: Any) -> None:
        """Take a run's message. Called for every event on the cluster, so other topics must cost nothing."""
        if topic == TOPIC:
            self.guard(lambda: self.board.take(msg, time.monotonic()))
            if isinstance(msg, dict) and msg.get("ended") is not None:
                self.guard(self._tell_the_end)
            # The scheduler would keep the last 1000 snapshots; nobody asks for them.
            self.guard(lambda: self._scheduler._broker.truncate(TOPIC))

    def opened(self, doc: Any, refresh: Callable[[], None]) -> None:
        """Remember a tab, as long as it is there."""
        self._open[doc] = refresh

    def _tell_the_end(self) -> None:
        """Draw every tab now: a driver whose cluster is its own is gone before the next second."""
        for doc, refresh in list(self._open.items()):
            doc.add_next_tick_callback(refresh)

    def guard(self, function: Callable[[], None]) -> None:
        """Run `function`; the first failure is logged, none goes further."""
        try:
            function()
        except Exception:
            if not self._failed:
                self._failed = True
                logger.warning("the Headroom page fails; runs are not affected", exc_info=True)


def _open(plugin: HeadroomPage, scheduler: Scheduler, extra: Json, doc: Any) -> None:
    from distributed.dashboard.components.scheduler import BOKEH_THEME, env

    from scheduler.ui.dashboard import document

    doc.template = env.get_template("simple.html")  # the frame of all of Dask's pages
    doc.template_variables.update(extra)
    doc.theme = BOKEH_THEME
    tab = document.Document(plugin.board, time.monotonic, plugin.guard, doc)
    tab.open()
    plugin.opened(doc, tab.refresh)


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
        """Send the state of the run now; an earlier one that is not sent yet is dropped."""
        self._latest = snapshot
        self._wake.set()

    def end(self, reason: str) -> None:
        """Tell the page that the run is over, and why; waits 2 s at most."""
        self._ended = reason
        self._wake.set()
        self._done.wait(END_SENT_TIMEOUT_S)

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
        message = {"version": VERSION, "key": self._key, "ended": ended, "unix": time.time()}
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
            self._log(JournalEvent.DASHBOARD_NO_PAGE, error=f"{type(error).__name__}: {error}".splitlines()[0])

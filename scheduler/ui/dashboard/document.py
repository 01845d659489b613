"""The page as a Bokeh document: one browser's tab, drawn anew every second, and at once when the run ends.

Bokeh is imported only when a page is opened: whoever wants the HTML alone needs none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bokeh.layouts import column
from bokeh.models import CustomJS, Div, InlineStyleSheet

from scheduler.ui.dashboard import page
from scheduler.ui.dashboard.charts import Charts
from scheduler.ui.dashboard.runs import Board

REFRESH_MS = 1000

# The server is the driver itself when the cluster is its own: once it is gone only the browser can say so. The next
# run on the same port then takes the page over.
LOST = """
if (!top.text.includes('class="banner ended"')) {
  const when = new Date().toLocaleTimeString()
  banner.visible = true
  top.text = top.text.replace(/badge good("[^>]*)>running/g, 'badge bad$1>stale')
  banner.text = `<div class="banner bad">Connection lost at ${when}: the run's driver or the Dask scheduler is gone.
   What is below is the last that was seen.</div>`
}
if (!window.headroom_waits) {
  window.headroom_waits = setInterval(() => fetch(window.location.href, {cache: "no-store"})
    .then((answer) => { if (answer.ok) window.location.reload() }).catch(() => {}), 3000)
}
"""

FRAME = {"background": "#fff", "border": "1px solid #dfe4ea", "border-radius": "6px", "padding": "6px 8px"}
# Side by side where there is room, one below the other on a phone.
PAIR = {"flex-direction": "row", "flex-wrap": "wrap", "gap": "10px", "align-items": "flex-start"}
HALF = {"flex": "1 1 380px", "min-width": "min(380px, 100%)", "max-width": "100%"}


class Document:
    """One tab. `guard(function)` runs it and never raises."""

    def __init__(self, board: Board, clock: Callable[[], float], guard: Callable[..., Any], doc: Any) -> None:
        self._board, self._clock, self._guard, self._doc = board, clock, guard, doc
        self._lost, self._top, self._workers, self._trials, self._rest = (_div() for _ in range(5))
        self._lost.visible = False
        self._charts = Charts()
        self._memory = column(sizing_mode="stretch_width", styles={**FRAME, **HALF})
        self._timeline = column(
            _div("<h2>Attempts</h2>"), self._charts.timeline, sizing_mode="stretch_width", styles=FRAME
        )
        left = column(self._workers, self._trials, sizing_mode="stretch_width", spacing=10, styles=HALF)
        self._pair = column(left, self._memory, sizing_mode="stretch_width", styles=PAIR)
        self._root = column(self._lost, self._top, sizing_mode="stretch_width", spacing=10)
        arguments = doc.session_context.request.arguments if doc.session_context else {}
        wanted = arguments.get("run", [b""])[0].decode(errors="replace")
        self._chosen = wanted, wanted  # (key, name): a run that was started again goes by its name

    def open(self) -> None:
        """Draw it, and keep it fresh. The frame and the colours are the caller's, by the document's template."""
        doc = self._doc
        doc.title = "Headroom"
        doc.config.notify_connection_status = False
        doc.config.reconnect_session = False
        doc.js_on_event("connection_lost", CustomJS(args={"banner": self._lost, "top": self._top}, code=LOST))
        doc.add_root(self._root)
        self.refresh()
        doc.add_periodic_callback(self.refresh, REFRESH_MS)

    def refresh(self) -> None:
        """Draw the run as it is now."""
        self._guard(self._draw)

    def _draw(self) -> None:
        now = self._clock()
        run = self._board.find(*self._chosen, now)
        self._top.text = page.head(self._board, run, now)
        if run is None:
            return
        self._chosen = run.key, run.snapshot.run
        shot = run.snapshot
        self._charts.draw(run.history, shot, run.seen)
        self._workers.text, self._trials.text = page.workers(shot), page.trials(shot)
        self._rest.text = page.below(shot, run.history)
        figures = [_div("<h2>Memory of each worker, by trial</h2>"), *self._charts.memory]
        if [each.id for each in self._memory.children[1:]] != [each.id for each in figures[1:]]:
            self._memory.children = figures
        if self._pair not in self._root.children:  # a plot that is hidden at first would keep no room for its axis
            self._root.children = [*self._root.children, self._pair, self._timeline, self._rest]


def _div(text: str = "") -> Any:
    style = InlineStyleSheet(css=page.STYLE)
    return Div(text=text, margin=0, disable_math=True, stylesheets=[style], sizing_mode="stretch_width")

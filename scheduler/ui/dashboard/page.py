"""What the page `/headroom` shows: a board of runs as HTML, and the Bokeh document that keeps it fresh.

Draws snapshots that others collected (`dashboard`). All text from outside is escaped. Bokeh is imported only when a
page is opened, so that the HTML can be made, and tested, without it. Sizes are always in GiB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from html import escape
from itertools import islice
from typing import Any

from scheduler.ui.dashboard.runs import Board, Run
from scheduler.ui.snapshot import Snapshot, StudyLine, TrialLine, WorkerLine
from scheduler.units import GIB, duration

REFRESH_MS = 1000
MAX_WORKERS, MAX_TRIALS, MAX_STUDIES = 32, 64, 64  # rows drawn; the rest is counted
USED, RESERVED, CAPACITY = "#2b6cb0", "#9cc3e6", "#64707d"

STYLE = """
:host { font: 13px/1.45 "Helvetica Neue", Helvetica, Arial, "DejaVu Sans", sans-serif; color: #1f2933; width: 100%; }
* { box-sizing: border-box; } .bk-clearfix { display: block !important; width: 100%; }
h1 { font-size: 21px; margin: 0; } h2 { font-size: 14px; margin: 0 0 6px; font-weight: 600; }
.head { display: flex; align-items: center; gap: 12px 14px; flex-wrap: wrap; padding: 4px 2px; }
.tiles { margin-left: auto; display: flex; gap: 26px; } .tile { text-align: right; }
.tile b { display: block; font-size: 18px; line-height: 1.2; } .tile span, .muted { color: #66727f; font-size: 12px; }
.badge { border-radius: 9px; padding: 1px 9px; font-size: 12px; white-space: nowrap; background: #e3e8ee; }
.good { background: #d5efdf; color: #17603a; } .warn { background: #fdeccb; color: #7a4b00; }
.bad { background: #f9d6d2; color: #8f1d12; }
.banner { padding: 7px 12px; margin: 4px 0 0; border-radius: 5px; font-weight: 600; }
.runs a { margin-right: 14px; color: #2b6cb0; }
.runs a.here { color: inherit; font-weight: 600; text-decoration: none; }
.panel { background: #fff; border: 1px solid #dfe4ea; border-radius: 6px; padding: 10px 12px; }
.grid { display: grid; grid-template-columns: 11fr 10fr; gap: 10px; align-items: start; }
@media (max-width: 1050px) { .grid { grid-template-columns: 1fr; } }
.row { display: flex; gap: 4px 14px; flex-wrap: wrap; align-items: baseline; }
.row > .right { margin-left: auto; }
.worker + .worker { margin-top: 10px; padding-top: 9px; border-top: 1px solid #eceff3; }
.bar { display: flex; height: 16px; margin: 4px 0; border-radius: 3px; overflow: hidden; background: #e9eef3; }
.bar.small { height: 10px; margin: 0; min-width: 90px; } .bar i { display: block; flex: none; height: 100%; }
.used { background: #2b6cb0; } .reserved { background: #9cc3e6; } .over { background: #e07b39; }
.done { background: #4a9d6f; }
.free { background: #e9eef3; border: 1px solid #c9d2dc; }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 5px; vertical-align: -1px; }
table { border-collapse: collapse; width: 100%; }
td, th { padding: 2px 12px 2px 0; text-align: left; white-space: nowrap; }
th { font-weight: 500; color: #66727f; font-size: 12px; border-bottom: 1px solid #dfe4ea; }
td { border-bottom: 1px solid #f1f3f6; } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
td:last-child, th:last-child { padding-right: 0; } td.why { white-space: normal; font-size: 12px; }
.empty { color: #66727f; padding: 4px 0; } code { background: #eef1f5; padding: 1px 5px; border-radius: 3px; }
"""

# The server is the driver itself when the cluster is its own: once it is gone only the browser can say so. The next
# run on the same port then takes the page over.
LOST = """
banner.visible = true
top.text = top.text.replace(/badge good("[^>]*)>running/g, 'badge bad$1>stale')
const when = new Date().toLocaleTimeString()
banner.text = `<div class="banner bad">Connection lost at ${when}: the run is over, or its driver or the Dask scheduler
 is gone. What is below is the last that was seen.</div>`
if (!window.headroom_waits) {
  window.headroom_waits = setInterval(() => fetch(window.location.href, {cache: "no-store"})
    .then((answer) => { if (answer.ok) window.location.reload() }).catch(() => {}), 3000)
}
"""


# -- words and numbers --------------------------------------------------------------------------------------------


def size(size_bytes: int | None) -> str:
    """Bytes as a number of GiB, without the unit: "0.53", "31.2"; "?" for unknown."""
    if size_bytes is None:
        return "?"
    value = size_bytes / GIB
    return f"{value:.2f}" if abs(value) < 9.995 else f"{value:.1f}" if abs(value) < 999.95 else f"{value:.0f}"


def share(part: float, whole: float) -> str:
    """CSS width of `part` in `whole`, kept within the bar."""
    return f"width:{100 * min(1.0, max(0.0, part / whole)) if whole > 0 else 0:.2f}%"


def bar(used: int | None, reserved: int, scale: int, *, small: bool = False) -> str:
    """Draw used, reserved but not used, and used beyond the reservation, stacked; what is left of `scale` is
    headroom."""
    taken = used or 0
    parts = [
        ("used", min(taken, reserved)),
        ("over", max(0, taken - reserved)),
        ("reserved", max(0, reserved - taken)),
    ]
    inner = "".join(f'<i class="{name}" style="{share(part, scale)}"></i>' for name, part in parts if part)
    return f'<div class="bar{" small" if small else ""}">{inner}</div>'


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _short(name: str, run: str) -> str:
    """Return a study's or attempt's name without the run's, which all of them start with; the full one as a tooltip."""
    return f'<span title="{escape(name)}">{escape(name.removeprefix(f"{run}_"))}</span>'


# -- the parts of the page ------------------------------------------------------------------------------------------


def head(board: Board, run: Run | None, now: float) -> str:
    """Title, state, totals, the other runs of this cluster, and a banner when the driver is silent."""
    if run is None:
        return (
            '<div class="head"><h1>Headroom</h1><span class="badge">no run</span></div><div class="panel">'
            "No run has reported to this Dask scheduler yet. One that starts appears here by itself within seconds; "
            "start one with <code>bin/schedule --cluster ADDRESS</code>.</div>"
        )
    shot = run.snapshot
    done, quota = sum(s.done for s in shot.studies), sum(s.quota for s in shot.studies)
    free = shot.headroom_bytes
    state, kind = run.state(now)
    tiles = [(f"{done} / {quota}", "trials done"), (str(len(shot.trials)), "running")]
    tiles += [(f"{size(free)} GiB", "headroom"), (duration(shot.elapsed_s, wide=True), "elapsed")]
    text = (
        f'<div class="head"><h1>{escape(shot.run)}</h1><span class="badge {kind}">{escape(state)}</span>'
        f'<div class="tiles">{"".join(f"""<div class="tile"><b>{a}</b><span>{b}</span></div>""" for a, b in tiles)}'
        "</div></div>"
    )
    if run.is_silent(now):
        text += (
            f'<div class="banner bad">No news from the driver for {duration(now - run.seen, wide=True)}: it is gone or '
            "cannot reach the scheduler. What is below is the last that was seen.</div>"
        )
    runs = board.runs(now)
    if len(runs) > 1:
        links = "".join(
            f'<a href="?run={escape(each.key)}"{" class=here" if each is run else ""}>{escape(each.snapshot.run)}</a>'
            f'<span class="badge {each.state(now)[1]}" style="margin:0 22px 0 -6px">{escape(each.state(now)[0])}</span>'
            for each in runs
        )
        text += f'<div class="runs"><span class="muted">Runs on this cluster:</span> {links}</div>'
    return text


def workers(shot: Snapshot) -> str:
    """Each worker's capacity as one bar: used, reserved, headroom."""
    keys = (("used", "used"), ("reserved", "reserved, not used"), ("over", "used, not reserved"), ("free", "headroom"))
    legend = "".join(f'<span class="muted"><i class="key {c}"></i>{text}</span>' for c, text in keys)
    title = f'<div class="row"><h2>Workers</h2><span class="row right">{legend}</span></div>'
    if not shot.workers:
        return f'<div class="panel">{title}<div class="empty">No worker has joined.</div></div>'
    return f'<div class="panel">{title}{_rows(shot.workers, MAX_WORKERS, _worker, "workers")}</div>'


def _worker(worker: WorkerLine) -> str:
    kind = {"normal": "good", "elevated": "warn"}.get(worker.pressure, "bad")
    closed = f'<span class="badge bad">closed: {escape(worker.closed_reason)}</span>' if worker.closed_reason else ""
    figures = [("capacity", worker.capacity_bytes), ("reserved", worker.reserved_bytes), ("used", worker.used_bytes)]
    figures.append(("headroom", worker.headroom_bytes))
    return (
        f'<div class="worker"><div class="row"><b>{escape(worker.host)}</b>'
        f'<span class="muted">{escape(worker.address)}</span>'
        f'<span class="badge {kind}">pressure {escape(worker.pressure)}</span>{closed}'
        f'<span class="muted right">{worker.free_slots} of {worker.slots} slots free</span></div>'
        + bar(worker.used_bytes, worker.reserved_bytes, max(worker.capacity_bytes, worker.used_bytes or 0))
        + '<div class="row">'
        + "".join(f'<span><span class="muted">{name}</span> <b>{size(n)}</b> GiB</span>' for name, n in figures)
        + "</div></div>"
    )


def trials(shot: Snapshot) -> str:
    """Each running trial: its reservation and what it uses of it, how far it is, and how good."""
    title = f"<h2>Running trials ({len(shot.trials)})</h2>"
    if not shot.trials:
        return f'<div class="panel">{title}<div class="empty">No trial is running.</div></div>'
    hosts = {w.address: w.host for w in shot.workers}
    several = len(shot.workers) > 1
    cells = ["Trial", *(["Worker"] if several else []), "Used of reserved", "n:GiB", "n:Epoch", "n:Loss"]
    header = _header([*cells, "n:Running"])

    def row(trial: TrialLine) -> str:
        where = f"<td>{escape(hosts.get(trial.worker, trial.worker))}</td>" if several else ""
        held = bar(trial.used_bytes, trial.reserved_bytes, max(trial.reserved_bytes, trial.used_bytes), small=True)
        epochs = f"{trial.epoch} / {trial.epochs}" if trial.epochs else str(trial.epoch)
        return (
            f"<tr><td>{_short(trial.attempt, shot.run)}</td>{where}"
            f'<td style="width:26%">{held}</td>'
            f'<td class="n">{size(trial.used_bytes)} / {size(trial.reserved_bytes)}</td><td class="n">{epochs}</td>'
            f'<td class="n">{number(trial.value)}</td><td class="n">{duration(trial.running_s, wide=True)}</td></tr>'
        )

    return f'<div class="panel">{title}{_table(header, shot.trials, MAX_TRIALS, row, "trials")}</div>'


def studies(shot: Snapshot) -> str:
    """Each study's progress, its best value, and why its next trial waits."""
    title = f"<h2>Studies ({len(shot.studies)})</h2>"
    if not shot.studies:
        return f'<div class="panel">{title}<div class="empty">No study is open.</div></div>'

    def row(study: StudyLine) -> str:
        filled = f'<i class="done" style="{share(study.done, study.quota)}"></i>'
        why = f"closed: {study.closed}" if study.closed else study.waiting or ""
        return (
            f"<tr><td>{_short(study.name, shot.run)}</td>"
            f'<td style="width:16%"><div class="bar small">{filled}</div></td>'
            f'<td class="n">{study.done} / {study.quota}</td><td class="n">{study.running or "–"}</td>'
            f'<td class="n">{number(study.best)}</td><td class="why">{escape(why)}</td></tr>'
        )

    header = _header(["Study", "Progress", "n:Done", "n:Running", "n:Best", "Next trial"])
    return f'<div class="panel">{title}{_table(header, shot.studies, MAX_STUDIES, row, "studies")}</div>'


def _header(names: Iterable[str]) -> str:
    cells = (("n", name[2:]) if name.startswith("n:") else ("", name) for name in names)
    return "<tr>" + "".join(f'<th class="{c}">{text}</th>' for c, text in cells) + "</tr>"


def _table(header: str, items: tuple[Any, ...], most: int, row: Callable[[Any], str], what: str) -> str:
    return f"<table>{header}{_rows(items, most, row, what, '<tr><td colspan=9>', '</td></tr>')}</table>"


def _rows(
    items: tuple[Any, ...],
    most: int,
    row: Callable[[Any], str],
    what: str,
    before: str = "<div>",
    after: str = "</div>",
) -> str:
    text = "".join(row(item) for item in islice(items, most))
    left = len(items) - most
    return text + (f'{before}<span class="muted">… and {left} more {what}</span>{after}' if left > 0 else "")


def below(shot: Snapshot) -> str:
    return f'<div class="grid">{trials(shot)}{studies(shot)}</div>'


# -- the Bokeh document ---------------------------------------------------------------------------------------------


def open_document(board: Board, clock: Callable[[], float], guard: Callable[..., Any], doc: Any) -> None:
    """Fill `doc`, one browser tab's document, and keep it fresh. `guard(function)` runs it and never raises.

    The frame and the colours are the caller's, who sets the document's template and theme.
    """
    from bokeh.layouts import column, row
    from bokeh.models import ColumnDataSource, CustomJS, Div, InlineStyleSheet

    def div(text: str = "", **size: Any) -> Any:
        return Div(text=text, margin=0, disable_math=True, stylesheets=[InlineStyleSheet(css=STYLE)], **size)

    lost, top, rest = (div(sizing_mode="stretch_width") for _ in range(3))
    lost.visible = False
    left = div(styles={"flex": "none", "width": "calc((100% - 10px) * 11 / 21)"})  # the same columns as .grid
    source = ColumnDataSource(data={"minutes": [], "used": [], "reserved": [], "capacity": []})
    plot = _history_plot(source)
    frame = {"background": "#fff", "border": "1px solid #dfe4ea", "border-radius": "6px", "padding": "6px 8px"}
    right = column(plot, styles={**frame, "flex": "none", "width": "calc((100% - 10px) * 10 / 21)"})
    middle = row(left, right, sizing_mode="stretch_width", spacing=10, styles={"align-items": "start"})
    arguments = doc.session_context.request.arguments if doc.session_context else {}
    wanted = arguments.get("run", [b""])[0].decode(errors="replace")
    chosen = [(wanted, wanted)]  # (key, name): a run that was started again goes by its name

    def draw() -> None:
        now = clock()
        run = board.find(*chosen[0], now)
        top.text = head(board, run, now)
        if run is None:
            return
        if middle not in root.children:  # a plot that is hidden at first would keep no room for its axis
            root.children = [*root.children, middle, rest]
        chosen[0] = (run.key, run.snapshot.run)
        left.text, rest.text = workers(run.snapshot), below(run.snapshot)
        _draw_history(plot, source, run, now)

    doc.title = "Headroom"
    doc.config.notify_connection_status = False
    doc.config.reconnect_session = False
    doc.js_on_event("connection_lost", CustomJS(args={"banner": lost, "top": top}, code=LOST))
    root = column(lost, top, sizing_mode="stretch_width", spacing=10)
    doc.add_root(root)
    guard(draw)
    doc.add_periodic_callback(lambda: guard(draw), REFRESH_MS)


def _history_plot(source: Any) -> Any:
    from bokeh.models import CustomJSTickFormatter, HoverTool, Legend, LegendItem, Range1d
    from bokeh.plotting import figure

    plot = figure(
        height=196,
        sizing_mode="stretch_width",
        margin=0,
        tools="xpan,xwheel_zoom,reset",
        toolbar_location=None,
        x_range=Range1d(-2, 0),
        y_range=Range1d(0, 1),
    )
    plot.outline_line_color = None
    plot.xgrid.grid_line_color, plot.ygrid.grid_line_color = None, "#eceff3"
    plot.min_border_right, plot.min_border_top = 18, 6
    area = plot.varea(x="minutes", y1=0, y2="used", source=source, fill_color=USED, fill_alpha=0.35)
    used = plot.line(x="minutes", y="used", source=source, line_color=USED, line_width=2)
    reserved = plot.line(x="minutes", y="reserved", source=source, line_color="#5b9bd5", line_width=2, line_dash="6 3")
    capacity = plot.line(x="minutes", y="capacity", source=source, line_color=CAPACITY, line_width=1.5)
    items = [("used", [area, used]), ("reserved", [reserved]), ("capacity", [capacity])]
    legend = Legend(
        items=[LegendItem(label=label, renderers=lines) for label, lines in items], orientation="horizontal"
    )
    legend.border_line_color, legend.padding, legend.margin, legend.label_text_font_size = None, 0, 2, "12px"
    legend.spacing = 14
    plot.add_layout(legend, "above")
    tips = [(name, f"@{name}{{0.00}} GiB") for name in ("used", "reserved", "capacity")]
    plot.add_tools(HoverTool(renderers=[used], mode="vline", tooltips=tips))
    plot.xaxis.formatter = CustomJSTickFormatter(code="return tick == 0 ? 'now' : Math.round(-tick * 10) / 10 + ' min'")
    plot.yaxis.axis_label = "GiB, all workers"
    for axis in (plot.xaxis, plot.yaxis):
        axis.axis_label_text_font_style, axis.axis_label_text_font_size = "normal", "12px"
        axis.minor_tick_line_color, axis.axis_line_color, axis.major_tick_line_color = None, "#c3cbd4", "#c3cbd4"
    return plot


def _draw_history(plot: Any, source: Any, run: Run, now: float) -> None:
    points = run.points()
    source.data = {
        "minutes": [(point.at - now) / 60 for point in points],
        "used": [point.used_bytes / GIB for point in points],
        "reserved": [point.reserved_bytes / GIB for point in points],
        "capacity": [point.capacity_bytes / GIB for point in points],
    }
    age = (now - points[0].at) / 60
    plot.x_range.start = -next((span for span in (2, 5, 10, 30) if age <= span), 30)
    plot.y_range.end = 1.12 * max(0.1, *(max(p.capacity_bytes, p.reserved_bytes, p.used_bytes) / GIB for p in points))

"""What the page `/headroom` says: a board of runs as HTML.

Draws snapshots that others collected (`runs`); the charts are `charts`, and what keeps it all fresh is `document`. All
text from outside is escaped. Sizes are always in GiB.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from html import escape
from itertools import islice
from typing import Any

from scheduler.ui.dashboard.history import History
from scheduler.ui.dashboard.runs import Board, Run
from scheduler.ui.snapshot import Happening, Snapshot, StudyLine, TrialLine, WorkerLine
from scheduler.units import GIB, duration

MAX_WORKERS, MAX_TRIALS, MAX_STUDIES = 32, 64, 64  # rows drawn; the rest is counted

STYLE = """
:host { font: 13px/1.45 "Helvetica Neue", Helvetica, Arial, "DejaVu Sans", sans-serif; color: #1f2933; width: 100%; }
* { box-sizing: border-box; } .bk-clearfix { display: block !important; width: 100%; }
h1 { font-size: 21px; margin: 0; } h2 { font-size: 14px; margin: 0 0 6px; font-weight: 600; }
.head { display: flex; align-items: center; gap: 12px 14px; flex-wrap: wrap; padding: 4px 2px; }
.tiles { margin-left: auto; display: flex; gap: 6px 26px; flex-wrap: wrap; } .tile { text-align: right; }
.tile b { display: block; font-size: 18px; line-height: 1.2; } .tile span, .muted { color: #66727f; font-size: 12px; }
.badge { border-radius: 9px; padding: 1px 9px; font-size: 12px; white-space: nowrap; background: #e3e8ee; }
.good { background: #d5efdf; color: #17603a; } .warn { background: #fdeccb; color: #7a4b00; }
.bad { background: #f9d6d2; color: #8f1d12; } .ended { background: #dfe8f1; color: #1f4e79; }
.banner { padding: 7px 12px; margin: 4px 0 0; border-radius: 5px; font-weight: 600; }
.runs a { margin-right: 14px; color: #2b6cb0; }
.runs a.here { color: inherit; font-weight: 600; text-decoration: none; }
.panel { background: #fff; border: 1px solid #dfe4ea; border-radius: 6px; padding: 10px 12px; }
.grid { display: grid; grid-template-columns: minmax(0, 11fr) minmax(0, 10fr); gap: 10px; align-items: start; }
@media (max-width: 1050px) { .grid { grid-template-columns: minmax(0, 1fr); } }
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
.wide { overflow-x: auto; } td.when { color: #66727f; font-size: 12px; } tr.bad, tr.warn { background: none; }
tr.bad td.what { color: #8f1d12; } tr.warn td.what { color: #7a4b00; } td.what { white-space: normal; }
@media (max-width: 600px) {
  .tiles { margin-left: 0; width: 100%; justify-content: space-between; gap: 6px 12px; } .tile { text-align: left; }
  .tile b { font-size: 16px; } td, th { padding-right: 8px; } .row > .right { margin-left: 0; }
  .aside { display: none; }
}
.empty { color: #66727f; padding: 4px 0; } code { background: #eef1f5; padding: 1px 5px; border-radius: 3px; }
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
    state, kind = run.state(now)
    tiles = [(f"{shot.done} / {shot.quota}", "trials done"), (str(len(shot.trials)), "running")]
    if shot.eta is not None and run.ended is None:
        low, high = (duration(s, wide=True) for s in (shot.eta.low_s, shot.eta.high_s))
        tiles.append((f"{low} – {high}" if low != high else low, "still to go"))
    tiles += [(f"{size(shot.headroom_bytes)} GiB", "headroom"), (duration(shot.elapsed_s, wide=True), "elapsed")]
    text = (
        f'<div class="head"><h1>{escape(shot.run)}</h1><span class="badge {kind}">{escape(state)}</span>'
        f'<div class="tiles">{"".join(f"""<div class="tile"><b>{a}</b><span>{b}</span></div>""" for a, b in tiles)}'
        "</div></div>"
    )
    if run.ended is not None:
        text += f'<div class="banner ended">The run is over: {escape(run.ended)}. What is below is how it ended.</div>'
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
    cells = ["Trial", *(["aside:Worker"] if several else []), "aside:Used of reserved", "n:GiB", "n:Epoch", "n:Loss"]
    header = _header([*cells, "n:Running"])

    def row(trial: TrialLine) -> str:
        where = f'<td class="aside">{escape(hosts.get(trial.worker, trial.worker))}</td>' if several else ""
        held = bar(trial.used_bytes, trial.reserved_bytes, max(trial.reserved_bytes, trial.used_bytes), small=True)
        epochs = f"{trial.epoch} / {trial.epochs}" if trial.epochs else str(trial.epoch)
        return (
            f"<tr><td>{_short(trial.attempt, shot.run)}</td>{where}"
            f'<td class="aside" style="width:26%">{held}</td>'
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
            f'<td class="aside" style="width:16%"><div class="bar small">{filled}</div></td>'
            f'<td class="n">{study.done} / {study.quota}</td><td class="n aside">{study.running or "–"}</td>'
            f'<td class="n">{number(study.best)}</td><td class="why">{escape(why)}</td></tr>'
        )

    header = _header(["Study", "aside:Progress", "n:Done", "n aside:Running", "n:Best", "Next trial"])
    return f'<div class="panel">{title}{_table(header, shot.studies, MAX_STUDIES, row, "studies")}</div>'


def _header(names: Iterable[str]) -> str:
    """Draw names, each after its classes and a colon where it has any."""
    cells = (name.rpartition(":") for name in names)
    return "<tr>" + "".join(f'<th class="{classes}">{text}</th>' for classes, _, text in cells) + "</tr>"


def _table(header: str, items: tuple[Any, ...], most: int, row: Callable[[Any], str], what: str) -> str:
    rows = _rows(items, most, row, what, "<tr><td colspan=9>", "</td></tr>")
    return f'<div class="wide"><table>{header}{rows}</table></div>'


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


def troubles(history: History) -> str:
    """List the attempts that were killed, failed or lost, the latest first, each with its reason."""
    found = list(reversed(history.troubles))
    title = f"<h2>Killed, failed and in trouble ({len(found)})</h2>"
    if not found:
        return f'<div class="panel">{title}<div class="empty">Nothing so far.</div></div>'

    def row(each: Happening) -> str:
        cells = ("when", time.strftime("%a %H:%M:%S", time.localtime(each.unix))), ("what", each.text)
        inner = "".join(f'<td class="{name}">{escape(text)}</td>' for name, text in cells)
        return f'<tr class="{escape(each.tone)}">{inner}</tr>'

    return f'<div class="panel">{title}<table>{"".join(map(row, found))}</table></div>'


def below(shot: Snapshot, history: History) -> str:
    return f'<div class="grid">{studies(shot)}{troubles(history)}</div>'

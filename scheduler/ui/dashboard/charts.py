"""The page's two charts in Bokeh: what each worker's memory held, and when each attempt ran.

Both share their time axis, in minutes before now. They draw a `History`; nothing is kept here.
"""

from __future__ import annotations

from itertools import islice, pairwise
from typing import Any

from bokeh.models import ColumnDataSource, CustomJSTickFormatter, FixedTicker, HoverTool, Legend, LegendItem, Range1d
from bokeh.plotting import figure

from scheduler.ui.dashboard.history import OTHERS, OURS, Band, History, Span
from scheduler.ui.snapshot import Snapshot, WorkerLine
from scheduler.units import GIB, duration

MAX_WORKERS = 6  # charts drawn; the tables count the rest
SPANS_MIN = (2, 5, 10, 30)
LANE_PX, MAX_LANES = 16, 40
RESERVED, CAPACITY, SWAP = "#1f4e79", "#64707d", "#b23a8e"
PALETTE = ("#5b9bd5", "#7bb489", "#c9a66b", "#9d8ec7", "#6fb7b7", "#d08e8e", "#8fa3bf", "#b5bd68")
QUIET = {OURS: "#c3cbd4", OTHERS: "#a9b4c0"}
TONES = {"": "#7bb489", "good": "#7bb489", "warn": "#e0a23b", "bad": "#c5402f"}
RUNNING = "#5b9bd5"
TOLD = '<div style="max-width:320px">@text</div>'


class WorkerChart:
    """The memory of one worker: stacked by trial, with reservation, capacity, swap, and what began and ended."""

    def __init__(self, times: Range1d, *, legend: bool) -> None:
        self._areas = ColumnDataSource(data={"xs": [], "ys": [], "name": [], "color": [], "size": []})
        self._lines = ColumnDataSource(data={"x": [], "reserved": [], "capacity": [], "swap": []})
        self._marks = ColumnDataSource(data={"x": [], "y": [], "marker": [], "color": [], "text": [], "size": []})
        self.figure = plot = _figure(times, height=190)
        plot.yaxis.axis_label = "GiB"
        areas = plot.patches(
            xs="xs", ys="ys", source=self._areas, fill_color="color", fill_alpha=0.75, line_color="#fff", line_width=0.6
        )
        lines = {"reserved": (RESERVED, "6 3"), "capacity": (CAPACITY, "solid"), "swap": (SWAP, "2 2")}
        drawn = {
            name: plot.step(
                x="x", y=name, source=self._lines, mode="after", line_color=tint, line_dash=dash, line_width=1.6
            )
            for name, (tint, dash) in lines.items()
        }
        marks = plot.scatter(x="x", y="y", marker="marker", size="size", color="color", source=self._marks)
        plot.add_tools(
            HoverTool(renderers=[areas], tooltips="<b>@name</b> @size", point_policy="follow_mouse"),
            HoverTool(renderers=[marks], tooltips=TOLD, attachment="vertical"),
        )
        if legend:
            plot.add_layout(_legend(drawn), "above")
        plot.title.text_font_size, plot.title.text_font_style = "12px", "normal"

    def draw(self, history: History, worker: WorkerLine, now: float) -> None:
        """Draw the worker as it is now."""
        bands = history.bands(worker.address, now)
        names = [name for name in dict.fromkeys(band.attempt for band in bands) if name not in QUIET]
        colors = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)} | QUIET
        self._areas.data = {
            "xs": [_along(band, now) for band in bands],
            "ys": [_around(band) for band in bands],
            "name": [band.attempt for band in bands],
            "color": [colors[band.attempt] for band in bands],
            "size": [f"{(band.high[-1] - band.low[-1]) / GIB:.2f} GiB" for band in bands],
        }
        levels = [*history.levels.get(worker.address, ())]
        held = [*levels, *levels[-1:]]
        self._lines.data = {
            "x": [*((level.at - now) / 60 for level in levels), *([0.0] if levels else [])],
            "reserved": [level.reserved_bytes / GIB for level in held],
            "capacity": [level.capacity_bytes / GIB for level in held],
            "swap": [float("nan") if level.swap_bytes is None else level.swap_bytes / GIB for level in held],
        }
        top = max(
            [0.1, *(max(n.capacity_bytes, n.reserved_bytes, n.used_bytes, n.swap_bytes or 0) / GIB for n in levels)]
        )
        self.figure.y_range.end = 1.16 * top
        self.figure.title.text = worker.host
        self._mark(history.of_worker(worker.address), top, now)

    def _mark(self, spans: list[Span], top: float, now: float) -> None:
        """Draw what began at the bottom, what ended well on the capacity's line, kills and failures above all."""
        marks = [((s.began - now) / 60, 0.02 * top, "triangle", "#44525f", f"{s.attempt} began", 6) for s in spans]
        for span in spans:
            if span.ended is not None:
                bad = span.tone in ("bad", "warn")
                y, shape, size = (1.08 * top, "x", 11) if bad else (0.0, "inverted_triangle", 6)
                text = span.text or f"{span.attempt} ended"
                marks.append(((span.ended - now) / 60, y, shape, TONES[span.tone], text, size))
        columns = ("x", "y", "marker", "color", "text", "size")
        self._marks.data = {name: [mark[i] for mark in marks] for i, name in enumerate(columns)}


class Timeline:
    """When each attempt ran, in as many lines as ran at once, and how it ended."""

    def __init__(self, times: Range1d) -> None:
        self._source = ColumnDataSource(data={"y": [], "left": [], "right": [], "color": [], "text": []})
        self.figure = _figure(times, height=120)
        bars = self.figure.hbar(
            y="y", left="left", right="right", height=0.76, source=self._source, color="color", line_color="#fff"
        )
        self.figure.add_tools(
            HoverTool(
                renderers=[bars], tooltips='<div style="max-width:320px">@text</div>', point_policy="follow_mouse"
            )
        )
        self.figure.ygrid.grid_line_color = None

    def draw(self, history: History, workers: tuple[WorkerLine, ...], now: float) -> None:
        """Draw the attempts on these workers."""
        rows: list[tuple[float, Span]] = []
        labels: dict[float, str] = {}
        first = 0
        for worker in islice(workers, MAX_WORKERS):
            spans = history.of_worker(worker.address)
            lanes = min(MAX_LANES, 1 + max((span.lane for span in spans), default=0))
            labels[-(first + (lanes - 1) / 2)] = worker.host
            rows += [(-float(first + span.lane), span) for span in spans if span.lane < lanes]
            first += lanes
        self._source.data = {
            "y": [y for y, _ in rows],
            "left": [(span.began - now) / 60 for _, span in rows],
            "right": [max(span.end - now, span.began - now + 0.2) / 60 for _, span in rows],
            "color": [RUNNING if span.ended is None else TONES[span.tone] for _, span in rows],
            "text": [_story(span, now) for _, span in rows],
        }
        self.figure.y_range.start, self.figure.y_range.end = -first + 0.5, 0.5
        self.figure.height = 46 + LANE_PX * max(2, first)
        self.figure.yaxis.ticker = FixedTicker(ticks=list(labels))
        self.figure.yaxis.major_label_overrides = labels


class Charts:
    """All charts of a run. `figures` changes when a worker comes or goes."""

    def __init__(self) -> None:
        self._times = Range1d(-2, 0)
        self._workers: dict[str, WorkerChart] = {}
        self._timeline = Timeline(self._times)

    @property
    def memory(self) -> list[Any]:
        return [chart.figure for chart in self._workers.values()]

    @property
    def timeline(self) -> Any:
        return self._timeline.figure

    def draw(self, history: History, snapshot: Snapshot, now: float) -> None:
        """Draw the run as it is now."""
        shown = {worker.address: worker for worker in islice(snapshot.workers, MAX_WORKERS)}
        for gone in self._workers.keys() - shown.keys():
            del self._workers[gone]
        for address, worker in shown.items():
            chart = self._workers.get(address)
            if chart is None:
                chart = self._workers[address] = WorkerChart(self._times, legend=not self._workers)
            chart.draw(history, worker, now)
        self._timeline.draw(history, snapshot.workers, now)
        oldest = min((levels[0].at for levels in history.levels.values()), default=now)
        self._times.start = -next((span for span in SPANS_MIN if (now - oldest) / 60 <= span), SPANS_MIN[-1])


def _legend(lines: dict[str, Any]) -> Legend:
    items = [LegendItem(label=name, renderers=[line]) for name, line in lines.items()]
    legend = Legend(items=items, orientation="horizontal")
    legend.border_line_color, legend.padding, legend.margin, legend.spacing = None, 0, 0, 10
    legend.label_text_font_size, legend.glyph_width = "11px", 16
    return legend


def _figure(times: Range1d, *, height: int) -> Any:
    plot = figure(
        height=height,
        sizing_mode="stretch_width",
        margin=0,
        tools="xpan,xwheel_zoom,reset",
        toolbar_location=None,
        x_range=times,
        y_range=Range1d(0, 1),
        min_width=260,
    )
    plot.outline_line_color = None
    plot.xgrid.grid_line_color, plot.ygrid.grid_line_color = None, "#eceff3"
    plot.min_border_right, plot.min_border_top = 18, 4
    plot.xaxis.formatter = CustomJSTickFormatter(code="return tick == 0 ? 'now' : Math.round(-tick * 10) / 10 + ' min'")
    for axis in (plot.xaxis, plot.yaxis):
        axis.axis_label_text_font_style, axis.axis_label_text_font_size = "normal", "12px"
        axis.minor_tick_line_color, axis.axis_line_color, axis.major_tick_line_color = None, "#c3cbd4", "#c3cbd4"
    return plot


def _story(span: Span, now: float) -> str:
    ran = duration(max(0.0, span.end - span.began), wide=True)
    if span.ended is None:
        return f"{span.attempt} runs for {ran}"
    return span.text or f"{span.attempt} ended after {ran}"


def _along(band: Band, now: float) -> list[float]:
    """Return an area's x values: along its upper edge in steps and back along the lower one."""
    steps = [x for a, b in pairwise(band.times) for x in ((a - now) / 60, (b - now) / 60)]
    return steps + steps[::-1]


def _around(band: Band) -> list[float]:
    upper = [y for size in band.high for y in (size / GIB, size / GIB)]
    lower = [y for size in band.low for y in (size / GIB, size / GIB)]
    return upper + lower[::-1]

"""Charts as SVG in the page: points, lines, areas and bars on linear, logarithmic and time axes. No script.

Small on purpose: text stays text and is readable at 390 px, and a chart is 2 to 20 KB. (Optuna's own plots are drawn by
plotly, whose script is 4.6 MB and must run; matplotlib would be one more dependency, for the same lines.) Everything
that is put into the markup is escaped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

from scheduler.units import duration, gib

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 10, 46
MOST_POINTS = 1500  # of one series; more are thinned: nobody sees them, and a phone has to draw them


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """label: what is measured, with its unit. kind: "linear", "log", "bytes", "clock" (Unix seconds), "span" (s).

    names: of an axis with words in the place of 0, 1, 2, ...
    """

    label: str = ""
    kind: str = "linear"
    low: float | None = None
    high: float | None = None
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """points: (x, y). kind: "points", "line", "steps" or "area" (steps down to the axis). css: a class of the page.

    titles: of the points, what is shown when one is pointed at.
    """

    points: Sequence[tuple[float, float]]
    kind: str = "points"
    css: str = "s0"
    name: str = ""
    titles: Sequence[str] = field(default_factory=tuple)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A vertical line at x, or a horizontal one at y, with a word beside it."""

    name: str
    x: float | None = None
    y: float | None = None
    css: str = "mark"


class _Scale:
    def __init__(self, axis: Axis, values: Iterable[float], start: float, end: float) -> None:
        self.axis, self.start, self.end = axis, start, end
        known = [v for v in values if math.isfinite(v) and (axis.kind != "log" or v > 0)]
        low = min(known, default=0.0) if axis.low is None else axis.low
        high = max(known, default=1.0) if axis.high is None else axis.high
        self.log = axis.kind == "log"
        if self.log:
            low, high = math.log10(low), math.log10(high)
        if high <= low:
            pad = abs(low) * 0.1 or 0.5
            low, high = low - (0.0 if axis.low is not None else pad), high + pad
        else:
            pad = 0.04 * (high - low)
            low, high = low - (0.0 if axis.low is not None else pad), high + (0.0 if axis.high is not None else pad)
        self.low, self.high = low, high

    def at(self, value: float) -> float:
        v = math.log10(value) if self.log else value
        return self.start + (v - self.low) / (self.high - self.low) * (self.end - self.start)

    def holds(self, value: float) -> bool:
        if not math.isfinite(value) or (self.log and value <= 0):
            return False
        v = math.log10(value) if self.log else value
        slack = 1e-9 * (self.high - self.low)
        return self.low - slack <= v <= self.high + slack

    def ticks(self, most: int) -> list[tuple[float, str]]:
        if self.axis.names:
            return [(float(i), _cut(name, 12)) for i, name in enumerate(self.axis.names)]
        if self.log:
            return self._log_ticks(most)
        unit = {"bytes": 2.0**30, "span": 1.0, "clock": 1.0}.get(self.axis.kind, 1.0)
        if self.axis.kind == "bytes" and self.high < 2**30:
            unit = 2.0**20
        step = _step((self.high - self.low) / unit / most, sixty=self.axis.kind in ("span", "clock")) * unit
        first = math.ceil(self.low / step - 1e-9)
        found = [i * step for i in range(first, first + 2 * most + 2) if i * step <= self.high + 1e-9 * step]
        return [(v, self._text(v, step)) for v in found]

    def _log_ticks(self, most: int) -> list[tuple[float, str]]:
        for mantissas in ((1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 5), (1, 3), (1,)):
            decades = range(math.floor(self.low), math.ceil(self.high) + 1)
            found = [m * 10.0**d for d in decades for m in mantissas if self.holds(m * 10.0**d)]
            if len(found) <= most:
                break
        if len(found) < 2:  # less than a decade: whatever is round
            low, high = 10**self.low, 10**self.high
            step = _step((high - low) / most)
            found = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
        return [(v, short(v)) for v in found]

    def _text(self, value: float, step: float) -> str:
        match self.axis.kind:
            case "bytes":
                return gib(round(value)) if value else "0"
            case "clock":
                return time.strftime("%H:%M" if step >= 60 else "%H:%M:%S", time.localtime(value))
            case "span":
                return ("-" if value < 0 else "") + duration(abs(value)) if value else "0"
        places = min(8, max(0, -math.floor(math.log10(step) + 1e-9)))
        return f"{value:.{places}f}" if places and abs(value) >= 1e-3 else short(value)


def _step(rough: float, *, sixty: bool = False) -> float:
    """Return the next round number: 1, 2, 5, 10 ...; of times 1, 2, 5, 10, 30 s, 1, 2, 5 min ..."""
    if rough <= 0 or not math.isfinite(rough):
        return 1.0
    if sixty and rough > 0.5:
        for s in (1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400, 21600, 43200, 86400):
            if s >= rough:
                return float(s)
        return 86400.0 * math.ceil(rough / 86400)
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))


def short(value: float) -> str:
    """Return a number in few characters: 1.8M, 0.683, 3e-05."""
    size = abs(value)
    for scale, letter in ((1e9, "B"), (1e6, "M"), (1e4, "")):
        if size >= scale and letter:
            return f"{value / scale:.3g}{letter}"
    if size and (size < 1e-3 or size >= 1e6):
        return f"{value:.1e}"
    return f"{value:.4g}"


def chart(
    series: Sequence[Series],
    *,
    x: Axis,
    y: Axis,
    marks: Sequence[Mark] = (),
    label: str,
    width: int = WIDTH,
    height: int = HEIGHT,
) -> Markup:
    """Draw a chart. label: what it shows, for those who cannot see it."""
    every = [p for s in series for p in s.points]
    scale_x = _Scale(x, [*(p[0] for p in every), *(m.x for m in marks if m.x is not None)], LEFT, width - RIGHT)
    scale_y = _Scale(y, [*(p[1] for p in every), *(m.y for m in marks if m.y is not None)], height - BOTTOM, TOP)
    out = [Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(width, height, label)]
    out += _frame(scale_x, scale_y, width, height)
    for each in series:
        out.append(_drawn(each, scale_x, scale_y))
    out += [_mark(each, scale_x, scale_y, width, height) for each in marks]
    out.append(Markup("</svg>"))
    return Markup("").join(out) + legend(series)


def legend(series: Sequence[Series]) -> Markup:
    """Name the series below a chart, where there is more than one name."""
    named = {s.name: s.css for s in series if s.name}
    keys = [Markup('<span><i class="key {}"></i>{}</span>').format(css, name) for name, css in named.items()]
    return Markup('<p class="legend">{}</p>').format(Markup("").join(keys)) if len(keys) > 1 else Markup("")


def _frame(x: _Scale, y: _Scale, width: int, height: int) -> list[Markup]:
    out = []
    for value, text in y.ticks(5):
        at = round(y.at(value), 1)
        out.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, width - RIGHT, at, at))
        out.append(
            Markup('<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>').format(LEFT - 5, at + 4, text)
        )
    for value, text in x.ticks(5):
        at = round(x.at(value), 1)
        out.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(at, at, TOP, height - BOTTOM))
        out.append(
            Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(
                at, height - BOTTOM + 18, text
            )
        )
    words = " · ".join(filter(None, [x.axis.label and f"→ {x.axis.label}", y.axis.label and f"↑ {y.axis.label}"]))
    out.append(Markup('<text class="axis" x="{}" y="{}">{}</text>').format(LEFT, height - 8, words))
    return out


def _drawn(series: Series, x: _Scale, y: _Scale) -> Markup:
    points = list(series.points)
    titles = list(series.titles)
    if len(points) > MOST_POINTS:
        every = math.ceil(len(points) / MOST_POINTS)
        points, titles = points[::every], titles[::every]
    places = [(round(x.at(a), 1), round(y.at(b), 1)) for a, b in points if x.holds(a) and y.holds(b)]
    if not places:
        return Markup("")
    if series.kind == "points":
        dots = []
        for i, (a, b) in enumerate(p for p in points if x.holds(p[0]) and y.holds(p[1])):
            title = Markup("<title>{}</title>").format(titles[i]) if i < len(titles) else Markup("")
            place = round(x.at(a), 1), round(y.at(b), 1)
            dots.append(
                Markup('<circle class="{}" cx="{}" cy="{}" r="4">{}</circle>').format(series.css, *place, title)
            )
        return Markup("").join(dots)
    path = f"M{places[0][0]} {places[0][1]}"
    for a, b in places[1:]:
        path += f"L{a} {b}" if series.kind == "line" else f"H{a}V{b}"
    if series.kind == "area":
        base = round(y.start, 1)
        return Markup('<path class="{} area" d="{}V{}H{}Z"/>').format(series.css, path, base, places[0][0])
    return Markup('<path class="{} line" d="{}"/>').format(series.css, path)


def _mark(mark: Mark, x: _Scale, y: _Scale, width: int, height: int) -> Markup:
    if mark.x is not None and x.holds(mark.x):
        at = round(x.at(mark.x), 1)
        side, move = ("end", -4) if at > width / 2 else ("start", 4)
        return Markup(
            '<line class="{c}" x1="{a}" x2="{a}" y1="{t}" y2="{b}"/>'
            '<text class="word" x="{w}" y="{v}" text-anchor="{s}">{n}</text>'
        ).format(c=mark.css, a=at, t=TOP, b=height - BOTTOM, w=at + move, v=TOP + 11, s=side, n=mark.name)
    if mark.y is not None and y.holds(mark.y):
        at = round(y.at(mark.y), 1)
        above = at - 4 if at > TOP + 16 else at + 13
        return Markup(
            '<line class="{c}" x1="{l}" x2="{r}" y1="{a}" y2="{a}"/>'
            '<text class="word" x="{r}" y="{v}" text-anchor="end">{n}</text>'
        ).format(c=mark.css, l=LEFT, r=width - RIGHT, a=at, v=above, n=mark.name)
    return Markup("")


def bars(rows: Sequence[tuple[str, float, str]], *, css: str = "s0") -> Markup:
    """Draw (name, share of the widest 0..1, what is said of it) as rows of a list: they are as wide as the page."""
    drawn = [
        Markup('<li><span class="name">{}</span><span class="track"><i class="{}" style="width:{}%"></i></span>'
               '<span class="said">{}</span></li>').format(name, css, round(100 * min(1.0, max(0.0, share)), 1), said)
        for name, share, said in rows
    ]  # fmt: skip
    return Markup('<ul class="bars">{}</ul>').format(Markup("").join(drawn))


def parallel(
    names: Sequence[str], lines: Sequence[tuple[Sequence[float | None], float, str]], ends: Sequence[tuple[str, str]]
) -> Markup:
    """Draw parallel coordinates. lines: (a place 0..1 per name, how good 0 (best)..1, title). ends: (low, high) texts.

    Every name has the same width, so that a phone scrolls them sideways rather than make them unreadable.
    """
    gap, height = 92, 230
    width = gap * len(names)
    out = [
        Markup('<svg class="wide" viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img" aria-label="{n}">').format(
            w=width, h=height, n="parallel coordinates"
        )
    ]
    place = [gap / 2 + i * gap for i in range(len(names))]
    for places, rank, title in sorted(lines, key=lambda each: -each[1]):
        dots = [f"{place[i]:.0f} {height - 44 - p * (height - 84):.1f}" for i, p in enumerate(places) if p is not None]
        css = "best" if rank <= 0 else "good" if rank <= 0.2 else "rest"
        if len(dots) > 1:
            out.append(
                Markup('<path class="pc {}" d="M{}"><title>{}</title></path>').format(css, "L".join(dots), title)
            )
    for i, name in enumerate(names):
        low, high = ends[i]
        out.append(
            Markup(
                '<line class="post" x1="{x}" x2="{x}" y1="40" y2="{b}"/>'
                '<text class="tick" x="{x}" y="33" text-anchor="middle">{high}</text>'
                '<text class="tick" x="{x}" y="{l}" text-anchor="middle">{low}</text>'
                '<text class="word" x="{x}" y="14" text-anchor="middle">{name}</text>'
            ).format(x=place[i], b=height - 44, l=height - 28, low=low, high=high, name=_cut(name, 14))
        )
    out.append(Markup("</svg>"))
    return Markup('<div class="scroll">{}</div>').format(Markup("").join(out))


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def nothing(why: str) -> Markup:
    """Return what stands in the place of a chart that cannot be drawn."""
    return Markup('<p class="muted">{}</p>').format(escape(why))

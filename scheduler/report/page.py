"""The report as one HTML file, and as data: sections computed, charts drawn, put into the template.

The page holds no script and asks nobody for anything: its own policy forbids it, so that what a trial has written into
an error can do nothing either. Text is escaped by the template engine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from scheduler.files.durable import write
from scheduler.host.kill_words import clock
from scheduler.masking import scrubbed
from scheduler.model import DeferReason, Json
from scheduler.report import best, ends, footprints, hours, kills, scaling, search, setup, svg, timeline, verdict
from scheduler.report.records import Run, load_run
from scheduler.units import duration, gib

NAME = "report.html"
VERSION = 1


def facts(run: Run) -> Json:
    """Return everything the report says, as JSON."""
    return {
        "version": VERSION,
        "made": clock(run.now),
        "verdict": verdict.section(run),
        "ends": ends.section(run),
        "kills": kills.section(run),
        "search": search.section(run),
        "scaling": scaling.section(run),
        "timeline": timeline.section(run),
        "footprints": footprints.section(run),
        "hours": hours.section(run),
        "best": best.section(run),
        "setup": setup.section(run),
    }


def as_html(found: Json) -> str:
    """Draw the facts. Passwords of URLs in what trials wrote are taken out."""
    engine = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    engine.filters |= {"gib": _gib, "duration": _duration, "number": _number, "percent": _percent, "json": _compact}
    engine.filters["scrubbed"] = scrubbed
    charts = {
        "kills": [kills.charts(each) for each in found["kills"]],
        "search": [search.charts(each) for each in found["search"]],
        "scaling": None if found["scaling"] is None else scaling.chart(found["scaling"]),
        "footprints": footprints.chart(found["footprints"]) if found["footprints"]["points"] else None,
        "gantt": timeline.gantt(found["timeline"]),
        "memory": [
            timeline.memory_chart(each, found["timeline"]["began"], found["timeline"]["until"])
            for each in found["timeline"]["workers"]
        ],
        "hours": _hours(found["hours"]["spent_by_end"], found["hours"]["trials_s"]),
        "waits": _hours(
            [row | {"reason": _awaited(row["reason"])} for row in found["hours"]["waited_by_reason"]], None
        ),
    }
    return engine.get_template("page.html.jinja").render(**found, charts=charts)


def as_json(found: Json) -> str:
    """Return the facts as JSON that everything can read: no NaN in it."""
    return json.dumps(_finite(found), indent=1, default=str)


def leave(folder: Path) -> Path:
    """Write a run's report and its best configurations into its folder; returns where the report is.

    Raises UsageError where there is no run, OSError.
    """
    found = facts(load_run(folder))
    write(folder / NAME, as_html(found))
    for each in found["best"]:
        if each["yaml"] is not None:
            (folder / each["file"]).parent.mkdir(exist_ok=True)
            write(folder / each["file"], each["yaml"])
    return folder / NAME


def _hours(rows: Sequence[Json], total_s: float | None) -> Markup:
    most = max((row["seconds"] for row in rows), default=0.0) or 1.0
    said = [
        (str(row["reason"]), row["seconds"] / most, _duration(row["seconds"]) + (_share(row["seconds"], total_s)))
        for row in rows
    ]
    return svg.bars(said, css="s0")


def _awaited(reason: str) -> str:
    """Say in words what was waited for."""
    return next((each.words for each in DeferReason if each == reason), reason)


def _share(seconds: float, total_s: float | None) -> str:
    return f" ({seconds / total_s:.0%})" if total_s else ""


def _gib(value: Any) -> str:
    return gib(int(value)) if isinstance(value, int | float) else "?"


def _duration(seconds: Any) -> str:
    if not isinstance(seconds, int | float):
        return "?"
    sign = "-" if seconds < 0 else ""
    return sign + (f"{abs(seconds):.1f} s" if abs(seconds) < 60 else duration(abs(seconds), wide=True))


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


def _percent(value: float) -> str:
    return f"{value:.0%}"


def _compact(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

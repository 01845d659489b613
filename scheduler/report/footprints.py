"""Predicted against observed peaks: how often a prediction held, and how much too large it was."""

from __future__ import annotations

from statistics import median

from markupsafe import Markup

from scheduler.model import Json
from scheduler.report import svg
from scheduler.report.records import Run


def section(run: Run) -> Json:
    """Return each completed attempt's prediction and peak, and what they amount to by source of the prediction."""
    points = [
        {"attempt": str(a.id), "source": a.source, "predicted_bytes": a.predicted_bytes, "peak_bytes": a.peak_bytes}
        for a in run.attempts
        if a.reason == "completed" and a.predicted_bytes and a.peak_bytes
    ]
    sources = dict.fromkeys(str(p["source"]) for p in points)
    return {
        "points": points,
        "by_source": [{"source": source, **_sum([p for p in points if p["source"] == source])} for source in sources],
        "all": _sum(points) if points else None,
        "without": sum(a.reason == "completed" and not a.predicted_bytes for a in run.attempts),
    }


def _sum(points: list[Json]) -> Json:
    ratios = [p["peak_bytes"] / p["predicted_bytes"] for p in points]
    return {
        "count": len(points),
        "held": sum(ratio <= 1 for ratio in ratios),
        "coverage": sum(ratio <= 1 for ratio in ratios) / len(ratios),
        "median_used": median(ratios),
        "worst": max(ratios),
    }


def chart(found: Json) -> Markup:
    """Draw peaks over predictions; the line is where both are equal: above it a trial took more than promised."""
    by: dict[str, list[Json]] = {}
    for point in found["points"]:
        by.setdefault(str(point["source"]), []).append(point)
    scale = 2**20
    series = []
    ends: list[float] = []
    for i, (source, points) in enumerate(by.items()):
        places = [(p["predicted_bytes"] / scale, p["peak_bytes"] / scale) for p in points]
        ends += [v for place in places for v in place]
        titles = [
            f"{p['attempt']}: predicted {a:,.0f} MiB, took {b:,.0f} MiB"
            for p, (a, b) in zip(points, places, strict=True)
        ]
        series.append(svg.Series(points=places, css=f"s{i % 7}", name=source, titles=titles))
    series.append(svg.Series(points=[(min(ends), min(ends)), (max(ends), max(ends))], kind="line", css="rest"))
    x, y = svg.Axis(label="predicted, MiB", kind="log"), svg.Axis(label="peak, MiB", kind="log")
    return svg.chart(series, x=x, y=y, label="predicted and observed peaks")

"""Value by size of the model: the power law, its exponent with an interval, and the groups beside each other.

Only for a workload that names a size (`Presentation.size`). Fitted by least squares on the logarithms:
value = a x size^b. The interval is Student's, 95 %; it holds if the logarithms scatter alike and independently.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from markupsafe import Markup

from scheduler.model import Json
from scheduler.report import svg
from scheduler.report.records import Run
from scheduler.report.search import focus

LEAST = 4  # points with at least two sizes: below, an interval says nothing
WIDE = 4.0  # the largest size is so many times the smallest: below, an exponent is about noise within one budget


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """value = a x size^b. low, high: 95 % interval of b. r2: share of the logarithms' variance that it explains."""

    a: float
    b: float
    low: float
    high: float
    r2: float
    count: int

    def at(self, size: float) -> float:
        return float(self.a * size**self.b)


def fit(points: Sequence[tuple[float, float]]) -> Fit | None:
    """Fit the law to (size, value), both above 0; None for too few points or one size."""
    known = [(math.log(x), math.log(y)) for x, y in points if x > 0 and y > 0]
    n = len(known)
    if n < LEAST:
        return None
    mean_x, mean_y = sum(x for x, _ in known) / n, sum(y for _, y in known) / n
    sxx = sum((x - mean_x) ** 2 for x, _ in known)
    syy = sum((y - mean_y) ** 2 for _, y in known)
    if sxx < 1e-12:
        return None
    b = sum((x - mean_x) * (y - mean_y) for x, y in known) / sxx
    intercept = mean_y - b * mean_x
    rest = sum((y - intercept - b * x) ** 2 for x, y in known)
    half = student(n - 2) * math.sqrt(rest / (n - 2) / sxx)
    r2 = 1.0 if syy < 1e-18 else 1 - rest / syy
    return Fit(a=math.exp(intercept), b=b, low=b - half, high=b + half, r2=r2, count=n)


def student(degrees: int, level: float = 0.975) -> float:
    """Return the quantile of Student's t (Hill's expansion; exact for 1 and 2 degrees, within 1 % for 3 and more)."""
    if degrees == 1:
        return math.tan(math.pi * (level - 0.5))
    if degrees == 2:
        return (2 * level - 1) * math.sqrt(2 / (4 * level * (1 - level)))
    z = NormalDist().inv_cdf(level)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(z + sum(term / degrees ** (i + 1) for i, term in enumerate(terms)))


def section(run: Run) -> Json | None:
    """Return points and laws by group, None for a workload whose trials have no size."""
    groups: dict[str, list[Json]] = {}
    label = value = ""
    for spec in run.specs:
        if not spec.shown.size or len(spec.directions) > 1:
            continue
        label, value = spec.shown.size, spec.shown.value
        group = f"{spec.shown.compare} {spec.shown.labels.get(spec.shown.compare)}" if spec.shown.compare else spec.name
        others = {k: v for k, v in spec.shown.labels.items() if k != spec.shown.compare}
        for row in run.rows.get(spec.name, ()):
            if row["state"] == "COMPLETE" and _is_positive(row.get("value")) and _is_positive(row.get(label)):
                point = {"size": row[label], "value": row["value"], "trial": row["number"], "study": spec.name}
                groups.setdefault(group, []).append({**point, "within": " ".join(str(v) for v in others.values())})
    if not groups:
        return None
    return {"size": label, "value": value, "groups": [_group(name, points) for name, points in groups.items()]}


def _group(name: str, points: list[Json]) -> Json:
    best: dict[str, Json] = {}
    for point in points:
        before = best.get(point["within"])
        best[point["within"]] = point if before is None or point["value"] < before["value"] else before
    every = fit([(p["size"], p["value"]) for p in points])
    front = fit([(p["size"], p["value"]) for p in best.values()])
    sizes = [p["size"] for p in points]
    return {
        "name": name,
        "points": points,
        "best": sorted(best.values(), key=lambda p: p["size"]),
        "law_of_all": None if every is None else _law(every),
        "law_of_best": None if front is None else _law(front),
        "is_wide": max(sizes) >= WIDE * min(sizes),
    }


def _law(found: Fit) -> Json:
    return {
        "a": found.a,
        "exponent": found.b,
        "low": found.low,
        "high": found.high,
        "r2": found.r2,
        "count": found.count,
    }


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def chart(found: Json) -> Markup:
    """Draw all points with the law of each group on logarithmic axes."""
    series = []
    values = [p["value"] for group in found["groups"] for p in group["points"]]
    for i, group in enumerate(found["groups"]):
        points = [(p["size"], p["value"]) for p in group["points"]]
        titles = [
            f"{p['study']} trial {p['trial']}: {p['size']:,} parameters, {p['value']:.6g}" for p in group["points"]
        ]
        css = f"s{i % 7}"
        series.append(svg.Series(points=points, css=css, name=group["name"], titles=titles))
        law = group["law_of_best"] or group["law_of_all"]
        if law is not None:
            low, high = min(p[0] for p in points), max(p[0] for p in points)
            steps = [low * (high / low) ** (k / 20) for k in range(21)]
            line = [(x, law["a"] * x ** law["exponent"]) for x in steps]
            series.append(svg.Series(points=line, kind="line", css=css))
    axis, _ = focus(values, maximize=False, label=found["value"])
    y = svg.Axis(label=found["value"], kind="log", high=axis.high)
    return svg.chart(series, x=svg.Axis(label=found["size"], kind="log"), y=y, label="value by size, logarithmic")

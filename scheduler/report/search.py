"""What the search found: history, importance and effect of each parameter, parallel coordinates; for any workload.

Importance is Optuna's, over the parameters that were really suggested (d_model, n_layers, ... with the built-in
workload).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from scheduler.model import Json, StudySpec
from scheduler.model.parameters import Choice, Distribution, Range
from scheduler.report import svg
from scheduler.report.records import Run
from scheduler.report.verdict import place
from scheduler.ui.report import best_row, ended_as, pareto_front

MOST_PARAMETERS = 12  # drawn; the rest matters less
MOST_LINES = 400


def section(run: Run) -> list[Json]:
    """Return a study each: its course, importance, and what its trials had and reached."""
    return [_study(run, spec) for spec in run.specs if run.rows.get(spec.name)]


def _study(run: Run, spec: StudySpec) -> Json:
    read = run.studies.get(spec.name)
    rows = run.rows[spec.name]
    ended = {row["number"]: ended_as(row) for row in rows}
    maximize = spec.directions[0] == "maximize"
    complete = [row for row in rows if row["state"] == "COMPLETE" and _is_number(row.get("value"))]
    params = {} if read is None else read.params
    space = {} if read is None else dict(read.space)
    importance = {} if read is None else dict(read.importance)
    order = sorted(space, key=lambda name: -importance.get(name, 0.0))
    best = best_row(rows, spec)
    return {
        "study": spec.name,
        "maximize": maximize,
        "several_values": len(spec.directions) > 1,
        "value": spec.shown.value,
        "front": [
            {"number": row["number"], "values": _values(row, len(spec.directions))} for row in pareto_front(rows, spec)
        ]
        if len(spec.directions) > 1
        else [],
        "points": [{"number": row["number"], "values": _values(row, len(spec.directions))} for row in complete]
        if len(spec.directions) > 1
        else [],
        "history": [{"number": row["number"], "value": row["value"]} for row in complete],
        "stopped": [
            {"number": number, "value": list(values.values())[-1]}
            for number, values in ({} if read is None else read.reported).items()
            if ended.get(number) in ("pruned", "killed")
        ],
        "best": None if best is None else best["number"],
        "importance": importance,
        "why_no_importance": "the study is not at hand" if read is None else read.why_no_importance,
        "parameters": [
            {"name": name, "drawn": _drawn(space[name]), "effect": _effect(name, complete, params, space[name])}
            for name in order
        ],
        "trials": [
            {"number": row["number"], "value": row["value"], "params": dict(params.get(row["number"], {}))}
            for row in complete
        ],
    }


def _values(row: Mapping[str, Any], count: int) -> list[Any]:
    return [row.get(f"value.{i}") for i in range(count)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _drawn(drawn: Distribution) -> Json:
    if isinstance(drawn, Choice):
        return {"options": [str(option) for option in drawn.options]}
    return {"low": drawn.low, "high": drawn.high, "log": drawn.log}


def _effect(
    name: str, complete: Sequence[Mapping[str, Any]], params: Mapping[int, Mapping[str, Any]], drawn: Distribution
) -> list[Json]:
    """Return the median value in each third of the range, or for each option: what changing it has been worth."""
    groups: dict[str, list[float]] = {}
    for row in complete:
        if name not in params.get(row["number"], {}):
            continue
        value = params[row["number"]][name]
        if isinstance(drawn, Range):
            word = ("low third", "middle", "high third")[min(2, int(3 * max(0.0, place(drawn, value))))]
        else:
            word = str(value)
        groups.setdefault(word, []).append(row["value"])
    order = ["low third", "middle", "high third"] if isinstance(drawn, Range) else [str(o) for o in drawn.options]
    return [
        {"where": word, "count": len(groups[word]), "median": _median(groups[word])} for word in order if word in groups
    ]


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def focus(values: Sequence[float], *, maximize: bool, label: str) -> tuple[svg.Axis, int]:
    """Return an axis on which the better values can be told apart, and how many worse ones lie beyond it."""
    best, worst = (max(values), min(values)) if maximize else (min(values), max(values))
    ordered = sorted(values, reverse=maximize)
    most = ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]
    limit = best + 1.6 * (most - best)
    if abs(worst - best) <= abs(limit - best) * 1.5 or limit == best:
        return svg.Axis(label=label), 0
    beyond = sum(value < limit if maximize else value > limit for value in values)
    return svg.Axis(label=label, low=limit if maximize else None, high=None if maximize else limit), beyond


def charts(study: Json) -> dict[str, Any]:
    """Draw a study: `history`, `importance`, `effects` by name, `parallel`."""
    trials, maximize = study["trials"], study["maximize"]
    if study["several_values"] and study["front"] and len(study["front"][0]["values"]) == 2:
        return {"front": _front(study)}
    if not trials or study["several_values"]:
        return {}
    values = [trial["value"] for trial in trials]
    axis, beyond = focus(values, maximize=maximize, label=study["value"])
    return {
        "beyond": beyond,
        "history": _history(study, axis),
        "importance": _importance(study["importance"]),
        "effects": {each["name"]: _scatter(each, study, axis) for each in study["parameters"][:MOST_PARAMETERS]},
        "parallel": _parallel(study),
    }


def _front(study: Json) -> Markup:
    series = []
    for key, css, name in (("points", "rest", "completed"), ("front", "s1", "on the Pareto front")):
        points = [each for each in study[key] if all(map(_is_number, each["values"]))]
        titles = [f"trial {each['number']}: {each['values'][0]:.6g}, {each['values'][1]:.6g}" for each in points]
        places = [(float(each["values"][0]), float(each["values"][1])) for each in points]
        series.append(svg.Series(points=places, css=css, name=name, titles=titles))
    return svg.chart(series, x=svg.Axis(label="first value"), y=svg.Axis(label="second value"), label="Pareto front")


def _history(study: Json, axis: svg.Axis) -> Markup:
    done = sorted((each["number"], each["value"]) for each in study["history"])
    so_far: list[tuple[float, float]] = []
    for number, value in done:
        best = value if not so_far else (max if study["maximize"] else min)(so_far[-1][1], value)
        so_far.append((number, best))
    said = [f"trial {number}: {value:.6g}" for number, value in done]
    stopped = [(each["number"], each["value"]) for each in study["stopped"]]
    words = [f"trial {number}: stopped at {value:.6g}" for number, value in stopped]
    series = [
        svg.Series(points=stopped, css="rest", name="pruned or killed (last value)", titles=words),
        svg.Series(points=done, css="s0", name="complete", titles=said),
        svg.Series(points=so_far, kind="steps", css="s1", name="best so far"),
    ]
    drawn = [each for each in series if each.points]
    return svg.chart(drawn, x=svg.Axis(label="trial"), y=axis, label="optimisation history")


def _importance(importance: Mapping[str, float]) -> Markup:
    top = max(importance.values(), default=0.0) or 1.0
    return svg.bars([(name, share / top, f"{share:.0%}") for name, share in importance.items()])


def _scatter(parameter: Json, study: Json, axis: svg.Axis) -> Markup:
    name, drawn = parameter["name"], parameter["drawn"]
    have = [trial for trial in study["trials"] if name in trial["params"]]
    if "options" in drawn:
        at = {option: i for i, option in enumerate(drawn["options"])}
        points = [(float(at[str(t["params"][name])]), t["value"]) for t in have if str(t["params"][name]) in at]
        x = svg.Axis(label=name, names=tuple(drawn["options"]), low=-0.5, high=len(at) - 0.5)
    else:
        points = [(float(t["params"][name]), t["value"]) for t in have]
        x = svg.Axis(label=name, kind="log" if drawn["log"] and drawn["low"] > 0 else "linear")
    titles = [f"trial {t['number']}: {name} {t['params'][name]}, {t['value']:.6g}" for t in have]
    return svg.chart([svg.Series(points=points, titles=titles)], x=x, y=axis, label=f"effect of {name}")


def _parallel(study: Json) -> Markup:
    shown = study["parameters"][: MOST_PARAMETERS - 1]
    trials = study["trials"][-MOST_LINES:]
    if len(trials) < 2 or not shown:
        return svg.nothing("Parallel coordinates need two completed trials.")
    values = sorted(trial["value"] for trial in trials)
    low, high = values[0], values[-1]
    ranks = {v: i / max(1, len(values) - 1) for i, v in enumerate(reversed(values) if study["maximize"] else values)}
    lines = []
    for trial in trials:
        places: list[float | None] = [_at(each["drawn"], trial["params"].get(each["name"])) for each in shown]
        places.append((trial["value"] - low) / (high - low) if high > low else 0.5)
        lines.append((places, ranks[trial["value"]], f"trial {trial['number']}: {trial['value']:.6g}"))
    ends = [_ends(each["drawn"]) for each in shown] + [(svg.short(low), svg.short(high))]
    return svg.parallel([*(each["name"] for each in shown), study["value"]], lines, ends)


def _at(drawn: Json, value: Any) -> float | None:
    if value is None and "options" not in drawn:
        return None
    if "options" in drawn:
        options = drawn["options"]
        return None if str(value) not in options else (options.index(str(value)) + 0.5) / len(options)
    return min(1.0, max(0.0, place(Range(low=drawn["low"], high=drawn["high"], log=drawn["log"]), float(value))))


def _ends(drawn: Json) -> tuple[str, str]:
    if "options" in drawn:
        return drawn["options"][0], drawn["options"][-1]
    return svg.short(drawn["low"]), svg.short(drawn["high"])

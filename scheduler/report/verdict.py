"""The first lines: what ran, how it ended, the best of each study, and what to do next."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from scheduler.host.kill_words import clock
from scheduler.model import ExitReason, Json, StudySpec
from scheduler.model.parameters import Range
from scheduler.report.records import Run
from scheduler.ui.report import best_row, ended_as
from scheduler.units import duration

EXITS = {0: "all was done", 1: "not all was done", 124: "its time limit stopped it", 130: "it was stopped"}
EDGE = 0.04  # of a range: the best trials lie this near to its end
BEST_FEW = 4


def section(run: Run) -> Json:
    """Return the sentence, a line per study, and what to do next."""
    last = run.starts[-1] if run.starts else None
    code = last.ended.get("exit_code") if last is not None and run.state == "over" else None
    why = str(last.ended.get("reason")) if last is not None and last.ended else ""
    ended = sum(ended_as(row) not in (None, "too large") for _, row in run.trials)
    quota = sum(spec.quota for spec in run.specs if spec.name not in run.refused)
    if run.state == "over" and code == 0 and run.refused:  # what the command itself ends with
        code, why = 1, f"{why}; {len(run.refused)} refused"
    return {
        "run": run.name,
        "state": run.state,
        "sentence": _sentence(run, ended, quota, code, why),
        "exit_code": code,
        "reason": why,
        "began": clock(run.began),
        "until": clock(run.until),
        "lasted_s": round(sum(s.until - s.began for s in run.starts), 1),
        "starts": len(run.starts),
        "ended": ended,
        "quota": quota,
        "refused": [{"study": name, "reason": each} for name, each in run.refused.items()],
        "studies": [_study(run, spec) for spec in run.specs if spec.name not in run.refused],
        "next": advice(run, quota - ended),
        "missing": list(run.missing),
        "notes": [{"event": event, "text": text} for event, text in run.notes],
    }


def _sentence(run: Run, ended: int, quota: int, code: Any, why: str) -> str:
    count = len(run.specs) - len(run.refused)
    what = f"{ended} of {quota} trials in {count} {'study' if count == 1 else 'studies'} have ended"
    lasted = duration(sum(s.until - s.began for s in run.starts), wide=True)
    if run.state == "running":
        return f"The run is going on: {what} after {lasted}."
    if run.state == "died":
        return f"The driver died without a word, last heard of at {clock(run.until)}: {what} in {lasted}."
    return f"Exit {code}, {EXITS.get(code, 'it could not go on')} ({why}): {what} in {lasted}."


def _study(run: Run, spec: StudySpec) -> Json:
    rows = run.rows.get(spec.name, ())
    best: Mapping[str, Any] = best_row(rows, spec) or {}
    names = [*spec.shown.columns] or list(best.get("asked.params", ()))
    closed, early = run.closed.get(spec.name, ("", False))
    several = len(spec.directions) > 1
    return {
        "study": spec.name,
        "labels": dict(spec.shown.labels),
        "directions": list(spec.directions),
        "completed": sum(row["state"] == "COMPLETE" for row in rows),
        "quota": spec.quota,
        "best_value": best.get("value"),
        "best_trial": best.get("number"),
        "parameters": {name: best[name] for name in names if name in best},
        "peak_bytes": best.get("footprint.observed_peak_bytes"),
        "note": f"closed early: {closed}" if early else "several values: no single best" if several else "",
    }


def advice(run: Run, left: int) -> list[str]:
    """Return what somebody who wants the most of the next run would do, each with its reason; the gravest first."""
    said: list[str] = []
    for name, why in run.refused.items():
        said.append(f"{name} did not run: {why}.")
    if run.state == "died":
        said.append("Give the same command again: it settles what the dead driver left and goes on.")
    elif left > 0 and run.state == "over" and not any(early for _, early in run.closed.values()):
        said.append(f"{left} {'trial is' if left == 1 else 'trials are'} left: the same command goes on.")
    for name, (why, early) in run.closed.items():
        if early:
            said.append(f"{name} was closed early ({why}): put that right, then give the same command again.")
    said += _of_kills(run)
    errors = [row for _, row in run.trials if ended_as(row) == "failed"]
    if errors:
        said.append(
            f"{len(errors)} {'trial' if len(errors) == 1 else 'trials'} failed by an error of their own, listed below. "
            "They count towards the quota; raise --trials by as many to have them replaced."
        )
    for spec in run.specs:
        said += _edges(run, spec)
    if run.state == "over":
        said += _onwards(run, left) if said else ["Nothing was amiss.", *_onwards(run, left)]
    return said


def _onwards(run: Run, left: int) -> list[str]:
    """Say how the search is gone on with once it is complete, and how its best is run."""
    found = [spec for spec in run.specs if best_row(run.rows.get(spec.name, ()), spec) is not None]
    if left > 0 or not found:
        return []
    names = ", ".join(f"best/{spec.name}.yaml" for spec in found[:3]) + (", and so on" if len(found) > 3 else "")
    told = (
        "To search on, give the same command with a larger --trials; to run the best again, bin/schedule --config FILE "
    )
    return [f"{told}with a file of the run's folder ({names})."]


def _of_kills(run: Run) -> list[str]:
    kinds: dict[ExitReason, list[str]] = {}
    for kill in run.kills:
        if not kill.observed:
            ended = next((a.reason for a in run.attempts if a.id == kill.attempt), "")
            if ended in {reason.value for reason in ExitReason}:
                kinds.setdefault(ExitReason(ended), []).append(str(kill.attempt.trial.number))
    said = []
    for why, numbers in kinds.items():
        who = f"Trial{'s' if len(numbers) > 1 else ''} {', '.join(dict.fromkeys(numbers))}"
        match why:
            case ExitReason.STALLED:
                said.append(
                    f"{who} stood still and will not be run again: the stack below says where. If work there may take "
                    "longer without a sign of life, report more often, or raise watchdog.stall_after_s."
                )
            case ExitReason.OVERSHOOT | ExitReason.EVICTED:
                said.append(
                    f"{who} took more memory than promised; the sampler was told that this is infeasible. Bound the "
                    "parameters that make it large, or, where the promise was yours (--memory), raise it."
                )
            case ExitReason.PREEMPTED:
                said.append(
                    f"{who} kept the promise and was ended to save the host: it runs again by itself. If it happens "
                    "often, lower --memory-budget, or end what else runs on the machine."
                )
    return said


def _edges(run: Run, spec: StudySpec) -> list[str]:
    """Name the parameters whose best values lie at an end of their range: the optimum may be beyond."""
    read = run.studies.get(spec.name)
    if read is None or len(spec.directions) > 1:
        return []
    sign = -1 if spec.directions[0] == "maximize" else 1
    complete = [row for row in read.rows if row["state"] == "COMPLETE" and row.get("value") is not None]
    best = [row["number"] for row in sorted(complete, key=lambda row: sign * row["value"])[:BEST_FEW]]
    if len(complete) < 5 * BEST_FEW:
        return []
    said = []
    for name, drawn in read.space.items():
        if not isinstance(drawn, Range) or drawn.low >= drawn.high or name in spec.shown.shape.values():
            continue
        places = [place(drawn, read.params[number][name]) for number in best if name in read.params.get(number, {})]
        for end, bound, near in (
            ("upper", drawn.high, lambda p: p > 1 - EDGE),
            ("lower", drawn.low, lambda p: p < EDGE),
        ):
            if len(places) == BEST_FEW and all(map(near, places)):
                said.append(
                    f"{spec.name}: the best {BEST_FEW} trials lie at the {end} end of {name} ({bound:g}): widen it."
                )
    return said


def place(drawn: Range, value: float) -> float:
    """Return where a value lies in its range, 0 to 1, on the scale on which it was drawn."""
    low, high, v = drawn.low, drawn.high, float(value)
    if drawn.log and low > 0 and v > 0:
        low, high, v = math.log(low), math.log(high), math.log(v)
    return 0.5 if high <= low else (v - low) / (high - low)

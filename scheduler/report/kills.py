"""Each kill as a paragraph, with the minutes before it, who else was looked at and why they were spared."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from scheduler.core.fault import RULES
from scheduler.host import kill_words as words
from scheduler.model import ExitReason, Json
from scheduler.model.fields import finite
from scheduler.report import svg
from scheduler.report.ends import tail
from scheduler.report.hours import lost_s
from scheduler.report.records import Attempt, Kill, Run
from scheduler.units import duration

MOST = 60


def section(run: Run) -> list[Json]:
    """Return the kills, the last ones where there are very many."""
    return [_kill(run, kill) for kill in run.kills[-MOST:]]


def _kill(run: Run, kill: Kill) -> Json:
    story = {**kill.record, **kill.story}
    evidence = story.get("evidence")
    evidence = evidence if isinstance(evidence, Mapping) else {}
    attempt = next((a for a in run.attempts if a.id == kill.attempt), None)
    ended = attempt.reason if attempt is not None else str(story.get("reason"))
    shift = words.offset(story.get("steps"))
    return {
        "attempt": str(kill.attempt),
        "trial": words.trial_of(kill.attempt),
        "observed": kill.observed,
        "unix": kill.unix,
        "rule": str(story.get("rule")),
        "reason": ended,
        "paragraph": _paragraph(kill, story, evidence, ended),
        "cost": "" if kill.observed else _cost(run, kill, attempt),
        "then": _then(run, kill, ended),
        "course": words.course(story.get("steps")),
        "candidates": [
            {"trial": name, "held": held, "promised": promised, "why": why, "victim": why.startswith("chosen")}
            for name, held, promised, why in words.candidates(story)
        ],
        "stack": tail(story.get("stack") or ""),
        "log_tail": tail(_without(kill.log_tail, story.get("stack"))),
        "samples": _samples(story.get("samples"), shift),
        "promised_bytes": finite(evidence.get("promised_bytes")),
        "has_story": bool(kill.story),
    }


def _without(log: str, stack: Any) -> str:
    """Return the log without the stack, which is the last thing that was written there, and shown by itself."""
    at = log.rfind(stack.strip()) if isinstance(stack, str) and stack.strip() else -1
    return log[:at].rstrip() if at >= 0 else log


def _paragraph(kill: Kill, story: Mapping[str, Any], evidence: Mapping[str, Any], ended: str) -> str:
    who = words.trial_of(kill.attempt)
    verb = "would have been ended" if kill.observed else "was ended"
    told = f"{who[:1].upper()}{who[1:]} {verb} at {words.clock(kill.unix)}, because "
    told += f"{words.why(story.get('rule'), evidence)}. {words.held(evidence)} {words.stood(story.get('stack'))}"
    fault = words.fault(ended) or words.fault(story.get("reason"))
    return " ".join(told.split()) + (f" The fault was {fault}" if fault else "")


def _cost(run: Run, kill: Kill, attempt: Attempt | None) -> str:
    if attempt is None:
        return ""
    epochs = attempt.progress[-1][1] if attempt.progress else 0
    after = next((a for a in run.attempts if a.id.trial == kill.attempt.trial and a.launched > attempt.launched), None)
    lasted = duration(attempt.lasted_s, wide=True)
    if after is None:
        return f"It cost the {lasted} that the attempt had run ({epochs} epochs or steps reported)."
    if after.resume_from:
        return f"It cost {duration(lost_s(attempt, after), wide=True)} of {lasted}: it went on from its checkpoint."
    return f"It cost {lasted}: it had no checkpoint and began anew."


def _then(run: Run, kill: Kill, ended: str) -> str:
    if kill.observed:
        return "Nothing was done: the watchdog only observes (--watchdog observe)."
    trial = kill.attempt.trial
    row = next((r for r in run.rows.get(trial.study, ()) if r["number"] == trial.number), None)
    try:
        rule = RULES[ExitReason(ended)]
    except ValueError:
        return ""
    if row is not None and row["state"] == "RUNNING":
        return "It runs again."
    if rule.state is None:
        return "It was run again, and it cost the trial nothing: neither its place in the quota nor a retry."
    told = f"In the study it is {rule.state.value}; it counts towards the quota and is not run again."
    return told + (" The sampler was told that it is infeasible." if rule.constraint else "")


def _samples(told: Any, shift: float | None) -> list[Json]:
    """Return (seconds before the last sample, available, limit, footprint, CPU seconds) of what the watchdog saw."""
    found: list[Json] = []
    for each in told if isinstance(told, Sequence) and not isinstance(told, str) else ():
        if not isinstance(each, Mapping) or (at := finite(each.get("at"))) is None:
            continue
        host = each.get("host")
        host = host if isinstance(host, Mapping) else {}
        trials = each.get("trials")
        first = trials[0] if isinstance(trials, list) and trials else None
        tree = first.get("tree") if isinstance(first, Mapping) else None
        tree = tree if isinstance(tree, Mapping) else {}
        found.append(
            {
                "unix": None if shift is None else round(at + shift, 3),
                "at": at,
                "available_bytes": finite(host.get("available_bytes")),
                "limit_bytes": finite(host.get("limit_bytes")),
                "footprint_bytes": finite(tree.get("footprint_bytes")),
                "cpu_s": finite(tree.get("cpu_s")),
            }
        )
    return found


def charts(kill: Json) -> list[tuple[str, Markup]]:
    """Draw what the watchdog saw before a kill: the trial's memory, its CPU, and what the host had left."""
    samples = kill["samples"]
    if len(samples) < 2:
        return []
    end = samples[-1]["at"]
    axis = svg.Axis(label="time until the decision", kind="span")

    def line(key: str) -> list[tuple[float, float]]:
        return [(s["at"] - end, s[key]) for s in samples if s[key] is not None]

    drawn = []
    if held := line("footprint_bytes"):
        promise = kill["promised_bytes"]
        marks = [svg.Mark(name="promised", y=promise, css="mark")] if promise else []
        series = [svg.Series(points=held, kind="line", css="s1")]
        low = svg.Axis(label="memory of the trial", kind="bytes", low=0)
        drawn.append(("Memory it held", svg.chart(series, x=axis, y=low, marks=marks, label="memory before the kill")))
    cpu = line("cpu_s")
    rate = [(b[0], max(0.0, (b[1] - a[1]) / (b[0] - a[0]))) for a, b in itertools.pairwise(cpu) if b[0] > a[0]]
    if rate:
        series = [svg.Series(points=rate, kind="line", css="s0")]
        drawn.append(("CPU it used", svg.chart(series, x=axis, y=svg.Axis(label="cores", low=0), label="CPU use")))
    if free := line("available_bytes"):
        series = [svg.Series(points=free, kind="line", css="s2")]
        low = svg.Axis(label="available on the host", kind="bytes", low=0)
        drawn.append(("What the host had left", svg.chart(series, x=axis, y=low, label="available memory")))
    return drawn

"""How trials and attempts ended: counts, the commonest errors, what they wrote last."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from scheduler.core.fault import RULES
from scheduler.model import ExitReason, Json
from scheduler.model.plain import line, text
from scheduler.report.records import Run
from scheduler.ui.report import KILLED, WORDS, ended_as, reason

MOST_ERRORS = 10
TAIL_LINES = 40
_ANSI = re.compile(r"(?:\x1b|\\x1b)\[[0-9;?]*[A-Za-z]")


def section(run: Run) -> Json:
    """Return counts per study and in all, attempts by how they ended, and the commonest errors."""
    studies = [{"study": spec.name, "quota": spec.quota, **_counts(run, spec.name)} for spec in run.specs]
    total: Counter[str] = Counter(dict.fromkeys((*WORDS, "running", "queued", "again"), 0))
    killed: Counter[str] = Counter()
    for each in studies:
        total.update({word: int(each[word]) for word in (*WORDS, "running", "queued", "again")})
        killed.update(each["killed_by"])
    attempts = Counter(attempt.reason for attempt in run.attempts)
    return {
        "studies": studies,
        "total": dict(total),
        "killed_by": dict(killed),
        "attempts": [{"reason": name, "count": count, **_rule(name)} for name, count in attempts.most_common()],
        "errors": _errors(run),
    }


def _counts(run: Run, study: str) -> Json:
    rows = run.rows.get(study, ())
    words = Counter(ended_as(row) for row in rows)
    again = sum(row.get("retried") is not None for row in rows)
    killed = Counter(reason(row) for row in rows if ended_as(row) == "killed")
    return {
        **{word: words[word] for word in WORDS},
        "running": sum(row["state"] == "RUNNING" for row in rows),
        "queued": sum(row["state"] == "WAITING" for row in rows),
        "again": again,
        "killed_by": dict(killed),
    }


def _rule(name: str) -> Json:
    """Return what the table of faults says of an end."""
    try:
        rule = RULES[ExitReason(name)]
    except ValueError:
        what = {"running": "it runs", "unknown": "its driver died before it ended"}.get(name, "")
        return {"what": what, "fault": "", "then": ""}
    then = "runs again" if rule.state is None else rule.state.value
    return {"what": rule.what, "fault": rule.fault.value, "then": then}


def _errors(run: Run) -> list[Json]:
    """Return the errors of failed trials, alike ones together: their numbers are taken out to compare."""
    found: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for spec, row in run.trials:
        if row.get("error") and reason(row) not in KILLED:
            said = line(row["error"], 300)
            found.setdefault(re.sub(r"\d+(\.\d+)?", "#", said), []).append((f"{spec.name}/{row['number']}", row))
    most = sorted(found.values(), key=len, reverse=True)[:MOST_ERRORS]
    return [
        {
            "error": line(group[0][1]["error"], 300),
            "count": len(group),
            "trials": [name for name, _ in group][:12],
            "reason": reason(group[0][1]),
            "tail": tail(group[0][1].get("traceback") or group[0][1].get("log_tail") or ""),
        }
        for group in most
    ]


def tail(said: Any) -> str:
    """Return the last lines of what a process wrote, without its terminal's colours."""
    lines = _ANSI.sub("", text(_ANSI.sub("", str(said)))).strip().splitlines()
    return "\n".join(lines[-TAIL_LINES:])

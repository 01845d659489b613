"""When each attempt ran and where (a Gantt chart), and what memory was reserved and used meanwhile.

Used memory is what the workers' samples said, from the run's recording; where there is none, or it is too large to be
read quickly, the peaks that attempts reported stand in for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from scheduler import model as m
from scheduler.core import admission
from scheduler.driver import recording
from scheduler.host.kill_words import clock
from scheduler.model import Json
from scheduler.model.fields import finite
from scheduler.report import svg
from scheduler.report.records import Attempt, Run
from scheduler.units import duration, gib

MOST_RECORDING_BYTES = 8 << 20  # some ten days of a host; a second per 2 MiB
MOST_BARS = 1200


def section(run: Run) -> Json:
    """Return lanes of attempts by worker, and memory over time by worker."""
    workers = dict.fromkeys(attempt.worker for attempt in run.attempts)
    used = _used(run)
    return {
        "began": run.began,
        "until": max(run.until, run.began + 1),
        "workers": [_worker(run, worker, used.get(worker, [])) for worker in workers],
        "bars_left_out": sum(max(0, sum(a.worker == w for a in run.attempts) - MOST_BARS) for w in workers),
        "used_from": "the workers' samples" if used else "the peaks that trials reported",
    }


def _worker(run: Run, worker: str, used: list[tuple[float, int]]) -> Json:
    mine = [attempt for attempt in run.attempts if attempt.worker == worker]
    facts = run.workers.get(worker, {})
    overhead = int(finite(facts.get("overhead_bytes")) or 0)
    return {
        "worker": worker,
        "slots": facts.get("slots"),
        "capacity_bytes": _capacity(run, facts),
        "limit_bytes": facts.get("limit_bytes"),
        "lanes": _lanes(mine),
        "reserved": _reserved(mine, overhead),
        "used": used or _peaks(mine, overhead),
    }


def _lanes(attempts: Sequence[Attempt]) -> list[list[Json]]:
    """Put attempts that ran at the same time below each other, each in the first lane that is free."""
    lanes: list[list[Json]] = []
    for attempt in attempts[-MOST_BARS:]:
        lane = next((each for each in lanes if each[-1]["until"] <= attempt.launched + 0.001), None)
        if lane is None:
            lanes.append(lane := [])
        lane.append(
            {
                "attempt": str(attempt.id),
                "number": attempt.id.trial.number,
                "from": attempt.launched,
                "until": attempt.until,
                "reason": attempt.reason,
                "peak_bytes": attempt.peak_bytes,
                "predicted_bytes": attempt.predicted_bytes,
            }
        )
    return lanes


def _reserved(attempts: Sequence[Attempt], overhead: int) -> list[tuple[float, int]]:
    """Return the sum of what the ledger held, at each instant where it changed."""
    changes: list[tuple[float, int]] = []
    for attempt in attempts:
        before = 0
        for at, size in attempt.reserved:
            changes.append((at, size - before))
            before = size
        changes.append((attempt.until, -before))
    return _summed(changes, overhead)


def _peaks(attempts: Sequence[Attempt], overhead: int) -> list[tuple[float, int]]:
    changes: list[tuple[float, int]] = []
    for attempt in attempts:
        before = 0
        for at, _, _, peak in attempt.progress:
            if peak:
                changes.append((at, peak - before))
                before = peak
        changes.append((attempt.until, -before))
    return _summed(changes, overhead)


def _summed(changes: list[tuple[float, int]], start: int) -> list[tuple[float, int]]:
    total, found = start, []
    for at, change in sorted(changes):
        total += change
        found.append((at, total))
    return found


def capacity_of(run: Run, worker: str) -> int | None:
    """Return what a worker may promise in all; None where that is not known."""
    return _capacity(run, run.workers.get(worker, {}))


def _capacity(run: Run, facts: Mapping[str, Any]) -> int | None:
    """Return what the worker may promise, as the ledger reckoned when it joined."""
    if run.settings is None:
        return None
    with contextlib.suppress(KeyError, TypeError, ValueError, m.UsageError):
        known = m.WorkerFacts(
            address=str(facts["worker"]),
            host=str(facts["host"]),
            slots=int(facts["slots"]),
            limit_bytes=int(facts["limit_bytes"]),
            available_bytes=int(facts["available_bytes"]),
            total_bytes=int(facts["limit_bytes"]),
            overhead_bytes=int(facts["overhead_bytes"]),
        )
        return admission.capacity(run.settings.memory_budget.on(known), known)
    return None


def _used(run: Run) -> dict[str, list[tuple[float, int]]]:
    """Return by worker what its attempts held, by Unix time; empty where no recording tells it."""
    folder = run.folder / recording.FOLDER
    found: dict[str, list[tuple[float, int]]] = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        if sum(path.stat().st_size for path in folder.iterdir()) > MOST_RECORDING_BYTES:
            return {}
        started = {attempt.id: attempt.started for attempt in run.attempts if attempt.started is not None}
        for start in recording.read(run.folder):
            _read(start, started, found, {w: int(f.get("overhead_bytes") or 0) for w, f in run.workers.items()})
    return found


def _read(
    start: recording.Start,
    started: Mapping[m.AttemptId, float],
    found: dict[str, list[tuple[float, int]]],
    overhead: Mapping[str, int],
) -> None:
    shift: float | None = None
    mine: list[tuple[str, float, int]] = []
    for step in start.steps:
        match step.event:
            case m.AttemptStarted(attempt=attempt) if shift is None and attempt in started:
                shift = started[attempt] - step.at  # the same moment by both clocks
            case m.WorkerVitals(worker=worker, used_bytes=used):
                mine.append((worker, step.at, sum(used.values()) + overhead.get(worker, 0)))
    for worker, at, size in mine if shift is not None else ():
        assert shift is not None
        found.setdefault(worker, []).append((at + shift, size))


def memory_chart(worker: Json, began: float, until: float) -> Markup:
    """Draw reserved and used memory of a worker below its capacity."""
    marks = [svg.Mark(name="capacity", y=worker["capacity_bytes"])] if worker["capacity_bytes"] else []
    series = [
        svg.Series(points=worker["reserved"], kind="area", css="s5", name="reserved"),
        svg.Series(points=worker["used"], kind="steps", css="s0", name="used"),
    ]
    x = svg.Axis(kind="clock", low=began, high=until)
    y = svg.Axis(label="memory", kind="bytes", low=0)
    return svg.chart([s for s in series if s.points], x=x, y=y, marks=marks, label="memory over time", height=210)


def gantt(found: Json) -> list[tuple[str, Markup]]:
    """Draw each worker's lanes; as boxes of the page and not as a picture, so that they are as wide as it is."""
    began, span = found["began"], found["until"] - found["began"]
    drawn = []
    for worker in found["workers"]:
        lanes = [
            Markup('<div class="lane">{}</div>').format(Markup("").join(_bar(bar, began, span) for bar in lane))
            for lane in worker["lanes"]
        ]
        drawn.append((worker["worker"], Markup('<div class="gantt">{}</div>').format(Markup("").join(lanes))))
    return drawn


def _bar(bar: Json, began: float, span: float) -> Markup:
    left = 100 * (bar["from"] - began) / span
    width = max(0.15, 100 * (bar["until"] - bar["from"]) / span)
    peak = "" if not bar["peak_bytes"] else f", peak {gib(bar['peak_bytes'])}"
    title = f"{bar['attempt']}: {bar['reason']}, {clock(bar['from'])}, {duration(bar['until'] - bar['from'])}{peak}"
    words = str(bar["number"]) if width > 4 else ""
    return Markup('<i class="r-{}" style="left:{}%;width:{}%" title="{}">{}</i>').format(
        bar["reason"], round(left, 3), round(width, 3), title, words
    )

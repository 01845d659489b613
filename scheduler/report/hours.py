"""Where the hours went: spent by how attempts ended, lost and why, waited for what, saved by what.

Only what the records tell. What would have been is marked as an estimate, with how it was made.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from scheduler.model import Json, TrialId
from scheduler.model.fields import finite
from scheduler.report.records import Attempt, Run
from scheduler.report.timeline import capacity_of
from scheduler.ui.report import ended_as

# Ends of an attempt that left no result, and after which its trial did not go on.
LOST = frozenset(("stalled", "evicted", "overshoot", "kernel_oom", "failed", "timed_out", "unknown"))
MOST_JOBS = 3000  # of the first-come-first-served reckoning


def section(run: Run) -> Json:
    """Return seconds: of trials (attempts added up) where nothing else is said, of the clock for the run."""
    spent: dict[str, float] = {}
    waited: dict[str, float] = {}
    for attempt in run.attempts:
        spent[attempt.reason] = spent.get(attempt.reason, 0.0) + attempt.lasted_s
        if attempt.wait_s:
            why = attempt.waited_for[-1] if attempt.waited_for else "its turn"
            waited[why] = waited.get(why, 0.0) + attempt.wait_s
    again_s = _again_s(run.attempts)
    busy_s, serial_s = _busy_s(run.attempts), sum(attempt.lasted_s for attempt in run.attempts)
    return {
        "clock_s": round(sum(start.until - start.began for start in run.starts), 1),
        "busy_s": round(busy_s, 1),
        "trials_s": round(serial_s, 1),
        "spent_by_end": _ordered(spent),
        "lost_by_end": {reason: round(s, 3) for reason, s in spent.items() if reason in LOST},
        "done_again_s": round(again_s, 1),
        "waited_by_reason": _ordered(waited),
        "saved": _saved(run, busy_s, serial_s),
    }


def _ordered(seconds: Mapping[str, float]) -> list[Json]:
    most_first = sorted(seconds.items(), key=lambda each: -each[1])
    return [{"reason": reason, "seconds": round(s, 3)} for reason, s in most_first]


def _again_s(attempts: Sequence[Attempt]) -> float:
    """How long attempts had run beyond what the next one of their trial went on from."""
    by_trial: dict[TrialId, list[Attempt]] = {}
    for attempt in attempts:
        by_trial.setdefault(attempt.id.trial, []).append(attempt)
    return sum(lost_s(before, after) for each in by_trial.values() for before, after in itertools.pairwise(each))


def lost_s(attempt: Attempt, after: Attempt) -> float:
    """How long an attempt had run beyond what the next one of its trial went on from, as far as their reports tell."""
    if not after.resume_from:
        return attempt.lasted_s
    if not after.progress or not attempt.progress:
        return 0.0
    kept = after.progress[0][1] - 1
    reached = next((at for at, step, *_ in reversed(attempt.progress) if step <= kept), attempt.launched)
    return max(0.0, attempt.until - reached)


def _busy_s(attempts: Sequence[Attempt]) -> float:
    """Clock time in which at least one attempt ran."""
    total, end = 0.0, 0.0
    for attempt in attempts:
        total += max(0.0, attempt.until - max(end, attempt.launched))
        end = max(end, attempt.until)
    return total


def _saved(run: Run, busy_s: float, serial_s: float) -> list[Json]:
    found: list[Json] = []
    for word, name in (("complete", "early stopping"), ("pruned", "pruning")):
        seconds, trials = _not_trained_s(run, word)
        if trials:
            how = f"estimate: the epochs that {trials} trials did not train, each at its own pace so far"
            found.append({"by": name, "seconds": round(seconds, 1), "how": how})
    if serial_s > busy_s > 0:
        how = (
            "at most: all attempts added up, less the time in which any ran; alone on the machine each would have been "
            "faster than beside the others"
        )
        found.append({"by": "running at the same time", "seconds": round(serial_s - busy_s, 1), "how": how})
    fifo_s = _fifo_s(run)
    if fifo_s is not None:
        how = (
            "reckoned: the same attempts, with the reservations and durations they had, started strictly in the order "
            "in which they were drawn, none before an earlier one; negative: that order would have been quicker"
        )
        found.append({"by": "against first come, first served", "seconds": round(fifo_s - busy_s, 1), "how": how})
    return found


def _not_trained_s(run: Run, word: str) -> tuple[float, int]:
    seconds, trials = 0.0, 0
    for spec, row in run.trials:
        most = finite(run.asked.get(f"{spec.name}/{row['number']}", {}).get("epochs"))
        done, took = finite(row.get("epochs")), finite(row.get("duration_s"))
        if ended_as(row) != word or not most or not done or not took or row.get("stop_reason") == "max_steps":
            continue
        if most > done:
            seconds, trials = seconds + (most - done) * took / done, trials + 1
    return seconds, trials


def _fifo_s(run: Run) -> float | None:
    """Busy time of the same attempts on one worker without overtaking; None where that cannot be reckoned."""
    workers = {attempt.worker for attempt in run.attempts}
    if len(workers) != 1 or len(run.starts) != 1 or len(run.attempts) > MOST_JOBS or run.state != "over":
        return None
    worker = workers.pop()
    room, slots = capacity_of(run, worker), int(run.workers.get(worker, {}).get("slots") or 0)
    room = None if room is None else room - int(run.workers[worker].get("overhead_bytes") or 0)
    if not room or not slots:
        return None
    needs = {spec.name: spec.slots for spec in run.specs}
    running: list[tuple[float, int, int]] = []  # (end, bytes, slots)
    now = last = 0.0
    for attempt in sorted(run.attempts, key=lambda a: a.launched - a.wait_s):
        size = min(room, attempt.reserved[0][1])
        need = min(slots, needs.get(attempt.id.trial.study, 1))
        while sum(r[1] for r in running) + size > room or sum(r[2] for r in running) + need > slots:
            running.sort()
            now = max(now, running.pop(0)[0])
        running.append((now + attempt.lasted_s, size, need))
        last = max(last, now + attempt.lasted_s)
    return last

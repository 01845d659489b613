"""Where the hours went: spent by how attempts ended, lost and why, waited for what, saved by what.

Only what the records tell. What would have been is marked as an estimate, with how it was made.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Mapping, Sequence
from statistics import median

from scheduler.host.kill_words import clock
from scheduler.model import Json, TrialId
from scheduler.model.fields import finite
from scheduler.report.records import Attempt, Run
from scheduler.report.timeline import capacity_of
from scheduler.ui.report import ended_as

# Ends of an attempt that left no result, and after which its trial did not go on.
LOST = frozenset(("stalled", "evicted", "overshoot", "kernel_oom", "failed", "timed_out", "unknown"))
MOST_JOBS = 30_000  # that are played again


def section(run: Run) -> Json:
    """Return seconds: of trials (attempts added up) where nothing else is said, of the clock for the run."""
    spent: dict[str, float] = {}
    waited: dict[str, float] = {}
    for attempt in run.attempts:
        spent[attempt.reason] = spent.get(attempt.reason, 0.0) + attempt.lasted_s
        if attempt.wait_s:
            why = attempt.waited_for[-1] if attempt.waited_for else "its turn"
            waited[why] = waited.get(why, 0.0) + attempt.wait_s
    again_s = _again_s(run)
    busy_s, serial_s = _busy_s(run.attempts), sum(attempt.lasted_s for attempt in run.attempts)
    return {
        "clock_s": round(sum(start.until - start.began for start in run.starts), 1),
        "busy_s": round(busy_s, 1),
        "trials_s": round(serial_s, 1),
        "spent_by_end": _ordered(spent),
        "lost_by_end": {reason: round(s, 3) for reason, s in spent.items() if reason in LOST},
        "done_again_s": round(again_s, 1),
        "waited_by_reason": _ordered(waited),
        "forecast": _forecast(run),
        "saved": _saved(run, busy_s, serial_s),
    }


def _forecast(run: Run) -> Json | None:
    """Return the last forecast, and how good those of starts that came to their end by themselves were."""
    if not run.forecasts:
        return None
    at, low, middle, high = run.forecasts[-1]
    held, errors = 0, []
    for made, least, likely, most in run.forecasts:
        start = next((s for s in run.starts if s.began <= made <= s.until), None)
        if start is not None and start.ended and start.quit is None:
            held += least <= start.until <= most
            errors.append(abs(likely - start.until) / max(1.0, start.until - made))
    return {
        "made": clock(at),
        "low": clock(low),
        "middle": clock(middle),
        "high": clock(high),
        "judged": len(errors),
        "held": held,
        "median_error": median(errors) if errors else None,
    }


def _ordered(seconds: Mapping[str, float]) -> list[Json]:
    most_first = sorted(seconds.items(), key=lambda each: -each[1])
    return [{"reason": reason, "seconds": round(s, 3)} for reason, s in most_first]


def _again_s(run: Run) -> float:
    """How long attempts had run beyond what the next one of their trial went on from.

    A trial that was queued again is another trial in the study: its attempts follow those of the first.
    """
    first = {TrialId(spec.name, row["retried"]): TrialId(spec.name, row["number"]) for spec, row in run.trials
             if isinstance(row.get("retried"), int)}  # fmt: skip
    chains: dict[TrialId, list[Attempt]] = {}
    for attempt in run.attempts:
        trial = attempt.id.trial
        while first.get(trial, trial).number < trial.number:
            trial = first[trial]
        chains.setdefault(trial, []).append(attempt)
    return sum(lost_s(before, after) for each in chains.values() for before, after in itertools.pairwise(each))


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
    by_order = _by_order_s(run)
    if by_order is not None:
        drawn_s, started_s = by_order
        how = (
            "reckoned: the same attempts, with the reservations and durations they had, each started as soon as there "
            "was room; once strictly in the order in which they were drawn, once in that in which they were started; "
            "negative: the first would have been quicker"
        )
        found.append({"by": "letting smaller ones go first", "seconds": round(drawn_s - started_s, 1), "how": how})
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


def _by_order_s(run: Run) -> tuple[float, float] | None:
    """How long the same attempts take on one worker in the order drawn and in the order started, nobody overtaking.

    None where that cannot be reckoned: several workers or starts, too many attempts.
    """
    workers = {attempt.worker for attempt in run.attempts}
    if len(workers) != 1 or len(run.starts) != 1 or len(run.attempts) > MOST_JOBS or run.state != "over":
        return None
    worker = workers.pop()
    room, slots = capacity_of(run, worker), int(run.workers.get(worker, {}).get("slots") or 0)
    room = None if room is None else room - int(run.workers[worker].get("overhead_bytes") or 0)
    if not room or not slots:
        return None
    needs = {spec.name: spec.slots for spec in run.specs}
    jobs = [
        (
            attempt.lasted_s,
            min(room, attempt.reserved[0][1]),
            min(slots, needs.get(attempt.id.trial.study, 1)),
            attempt.launched - attempt.wait_s,
        )
        for attempt in run.attempts
    ]
    return _played_s(sorted(jobs, key=lambda job: job[3]), room, slots), _played_s(jobs, room, slots)


def _played_s(jobs: Sequence[tuple[float, int, int, float]], room: int, slots: int) -> float:
    """Return when the last of (seconds, bytes, slots, ...) ends, each started once the one before has and it fits."""
    running: list[tuple[float, int, int]] = []
    now = last = 0.0
    free_bytes, free_slots = room, slots
    for seconds, size, need, _ in jobs:
        while size > free_bytes or need > free_slots:
            end, size_back, need_back = heapq.heappop(running)
            now, free_bytes, free_slots = max(now, end), free_bytes + size_back, free_slots + need_back
        heapq.heappush(running, (now + seconds, size, need))
        free_bytes, free_slots = free_bytes - size, free_slots - need
        last = max(last, now + seconds)
    return last

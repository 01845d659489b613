"""What happened, as a sentence for a person: from an event of the journal to a `Happening`.

Covers the ends of attempts (above all kills: whose fault, and where the story is), studies, hosts, workers, the
database and the cluster. What says nothing to a person gives None; the journal has it all. Pure: the time is an
argument, and so is where a file lies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from scheduler.model import AttemptId, ExitReason
from scheduler.model.host_words import HOST_IN_NEED
from scheduler.model.journal_events import JournalEvent
from scheduler.model.plain import line
from scheduler.ui import words
from scheduler.ui.snapshot import Happening
from scheduler.units import duration, gib

Fields = Mapping[str, Any]
StoryPath = Callable[[AttemptId], str | None]  # of a kill's file; None where it lies on another host


def tell(
    event: str, fields: Fields, run: str, unix: float, story: StoryPath = lambda attempt: None
) -> Happening | None:
    """Return the event as a sentence, None where it says nothing to a person.

    run: whose studies go without its name.
    """
    whose = ""
    match event:
        case JournalEvent.ATTEMPT_ENDED:
            whose = str(fields["attempt"])
            tone, text = _ended(fields, run, story)
        case JournalEvent.WATCHDOG_WOULD_KILL:
            attempt = AttemptId.parse(fields["attempt"])
            tone, text = "warn", f"{_trial(attempt, run)} would have been ended: {_why_killed(fields)} (observing only)"
        case JournalEvent.STUDY_CLOSED:
            early = bool(fields.get("early"))
            name = words.study_name(fields["study"], run)
            tone = "warn" if early else "good"
            text = f"study {name} is closed early: {fields['reason']}" if early else f"study {name} is complete"
        case _:
            found = _other(event, fields, run)
            if found is None:
                return None
            tone, text = found
    return Happening(unix=unix, text=line(text, 400), tone=tone, attempt=whose)


def _other(event: str, f: Fields, run: str) -> tuple[str, str] | None:
    """(tone, text) of what concerns no single trial."""
    match event:
        case JournalEvent.STUDY_ASK_FAILED:
            return "bad", f"study {words.study_name(f['study'], run)} cannot be sampled: {f.get('detail')}"
        case JournalEvent.STUDY_UNAVAILABLE:
            return "warn", f"the database does not answer: {f.get('error')}; what is to be written waits"
        case JournalEvent.STUDY_AVAILABLE:
            return "good", "the database answers again"
        case JournalEvent.HOST_CLOSED:
            return "warn", f"nothing starts on {f.get('worker')}: {f.get('reason')}"
        case JournalEvent.HOST_OPENED:
            return "good", f"trials may start on {f.get('worker')} again"
        case JournalEvent.WORKER_LEFT:
            return "warn", f"worker {f.get('worker')} is out of reach: {f.get('detail')}"
        case JournalEvent.WORKER_BROKEN:
            return "bad", f"no trial can run on {f.get('worker')}: {f.get('detail')}"
        case JournalEvent.WORKER_NONE:
            return "bad", "no worker is in reach"
        case JournalEvent.CLUSTER_DISCONNECTED:
            return "warn", f"the Dask scheduler is gone; trials are held for {duration(f.get('held_s') or 0)}"
        case JournalEvent.CLUSTER_BACK:
            return "good", "the Dask scheduler is back"
        case JournalEvent.CLUSTER_REBUILT:
            return "warn", "our own cluster was made anew"
        case JournalEvent.CLUSTER_LOST:
            return "bad", "the Dask scheduler did not come back; the run ends and can be resumed"
        case JournalEvent.RUN_FILES_LOST:
            return "bad", f"the {f.get('what')} was {f.get('fate')}: {f.get('path')}"
    return None


def _ended(fields: Fields, run: str, story: StoryPath) -> tuple[str, str]:
    attempt, reason = AttemptId.parse(fields["attempt"]), ExitReason(fields["reason"])
    who, took = _trial(attempt, run), duration(fields.get("duration_s") or 0.0)
    kill = fields.get("kill")
    if kill:
        path = story(attempt)
        again = f"; {_again(fields)}" if reason in _AGAIN else ""
        return "bad", f"{who} was ended: {_why_killed(kill)}{again}{f'; story: {path}' if path else ''}"
    value, epochs = fields.get("value"), fields.get("epochs") or 0
    score = "" if value is None else f" with {value:.5g}"
    after = f" after {epochs} epoch{'s' * (epochs != 1)}, {took}" if epochs else f" after {took}"
    detail = fields.get("detail") or ""
    match reason:
        case ExitReason.COMPLETED:
            return "", f"{who} completed{score}{after}{_peak(fields)}"
        case ExitReason.PRUNED:
            return "", f"{who} was pruned{after}"
        case ExitReason.FAILED:
            return "warn", f"{who} failed{after}: {detail}"
        case ExitReason.KERNEL_OOM:
            return "bad", f"{who} was killed by the kernel{after}: {detail}"
        case ExitReason.TIMED_OUT:
            return "warn", f"{who} ran into --trial-timeout{after}"
        case ExitReason.INTERRUPTED:
            return "", f"{who} left with its checkpoint{after}"
        case ExitReason.PREEMPTED:
            return "bad", f"{who} lost its memory to another program{after}; {_again(fields)}"
        case ExitReason.NOT_STARTED | ExitReason.NO_ROOM:
            return "warn", f"{who} runs again, its host is to blame: {detail}"
    return "warn", f"{who} was lost{after}: {detail}; {_again(fields)}"


_AGAIN = frozenset({ExitReason.PREEMPTED, ExitReason.LOST})


def _again(fields: Fields) -> str:
    """Return what becomes of it; without a checkpoint of its own nothing is said of where it begins."""
    return f"it runs again{' from its checkpoint' if fields.get('checkpoint') else ''}"


def _trial(attempt: AttemptId, run: str) -> str:
    again = f", attempt {attempt.attempt}," if attempt.attempt > 1 else ""
    return f"trial {attempt.trial.number} of {words.study_name(attempt.trial.study, run)}{again}"


def _why_killed(kill: Fields) -> str:
    """Return the rule it broke in words, with the numbers that count."""
    rule, seen = str(kill.get("rule") or ""), kill.get("evidence") or {}
    held, promised = _bytes(seen, "footprint_bytes"), _bytes(seen, "promised_bytes")
    size = ""
    if held is not None:
        size = f" while it held {gib(held)}" + (f" of {gib(promised)} promised" if promised else "")
    match rule:
        case "stalled":
            return f"no CPU and no progress for {_minutes(seen.get('quiet_s') or seen.get('limit_s') or 0)}"
        case "thrashing":
            return f"it paged memory in and out and made no progress{size}"
        case "orphaned":
            return "nobody waits for its result any more"
        case "overshoot":
            return f"it took far more than it was promised: {gib(held or 0)} of {gib(promised or 0)}"
    return HOST_IN_NEED.get(rule, line(rule.replace("_", " "), 60) or "the watchdog's rule") + size


def _peak(fields: Fields) -> str:
    peak, predicted = _bytes(fields, "peak_bytes"), _bytes(fields, "predicted_bytes")
    if peak is None:
        return ""
    return f", peak {gib(peak)}" + (f" of {gib(predicted)} predicted" if predicted else "")


def _minutes(seconds: Any) -> str:
    return duration(float(seconds), wide=True).replace(" 00 s", "") if isinstance(seconds, int | float) else "long"


def _bytes(fields: Fields, key: str) -> int | None:
    found = fields.get(key)
    return int(found) if isinstance(found, int | float) and not isinstance(found, bool) else None

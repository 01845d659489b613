"""The story of a kill in plain words, sizes in GiB and instants on the clock: `kill.txt`, and the run's report.

Covers the sentences only; the story itself is `kill.json`, as the watchdog leaves it. A trial's own code can write to
that folder, so whatever is no number or no text is left out. Standard library only.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scheduler.model import AttemptId, ExitReason
from scheduler.model.fields import finite
from scheduler.model.host_words import HOST_IN_NEED
from scheduler.model.plain import line, text
from scheduler.units import duration, gib

_BYTES = re.compile(r"\b(\d{1,20}) bytes\b(?:( of(?: at least)?) (\d{1,20})\b)?")  # "7 bytes of at least 9"
_FRAME = re.compile(r'File "([^"\n]+)", line (\d+) in ([^\n]+)')  # as faulthandler writes it
_FAULT = {
    ExitReason.STALLED: "its own: it did nothing any more.",
    ExitReason.EVICTED: "its own: it held more than it was promised, or thrashed, while the host ran out of memory.",
    ExitReason.OVERSHOOT: "its own: it held far more than it was promised.",
    ExitReason.KERNEL_OOM: "its own, as far as can be told: the kernel ends who holds most, beyond its promise.",
    ExitReason.TIMED_OUT: "its own: it was too slow.",
    ExitReason.PREEMPTED: "not its own: it kept its promise, and another trial or program took the memory.",
    ExitReason.LOST: "not its own: the process that looked after it was gone.",
}


def clock(unix: float | None) -> str:
    """Return the local time of day with its date: "2026-11-24 14:03:12"; "?" where it is not known."""
    try:
        return "?" if unix is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix))
    except (OverflowError, ValueError, OSError):
        return "?"


def trial_of(attempt: Any) -> str:
    """ "trial 17 of phase6a_20M_h3 (attempt 2)"; the text as it is where it names no attempt."""
    try:
        found = AttemptId.parse(str(attempt))
    except ValueError:
        return line(attempt, 200)
    again = f" (attempt {found.attempt})" if found.attempt > 1 else ""
    return f"trial {found.trial.number} of {found.trial.study}{again}"


def size(value: Any) -> str:
    """Return bytes as people read them; "an unknown amount" where it is no number."""
    number = finite(value)
    return "an unknown amount" if number is None else gib(int(number))


def in_words(text: Any) -> str:
    """Return a sentence of the watchdog's with its bytes in GiB."""
    told = _BYTES.sub(_sizes, line(text, 500))
    return re.sub(r"^healthy: (\w+)$", r"spared: nothing was wrong with it (\1)", told)


def _sizes(found: re.Match[str]) -> str:
    return gib(int(found[1])) + (f"{found[2]} {gib(int(found[3]))}" if found[3] else "")


def why(rule: Any, evidence: Mapping[str, Any]) -> str:
    """Return what the trial did, or the host lacked, as the end of "because ..."."""
    number = _numbers(evidence)
    held, promised = size(evidence.get("footprint_bytes")), number("promised_bytes")
    match rule:
        case "stalled":
            quiet, limit = number("quiet_s"), number("limit_s")
            what = "it used no CPU and showed no progress"
            return what + (f" for {_time(quiet)} (limit {_time(limit)})" if quiet and limit else "")
        case "thrashing":
            return f"it made no progress while its memory was being swapped ({size(evidence.get('swap_bytes'))} of it)"
        case "orphaned":
            return "the agent that had started it was gone and nobody would have heard of its result"
        case "kernel_oom":
            return "the kernel's out-of-memory killer took it"
        case "timed_out":
            return "it ran longer than a trial may (--trial-timeout)"
        case "overshoot":
            return f"it held {held}, far over the {size(promised)} that it was promised"
    told = HOST_IN_NEED.get(str(rule), f"the host was in need ({line(rule, 80)})")
    available, left = number("available_bytes"), number("left_s")
    if available is not None:
        told += f": {gib(int(available))} of {size(evidence.get('limit_bytes'))} were available"
    return told + (f", {left:.1f} s until it would have been gone" if left is not None else "")


def held(evidence: Mapping[str, Any]) -> str:
    """Return what it held beside its promise, in a sentence; empty where nobody could measure it."""
    number = _numbers(evidence)
    footprint, promised = number("footprint_bytes"), number("promised_bytes")
    if footprint is None:
        return ""
    if not promised:
        return (
            f"It held {gib(int(footprint))}; nothing was promised for it: what it would take was a guess, or unknown."
        )
    over = footprint - promised
    beside = f"{gib(int(over))} more than" if over > 0 else f"within the {gib(int(promised))} of"
    return f"It held {gib(int(footprint))}: {beside} its promise" + (f" of {gib(int(promised))}." if over > 0 else ".")


def stood(stack: Any) -> str:
    """Return where its main thread was, in a sentence: the innermost line outside of Python's own library and of what
    is installed, else the innermost. Empty where the stack is not known."""
    if not isinstance(stack, str):
        return ""
    _, found, main = stack.partition("Current thread")
    frames = _FRAME.findall((main if found else stack).partition("\n\n")[0])
    own = [frame for frame in frames if "/lib/python" not in frame[0] and not frame[0].startswith("<")]
    for path, number, function in (own or frames)[:1]:
        return f"It stood in {line(path.rpartition('/')[2], 100)}, line {number}, in {line(function, 100)}."
    return ""


def fault(reason: Any) -> str:
    """Return whose fault the end is, in words; empty for an unknown reason."""
    try:
        return _FAULT.get(ExitReason(reason), "")
    except ValueError:
        return ""


def offset(steps: Any) -> float | None:
    """Return what an instant of the story lacks to the Unix time, None where no step tells both."""
    for step in steps if isinstance(steps, Sequence) and not isinstance(steps, str) else ():
        if isinstance(step, Mapping):
            at, unix = finite(step.get("at")), finite(step.get("unix"))
            if at is not None and unix is not None:
                return unix - at
    return None


def course(steps: Any) -> list[str]:
    """Return a line per step: the time of day, and what was done."""
    shift = offset(steps)
    words = {
        "intent": "decided",
        "recheck": "looked again: the reason still held",
        "term": "asked to end (SIGTERM)",
        "kill": "ended (SIGKILL)",
        "unkillable": "it did not end: the host takes nothing more",
        "dead": "dead",
        "memory_back": "its memory came back",
        "released": "over",
        "aborted": "called off",
        "would_kill": "would have been ended; the watchdog only observes",
    }
    lines = []
    for step in steps if isinstance(steps, Sequence) and not isinstance(steps, str) else ():
        at = finite(step.get("at")) if isinstance(step, Mapping) else None
        if at is None:
            continue
        told = words.get(str(step.get("step")), line(step.get("step"), 40))
        if (gained := finite(step.get("gained_bytes"))) is not None and step.get("step") == "memory_back":
            told += f": {gib(int(gained))}"
        if step.get("why"):
            told += f" ({line(step['why'], 200)})"
        lines.append(f"{clock(None if shift is None else at + shift)}  {told}")
    return lines


def candidates(story: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return (trial, what it held, what it was promised, why it was chosen or spared) of each that was looked at."""
    told = story.get("candidates")
    rows = []
    for each in told if isinstance(told, Sequence) and not isinstance(told, str) else ():
        if isinstance(each, Mapping):
            promised = "nothing" if each.get("promised_bytes") == 0 else size(each.get("promised_bytes"))
            reason = in_words(each.get("why"))
            rows.append((trial_of(each.get("attempt")), size(each.get("footprint_bytes")), promised, reason))
    return rows


def as_text(story: Mapping[str, Any]) -> str:
    """Return the whole story for people: what, why, whose fault, the others, the course of it."""
    evidence = story.get("evidence")
    evidence = evidence if isinstance(evidence, Mapping) else {}
    steps, shift = story.get("steps"), offset(story.get("steps"))
    since = finite(story.get("since"))
    observed = isinstance(steps, list) and any(isinstance(s, Mapping) and s.get("step") == "would_kill" for s in steps)
    verb = "would have been ended" if observed else "was ended"
    lines = [f"{trial_of(story.get('attempt'))} {verb}, because {why(story.get('rule'), evidence)}."]
    lines += [found for found in (held(evidence), stood(story.get("stack"))) if found]
    lines += [f"The fault was {found}"] if (found := fault(story.get("reason"))) else []
    if since is not None and shift is not None:
        lines.append(f"First symptom: {clock(since + shift)}.")
    told = "\n".join(lines)
    told = told[:1].upper() + told[1:]
    if steps_told := course(steps):
        told += "\n\nWhat was done\n" + "\n".join(f"  {each}" for each in steps_told)
    if others := candidates(story):
        rows = [f"  {name}: held {had} of {promised} promised; {reason}" for name, had, promised, reason in others]
        told += "\n\nWho was looked at\n" + "\n".join(rows)
    if isinstance(stack := story.get("stack"), str) and stack.strip():
        told += "\n\nWhere it stood\n" + "\n".join(f"  {each}" for each in text(stack.strip()).splitlines()[:80])
    return told + "\n\nAll numbers: kill.json beside this file.\n"


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds, wide=True)


def _numbers(evidence: Mapping[str, Any]) -> Callable[[str], float | None]:
    return lambda name: finite(evidence.get(name))

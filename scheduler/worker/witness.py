"""All that was seen of one attempt, and what its end therefore was.

Covers `conclude`, the rule that turns what was seen into an Outcome: a living agent uses it, and whoever finds later
what a dead one has left. Pure. Whose fault the end is, and what follows, is `core.fault`.
"""

from __future__ import annotations

import math
import signal
from dataclasses import dataclass, field

from scheduler.model import ExitReason, Json, KillRecord, Outcome
from scheduler.model.fields import finite
from scheduler.model.messages import Last
from scheduler.model.plain import line, text
from scheduler.worker.tree_peak import TreePeak, with_children


@dataclass(slots=True, kw_only=True)
class Witness:
    """All that was seen of one attempt; `conclude` makes the outcome of it.

    last: its final message, None when none came. asked: why the agent asked it to leave, None if it did not. ended_by:
    why the agent itself ended it, None if it did not. kill: the watchdog's record, None without one. oom_killed: the
    kernel killed it and counted that.
    allowed_bytes: its promise and what an estimate may err, None where unknown. freed_bytes: what the host had
    available right after the kernel's kill: no less than the victim held; None where that cannot be told. peak_bytes:
    its own, tree: of all its processes. environment, runtime_bytes: what the process was and held when it was ready.
    """

    last: Last | None = None
    asked: str | None = None
    exit_status: int | None = None
    ended_by: str | None = None
    kill: KillRecord | None = None
    oom_killed: bool = False
    allowed_bytes: float | None = None
    freed_bytes: int | None = None
    epochs: int = 0
    value: float | None = None
    peak_bytes: int | None = None
    tree: TreePeak = field(default_factory=TreePeak)
    device_peak_bytes: int | None = None
    environment: str | None = None
    runtime_bytes: int | None = None
    duration_s: float = 0.0
    checkpoint: str | None = None
    log_tail: str = ""


# Sent from outside (a person, a service manager, a host that shuts down): no word about the trial. What it dies
# of by its own fault (SIGSEGV, SIGABRT, SIGBUS, ...) is its own.
FROM_OUTSIDE = frozenset({-signal.SIGKILL, -signal.SIGTERM, -signal.SIGHUP})
# Why it was asked, or made, to leave -> what its end then is. Whatever else it is asked for is an interruption.
_ASKED = {"prune": ExitReason.PRUNED, "timeout": ExitReason.TIMED_OUT, "orphaned": ExitReason.LOST}


def conclude(seen: Witness) -> Outcome:
    """Tell what the end of an attempt was. A durable result always wins: a kill that came too late changes nothing."""
    value, traceback, last = None, None, seen.last
    values: tuple[float, ...] = ()
    own_peak_bytes = max(seen.peak_bytes or 0, (last and last.peak_bytes) or 0)
    peak_bytes = with_children(own_peak_bytes, seen.tree, None if last is None else last.children_peak_bytes)
    result: Json = {}
    if last is not None and last.result is not None:
        result = dict(last.result)
        values = _values(result)
        reason, detail, value = _of_result(result, values, seen.asked or last.asked)
    elif seen.kill is not None:
        reason, detail = seen.kill.ended, f"watchdog: {seen.kill.rule}"
    elif last is not None:
        reason, detail, traceback = ExitReason.FAILED, last.error, last.traceback
        if not last.started:
            reason = ExitReason.NOT_STARTED
        elif last.no_room:
            reason = ExitReason.NO_ROOM
    elif seen.ended_by is not None:
        reason, detail = _ASKED.get(seen.ended_by, ExitReason.INTERRUPTED), f"ended: {seen.ended_by}"
    elif seen.oom_killed:
        # The last sample may be a second old, and a trial takes gigabytes in that time: what came back shows it.
        held = max(peak_bytes or 0, seen.freed_bytes or 0)
        within = peak_bytes and seen.allowed_bytes and held <= seen.allowed_bytes
        reason = ExitReason.PREEMPTED if within else ExitReason.KERNEL_OOM
        detail = f"killed by the kernel: out of memory{', within its promise' if within else ''}"
    else:
        reason = ExitReason.LOST if seen.exit_status in FROM_OUTSIDE else ExitReason.FAILED
        detail = describe_status(seen.exit_status)
    epochs = result.get("epochs")
    return Outcome(
        reason=reason,
        value=value,
        values=values if reason is ExitReason.COMPLETED else (),
        fatal=reason is ExitReason.FAILED and last is not None and last.fatal,
        detail=detail.strip().splitlines()[-1] if detail.strip() else "",
        epochs=epochs if isinstance(epochs, int) and not isinstance(epochs, bool) and epochs > 0 else seen.epochs,
        duration_s=seen.duration_s,
        peak_bytes=peak_bytes or None,
        device_peak_bytes=(last and last.device_peak_bytes) or seen.device_peak_bytes,
        environment=(last and last.environment) or seen.environment,
        runtime_bytes=(last and last.runtime_bytes) or seen.runtime_bytes,
        exit_status=seen.exit_status,
        traceback=traceback,
        log_tail=text(seen.log_tail),
        checkpoint=seen.checkpoint,
        kill=seen.kill if reason not in (ExitReason.COMPLETED, ExitReason.PRUNED) else None,
        result=result,
    )


def _values(result: Json) -> tuple[float, ...]:
    """Return what an objective with a trial of its own returned: numbers as text. Empty when there are none that
    are."""
    found = result.get("values")
    try:
        values = tuple(float(value) for value in found) if isinstance(found, list) else ()
    except (TypeError, ValueError, OverflowError):
        return ()
    return () if any(math.isnan(value) for value in values) else values


def _of_result(result: Json, values: tuple[float, ...], asked: str | None) -> tuple[ExitReason, str, float | None]:
    """(reason, detail, value) of an attempt that returned. That it was interrupted counts only if it was asked to
    leave: a function that says so by itself would else be run again for ever."""
    said, value = line(result.get("stop_reason") or "completed", 80), finite(result.get("value"))
    if values:
        value = values[0]  # may be infinite: the study can hold that
    if said in ("interrupted", "pruned") and asked is not None:
        own_word = said == "pruned" and asked not in _ASKED
        return ExitReason.PRUNED if own_word else _ASKED.get(asked, ExitReason.INTERRUPTED), said, value
    if said == "pruned":
        return ExitReason.PRUNED, said, value
    if value is None:
        why = "it says interrupted, but nobody asked it to leave: " if said == "interrupted" else ""
        shown = line(repr(result.get("value")), 80)
        return ExitReason.FAILED, f"{why}the objective returned the value {shown}, not a number", None
    return ExitReason.COMPLETED, said, value


def describe_status(status: int | None) -> str:
    """`exit status 7` or `killed by SIGSEGV` in words."""
    if status is None:
        return "it would not die"
    if status >= 0:
        return f"ended without a result, exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"

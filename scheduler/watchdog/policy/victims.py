"""On what ground a trial may be ended, and which one first: the same question for every level of pressure.

A trial answers for its own silence and for memory beyond its promise. One within its promise is a bystander: it is
spared while the host can be saved otherwise, and preempted only when the kernel's killer would be next. The kernel
takes trials first (oom_score_adj 500) and the largest of them, which may have days of work in it; a preemption takes
the one with the least work since its checkpoint, runs it again from there, and costs it nothing.

Pure: verdicts and a situation in, an order out. What a verdict is, is `trial_watch`; levels are `pressure`.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from scheduler.model import Pressure
from scheduler.watchdog.policy.thresholds import Thresholds
from scheduler.watchdog.policy.trial_watch import Over, Verdict


class Ground(enum.IntEnum):
    """Why a trial may be ended; the first goes first."""

    DOOMED = 0  # stalled, thrashing, orphaned: it has nothing to lose
    FAR = 1  # far over its promise
    OVER = 2  # over its promise while the host is in need
    UNSIZED = 3  # it has no promise, so nobody can say
    WITHIN = 4  # a bystander, ended only to save the others


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What the choice depends on besides the trials.

    running_out: the level comes from the pace alone, memory is not yet low. soon, dying: see `HostWatch`.
    rate_bytes_per_s: that pace. deficit_bytes: what must come back, 0 when it cannot be told. used_bytes: all that is
    in use on the host, swap included, None when unknown.
    """

    now: float
    level: Pressure
    running_out: bool = False
    soon: bool = False
    dying: bool = False
    rate_bytes_per_s: float = 0.0
    deficit_bytes: int = 0
    used_bytes: int | None = None

    @property
    def pressed(self) -> bool:
        return self.level >= Pressure.SOFT


def not_ours(verdicts: Iterable[Verdict], situation: Situation, t: Thresholds) -> bool:
    """Ours hold so little that ending them all would not help, and the kernel would take the stranger itself."""
    if situation.used_bytes is None:
        return False
    ours = sum(v.footprint_bytes or 0 for v in verdicts)
    return ours < t.own_share * situation.used_bytes or ours < situation.deficit_bytes


def rank(
    verdicts: Iterable[Verdict], situation: Situation, t: Thresholds, spared: Mapping[str, str]
) -> tuple[list[tuple[Ground, Verdict]], dict[str, str]]:
    """Who may be ended, the first victim first; and of the others why they are not. spared: key -> why not this one."""
    verdicts = tuple(verdicts)
    foreign = not_ours(verdicts, situation, t)
    ranked, why = [], {}
    for v in verdicts:
        found = spared.get(v.sample.key) or _ground(v, situation, t, foreign)
        if isinstance(found, Ground):
            ranked.append((found, v))
        else:
            why[v.sample.key] = found
    return sorted(ranked, key=lambda pair: _order_key(pair[0], pair[1], situation.now)), why


def _ground(v: Verdict, s: Situation, t: Thresholds, foreign: bool) -> Ground | str:
    """Find the ground on which this trial may be ended now, or why it may not."""
    takes_part = v.growth_bytes_per_s > 0 and v.growth_bytes_per_s >= t.growing_share * s.rate_bytes_per_s
    if v.is_without_progress:
        return Ground.DOOMED
    if v.over is Over.FAR or (v.far_now and s.soon and takes_part):
        return Ground.FAR
    held = v.footprint_bytes
    if not s.pressed:
        return f"healthy: {v.state.value}"
    if held is None:
        return "its memory could not be read"
    promised = bool(v.sample.promised_bytes)
    if promised and v.within_promise is None:
        return "its pages may be shared: not measured exactly yet"
    to_blame = v.within_promise is not True
    if to_blame and s.running_out and takes_part:
        return Ground.OVER if promised else Ground.UNSIZED  # however small: it is what the memory goes to
    if not s.dying and not to_blame:
        return f"within its promise: {held} bytes of {v.sample.promised_bytes}"
    if s.running_out and not s.dying:
        return "does not grow: not what the memory goes to"
    if foreign:
        return "not ours: other programs hold the memory"
    least = max(t.victim_min_bytes, int(t.victim_min_share * s.deficit_bytes))
    if held < least:
        return f"too small to help: {held} bytes of at least {least}"
    if not to_blame:
        return Ground.WITHIN
    return Ground.OVER if promised else Ground.UNSIZED


def _order_key(ground: Ground, v: Verdict, now: float) -> tuple[int, int, int, int, str]:
    work_lost_min = int(work_lost_s(v, now) // 60)  # by the minute: among those of one age the largest goes
    over = v.over_bytes if ground in (Ground.FAR, Ground.OVER) else 0
    return (ground, -over, work_lost_min, -(v.footprint_bytes or 0), v.sample.key)


def work_lost_s(v: Verdict, now: float) -> float:
    """Seconds since its last checkpoint, or since its launch before the first."""
    return now - max(v.sample.launched, v.sample.saved_at or v.sample.launched)


def explain(v: Verdict, now: float) -> str:
    """Return what was thought of a trial that may be ended, in words."""
    words = [v.state.value]
    if v.orphaned:
        words.append("its agent is gone")
    if v.within_promise is True:
        words.append("within its promise")
    elif v.over_bytes:
        words.append(f"{v.over_bytes} bytes over its promise")
    words.append(f"{work_lost_s(v, now):.0f} s of work to lose")
    return ", ".join(words)

"""Who is killed, and why not the others: a pure function of the samples so far.

`Evaluator.observe(sample)` turns what was seen into a `Decision`: the host's level, why admission is closed, a verdict
per trial, and at most one `KillOrder`. It reads no clock (samples carry their instant), so a recorded trace replays to
the same decisions. The signals are sent by `scheduler.watchdog`, which asks again right before them.

Order of victims: no progress left to lose (stalled, thrashing, orphaned), most over its promise, least work lost,
largest. If our trials are not the cause, admission closes and nobody dies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scheduler.model import Pressure
from scheduler.policy.pressure import HostWatch, swap_limit
from scheduler.policy.samples import HostMemory, HostSample, TrialSample
from scheduler.policy.thresholds import Thresholds
from scheduler.policy.trial_watch import Over, State, TrialWatch, Verdict

__all__ = ["Decision", "Evaluator", "HostMemory", "HostSample", "KillOrder", "Over", "State", "Thresholds", "Verdict"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KillOrder:
    """One trial is to be killed.

    rule: what it broke (stalled, thrashing, orphaned, overshoot, or the host's: memory_low, swap_threshold, ...).
    reason: value of model.ExitReason. since: instant of the first symptom. grace_s: from SIGTERM to SIGKILL.
    candidates: every trial with its rank or why it was not chosen.
    """

    victim: TrialSample
    rule: str
    reason: str
    level: Pressure
    since: float
    grace_s: float
    evidence: Mapping[str, Any] = field(default_factory=dict)
    candidates: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What one sample led to. closed_reason: why nothing is admitted whatever the level; None if that is all right."""

    at: float
    level: Pressure
    level_reason: str = ""
    closed_reason: str | None = None
    gap: bool = False
    verdicts: tuple[Verdict, ...] = ()
    kill: KillOrder | None = None
    held_back: str | None = None  # why a kill that was due was not ordered


class Evaluator:
    """The windows of the host and its trials, and the limits on killing. Deterministic."""

    def __init__(self, thresholds: Thresholds | None = None) -> None:
        self.thresholds = thresholds or Thresholds()
        self.host = HostWatch()
        self._trials: dict[str, TrialWatch] = {}
        self._verdicts: tuple[Verdict, ...] = ()
        self._last: HostSample | None = None
        self._kills: list[float] = []
        self._cool_until = -1e18
        self._unkillable: set[str] = set()
        self._observed: dict[str, float] = {}
        self._swap_base: int | None = None

    # -- what happened elsewhere --------------------------------------------------------------------------------

    def kill_started(self, at: float) -> None:
        """A signal was sent: it counts towards the breaker."""
        self._kills.append(at)

    def kill_ended(self, at: float) -> None:
        """The victim is dead and its memory back: the cool-down starts."""
        self._cool_until = at + self.thresholds.cooldown_s

    def unkillable(self, attempt: str, stuck: bool) -> None:
        """A victim that SIGKILL does not end (stuck), or that went in the end."""
        (self._unkillable.add if stuck else self._unkillable.discard)(attempt)

    def would_have_killed(self, key: str, at: float) -> None:
        """Observe mode: the order was only logged. This trial is left out for a while, and the cool-down starts."""
        self._observed[key] = at
        self.kill_ended(at)

    # -- judging ------------------------------------------------------------------------------------------------

    def observe(self, sample: HostSample, *, busy: bool = False) -> Decision:
        """Take in a sample. busy: a kill is under way, so nobody else is chosen."""
        t, now = self.thresholds, sample.at
        gap = self._is_gap(sample)
        if gap:
            self.host.drop_windows()
            for watch in self._trials.values():
                watch.drop_windows(now)
        self._last = sample
        if sample.trials is not None:
            pressed = self.host.paging or (sample.host.level or 0) >= 2
            self._verdicts = self._judge(sample, pressed)
        level = self.host.observe(sample.host, self._our_swap(sample.host), t)
        kill, held_back = self._choose(sample.host, level, now, busy)
        return Decision(
            at=now,
            level=level,
            level_reason=self.host.reason,
            closed_reason=self._closed(level, now, held_back),
            gap=gap,
            verdicts=self._verdicts,
            kill=kill,
            held_back=held_back,
        )

    def _is_gap(self, sample: HostSample) -> bool:
        last = self._last
        if last is None:
            return False
        slept = 0.0
        if sample.suspended_s is not None and last.suspended_s is not None:
            slept = sample.suspended_s - last.suspended_s
        # Half a second on top: a watchdog that samples every 0.25 s near HARD may be late by a scheduler's slice.
        return slept > 2.0 or sample.at - last.at > 3 * sample.interval_s + 0.5

    def _judge(self, sample: HostSample, pressed: bool) -> tuple[Verdict, ...]:
        trials = sample.trials or ()
        present = {trial.key for trial in trials}
        self._trials = {key: watch for key, watch in self._trials.items() if key in present}
        verdicts = []
        for trial in trials:
            watch = self._trials.setdefault(trial.key, TrialWatch(quiet_since=sample.at))
            verdicts.append(watch.observe(sample.at, trial, sample.host, pressed, self.thresholds))
        return tuple(verdicts)

    def _our_swap(self, host: HostMemory) -> int | None:
        """Our trials' swap; on macOS, which does not tell it by process, the growth of all swap since we began."""
        if host.level is not None:
            if host.swap_total_bytes is None or host.swap_free_bytes is None:
                return None
            used = host.swap_total_bytes - host.swap_free_bytes
            self._swap_base = used if self._swap_base is None else min(self._swap_base, used)
            return used - self._swap_base
        known = [v.sample.tree.swap_bytes for v in self._verdicts if v.sample.tree is not None]
        parts = [swap for swap in known if swap is not None]
        return sum(parts) if parts else None

    # -- choosing -----------------------------------------------------------------------------------------------

    def _choose(self, host: HostMemory, level: Pressure, now: float, busy: bool) -> tuple[KillOrder | None, str | None]:
        t = self.thresholds
        own = [v for v in self._verdicts if v.doomed or (v.over is Over.FAR)]
        pressed = level >= Pressure.SOFT
        if not own and not pressed:
            return None, None
        deficit = self._deficit(host)
        blame = self._not_ours(host, deficit) if pressed else None
        ranked, why = self._rank(now, deficit, everyone=pressed and blame is None)
        if not ranked:
            return None, blame or "no_victim"
        if busy:
            return None, "kill_under_way"
        if now < self._cool_until:
            return None, "cooldown"
        self._kills = [at for at in self._kills if now - at < t.breaker_window_s]
        if level < Pressure.HARD:
            if self._unkillable:
                return None, "unkillable"
            if len(self._kills) >= t.breaker_kills:
                return None, "breaker"
        return self._order(ranked, why, host, level, now, deficit), None

    def _deficit(self, host: HostMemory) -> int:
        """Bytes that must come back before the host is out of SOFT; 0 when it cannot be told."""
        t = self.thresholds
        if host.available_bytes is None or not host.limit_bytes:
            return 0
        share = t.soft_free_share_no_swap if host.swap_total_bytes == 0 else t.soft_free_share
        missing = int(share * host.limit_bytes) - host.available_bytes
        limit, swap = swap_limit(host, t), self._our_swap(host)
        if limit is not None and swap is not None:
            missing = max(missing, swap - limit)
        return max(0, missing)

    def _not_ours(self, host: HostMemory, deficit: int) -> str | None:
        """Why killing our trials would not help; None when it would."""
        held = [v.footprint_bytes for v in self._verdicts]
        ours = sum(h for h in held if h is not None)
        if host.limit_bytes is None or host.available_bytes is None:
            return None
        used = host.limit_bytes - host.available_bytes
        if host.swap_total_bytes is not None and host.swap_free_bytes is not None:
            used += host.swap_total_bytes - host.swap_free_bytes
        if ours < self.thresholds.own_share * used or ours < deficit:
            return "not_ours"
        return None

    def _rank(self, now: float, deficit: int, *, everyone: bool) -> tuple[list[Verdict], dict[str, str]]:
        """Eligible trials, first victim first; and for the others why they are not."""
        t = self.thresholds
        least = max(t.victim_min_bytes, int(t.victim_min_share * deficit))
        ranked, why = [], {}
        for v in self._verdicts:
            held = v.footprint_bytes
            if v.sample.attempt in self._unkillable:
                why[v.sample.key] = "unkillable"
            elif now - self._observed.get(v.sample.key, -1e18) < t.breaker_window_s:
                why[v.sample.key] = "observed only: already logged"
            elif v.doomed or v.over is Over.FAR:
                ranked.append(v)
            elif not everyone:
                why[v.sample.key] = f"healthy: {v.state.value}"
            elif held is None:
                why[v.sample.key] = "its memory could not be read"
            elif held < least:
                why[v.sample.key] = f"too small to help: {held} bytes of at least {least}"
            else:
                ranked.append(v)
        ranked.sort(key=lambda v: _order_key(v, now))
        return ranked, why

    def _order(
        self, ranked: list[Verdict], why: dict[str, str], host: HostMemory, level: Pressure, now: float, deficit: int
    ) -> KillOrder:
        t, victim = self.thresholds, ranked[0]
        rule, reason, since, grace = victim.state.value, "stalled", victim.since, t.stall_grace_s
        if victim.state is State.THRASHING:
            reason = "evicted"
        elif victim.state is not State.STALLED:
            if victim.orphaned:
                rule, reason, since = "orphaned", "lost", victim.orphaned_since
            elif victim.over is Over.FAR and level < Pressure.SOFT:
                rule, reason = "overshoot", "overshoot"
            else:
                rule, reason, since, grace = self.host.reason, "evicted", None, t.soft_grace_s
        if level is Pressure.HARD:
            grace = 0.0
        ranks = {v.sample.key: f"rank {i + 1}: {_explain(v, now)}" for i, v in enumerate(ranked)}
        ranks[victim.sample.key] = f"chosen: {_explain(victim, now)}"
        candidates = tuple(
            {
                "attempt": v.sample.attempt,
                "pid": v.sample.pid,
                "footprint_bytes": v.footprint_bytes,
                "why": ranks.get(v.sample.key) or why.get(v.sample.key, ""),
            }
            for v in self._verdicts
        )
        tree = victim.sample.tree
        evidence = {
            "state": victim.state.value,
            "quiet_s": None if victim.since is None else round(now - victim.since, 1),
            "limit_s": victim.limit_s,
            "cpu_share": victim.cpu_share,
            "faults_per_s": victim.faults_per_s,
            "footprint_bytes": victim.footprint_bytes,
            "swap_bytes": None if tree is None else tree.swap_bytes,
            "states": None if tree is None else tree.states,
            "promised_bytes": victim.sample.promised_bytes,
            "over_bytes": victim.over_bytes,
            "step": victim.sample.step,
            "tick_age_s": None if victim.sample.ticked_at is None else round(now - victim.sample.ticked_at, 1),
            "level": level.name,
            "level_reason": self.host.reason,
            "deficit_bytes": deficit,
            "available_bytes": host.available_bytes,
            "limit_bytes": host.limit_bytes,
            "swap_free_bytes": host.swap_free_bytes,
            "psi_full_avg10": host.psi_full_avg10,
        }
        return KillOrder(
            victim=victim.sample,
            rule=rule,
            reason=reason,
            level=level,
            since=now if since is None else since,
            grace_s=grace,
            evidence=evidence,
            candidates=candidates,
        )

    def _closed(self, level: Pressure, now: float, held_back: str | None) -> str | None:
        if self._unkillable:
            return f"unkillable: {', '.join(sorted(self._unkillable))}"
        recent = [at for at in self._kills if now - at < self.thresholds.breaker_window_s]
        if len(recent) >= self.thresholds.breaker_kills:
            return f"breaker: {len(recent)} kills in {self.thresholds.breaker_window_s:.0f} s"
        if level >= Pressure.SOFT and held_back == "not_ours":
            return "not_ours: other programs hold the memory"
        return None


def _order_key(v: Verdict, now: float) -> tuple[bool, int, int, int, str]:
    saved = max(v.sample.launched, v.sample.saved_at or v.sample.launched)
    work_lost_min = int((now - saved) // 60)  # by the minute: among those of one age the largest goes
    over = v.over_bytes if v.over >= Over.FIRST else 0
    return (not v.doomed, -over, work_lost_min, -(v.footprint_bytes or 0), v.sample.key)


def _explain(v: Verdict, now: float) -> str:
    words = [v.state.value]
    if v.orphaned:
        words.append("its agent is gone")
    if v.over is not Over.NO:
        words.append(f"{v.over_bytes} bytes over its promise")
    saved = max(v.sample.launched, v.sample.saved_at or v.sample.launched)
    words.append(f"{now - saved:.0f} s of work to lose")
    return ", ".join(words)

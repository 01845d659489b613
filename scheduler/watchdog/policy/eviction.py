"""Who is killed, and why not the others: a pure function of the samples so far.

`Evaluator.observe(sample)` turns what was seen into a `Decision`: the host's level, why admission is closed, a verdict
per trial, and at most one `KillOrder`. It reads no clock (samples carry their instant), so a recorded trace replays to
the same decisions. The signals are sent by `scheduler.watchdog`, which asks again right before them.

Order of victims: no progress left to lose (stalled, thrashing, orphaned), far over its promise, most over it; then
`policy.victims` says who may be ended at all. Where nobody is over its promise admission closes and nobody dies, until
the kernel's killer would be next.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scheduler.model import ExitReason, Pressure
from scheduler.model.samples import HostMemory, HostSample, TrialSample
from scheduler.watchdog.policy.pressure import RUNNING_OUT, HostWatch, swap_limit
from scheduler.watchdog.policy.thresholds import Thresholds
from scheduler.watchdog.policy.trial_watch import Over, State, TrialWatch, Verdict
from scheduler.watchdog.policy.victims import Ground, Situation, explain, not_ours, rank

__all__ = ["Decision", "Evaluator", "HostMemory", "HostSample", "KillOrder", "Over", "State", "Thresholds", "Verdict"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KillOrder:
    """One trial is to be killed.

    rule: what it broke (stalled, thrashing, orphaned, overshoot, or the host's: memory_low, swap_threshold, ...).
    reason: how the attempt will have ended (PREEMPTED: within its promise). since: instant of the first symptom.
    grace_s: from SIGTERM to SIGKILL.
    candidates: every trial with its rank or why it was not chosen.
    """

    victim: TrialSample
    rule: str
    reason: ExitReason
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
        """Note that a signal was sent: it counts towards the breaker."""
        self._kills.append(at)

    def kill_ended(self, at: float) -> None:
        """Note that the victim is dead and its memory back: the cool-down starts, and the pace at which it went is no
        news."""
        self._cool_until = at + self.thresholds.cooldown_s
        self.host.drop_trend()

    def unkillable(self, attempt: str, stuck: bool) -> None:
        """Note a victim that SIGKILL does not end (stuck), or that went in the end."""
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
        situation = self._situation(host, level, now)
        ranked, why = rank(self._verdicts, situation, t, self._spared(now))
        if not ranked:
            return None, self._why_nobody(situation) if situation.pressed else None
        if busy:
            return None, "kill_under_way"
        if now < self._cool_until and not (situation.running_out or situation.dying):
            return None, "cooldown"
        self._kills = [at for at in self._kills if now - at < t.breaker_window_s]
        if level < Pressure.HARD:
            if self._unkillable:
                return None, "unkillable"
            if len(self._kills) >= t.breaker_kills:
                return None, "breaker"
        return self._order(ranked, why, host, situation), None

    def _situation(self, host: HostMemory, level: Pressure, now: float) -> Situation:
        used = None
        if host.limit_bytes is not None and host.available_bytes is not None:
            used = host.limit_bytes - host.available_bytes
            if host.swap_total_bytes is not None and host.swap_free_bytes is not None:
                used += host.swap_total_bytes - host.swap_free_bytes
        return Situation(
            now=now,
            level=level,
            running_out=level is Pressure.HARD and self.host.reason == RUNNING_OUT,
            soon=self.host.runs_out_soon(host, self.thresholds),
            dying=self.host.is_dying(host, self.thresholds),
            rate_bytes_per_s=self.host.rate_bytes_per_s,
            deficit_bytes=self._deficit(host),
            used_bytes=used,
        )

    def _spared(self, now: float) -> dict[str, str]:
        spared = {}
        for v in self._verdicts:
            if v.sample.attempt in self._unkillable:
                spared[v.sample.key] = "unkillable"
            elif now - self._observed.get(v.sample.key, -1e18) < self.thresholds.breaker_window_s:
                spared[v.sample.key] = "observed only: already logged"
        return spared

    def _why_nobody(self, situation: Situation) -> str:
        """Nobody may be ended although the host is in need: whose memory is it?"""
        if not_ours(self._verdicts, situation, self.thresholds):
            return "not_ours"
        return "within_promise" if all(v.within_promise is True for v in self._verdicts) else "no_victim"

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

    def _held(self) -> dict[str, int]:
        """Sum what ours hold, and what they were promised: the first question before anybody is blamed."""
        return {
            "ours_held_bytes": sum(v.footprint_bytes or 0 for v in self._verdicts),
            "ours_promised_bytes": sum(v.sample.promised_bytes for v in self._verdicts),
        }

    def _order(
        self, ranked: list[tuple[Ground, Verdict]], why: dict[str, str], host: HostMemory, situation: Situation
    ) -> KillOrder:
        now, level = situation.now, situation.level
        ground, victim = ranked[0]
        rule, reason, since, grace = self._sentence(ground, victim, level)
        if level is Pressure.HARD:
            grace = 0.0
        elif self.host.left_s is not None:  # a grace that outlasts the memory is none
            grace = min(grace, max(0.0, self.host.left_s - self.thresholds.kill_needs_s))
        for i, (_, v) in enumerate(ranked):
            why[v.sample.key] = f"rank {i + 1}: {explain(v, now)}" if i else f"chosen: {explain(v, now)}"
        candidates = tuple(
            {
                "attempt": v.sample.attempt,
                "pid": v.sample.pid,
                "footprint_bytes": v.footprint_bytes,
                "promised_bytes": v.sample.promised_bytes,
                "why": why.get(v.sample.key, ""),
            }
            for v in self._verdicts
        )
        return KillOrder(
            victim=victim.sample,
            rule=rule,
            reason=reason,
            level=level,
            since=now if since is None else since,
            grace_s=grace,
            evidence=self._evidence(victim, host, situation),
            candidates=candidates,
        )

    def _sentence(
        self, ground: Ground, victim: Verdict, level: Pressure
    ) -> tuple[str, ExitReason, float | None, float]:
        """(rule, reason, instant of the first symptom, grace in seconds). A bystander's reason is PREEMPTED."""
        t, state = self.thresholds, victim.state
        if state is State.STALLED:
            return state.value, ExitReason.STALLED, victim.since, t.stall_grace_s
        if state is State.THRASHING:  # one that pages because others took the memory is a bystander too
            reason = ExitReason.PREEMPTED if victim.within_promise is True else ExitReason.EVICTED
            return state.value, reason, victim.since, t.stall_grace_s
        if victim.orphaned:
            return "orphaned", ExitReason.LOST, victim.orphaned_since, t.stall_grace_s
        if ground is Ground.FAR and level < Pressure.SOFT:
            return "overshoot", ExitReason.OVERSHOOT, victim.since, t.stall_grace_s
        reason = ExitReason.PREEMPTED if ground is Ground.WITHIN else ExitReason.EVICTED
        return self.host.reason, reason, None, t.soft_grace_s

    def _evidence(self, victim: Verdict, host: HostMemory, situation: Situation) -> dict[str, Any]:
        now, tree = situation.now, victim.sample.tree
        return {
            "state": victim.state.value,
            "quiet_s": None if victim.since is None else round(now - victim.since, 1),
            "limit_s": victim.limit_s,
            "cpu_share": victim.cpu_share,
            "faults_per_s": victim.faults_per_s,
            "footprint_bytes": victim.footprint_bytes,
            "swap_bytes": None if tree is None else tree.swap_bytes,
            "shared_bytes": None if tree is None else tree.shared_bytes,
            "lasting_bytes": None if tree is None else tree.lasting_bytes,
            "states": None if tree is None else tree.states,
            "promised_bytes": victim.sample.promised_bytes,
            "within_promise": victim.within_promise,
            "over_bytes": victim.over_bytes,
            "growth_bytes_per_s": round(victim.growth_bytes_per_s),
            "step": victim.sample.step,
            "tick_age_s": None if victim.sample.ticked_at is None else round(now - victim.sample.ticked_at, 1),
            "level": situation.level.name,
            "level_reason": self.host.reason,
            "deficit_bytes": situation.deficit_bytes,
            "left_s": None if self.host.left_s is None else round(self.host.left_s, 2),
            "rate_bytes_per_s": round(situation.rate_bytes_per_s),
            "available_bytes": host.available_bytes,
            "limit_bytes": host.limit_bytes,
            "swap_free_bytes": host.swap_free_bytes,
            "host_shared_bytes": host.shared_bytes,
            "psi_full_avg10": host.psi_full_avg10,
            **self._held(),
        }

    def _closed(self, level: Pressure, now: float, held_back: str | None) -> str | None:
        if self._unkillable:
            return f"unkillable: {', '.join(sorted(self._unkillable))}"
        recent = [at for at in self._kills if now - at < self.thresholds.breaker_window_s]
        if len(recent) >= self.thresholds.breaker_kills:
            return f"breaker: {len(recent)} kills in {self.thresholds.breaker_window_s:.0f} s"
        if level >= Pressure.SOFT and held_back in ("not_ours", "within_promise"):
            held = self._held()
            return f"{held_back}: ours hold {held['ours_held_bytes']} bytes of {held['ours_promised_bytes']} promised"
        return None

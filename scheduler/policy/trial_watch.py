"""One trial under watch: from samples of its process tree to a verdict.

Covers stalled, thrashing, over its promise, paused, orphaned, and what a gap in sampling does to each. All counters are
cumulative, so a sample that could not be read loses nothing: the next one covers its time too. Chooses no victim
(`policy.eviction` does).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from scheduler.policy.samples import HostMemory, TrialSample
from scheduler.policy.thresholds import Thresholds


class State(enum.Enum):
    """What a trial seems to be doing."""

    ACTIVE = "active"
    QUIET = "quiet"  # nothing measured for a while, far from the limit
    SUSPECT = "suspect"  # half of the limit
    STALLED = "stalled"
    THRASHING = "thrashing"
    PAUSED = "paused"  # stopped or frozen by somebody, on purpose
    UNKNOWN = "unknown"  # it could not be read


class Over(enum.IntEnum):
    """How far a trial is over what it was promised."""

    NO = 0
    OVER = 1  # the reservation is to grow
    FIRST = 2  # first in line when the host is under pressure
    FAR = 3  # killed without pressure


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What is thought of one trial now. since: instant of the first symptom; limit_s: when it would be killed."""

    sample: TrialSample
    state: State
    over: Over = Over.NO
    since: float | None = None
    limit_s: float | None = None
    orphaned_since: float | None = None
    orphaned: bool = False
    cpu_share: float | None = None
    faults_per_s: float | None = None

    @property
    def footprint_bytes(self) -> int | None:
        return None if self.sample.tree is None else self.sample.tree.footprint_bytes

    @property
    def over_bytes(self) -> int:
        """Bytes over the promise, 0 when it is within, unknown, or was never sized."""
        held, promised = self.footprint_bytes, self.sample.promised_bytes
        return 0 if held is None or not promised else max(0, held - promised)

    @property
    def doomed(self) -> bool:
        """It makes no progress any more: killing it loses nothing."""
        return self.state in (State.STALLED, State.THRASHING) or self.orphaned


@dataclass(slots=True)
class _Mark:
    """Counters at the start of a bucket."""

    at: float
    cpu_s: float
    io_bytes: int | None


@dataclass(slots=True)
class TrialWatch:
    """The windows of one trial."""

    quiet_since: float
    ticked_at: float | None = None
    cpu_share: float | None = None
    faults_per_s: float | None = None
    _mark: _Mark | None = None
    _faults: tuple[float, int] | None = None
    _read_at: float | None = None
    _thrash: tuple[float, float] | None = None  # first and last time it looked like it
    _over: list[float | None] = field(default_factory=lambda: [None, None, None])
    _orphan_since: float | None = None

    def drop_windows(self, now: float) -> None:
        """The samples before a gap say nothing about the time in it."""
        self.quiet_since = now
        self._mark = self._faults = self._thrash = self._orphan_since = None
        self._over = [None, None, None]

    def observe(self, now: float, sample: TrialSample, host: HostMemory, pressed: bool, t: Thresholds) -> Verdict:
        """Take in one sample. pressed: the host pages actively or its memory pressure level is raised."""
        tree = sample.tree
        self._tick(sample)
        if tree is None:
            if self._read_at is not None and now - self._read_at > 3 * t.sample_s + 1.0:
                self.drop_windows(now)  # not seen for long: nothing can be claimed of that time
            return self._verdict(sample, State.UNKNOWN, self._over_state(now, sample, t), now, t)
        self._read_at = now
        if tree.paused:
            self.quiet_since, self._mark, self._thrash = now, None, None
            return self._verdict(sample, State.PAUSED, self._over_state(now, sample, t), now, t)
        self._measure_cpu(now, sample, t)
        thrashing = self._thrashes(now, sample, host, pressed, t)
        limit = self._limit(sample, t)
        quiet = now - self.quiet_since
        if thrashing:
            state = State.THRASHING
        elif tree.cpu_s is None:
            state = State.UNKNOWN
        elif quiet >= limit:
            state = State.STALLED
        elif quiet >= limit / 2:
            state = State.SUSPECT
        else:
            state = State.QUIET if quiet >= limit / 5 else State.ACTIVE
        return self._verdict(sample, state, self._over_state(now, sample, t), now, t)

    def _tick(self, sample: TrialSample) -> None:
        if sample.ticked_at is not None and sample.ticked_at != self.ticked_at:
            self.ticked_at = sample.ticked_at
            self.quiet_since = max(self.quiet_since, sample.ticked_at)
            if self._thrash is not None and sample.ticked_at > self._thrash[0]:
                self._thrash = None

    def _measure_cpu(self, now: float, sample: TrialSample, t: Thresholds) -> None:
        tree = sample.tree
        assert tree is not None
        if tree.cpu_s is None:
            return
        mark = self._mark
        if mark is None:
            self._mark = _Mark(now, tree.cpu_s, tree.io_bytes)
            return
        bucket = min(t.stall_bucket_s, t.stall_after_s / 4)
        cpu, elapsed = tree.cpu_s - mark.cpu_s, now - mark.at
        moved = None if tree.io_bytes is None or mark.io_bytes is None else tree.io_bytes - mark.io_bytes
        if elapsed > 0:
            self.cpu_share = max(0.0, cpu / elapsed)
        span = max(elapsed, bucket)
        # A sum that falls lost a member: something ended, so something happened.
        active = cpu < -0.005 or cpu >= t.stall_cpu_share * span
        active = active or (moved is not None and moved >= t.stall_io_bytes_per_s * span)
        if active:
            self.quiet_since = now
        if active or elapsed >= bucket:
            self._mark = _Mark(now, tree.cpu_s, tree.io_bytes)

    def _thrashes(self, now: float, sample: TrialSample, host: HostMemory, pressed: bool, t: Thresholds) -> bool:
        tree = sample.tree
        assert tree is not None
        if tree.major_faults is not None:
            if self._faults is not None and now > self._faults[0]:
                rate = (tree.major_faults - self._faults[1]) / (now - self._faults[0])
                self.faults_per_s = max(0.0, rate)
            self._faults = (now, tree.major_faults)
        out = bool(tree.footprint_bytes) and tree.swap_bytes is not None
        paged_out = out and (tree.swap_bytes or 0) >= t.thrash_swap_share * (tree.footprint_bytes or 1)
        heavy = self.faults_per_s is not None and self.faults_per_s >= t.thrash_faults_per_s
        pressed = pressed or (host.psi_full_avg60 or 0.0) >= t.psi_full_soft
        if (paged_out or heavy) and pressed:
            self._thrash = (now if self._thrash is None else self._thrash[0], now)
        elif self._thrash is not None and now - self._thrash[1] > t.thrash_after_s / 10:
            self._thrash = None  # one better sample does not end it, a tenth of the time does
        if self._thrash is None:
            return False
        return now - max(self._thrash[0], self.ticked_at or 0.0) >= t.thrash_after_s

    def _limit(self, sample: TrialSample, t: Thresholds) -> float:
        unproven = sample.uses_device or sample.ticked_at is None
        return max(t.stall_after_s, t.stall_unproven_s) if unproven else t.stall_after_s

    def _over_state(self, now: float, sample: TrialSample, t: Thresholds) -> Over:
        held, promised = (None if sample.tree is None else sample.tree.footprint_bytes), sample.promised_bytes
        if held is None or not promised:
            return Over.NO if not promised else self._over_for(now, t)
        lines = (
            promised,
            t.over_factor * promised + t.over_extra_bytes,
            t.far_over_factor * promised + t.far_over_extra_bytes,
        )
        for i, line in enumerate(lines):
            since = self._over[i]
            self._over[i] = (now if since is None else since) if held > line else None
        state = self._over_for(now, t)
        tree = sample.tree
        if state is Over.FAR and tree is not None and not tree.exact and tree.processes > 1:
            return Over.FIRST  # the cheap sum counts shared pages once per process: no kill on it alone
        return state

    def _over_for(self, now: float, t: Thresholds) -> Over:
        needed = (t.over_after_s, t.over_first_after_s, t.over_first_after_s)
        for i in (2, 1, 0):
            since = self._over[i]
            if since is not None and now - since >= needed[i]:
                return Over(i + 1)
        return Over.NO

    def _verdict(self, sample: TrialSample, state: State, over: Over, now: float, t: Thresholds) -> Verdict:
        self._orphan_since = (self._orphan_since or now) if sample.owner_gone else None
        since: float | None = None
        if state in (State.SUSPECT, State.STALLED, State.QUIET):
            since = self.quiet_since
        elif state is State.THRASHING and self._thrash is not None:
            since = max(self._thrash[0], self.ticked_at or 0.0)
        elif over is not Over.NO:
            since = self._over[over - 1]
        return Verdict(
            sample=sample,
            state=state,
            over=over,
            since=since,
            limit_s=self._limit(sample, t),
            orphaned_since=self._orphan_since,
            orphaned=self._orphan_since is not None and now - self._orphan_since >= t.orphan_after_s,
            cpu_share=self.cpu_share,
            faults_per_s=self.faults_per_s,
        )

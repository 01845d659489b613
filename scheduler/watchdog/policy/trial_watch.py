"""One trial under watch: from samples of its process tree to a verdict.

Covers stalled, thrashing, over its promise, growing, paused, orphaned, and what a gap in sampling does to each. All
counters are cumulative, so a sample that could not be read loses nothing: the next one covers its time too. Chooses no
victim (`policy.victims` does).
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass, field

from scheduler.model.samples import HostMemory, TrialSample
from scheduler.watchdog.policy.thresholds import Thresholds


class State(enum.Enum):
    """What a trial seems to be doing."""

    ACTIVE = "active"
    QUIET = "quiet"  # nothing measured for a while, far from the limit
    SUSPECT = "suspect"  # half of the limit
    STALLED = "stalled"
    THRASHING = "thrashing"
    PAUSED = "paused"  # stopped or frozen by somebody, on purpose
    UNKNOWN = "unknown"  # it could not be read


GROWTH_S = 1.0  # growth is what it took since it was last looked at, but over no less than this


class Over(enum.IntEnum):
    """How far a trial has been over what it was promised, for some time."""

    NO = 0
    OVER = 1  # the reservation is to grow
    FIRST = 2  # first in line when the host is under pressure
    FAR = 3  # killed without pressure


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What is thought of one trial now. since: instant of the first symptom; limit_s: when it would be killed.

    within_promise: at this very moment, the estimate's error allowed for; None when nobody could size it, its memory
    could not be read, or the sum counts shared pages twice. far_now: it is past the line at which one is ended without
    pressure. growth_bytes_per_s: of the last seconds, 0 while unknown.
    """

    sample: TrialSample
    state: State
    over: Over = Over.NO
    within_promise: bool | None = None
    far_now: bool = False
    growth_bytes_per_s: float = 0.0
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
    def is_without_progress(self) -> bool:
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
    _held: deque[tuple[float, int]] = field(default_factory=deque)

    def drop_windows(self, now: float) -> None:
        """Forget the samples before a gap: they say nothing about the time in it."""
        self.quiet_since = now
        self._held.clear()
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
        if state is Over.FAR and _within(sample, lines[2]) is None:
            return Over.FIRST  # no kill on the cheap sum alone
        return state

    def _over_for(self, now: float, t: Thresholds) -> Over:
        needed = (t.over_after_s, t.over_first_after_s, t.over_first_after_s)
        for i in (2, 1, 0):
            since = self._over[i]
            if since is not None and now - since >= needed[i]:
                return Over(i + 1)
        return Over.NO

    def _grows(self, now: float, sample: TrialSample) -> float:
        """Bytes a second since a look that is GROWTH_S old or, while there is none, since the first."""
        held = None if sample.tree is None else sample.tree.footprint_bytes
        if held is None:
            return 0.0
        self._held.append((now, held))
        while len(self._held) > 2 and self._held[1][0] <= now - GROWTH_S:
            self._held.popleft()
        since, before = self._held[0]
        return (held - before) / (now - since) if now > since else 0.0

    def _verdict(self, sample: TrialSample, state: State, over: Over, now: float, t: Thresholds) -> Verdict:
        self._orphan_since = (self._orphan_since or now) if sample.owner_gone else None
        since: float | None = None
        if state in (State.SUSPECT, State.STALLED, State.QUIET):
            since = self.quiet_since
        elif state is State.THRASHING and self._thrash is not None:
            since = max(self._thrash[0], self.ticked_at or 0.0)
        elif over is not Over.NO:
            since = self._over[over - 1]
        promised = sample.promised_bytes
        return Verdict(
            sample=sample,
            state=state,
            over=over,
            within_promise=_within(sample, t.allowed_bytes(promised)),
            far_now=_within(sample, t.far_over_factor * promised + t.far_over_extra_bytes) is False,
            growth_bytes_per_s=self._grows(now, sample),
            since=since,
            limit_s=self._limit(sample, t),
            orphaned_since=self._orphan_since,
            orphaned=self._orphan_since is not None and now - self._orphan_since >= t.orphan_after_s,
            cpu_share=self.cpu_share,
            faults_per_s=self.faults_per_s,
        )


def _within(sample: TrialSample, line: float) -> bool | None:
    """Whether it holds no more than `line`; None when that cannot be told or nothing was promised."""
    tree = sample.tree
    if tree is None or tree.footprint_bytes is None or not sample.promised_bytes:
        return None
    if tree.footprint_bytes <= line:
        return True
    return False if tree.exact or tree.processes <= 1 else None  # the cheap sum counts shared pages per process

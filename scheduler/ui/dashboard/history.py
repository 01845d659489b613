"""What each worker's memory held over the last half hour, trial by trial, and what began and ended there.

Filled from the snapshots of one run, read by `charts`. Pure: times are monotonic seconds that the caller gives. Between
two snapshots nothing is known, so what one of them showed holds until the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from scheduler.ui.snapshot import Happening, Snapshot, WorkerLine

HISTORY_S = 1800.0
STEP_S = 5.0
MAX_BANDS = 40  # per worker; smaller trials are drawn together
MAX_SPANS = 500
MAX_TROUBLES = 50
OURS = "workers and warm processes"
OTHERS = "smaller trials"


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One worker at one moment. trials: attempt -> bytes it used. swap_bytes: None where the host has none."""

    at: float
    used_bytes: int
    reserved_bytes: int
    capacity_bytes: int
    swap_bytes: int | None
    trials: Mapping[str, int]


@dataclass(slots=True, kw_only=True)
class Span:
    """One attempt's time on a worker. ended: None while it runs. tone: how it ended, as `Happening.tone`."""

    attempt: str
    worker: str
    began: float
    seen: float
    lane: int = 0
    ended: float | None = None
    tone: str = ""
    text: str = ""
    peak_bytes: int = 0

    @property
    def end(self) -> float:
        return self.seen if self.ended is None else self.ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """What one trial held, as an area: from low[i] to high[i] bytes between times[i] and times[i + 1].

    The last time closes the area: low and high are one shorter than times.
    """

    attempt: str
    times: tuple[float, ...]
    low: tuple[int, ...]
    high: tuple[int, ...]


@dataclass(slots=True)
class History:
    """The last half hour of one run."""

    levels: dict[str, deque[Level]] = field(default_factory=dict)
    spans: dict[str, Span] = field(default_factory=dict)
    troubles: deque[Happening] = field(default_factory=lambda: deque(maxlen=MAX_TROUBLES))
    _told: float = 0.0  # the latest happening's time

    def take(self, snapshot: Snapshot, now: float, sent_unix: float) -> None:
        """Add a snapshot that was sent at `sent_unix` (the driver's clock) and came at `now`."""
        used: dict[str, dict[str, int]] = {}
        for trial in snapshot.trials:
            used.setdefault(trial.worker, {})[trial.attempt] = trial.used_bytes
            span = self.spans.get(trial.attempt)
            if span is None:
                began = now - trial.running_s
                span = Span(attempt=trial.attempt, worker=trial.worker, began=began, seen=now)
                span.lane = self._lane(trial.worker, began)
                self.spans[trial.attempt] = span
            span.seen, span.peak_bytes = now, max(span.peak_bytes, trial.used_bytes)
        for worker in snapshot.workers:
            self._level(worker, used.get(worker.address, {}), now)
        running = {trial.attempt for trial in snapshot.trials}
        for span in self.spans.values():
            if span.ended is None and span.attempt not in running:
                span.ended = now
        self._tell(snapshot.happenings, now - sent_unix)
        self._forget(now)

    def bands(self, worker: str, now: float) -> list[Band]:
        """Return what the trials on a worker held, stacked: the oldest lies lowest, upon the worker's own."""
        levels = [*self.levels.get(worker, ())]
        named = self._named(levels)
        open_: dict[str, tuple[list[float], list[int], list[int]]] = {}
        found: list[Band] = []
        for level, until in zip(levels, [*(level.at for level in levels[1:]), now], strict=True):
            stack = dict(_stacked(level, named))
            found += [_band(name, *open_.pop(name)) for name in list(open_) if name not in stack]
            for name, (low, high) in stack.items():
                times, lows, highs = open_.setdefault(name, ([level.at], [], []))
                times.append(until)
                lows.append(low)
                highs.append(high)
        return found + [_band(name, *parts) for name, parts in open_.items()]

    def of_worker(self, worker: str) -> list[Span]:
        """Return the attempts that ran there, the oldest first."""
        return [span for span in self.spans.values() if span.worker == worker]

    def _named(self, levels: Iterable[Level]) -> dict[str, None]:
        """Return the attempts that get a band of their own, oldest first."""
        peaks: dict[str, int] = {}
        for level in levels:
            for attempt, size in level.trials.items():
                peaks[attempt] = max(size, peaks.get(attempt, 0))
        kept = set(sorted(peaks, key=lambda attempt: peaks[attempt], reverse=True)[:MAX_BANDS])
        return {attempt: None for attempt in peaks if attempt in kept}

    def _level(self, worker: WorkerLine, trials: dict[str, int], now: float) -> None:
        levels = self.levels.setdefault(worker.address, deque())
        level = Level(
            at=now,
            used_bytes=worker.used_bytes or 0,
            reserved_bytes=worker.reserved_bytes,
            capacity_bytes=worker.capacity_bytes,
            swap_bytes=worker.swap_bytes,
            trials=trials,
        )
        # Between two steps only the last is replaced; who came or went since then is kept all the same.
        same = len(levels) > 1 and levels[-2].trials.keys() == levels[-1].trials.keys() == trials.keys()
        if same and now - levels[-2].at <= STEP_S:
            levels.pop()
        levels.append(level)

    def _lane(self, worker: str, began: float) -> int:
        """Return the first line of the worker's that is free at that time."""
        taken = {span.lane for span in self.of_worker(worker) if span.ended is None or span.ended > began + 1.0}
        return next(lane for lane in range(len(taken) + 1) if lane not in taken)

    def _tell(self, happenings: Iterable[Happening], offset: float) -> None:
        for each in happenings:
            if each.unix <= self._told or not each.attempt:
                continue
            if (span := self.spans.get(each.attempt)) is not None:
                span.ended, span.tone, span.text = each.unix + offset, each.tone, each.text
            if each.tone in ("bad", "warn"):
                self.troubles.append(each)
        self._told = max([self._told, *(each.unix for each in happenings)])

    def _forget(self, now: float) -> None:
        for worker, levels in list(self.levels.items()):
            while levels and levels[0].at < now - HISTORY_S:
                levels.popleft()
            if not levels:
                del self.levels[worker]
        old = [a for a, span in self.spans.items() if span.ended is not None and span.ended < now - HISTORY_S]
        over = max(0, len(self.spans) - len(old) - MAX_SPANS)
        done = (a for a, span in self.spans.items() if span.ended is not None and a not in set(old))
        for attempt in [*old, *[a for a, _ in zip(done, range(over), strict=False)]]:
            del self.spans[attempt]


def _stacked(level: Level, named: Mapping[str, None]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield (name, (low, high)) of one moment from below."""
    own = max(0, level.used_bytes - sum(level.trials.values()))
    parts = {OURS: own}
    parts |= {attempt: level.trials[attempt] for attempt in named if attempt in level.trials}
    rest = sum(size for attempt, size in level.trials.items() if attempt not in named)
    if rest:
        parts[OTHERS] = rest
    low = 0
    for name, size in parts.items():
        yield name, (low, low + size)
        low += size


def _band(name: str, times: list[float], low: list[int], high: list[int]) -> Band:
    return Band(attempt=name, times=tuple(times), low=tuple(low), high=tuple(high))

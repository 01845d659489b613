"""How hard-pressed the host is: NORMAL, ELEVATED, SOFT or HARD, from a window of readings, with hysteresis.

Covers the level, whether the host pages actively, and how long its memory will last. Who is to blame and who dies is
`policy.victims`' business. A reading that is None says nothing: it neither raises the level nor clears it. The clock is
the readings' own.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from scheduler.model import Pressure
from scheduler.model.samples import HostMemory
from scheduler.watchdog.policy.thresholds import Thresholds
from scheduler.watchdog.policy.trend import Trend

RUNNING_OUT = "running_out"


@dataclass(slots=True)
class HostWatch:
    """The host's recent readings and the level they amount to.

    left_s: how long the memory lasts at the pace of the last seconds (swap included), None while it does not fall.
    rate_bytes_per_s: that pace, 0 while it does not fall.
    """

    level: Pressure = Pressure.NORMAL
    paging: bool = False
    reason: str = ""
    readings: int = 0
    left_s: float | None = None
    rate_bytes_per_s: float = 0.0
    _trend: Trend = field(default_factory=lambda: Trend(window_s=3.0))
    _paged: deque[tuple[float, int]] = field(default_factory=deque)
    _soft: deque[tuple[float, bool]] = field(default_factory=deque)
    _hard_since: float | None = None
    _psi_since: float | None = None
    _critical_since: float | None = None
    _paged_at: float = -1e18
    _clean_since: float | None = None
    _measured: bool = False  # the level was raised by more than a forecast since it was last NORMAL

    def drop_windows(self) -> None:
        """Forget what was seen before a gap in sampling: it says nothing about now. The level stays until it clears."""
        self._paged.clear()
        self._soft.clear()
        self._hard_since = self._psi_since = self._critical_since = self._clean_since = None
        self.drop_trend()

    def drop_trend(self) -> None:
        """Memory came back: the pace at which it went before is over until new readings show it."""
        self._trend.clear()
        self.left_s, self.rate_bytes_per_s = None, 0.0

    def observe(self, host: HostMemory, ours_swap_bytes: int | None, t: Thresholds) -> Pressure:
        """Return the level after this reading. ours_swap_bytes: our trials' part of the swap, None when unknown."""
        now, free = host.at, host.free_share
        self.readings += 1
        self.paging = self._pages_actively(host, t)
        if self.paging:
            self._paged_at = now
        self._extrapolate(host, t)
        if self._is_hard(host, t):
            return self._rise(Pressure.HARD)
        if self._lasts(t.run_out_s, host, t):
            self.reason = RUNNING_OUT
            return self._rise(Pressure.HARD, measured=free is not None and free < t.elevated_free_share)
        if self._is_soft(host, ours_swap_bytes, t):
            return self._rise(Pressure.SOFT)
        if self._is_elevated(host, ours_swap_bytes, t):
            return self._rise(Pressure.ELEVATED, measured=self.reason != RUNNING_OUT)
        if self.level is Pressure.NORMAL or not self._measured:
            # A forecast alone ends with the fall: a large trial that has loaded its memory leaves no pressure behind.
            self.level, self.reason, self._measured = Pressure.NORMAL, "", False
            return self.level
        # Coming down: SOFT and HARD end at once (a kill must not follow an old one), ELEVATED only after a while.
        self.level = Pressure.ELEVATED
        clean = free is not None and free >= min(1.0, t.elevated_free_share * t.clear_factor)
        self._clean_since = (now if self._clean_since is None else self._clean_since) if clean else None
        if self._clean_since is not None and now - self._clean_since >= t.clear_after_s:
            self.level, self.reason, self._clean_since, self._measured = Pressure.NORMAL, "", None, False
        return self.level

    def _rise(self, level: Pressure, *, measured: bool = True) -> Pressure:
        """measured: for what was seen; False: for what is foretold."""
        self._clean_since = None
        self.level, self._measured = level, self._measured or measured
        return level

    def _extrapolate(self, host: HostMemory, t: Thresholds) -> None:
        """Swap counts as memory that is left, except on macOS, whose total grows by itself: there nothing is said."""
        self._trend.window_s = t.trend_window_s
        if host.available_bytes is not None and host.level is None:
            self._trend.add(host.at, host.available_bytes + (host.swap_free_bytes or 0))
            self.left_s, self.rate_bytes_per_s = self._trend.left_s(), max(0.0, -(self._trend.slope or 0.0))

    def _lasts(self, seconds: float, host: HostMemory, t: Thresholds) -> bool:
        """Will the memory be gone within so long, at a pace that is worth a word?"""
        free = host.free_share
        return self.left_s is not None and self.left_s <= seconds and free is not None and free <= t.run_out_free_share

    def runs_out_soon(self, host: HostMemory, t: Thresholds) -> bool:
        """Time to look closely, to admit nothing, and not to wait with one that is far over its promise."""
        return self._lasts(t.run_out_soon_s, host, t)

    def is_dying(self, host: HostMemory, t: Thresholds) -> bool:
        """Tell whether the kernel's killer is next unless something ends now: the only ground to end a trial within its
        promise.

        Almost nothing is left and still falls, or the host has stopped making progress (PSI; macOS: critical) for as
        long as HARD asks. A forecast alone is no such ground: a program that takes memory fast and then stops would
        cost a bystander its work, while the kernel's victim within its promise runs again just as well.
        """
        free = host.free_share
        if free is not None and free <= t.last_free_share and self._lasts(t.run_out_s, host, t):
            return True
        return self.level is Pressure.HARD and self.reason in ("psi_full", "level_critical")

    def _pages_actively(self, host: HostMemory, t: Thresholds) -> bool:
        fast = False
        if host.paging_bytes is not None:
            self._paged.append((host.at, host.paging_bytes))
            while len(self._paged) > 2 and self._paged[1][0] <= host.at - t.paging_window_s:
                self._paged.popleft()
            (since, before), (at, after) = self._paged[0], self._paged[-1]
            fast = at > since and (after - before) / (at - since) >= t.paging_bytes_per_s
        return fast or (_psi_counts(host, t) and (host.psi_full_avg10 or 0.0) >= t.psi_full_soft)

    def _is_hard(self, host: HostMemory, t: Thresholds) -> bool:
        now, free = host.at, host.free_share
        if free is not None:
            no_swap = _no_swap(host)
            full = no_swap or _swap_full(host, t)
            under = full and free <= (t.hard_free_share_no_swap if no_swap else t.hard_free_share)
            self._hard_since = _since(under, self._hard_since, now)
        if host.psi_full_avg10 is not None:
            stuck = _psi_counts(host, t) and host.psi_full_avg10 >= t.psi_full_hard
            # Old pressure averages linger: without paging in the last seconds they speak of the past.
            stuck = stuck and (_no_swap(host) or now - self._paged_at <= t.psi_hard_s)
            self._psi_since = _since(stuck, self._psi_since, now)
        if host.level is not None:
            self._critical_since = _since(host.level >= 4, self._critical_since, now)
        for name, since, needed in (
            ("memory_exhausted", self._hard_since, t.hard_for_s),
            ("psi_full", self._psi_since, t.psi_hard_s),
            ("level_critical", self._critical_since, t.level_hard_s),
        ):
            if since is not None and now - since >= needed:
                self.reason = name
                return True
        return False

    def _is_soft(self, host: HostMemory, ours_swap_bytes: int | None, t: Thresholds) -> bool:
        now, free = host.at, host.free_share
        if free is not None:
            if _no_swap(host):
                holds, reason = free <= t.soft_free_share_no_swap, "memory_low_no_swap"
            else:
                swapped = ours_swap_bytes is not None and (limit := swap_limit(host, t)) and ours_swap_bytes >= limit
                holds = bool(free <= t.soft_free_share or swapped) and self.paging
                reason = "swap_threshold" if swapped else "memory_low"
            self._soft.append((now, holds))
            while len(self._soft) > 1 and self._soft[1][0] <= now - t.soft_for_s:
                self._soft.popleft()  # one sample at the window's far end stays, so that it spans all of it
            met = sum(held for _, held in self._soft)
            if holds and now - self._soft[0][0] >= 0.8 * t.soft_for_s and met >= 0.8 * len(self._soft):
                self.reason = reason
                return True
        return False

    def _is_elevated(self, host: HostMemory, ours_swap_bytes: int | None, t: Thresholds) -> bool:
        free = host.free_share
        paged_lately = host.at - self._paged_at <= t.clear_after_s
        for name, holds in (
            ("memory_low", free is not None and free < t.elevated_free_share),
            ("swapping", ours_swap_bytes is not None and ours_swap_bytes > t.elevated_swap_bytes and paged_lately),
            ("psi_some", _psi_counts(host, t) and (host.psi_some_avg10 or 0.0) > t.elevated_psi_some),
            ("level_warn", host.level is not None and host.level >= 2),
            (RUNNING_OUT, self.runs_out_soon(host, t)),
        ):
            if holds:
                self.reason = name
                return True
        return False


def pace_s(host: HostMemory, watch: HostWatch, t: Thresholds) -> float:
    """Seconds until the host should be looked at again: `host_sample_s`, down to a tenth of it as time gets short.

    A quarter where the memory that is left could be taken within some seconds by the fastest of programs, since the
    pace can only be told after a few looks.
    """
    shortest = t.host_sample_s
    if host.available_bytes is not None:
        shortest = min(shortest, max(t.host_sample_s / 4, host.available_bytes / t.fastest_bytes_per_s))
    if watch.level >= Pressure.SOFT:
        shortest = min(shortest, t.host_sample_s / 4)
    if watch.left_s is not None and watch.left_s <= t.run_out_soon_s:
        shortest = min(shortest, max(t.host_sample_s / 10, watch.left_s / t.run_out_soon_s))
    return shortest


def swap_limit(host: HostMemory, t: Thresholds) -> int | None:
    """Bytes of swap our trials may hold before it is SOFT; None when nothing is known to bound it."""
    bounds = []
    if host.swap_total_bytes and host.level is None:  # on macOS the total of swap grows with its use
        bounds.append(t.swap_limit_share_of_swap * host.swap_total_bytes)
    if host.limit_bytes:
        bounds.append(t.swap_limit_share_of_ram * host.limit_bytes)
    return int(min(bounds)) if bounds else None


def _no_swap(host: HostMemory) -> bool:
    return host.swap_total_bytes == 0 and host.level is None  # macOS adds swap files when it needs them


def _swap_full(host: HostMemory, t: Thresholds) -> bool:
    if not host.swap_total_bytes or host.swap_free_bytes is None or host.level is not None:
        return False
    return host.swap_free_bytes <= t.hard_swap_free_share * host.swap_total_bytes


def _psi_counts(host: HostMemory, t: Thresholds) -> bool:
    return host.free_share is not None and host.free_share < t.psi_free_share


def _since(holds: bool, since: float | None, now: float) -> float | None:
    if not holds:
        return None
    return now if since is None else since

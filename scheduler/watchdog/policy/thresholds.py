"""The watchdog's thresholds: each with its unit, its default and the reason for it.

Covers numbers only; `policy.pressure` and `policy.eviction` use them. `configs/schedule.yaml` has the same keys below
`watchdog:`. Seconds are `float`, bytes `int`, shares 0..1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MIB = 2**20
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """When a trial is judged stalled, thrashing or over, when the host is under pressure, and how a kill goes."""

    # -- sampling
    sample_s: float = 5.0
    """Time between two looks at the process trees. 5 s: 16 trials then cost under 0.5 % of a core."""
    host_sample_s: float = 1.0
    """Time between two looks at the host's memory. 1 s: as systemd-oomd; down to a tenth as time gets short."""

    # -- stall
    stall_after_s: float = 600.0
    """CPU below `stall_cpu_share` and no tick for so long: stalled. 10 min: past a collective's own timeout (8 min)."""
    stall_unproven_s: float = 1800.0
    """The same for a trial that has not ticked yet or computes on a device, where 0 % CPU is normal. 30 min."""
    stall_cpu_share: float = 0.01
    """Part of one core, over the whole tree, that counts as no CPU. 1 %: idle threads of a deadlock wake below that."""
    stall_io_bytes_per_s: int = 64 * 1024
    """Read and write calls at this rate are work (a download, a slow file system). 64 KiB/s."""
    stall_bucket_s: float = 30.0
    """CPU and I/O are averaged over so long, so that a burst counts and noise does not."""

    # -- thrashing
    thrash_after_s: float = 600.0
    """No tick, paged out, host under pressure for so long: thrashing. 10 min; it need not be at 0 % CPU."""
    thrash_swap_share: float = 0.25
    """A trial with this part of its footprint swapped out is paged out. The 115 GB case was far past a quarter."""
    thrash_faults_per_s: float = 50.0
    """Or one with so many major faults a second: each waits for the disk, so 50/s is most of its time."""

    # -- overshoot
    over_after_s: float = 10.0
    """Over its reservation for so long: reported, so that the reservation grows and admission sees it."""
    over_factor: float = 1.15
    over_extra_bytes: int = GIB
    """Over `over_factor` x promised + `over_extra_bytes`: first in line as a victim. Below it is estimation error."""
    over_first_after_s: float = 30.0
    """It must be over that line for so long; allocators overshoot for a moment."""
    far_over_factor: float = 1.5
    far_over_extra_bytes: int = 2 * GIB
    """Over `far_over_factor` x promised + `far_over_extra_bytes` for `over_first_after_s`: killed without pressure."""

    # -- pressure of the host
    elevated_free_share: float = 0.10
    """Available memory below this part of the limit: ELEVATED, nothing is admitted."""
    elevated_swap_bytes: int = GIB
    """Or our trials hold more than this in swap while the host pages."""
    elevated_psi_some: float = 10.0
    """Or some task waited for memory this per cent of 10 s, with less than `psi_free_share` available."""
    soft_free_share: float = 0.05
    """Available at or below this with active paging: SOFT, one trial is evicted. 5 %: earlyoom kills at 5 %."""
    soft_free_share_no_swap: float = 0.08
    """The same on a host without swap, where no paging warns: earlier, since nothing gives way."""
    hard_free_share: float = 0.02
    """Available at or below this and swap full: HARD, no grace for SIGTERM."""
    hard_free_share_no_swap: float = 0.04
    hard_swap_free_share: float = 0.10
    """Swap with at most this part free is full."""
    swap_limit_share_of_swap: float = 0.25
    swap_limit_share_of_ram: float = 0.10
    """The swap threshold: our trials' swap at the smaller of the two, with active paging: SOFT. Ours, never others'."""
    paging_bytes_per_s: int = 4 * MIB
    """Swapped in and out at this rate over `paging_window_s`: active paging. Pages that stay out are harmless."""
    paging_window_s: float = 10.0
    psi_full_soft: float = 20.0
    """Every task waiting for memory this per cent of 10 s also is active paging (systemd-oomd kills at 60)."""
    psi_full_hard: float = 60.0
    """At this for `psi_hard_s`: HARD. As systemd-oomd."""
    psi_hard_s: float = 10.0
    psi_free_share: float = 0.25
    """PSI counts only with less than this available: kernels have shown PSI 85 with 90 % free (nohang #31)."""
    soft_for_s: float = 15.0
    """SOFT must hold for four fifths of the samples of so long: 12 of 15."""
    hard_for_s: float = 2.0
    """HARD must hold for so long without a break: two samples."""
    level_hard_s: float = 5.0
    """macOS: pressure level 4 (critical) for so long is HARD; level 2 is ELEVATED."""
    clear_factor: float = 1.25
    """ELEVATED ends only above this multiple of its threshold..."""
    clear_after_s: float = 60.0
    """...for so long, so that admission does not flap."""

    # -- time that is left
    trend_window_s: float = 3.0
    """The pace at which memory goes is taken over so long, from at least 4 readings. 3 s: no single allocation."""
    run_out_soon_s: float = 20.0
    """Gone within so long at that pace: ELEVATED; looked at more often; one already far over its promise ends now."""
    run_out_s: float = 5.0
    """Gone within so long: HARD, whatever the level; the one that is over its promise and grows is ended. 50 MiB/s
    from 8 % of 2 GiB is 3 s: a window of 15 s is longer than the host lives."""
    last_free_share: float = 0.02
    """With at most this part available, which still falls and goes within `run_out_s`, and no one over its promise, the
    kernel's killer is next: one trial is preempted instead."""
    kill_needs_s: float = 1.0
    """A kill takes so long (two looks, two fsyncs, the exit of a large process: 0.3 s measured, 1.0 s at a load of 13):
    a grace for SIGTERM ends so long before the memory does."""
    fastest_bytes_per_s: int = 8 * GIB
    """No host loses memory faster: with less available than that it is looked at more often than once a second."""
    run_out_free_share: float = 0.5
    """With more than this part available the pace of seconds is no forecast: it is a program that loads its data."""
    growing_share: float = 0.1
    """A trial that grows at this part of the host's pace takes part in it."""

    # -- victims
    over_tolerance_share: float = 0.10
    over_tolerance_bytes: int = 64 * MIB
    """Over its promise by more than both: under pressure it is to blame. Below it is the estimate's error, not its."""
    own_share: float = 0.25
    """Our trials hold less than this part of the used memory: not the cause, so close admission, kill nobody."""
    victim_min_bytes: int = 256 * MIB
    """A smaller trial is not worth a kill (earlyoom #309 killed one of 17 MiB)..."""
    victim_min_share: float = 0.05
    """...nor one that holds less than this part of what is missing."""
    breaker_kills: int = 3
    breaker_window_s: float = 1800.0
    """After `breaker_kills` kills in so long, admission closes and only HARD may kill: something else is wrong."""

    # -- the kill
    stall_grace_s: float = 15.0
    """From SIGTERM to SIGKILL for a stalled or thrashing trial, or one far over."""
    soft_grace_s: float = 10.0
    """The same for an eviction under SOFT; HARD has no grace."""
    unkillable_after_s: float = 60.0
    """A victim still there so long after SIGKILL: it stays charged and the host is closed."""
    memory_back_share: float = 0.5
    memory_back_after_s: float = 30.0
    """Dead, the kill is over when this part of its footprint is available again, or after so long."""
    cooldown_s: float = 15.0
    """Nothing is killed so long after a kill: pressure counters lag (systemd-oomd, oomd and nohang all wait 15 s)."""
    orphan_after_s: float = 30.0
    """A trial whose agent has been gone for so long is ended: nobody would take its result."""

    def allowed_bytes(self, promised_bytes: int) -> float:
        """Return what a trial may hold and still be within its promise: above it the estimate's error is allowed
        for."""
        return promised_bytes + max(self.over_tolerance_share * promised_bytes, self.over_tolerance_bytes)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Thresholds:
        """From a mapping; unknown keys are ignored, since a newer driver may talk to an older watchdog.

        Raises TypeError or ValueError on a value that is not a number.
        """
        defaults = dataclasses.asdict(cls())
        taken = {n: type(defaults[n])(v) for n, v in values.items() if n in defaults and v is not None}
        return cls(**taken)

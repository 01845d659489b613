"""Whether one trial may start on one worker now, and how much a worker may promise in all.

Covers the memory budget, a worker's capacity, and admission: the check of the ledger, then that of what the host has
now. Does not cover which worker or which trial first: see `placement`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from scheduler.model import (
    Admit,
    Defer,
    DeferReason,
    DevicePool,
    Footprint,
    Pressure,
    Reject,
    UsageError,
    Waiting,
    WorkerFacts,
    WorkerView,
)
from scheduler.units import MIB, gib, parse_size

CUDA_SHARE = 0.95  # the rest is the driver's context and fragmentation of the caching allocator
# A trial that nobody can size is given all that its worker may promise. Other runs and programs may hold a part of it:
# with half of it free it starts, since waiting for the last of them to quit could take days; with less it waits.
LEAST_SHARE_ALONE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """Either `percent` of what the process may use, or `absolute_bytes`; `text` is what the user wrote."""

    text: str
    percent: float | None = None
    absolute_bytes: int | None = None

    def on(self, facts: WorkerFacts) -> MemoryBudget:
        """Return this budget on that worker: a size that a worker which joined later does not have becomes the
        default."""
        too_much = self.absolute_bytes is not None and self.absolute_bytes > facts.limit_bytes
        return MemoryBudget(text="90%", percent=90.0) if too_much else self


def parse_memory_budget(text: str | int) -> MemoryBudget:
    """ "90%" or a size ("100GiB", "12GB", "512MiB", plain bytes). Raises UsageError with the value seen."""
    written = str(text).strip()
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", written):
        percent = float(match[1])
        if not 0 < percent <= 100:
            raise UsageError(f"memory_budget {written!r} must lie above 0% and at most at 100%")
        return MemoryBudget(text=written, percent=percent)
    absolute = parse_size(written, "memory_budget")
    if written.isdigit() and 0 < absolute < MIB:  # 100 of what? Programs may give whole bytes, and no host has so few
        raise UsageError(f"memory_budget {written!r} has no unit: write {written}GiB, {written}GB or {written}%")
    if absolute <= 0:
        raise UsageError(f"memory_budget {written!r} leaves no memory: write e.g. 90% or 100GiB")
    return MemoryBudget(text=written, absolute_bytes=absolute)


def capacity(budget: MemoryBudget, facts: WorkerFacts, beside_bytes: int = 0) -> int:
    """Bytes that the worker's domain may promise in all, our own overhead included; never negative.

    A percentage is how full the host may get: that share of `limit_bytes` less what other programs hold at start, other
    runs' attempts aside, which end. A size is taken as written, since others' memory is seen by the live check; above
    `limit_bytes` it is a UsageError. beside_bytes: what other workers of ours hold there.
    """
    if budget.absolute_bytes is not None:
        if budget.absolute_bytes > facts.limit_bytes:
            raise UsageError(
                f"memory_budget {budget.text} is more than {facts.host} has: {gib(budget.absolute_bytes)} asked, "
                f"{gib(facts.limit_bytes)} usable; lower it or write a percentage such as 90%"
            )
        return budget.absolute_bytes
    assert budget.percent is not None
    known = facts.overhead_bytes + beside_bytes + facts.others_held_bytes
    others = max(0, facts.limit_bytes - facts.available_bytes - known)
    return max(0, int(facts.limit_bytes * budget.percent / 100) - others)


def own_capacity(budget: MemoryBudget, facts: WorkerFacts) -> int | None:
    """Bytes the worker may promise where it has a limit of its own (Dask's --memory-limit), None where it has none."""
    limit = facts.worker_limit_bytes
    if limit is None:
        return None
    if budget.absolute_bytes is not None:
        return min(budget.absolute_bytes, limit)
    assert budget.percent is not None
    return int(limit * budget.percent / 100)


def device_capacity(pool: DevicePool | None) -> int | None:
    """Bytes of the device that may be promised; None without a device.

    Metal's `total_bytes` is its recommended maximum (65-75 % of RAM), a safe cap already; CUDA's is the whole card.
    """
    if pool is None:
        return None
    return pool.total_bytes if pool.unified else int(pool.total_bytes * CUDA_SHARE)


def admit(waiting: Waiting, worker: WorkerView) -> Admit | Defer | Reject:
    """Decide on this trial on this worker, with the numbers that led there. Reject: never on this worker."""
    if (reject := never(waiting.footprint, waiting.slots, worker)) is not None:
        return reject
    if (shut := closed(worker)) is not None:
        return shut
    if not waiting.footprint.is_known:
        return _admit_alone(waiting, worker)
    if waiting.slots > worker.free_slots:
        return Defer(
            DeferReason.SLOTS, {"needed_slots": waiting.slots, "free_slots": worker.free_slots, "slots": worker.slots}
        )
    need, device_need = waiting.footprint.host_bytes, waiting.footprint.device_bytes
    if need > worker.headroom_bytes:
        return Defer(DeferReason.MEMORY, {"needed_bytes": need, **_ledger(worker)})
    if need > live_room(worker):
        return Defer(DeferReason.LIVE_MEMORY, {"needed_bytes": need, **_live(worker)})
    if device_need > device_room(worker):
        numbers = {
            "needed_bytes": device_need,
            "device_capacity_bytes": worker.device_capacity_bytes or 0,
            "device_reserved_bytes": worker.device_reserved_bytes,
        }
        return Defer(DeferReason.DEVICE_MEMORY, numbers)
    return Admit(worker.address, need, device_need)


def closed(worker: WorkerView) -> Defer | None:
    """Why nothing at all may start there now, None when it is open. What cannot be measured is closed."""
    if worker.closed_reason is not None:
        return Defer(DeferReason.CLOSED, {"reserved_bytes": worker.reserved_bytes})
    if worker.available_bytes is None:
        return Defer(DeferReason.PROBE_FAILED, {"reserved_bytes": worker.reserved_bytes})
    if worker.pressure >= Pressure.ELEVATED:
        return Defer(DeferReason.PRESSURE, {"pressure": int(worker.pressure), **_live(worker)})
    return None


def live_room(worker: WorkerView) -> int:
    """Bytes free on the host now that nobody was promised; others' memory counts. Below 0 when the probe failed."""
    if worker.available_bytes is None:
        return -1
    return worker.available_bytes - worker.unclaimed_bytes - worker.reserve_bytes


def room(worker: WorkerView) -> int:
    """Bytes that both the ledger and the host itself have free there now."""
    return min(worker.headroom_bytes, live_room(worker))


def device_room(worker: WorkerView) -> int:
    """Unreserved bytes of the device's pool, 0 without one."""
    return (worker.device_capacity_bytes or 0) - worker.device_reserved_bytes


def feasible(footprint: Footprint, workers: Iterable[WorkerView], slots: int = 1) -> Reject | None:
    """None when some worker could take it, were it empty; else a Reject with the best worker's numbers.

    Judged by what one trial can be given there while no other runs; a view that does not know that, by its capacity.
    """
    rejects = []
    for worker in workers:
        if (reject := never(footprint, slots, worker)) is None:
            return None
        rejects.append((worker.capacity_bytes, worker.address, reject))
    if not rejects:
        return None
    return max(rejects, key=lambda item: item[:2])[2]


def never(footprint: Footprint, slots: int, worker: WorkerView) -> Reject | None:
    """Why this worker could not take it even if it were empty, None when it could."""
    limit = worker.limit_bytes
    if limit is None:
        limit = worker.headroom_bytes if worker.free_slots == worker.slots else worker.capacity_bytes
    if footprint.host_bytes > limit:
        return Reject("exceeds_capacity", {"needed_bytes": footprint.host_bytes, "limit_bytes": limit})
    if slots > worker.slots:
        return Reject("exceeds_slots", {"needed_slots": slots, "slots": worker.slots})
    if footprint.device_bytes > (worker.device_capacity_bytes or 0):
        numbers = {"needed_bytes": footprint.device_bytes, "limit_bytes": worker.device_capacity_bytes or 0}
        return Reject("exceeds_device" if worker.device_capacity_bytes else "no_device", numbers)
    return None


def least_alone(whole_bytes: int) -> int:
    """Return the bytes that must be free on a host for a trial nobody can size, which is given `whole_bytes`."""
    return max(1, int(LEAST_SHARE_ALONE * whole_bytes))


def _admit_alone(waiting: Waiting, worker: WorkerView) -> Admit | Defer:
    """Give a trial nobody can size an empty host and all that is left of it, so that its peak can be measured."""
    if worker.free_slots < worker.slots or not worker.domain_idle:
        return Defer(DeferReason.NOT_EMPTY, {"free_slots": worker.free_slots, "slots": worker.slots, **_ledger(worker)})
    needed = least_alone(worker.headroom_bytes)
    if live_room(worker) < needed:
        return Defer(DeferReason.LIVE_MEMORY, {"needed_bytes": needed, **_ledger(worker), **_live(worker)})
    return Admit(worker.address, worker.headroom_bytes, max(0, device_room(worker)))


def _ledger(worker: WorkerView) -> dict[str, int]:
    return {
        "headroom_bytes": worker.headroom_bytes,
        "reserved_bytes": worker.reserved_bytes,
        "capacity_bytes": worker.capacity_bytes,
    }


def _live(worker: WorkerView) -> dict[str, int]:
    return {
        "available_bytes": worker.available_bytes or 0,
        "unclaimed_bytes": worker.unclaimed_bytes,
        "reserve_bytes": worker.reserve_bytes,
    }

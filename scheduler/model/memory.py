"""Memory as it is planned: footprints and what corrects them, workers and what they have, observed peaks."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


class FootprintSource(enum.Enum):
    """Where a footprint comes from; UNKNOWN is a value of its own, never zero bytes."""

    PRIOR = "prior"  # the analytic formula alone
    CORRECTED = "corrected"  # the formula's answer moved to what peaks like it have been: offset and slope
    LEARNT = "learnt"  # a guess from what its study's trials took with their parameters: places, and nothing else
    GIVEN = "given"  # the user's own number
    UNKNOWN = "unknown"  # no estimator: the trial runs alone and is measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Predicted peak bytes of one attempt.

    host_bytes: what it takes of the host's memory (on a unified-memory machine the device's bytes are in it).
    device_bytes: what it takes of the device's own pool, or of Metal's cap; 0 on CPU.
    components: name -> bytes of the host estimate before correction, for the log line that says *why*.
    prior_bytes: the formula's own answer, before correction (the base that observed peaks are compared with).
    runtime_bytes: the part of it that is the process before its first tensor; 0 when the formula does not tell it
    apart. Elsewhere another number stands in its place: what a trial process there was measured to hold.
    """

    host_bytes: int
    device_bytes: int = 0
    prior_bytes: int = 0
    runtime_bytes: int = 0
    source: FootprintSource = FootprintSource.PRIOR
    samples: int = 0
    components: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def unknown(cls) -> Footprint:
        """Return the footprint of a trial nobody can size: it is run alone first."""
        return cls(host_bytes=0, source=FootprintSource.UNKNOWN)

    @property
    def is_known(self) -> bool:
        return self.source is not FootprintSource.UNKNOWN

    @property
    def is_guess(self) -> bool:
        """Nobody has promised it: it may not reject a trial, end one, or teach the sampler."""
        return self.source is FootprintSource.LEARNT


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What a trial process is before its first tensor, as it says itself when it is ready.

    name: torch's version and build and the allocator in force, "torch-2.13.0+cpu/glibc-stack"; corrections are kept
    for each. runtime_bytes: what it holds. origin: who measured it, for the user.
    """

    name: str
    runtime_bytes: int
    origin: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """From a formula's answer to what is reserved: a rising function of the bytes above the runtime.

    lines: (offset in bytes, slope); the highest counts, since few observations do not tell an offset from a slope.
    capped: and the formula's answer where that is less: nothing that was observed was above it.
    runtime_bytes: what the process that will run it holds when it is ready. samples: how many observations stand
    behind it.
    """

    lines: tuple[tuple[float, float], ...] = ((0.0, 1.0),)
    capped: bool = False
    runtime_bytes: int = 0
    samples: int = 0

    def host_bytes(self, prior_bytes: int, runtime_bytes: int) -> int:
        """Return what to reserve for an answer of `prior_bytes`, of which `runtime_bytes` are the runtime it
        assumed."""
        above = prior_bytes - runtime_bytes
        corrected = max(0, math.ceil(max(offset + slope * above for offset, slope in self.lines)))
        corrected = min(corrected, above) if self.capped else corrected
        return corrected + (self.runtime_bytes if runtime_bytes else 0)

    def largest_prior(self, limit_bytes: int, runtime_bytes: int) -> int:
        """Return the largest answer, with `runtime_bytes` in it, for which no more than `limit_bytes` are reserved."""
        room = limit_bytes - (self.runtime_bytes if runtime_bytes else 0)
        above = math.floor(min((room - offset) / slope for offset, slope in self.lines))
        return (max(above, room) if self.capped else above) + runtime_bytes

    @classmethod
    def largest(cls, corrections: Iterable[Correction]) -> Correction:
        """One that never reserves less than any of these does; without any, the formula's answer itself."""
        found = list(corrections)
        return cls(
            lines=tuple(sorted({line for each in found for line in each.lines})) or ((0.0, 1.0),),
            capped=bool(found) and all(each.capped for each in found),
            runtime_bytes=max((each.runtime_bytes for each in found), default=0),
            samples=min((each.samples for each in found), default=0),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """A finished attempt's peak beside its prediction. `at_least`: it was killed for memory, so the true peak is more.

    family: the formula's name for what it sized, e.g. "patchtst/cpu/glibc-stack"; environment: where it ran. Together
    they are what shares one correction. runtime_bytes: what the process held when it was ready, a part of both numbers;
    0 when the formula does not tell it apart. predicted_bytes: 0 where nobody could predict.
    """

    family: str
    predicted_bytes: int
    observed_bytes: int
    environment: str = ""
    runtime_bytes: int = 0
    at_least: bool = False


class Pressure(enum.IntEnum):
    """How hard-pressed a host's memory is (watchdog's verdict). ELEVATED and above close admission."""

    NORMAL = 0
    ELEVATED = 1
    SOFT = 2
    HARD = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePool:
    """A device's memory. `unified`: its bytes are also the host's (MPS), else it is a pool of its own (CUDA)."""

    kind: str  # "cuda" or "mps"
    total_bytes: int
    unified: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFacts:
    """What a worker says of itself when it joins; measured on its host by the agent.

    domain: names the memory it draws from (the host's boot, and what bounds it there): all workers of one domain share
    its bytes. "": a domain of its own.
    total_bytes: physical memory. limit_bytes: what the domain may use in all (the smallest of RAM, its cgroups and what
    the batch system gave). worker_limit_bytes: what this worker alone may use of it (Dask's --memory-limit), None: all.
    limit_source: what rules: "ram", "cgroup", "slurm" or "dask".
    available_bytes: free for use right now (page cache does not count as use). others_unclaimed_bytes: of these,
    promised to other runs' attempts and not yet taken. others_held_bytes: what these hold: it comes back when they end.
    overhead_bytes: the worker's own processes, the warm spare among them; charged to its ledger row.
    via: the Dask worker through which it is reached, where that is another name.
    environment: of its trial processes; None when none of them said.
    """

    address: str
    host: str
    slots: int
    total_bytes: int
    limit_bytes: int
    available_bytes: int
    others_unclaimed_bytes: int = 0
    others_held_bytes: int = 0
    overhead_bytes: int = 0
    domain: str = ""
    worker_limit_bytes: int | None = None
    limit_source: str = "ram"
    via: str = ""
    device: DevicePool | None = None
    environment: Environment | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """One ledger row as admission and placement see it: a snapshot, free of the brain's internals.

    available_bytes: free memory of the host now, None when the probe failed (which closes admission).
    unclaimed_bytes: sum over the attempts that run on the host, other runs' among them, of max(0, reservation - used):
    promised, not yet taken.
    reserve_bytes: kept free for the system itself.
    device_*: the device's pool, None where there is none. device_is_shared: its bytes are those of the whole domain.
    domain: the memory it shares with other workers, "" where it shares none. domain_headroom_bytes: what nobody there
    holds of it, None where it shares none. domain_idle: no attempt of ours runs on any worker of it.
    limit_bytes: the most that one trial can be given here while no other runs, None when that is not known.
    """

    address: str
    capacity_bytes: int
    reserved_bytes: int
    available_bytes: int | None
    unclaimed_bytes: int
    reserve_bytes: int
    free_slots: int
    slots: int
    pressure: Pressure = Pressure.NORMAL
    closed_reason: str | None = None
    device_capacity_bytes: int | None = None
    device_reserved_bytes: int = 0
    host: str = ""
    device_is_shared: bool = False
    domain: str = ""
    domain_headroom_bytes: int | None = None
    domain_idle: bool = True
    limit_bytes: int | None = None

    @property
    def own_headroom_bytes(self) -> int:
        """Capacity of this row that is not reserved, whatever its domain has left."""
        return self.capacity_bytes - self.reserved_bytes

    @property
    def headroom_bytes(self) -> int:
        """Capacity that is not reserved: the row's or its domain's, the smaller."""
        own = self.own_headroom_bytes
        return own if self.domain_headroom_bytes is None else min(own, self.domain_headroom_bytes)

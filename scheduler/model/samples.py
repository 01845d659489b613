"""What the watchdog sees: one reading of the host, one of a trial's process tree, and the two together.

Covers what travels from `host.vitals` (which measures) to `watchdog.policy.eviction` (which judges), and their
JSON form, which recorded traces use. None always means "could not be read": it is never turned into zero.
Holds no judgement, reads nothing itself.

Units: bytes are `int`, seconds `float`; `at` is an instant of the monotonic clock.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMemory:
    """One reading of the host's memory.

    total_bytes: physical memory. limit_bytes: what we may use: the smallest of RAM and our own cgroup chain.
    available_bytes: free for use now, the smallest of MemAvailable and the cgroups' room; page cache is not use.
    swap_total_bytes, swap_free_bytes: 0 total means the host has no swap. On macOS the total grows by itself.
    paging_bytes: counter of bytes swapped in and out since boot. shared_bytes: all shared memory and tmpfs files.
    psi_*: per cent of time, Linux only. level: macOS memory pressure level (1 normal, 2 warn, 4 critical).
    oom_kills: counter of our cgroup (or host).
    """

    at: float
    total_bytes: int | None = None
    limit_bytes: int | None = None
    available_bytes: int | None = None
    swap_total_bytes: int | None = None
    swap_free_bytes: int | None = None
    paging_bytes: int | None = None
    shared_bytes: int | None = None
    psi_some_avg10: float | None = None
    psi_full_avg10: float | None = None
    psi_full_avg60: float | None = None
    level: int | None = None
    oom_kills: int | None = None

    @property
    def swap_used_bytes(self) -> int | None:
        """Swap in use; None where there is none or it cannot be read."""
        if not self.swap_total_bytes or self.swap_free_bytes is None:
            return None
        return self.swap_total_bytes - self.swap_free_bytes

    @property
    def free_share(self) -> float | None:
        """Available memory as a part of the limit, 0..1."""
        if self.available_bytes is None or not self.limit_bytes:
            return None
        return self.available_bytes / self.limit_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessMemory:
    """What one process holds, and has held.

    footprint_bytes: as in TreeSample, exact where it can be; None when it could not be read. resident_bytes: all that
    is in memory of it, file_bytes of that from mapped files. peak_bytes: the most that was ever resident since it was
    made or replaced by exec.
    """

    pid: int
    start: float
    footprint_bytes: int | None
    resident_bytes: int
    file_bytes: int
    peak_bytes: int

    @property
    def identity(self) -> tuple[int, float]:
        return self.pid, self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeSample:
    """One reading of a process tree, summed over its members.

    footprint_bytes: memory it holds, swapped parts included (Linux PSS + SwapPss, or the cheaper upper bound
    RssAnon + RssShmem + VmSwap when `exact` is False, either with the memfd and tmpfs files it fills; macOS
    phys_footprint). shared_bytes: the shared part of it; unmapped_bytes: of that what is in no process's own memory;
    lasting_bytes: of it what stays when it has ended, in named files on a tmpfs. cpu_s: user and system, with that of
    children already waited for. io_bytes: read and write calls, not disk traffic (swap-in would look like work).
    states: one letter per process. frozen: held by a cgroup freezer. members: (pid, start time) of each process.
    """

    footprint_bytes: int | None = None
    swap_bytes: int | None = None
    shared_bytes: int = 0
    unmapped_bytes: int = 0
    lasting_bytes: int = 0
    cpu_s: float | None = None
    io_bytes: int | None = None
    major_faults: int | None = None
    states: str = ""
    frozen: bool = False
    exact: bool = False
    members: tuple[tuple[int, float], ...] = ()

    @property
    def processes(self) -> int:
        return len(self.members)

    @property
    def paused(self) -> bool:
        """Every living process of the tree is stopped, traced or frozen: somebody holds it on purpose."""
        living = [s for s in self.states if s not in "ZX"]
        return self.frozen or (bool(living) and all(s in "Tt" for s in living))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialSample:
    """One registered trial at one instant: what its registration says and what was measured.

    promised_bytes: the reservation it was admitted with (or tightened to): growth granted later does not hide that it
    is over. 0 means nobody could size it. owner_gone: the agent that started it is certainly dead. ticked_at,
    saved_at: instants of its last progress tick and checkpoint, None before the first. tree: None when its processes
    could not be read this time.
    """

    attempt: str
    pid: int
    start_time: float
    launched: float
    reservation_bytes: int = 0
    promised_bytes: int = 0
    uses_device: bool = False
    mode: str = "on"
    owner_gone: bool = False
    ticked_at: float | None = None
    saved_at: float | None = None
    step: int = 0
    tree: TreeSample | None = None

    @property
    def key(self) -> str:
        """Identity of the attempt's process: the attempt, its pid and that pid's start time."""
        return f"{self.attempt}:{self.pid}:{self.start_time:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSample:
    """Everything seen at one instant. trials: None when only the host was read (trees are read less often).

    interval_s: time to the previous sample that was planned. suspended_s: how long the machine has slept since boot.
    """

    at: float
    interval_s: float
    host: HostMemory
    trials: tuple[TrialSample, ...] | None = None
    suspended_s: float | None = None


def to_json(value: Any) -> Any:
    """Return a sample as JSON types; `host_sample_from_json` is the inverse for a HostSample."""
    return dataclasses.asdict(value)


def _known(cls: type, data: Mapping[str, Any]) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(cls)}
    return {k: v for k, v in data.items() if k in names}


def host_sample_from_json(data: Mapping[str, Any]) -> HostSample:
    """Read a HostSample from its JSON form; unknown keys are ignored, so that old readers take newer traces."""
    trials = data.get("trials")
    return HostSample(
        at=data["at"],
        interval_s=data.get("interval_s", 1.0),
        suspended_s=data.get("suspended_s"),
        host=HostMemory(**{"at": data["at"], **_known(HostMemory, data["host"])}),
        trials=None if trials is None else tuple(_trial_from_json(t) for t in trials),
    )


def _trial_from_json(data: Mapping[str, Any]) -> TrialSample:
    fields = _known(TrialSample, data)
    if (tree := data.get("tree")) is not None:
        members = tuple((int(p), float(s)) for p, s in tree.get("members", ()))
        fields["tree"] = TreeSample(**{**_known(TreeSample, tree), "members": members})
    return TrialSample(**fields)


@dataclass(slots=True)
class History:
    """The last samples, for the story of a kill. Bounded; the oldest are dropped."""

    keep: int = 60
    samples: list[HostSample] = field(default_factory=list)

    def add(self, sample: HostSample) -> None:
        self.samples.append(sample)
        del self.samples[: -self.keep]

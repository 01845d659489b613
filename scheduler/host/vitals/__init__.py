"""What the host and the trials' processes take: one interface over Linux and macOS.

Covers memory of the host (with cgroup limits), samples of process trees, peaks, identities, and the evidence for a
kill by the kernel. Linux reads /proc itself (`linux`), macOS uses psutil and two system calls it lacks (`macos`).
Judges nothing (`policy.eviction` does), signals nobody (`scheduler.watchdog` does).

None means "could not be read", never zero.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterable, Mapping

if sys.platform == "linux":
    from scheduler.host.vitals import linux as system
else:
    from scheduler.host.vitals import macos as system

from scheduler.model.samples import HostMemory, ProcessMemory, TreeSample

__all__ = [
    "HostMemory",
    "OomWitness",
    "ProcessMemory",
    "TreeSample",
    "binding_cgroup",
    "has_children",
    "host_memory",
    "lives",
    "living",
    "oom_kills",
    "own_bytes",
    "peak_bytes",
    "processes",
    "sample_tree",
    "sample_trees",
    "start_time",
    "suspended_s",
]

_probe: system.HostProbe | None = None


def host_memory(now: float | None = None) -> HostMemory:
    """Read the host's memory now; limit and available are bounded by our own cgroup chain (v1 and v2)."""
    global _probe  # noqa: PLW0603 - it counts the paging since it was made: one for the whole process
    if _probe is None:
        _probe = system.HostProbe()
    return _probe.read(time.monotonic() if now is None else now)


def binding_cgroup() -> str | None:
    """Names the cgroup that bounds our memory, the same for all processes that it bounds; None where none does.

    By its inode, not its path: in a container every cgroup is called "/".
    """
    return system.binding_cgroup()


def start_time(pid: int) -> float | None:
    """Read the start of a process: with its pid, its identity. None when there is no such process.

    Only equality means anything (clock ticks since boot on Linux, seconds on macOS): pids are used again.
    """
    return system.start_time(pid)


def lives(pid: int, start: float) -> bool:
    """Whether this very process runs. One that is dead and not yet waited for does not, whatever its parent does."""
    found = system.process(pid)
    return found is not None and found.start == start and not (found.state in "ZX" and found.threads <= 1)


def peak_bytes(pid: int) -> int | None:
    """Read the most resident memory a process has had since its exec (VmHWM; on macOS its peak phys_footprint).

    Not `ru_maxrss`: that one is inherited through fork and exec.
    """
    return system.peak_bytes(pid)


def sample_tree(
    pid: int, start: float, *, exact: bool = False, known: Iterable[tuple[int, float]] = ()
) -> TreeSample | None:
    """Measure the process tree of a trial; None when the process with this identity is gone and nothing is left of it.

    exact: PSS instead of the cheap upper bound (costs milliseconds per GiB). known: members seen earlier.
    """
    return sample_trees({"": (pid, start, exact, tuple(known))})[""]


def sample_trees(
    wanted: Mapping[str, tuple[int, float, bool, Iterable[tuple[int, float]]]],
) -> dict[str, TreeSample | None]:
    """Like `sample_tree` for many at once, with one look at the process table. key -> (pid, start, exact, known)."""
    table = system.process_table()
    procs = {key: system.members(pid, start, table, known) for key, (pid, start, _, known) in wanted.items()}
    shared = system.shared_memory(procs)
    return {key: system.sample(procs[key], wanted[key][2], shared.get(key)) for key in wanted}


def has_children(pid: int) -> bool:
    """Whether a process has children now: some microseconds, where a look at the process table takes milliseconds.

    True where only that look could tell.
    """
    return system.has_children(pid)


def processes(
    wanted: Mapping[str, tuple[int, float, Iterable[tuple[int, float]]]],
) -> dict[str, list[ProcessMemory]]:
    """Measure what each living process of some trees holds, memory that they share divided among them.

    Milliseconds per GiB.

    key -> (pid, start, known), as for `sample_trees`.
    """
    table = system.process_table()
    found = {}
    for key, (pid, start, known) in wanted.items():
        living = [proc for proc in system.members(pid, start, table, known) if proc.state not in "ZX"]
        found[key] = [memory for memory in map(system.process_memory, living) if memory is not None]
    return found


def living(pid: int, start: float, known: Iterable[tuple[int, float]] = ()) -> set[tuple[int, float]]:
    """List the members of a tree that still hold memory: a zombie does not, unless another of its threads still
    runs."""
    procs = system.members(pid, start, system.process_table(), known)
    return {(p.pid, p.start) for p in procs if p.state != "X" and not (p.state == "Z" and p.threads <= 1)}


def own_bytes() -> int:
    """Memory this very process holds, in bytes; 0 when it cannot be read (never on Linux)."""
    return system.own_bytes()


def oom_kills() -> int | None:
    """Kernel OOM kills counted so far on this host; None where none are counted (macOS)."""
    return system.oom_kills()


def suspended_s() -> float | None:
    """How long the machine has slept since boot, in seconds; a jump of it tells a suspend from a slow sample."""
    return system.suspended_s()


class OomWitness:
    """Was that SIGKILL the kernel's? Make one when a process starts, ask when it has died.

    The kernel leaves no note on the process itself: a SIGKILL *and* a counted OOM kill since the start are the
    evidence. Where there is no counter (macOS) the answer is False: a kill that cannot be shown is not claimed.
    """

    def __init__(self) -> None:
        self._before = system.oom_kills()

    def is_oom_kill(self, exit_status: int | None) -> bool:
        """exit_status: as `Popen.returncode` (negative signal) or a shell's 128 + signal."""
        if exit_status not in (-signal.SIGKILL, 128 + signal.SIGKILL) or self._before is None:
            return False
        now = system.oom_kills()
        return now is not None and now > self._before

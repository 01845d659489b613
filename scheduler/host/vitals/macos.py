"""Reading processes and the host on macOS (and, with less detail, wherever psutil runs).

Covers what `scheduler.host.vitals` offers. psutil gives the process table and the host's totals; what it lacks
comes from two system calls through ctypes: `proc_pid_rusage` (phys_footprint: memory held including its compressed
part; RSS shrinks when macOS compresses a process) and `sysctlbyname` (memory pressure level). psutil's `sin`/`sout`
are page-ins and page-outs here, not swapping, so `paging_bytes` is taken from the growth of used swap instead.
Not run on a Mac yet: the tests feed the parsers with bytes laid out as the headers document them.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import psutil

from scheduler.model.samples import HostMemory, ProcessMemory, TreeSample

ON_MACOS = sys.platform == "darwin"  # a name, so that a type checker on Linux reads the rest too
RUSAGE_INFO_V4 = 4
_RUSAGE_SIZE = 16 + 35 * 8  # sys/resource.h: ri_uuid[16], then 64-bit fields
_STATES = {
    psutil.STATUS_RUNNING: "R",
    psutil.STATUS_SLEEPING: "S",
    psutil.STATUS_DISK_SLEEP: "D",
    psutil.STATUS_STOPPED: "T",
    psutil.STATUS_TRACING_STOP: "t",
    psutil.STATUS_ZOMBIE: "Z",
    psutil.STATUS_DEAD: "X",
    psutil.STATUS_IDLE: "I",
}


class Rusage(NamedTuple):
    """The part of rusage_info_v4 that is used. *_ns are mach time units scaled to nanoseconds by the caller."""

    pageins: int
    footprint_bytes: int
    peak_footprint_bytes: int
    read_bytes: int
    written_bytes: int


def parse_rusage(buffer: bytes) -> Rusage | None:
    """rusage_info_v4 (sys/resource.h); None when the buffer is too short to hold it."""
    if len(buffer) < _RUSAGE_SIZE:
        return None
    fields = struct.unpack_from("=35Q", buffer, 16)
    # 0 user 1 system 2 pkg_idle 3 interrupt 4 pageins 5 wired 6 resident 7 phys_footprint 8 start 9 exit
    # 10-15 child_* 16 diskio_read 17 diskio_written 18-24 qos 25 billed 26 serviced 27 logical_writes
    # 28 lifetime_max_phys_footprint
    return Rusage(fields[4], fields[7], fields[28], fields[16], fields[17])


def _rusage(pid: int) -> Rusage | None:
    if not ON_MACOS:
        return None
    buffer = ctypes.create_string_buffer(_RUSAGE_SIZE + 64)
    library = ctypes.CDLL("/usr/lib/libproc.dylib", use_errno=True)
    if library.proc_pid_rusage(pid, RUSAGE_INFO_V4, buffer) != 0:
        return None
    return parse_rusage(buffer.raw)


def _sysctl_int(name: str) -> int | None:
    if not ON_MACOS:
        return None
    value, size = ctypes.c_int(0), ctypes.c_size_t(4)
    library = ctypes.CDLL("/usr/lib/libc.dylib", use_errno=True)
    failed = library.sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0))
    return None if failed else value.value


class Proc(NamedTuple):
    """One process. start: seconds since the epoch as the kernel noted it, the pid's identity."""

    pid: int
    ppid: int
    session: int
    state: str
    start: float
    threads: int


def process(pid: int) -> Proc | None:
    try:
        proc = psutil.Process(pid)
        with proc.oneshot():
            state = _STATES.get(proc.status(), "S")
            return Proc(pid, proc.ppid(), _session(pid), state, round(proc.create_time(), 3), proc.num_threads())
    except psutil.ZombieProcess:
        return Proc(pid, 0, 0, "Z", 0.0, 1)
    except psutil.Error:
        return None


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return 0


def process_table() -> dict[int, Proc]:
    """Every process of ours that may be read."""
    found = {}
    for pid in psutil.pids():
        try:
            proc = psutil.Process(pid)
            found[pid] = Proc(pid, proc.ppid(), _session(pid), "S", round(proc.create_time(), 3), 1)
        except psutil.Error:
            continue
    return found


def start_time(pid: int) -> float | None:
    proc = process(pid)
    return None if proc is None or proc.start == 0.0 else proc.start


def peak_bytes(pid: int) -> int | None:
    usage = _rusage(pid)
    return None if usage is None else usage.peak_footprint_bytes


def own_bytes() -> int:
    usage = _rusage(os.getpid())
    return psutil.Process().memory_info().rss if usage is None else usage.footprint_bytes


def frozen(pid: int) -> bool:
    """There are no cgroups here."""
    return False


def members(root: int, start: float, table: Mapping[int, Proc], known: Iterable[tuple[int, float]] = ()) -> list[Proc]:
    """List the processes of a trial, its root first: descendants, its session, and those seen in it earlier."""
    found: dict[int, Proc] = {}
    top = table.get(root)
    if top is not None and top.start == start:
        found[root] = top
        found.update({p.pid: p for p in table.values() if p.session == root and p.start >= start})
    found.update({pid: table[pid] for pid, began in known if pid in table and table[pid].start == began})
    queue = list(found)
    while queue:
        parent = queue.pop()
        for child in table.values():
            if child.ppid == parent and child.pid not in found:
                found[child.pid] = child
                queue.append(child.pid)
    for never in (0, 1):
        found.pop(never, None)
    return list(found.values())


def shared_memory(trees: Mapping[str, list[Proc]]) -> dict[str, Any]:
    """There is no tmpfs here, and phys_footprint counts shared memory objects for those who made them."""
    return {}


def sample(procs: list[Proc], exact: bool, shared: object = None) -> TreeSample | None:
    """Measure these processes; a sum that lacks a member is None, never too small."""
    if not procs:
        return None
    footprint: int | None = 0
    faults: int | None = 0
    cpu: float | None = 0.0
    states = ""
    for proc in procs:
        now = process(proc.pid)
        if now is None or now.state in "ZX":
            states += "Z"
            continue
        states += now.state
        usage = _rusage(proc.pid)
        if usage is None:
            footprint = faults = None
        elif footprint is not None and faults is not None:
            footprint, faults = footprint + usage.footprint_bytes, faults + usage.pageins
        try:
            times = psutil.Process(proc.pid).cpu_times()
            children = getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
            cpu = None if cpu is None else cpu + times.user + times.system + children
        except psutil.Error:
            cpu = None
    return TreeSample(
        footprint_bytes=footprint,
        swap_bytes=None,  # macOS does not say which part of a process is compressed or swapped
        cpu_s=cpu,
        io_bytes=None,
        major_faults=faults,
        states=states,
        exact=footprint is not None,
        members=tuple((p.pid, p.start) for p in procs),
    )


def binding_cgroup() -> str | None:
    """There are no cgroups here."""
    return None


def process_memory(proc: Proc) -> ProcessMemory | None:
    """Everything by phys_footprint, which has no mapped files in it; None when it has ended."""
    usage = _rusage(proc.pid)
    if usage is None:
        return None
    return ProcessMemory(
        pid=proc.pid,
        start=proc.start,
        footprint_bytes=usage.footprint_bytes,
        resident_bytes=usage.footprint_bytes,
        file_bytes=0,
        peak_bytes=usage.peak_footprint_bytes,
    )


def has_children(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).children())
    except psutil.Error:
        return False


def suspended_s() -> float | None:
    """CLOCK_MONOTONIC runs on while a Mac sleeps, Python's monotonic clock (mach_absolute_time) does not."""
    return time.clock_gettime(time.CLOCK_MONOTONIC) - time.monotonic()


def oom_kills(chain: object = None) -> int | None:
    """macOS counts none."""
    return None


class HostProbe:
    """Reads the host's memory. Swapping is seen as growth of used swap, since psutil's counters mean something else."""

    def __init__(self) -> None:
        self._swap_used: int | None = None
        self._paged = 0

    def read(self, now: float) -> HostMemory:
        memory = psutil.virtual_memory()
        try:
            swap = psutil.swap_memory()
        except OSError:
            swap = None
        if swap is not None:
            if self._swap_used is not None:
                self._paged += max(0, swap.used - self._swap_used)
            self._swap_used = swap.used
        return HostMemory(
            at=now,
            total_bytes=memory.total,
            limit_bytes=memory.total,
            available_bytes=memory.available,
            swap_total_bytes=None if swap is None else swap.total,
            swap_free_bytes=None if swap is None else swap.free,
            paging_bytes=None if swap is None else self._paged,
            level=_sysctl_int("kern.memorystatus_vm_pressure_level"),
        )

"""Reading processes and the host on Linux, straight from /proc and the cgroup files.

Covers what `scheduler.host.vitals` offers. No library: the watchdog reads these files every second for days, and
one `open` costs 15 microseconds where a psutil call costs ten times that. Every reader answers None for "could not be
read". Judges nothing, signals nobody.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from scheduler.host.vitals.shared import Shared, SharedMemory
from scheduler.model.samples import HostMemory, ProcessMemory, TreeSample

PROC = "/proc"  # tests point it elsewhere
_HZ = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Proc(NamedTuple):
    """One line of the process table (/proc/<pid>/stat). start: clock ticks since boot, the pid's identity."""

    pid: int
    ppid: int
    session: int
    state: str
    start: float
    cpu_ticks: int
    major_faults: int
    threads: int


def read(path: str, size: int = 65536) -> bytes | None:
    """Read a small file whole, None when it cannot be read (gone, no permission)."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.read(fd, size)
    except OSError:  # ESRCH: the process ended between open and read
        return None
    finally:
        os.close(fd)


def parse_stat(text: bytes | None) -> Proc | None:
    """Parse a line of /proc/<pid>/stat; the name in it may hold spaces and brackets. None when it is torn."""
    if text is None:
        return None
    end = text.rfind(b")")
    head, fields = text[: text.find(b"(")], text[end + 2 :].split()
    if len(fields) < 22:  # cut off: a number at the end may lack digits, and the start time is an identity
        return None
    try:
        return Proc(
            pid=int(head),
            ppid=int(fields[1]),
            session=int(fields[3]),
            state=fields[0].decode(),
            start=float(int(fields[19])),
            cpu_ticks=int(fields[11]) + int(fields[12]) + int(fields[13]) + int(fields[14]),
            major_faults=int(fields[9]) + int(fields[10]),
            threads=int(fields[17]),
        )
    except (ValueError, IndexError, UnicodeDecodeError):
        return None


def process(pid: int) -> Proc | None:
    return parse_stat(read(f"{PROC}/{pid}/stat", 4096))


def process_table() -> dict[int, Proc]:
    """Every process of the machine: 15 microseconds each."""
    table = {}
    try:
        names = os.listdir(PROC)
    except OSError:
        return {}
    for name in names:
        if name.isdigit() and (proc := parse_stat(read(f"{PROC}/{name}/stat", 4096))) is not None:
            table[proc.pid] = proc
    return table


def start_time(pid: int) -> float | None:
    proc = process(pid)
    return None if proc is None else proc.start


def peak_bytes(pid: int) -> int | None:
    return _status(pid, (b"VmHWM",)).get(b"VmHWM")


def own_bytes() -> int:
    memory = memory_of(os.getpid(), exact=False)
    return 0 if memory is None else memory.footprint


def _status(pid: int, wanted: tuple[bytes, ...]) -> dict[bytes, int]:
    """Fields of /proc/<pid>/status in bytes; those it does not have are left out."""
    found = {}
    for line in (read(f"{PROC}/{pid}/status", 8192) or b"").splitlines():
        name, _, rest = line.partition(b":")
        if name in wanted and (size := _kilobytes(rest)) is not None:
            found[name] = size
    return found


def _kilobytes(text: bytes) -> int | None:
    """` 123 kB` in bytes; None when it is cut off."""
    parts = text.split()
    return int(parts[0]) * 1024 if len(parts) == 2 and parts[1] == b"kB" and parts[0].isdigit() else None


def _rollup(pid: int) -> Memory | None:
    """PSS of anonymous and shared memory, and SwapPss; walks the page tables: milliseconds per GiB."""
    sums = {}
    for line in (read(f"{PROC}/{pid}/smaps_rollup", 8192) or b"").splitlines():
        name, _, rest = line.partition(b":")
        if name in (b"Pss", b"Pss_Anon", b"Pss_Shmem", b"SwapPss") and (size := _kilobytes(rest)) is not None:
            sums[name] = size
    if b"SwapPss" not in sums or b"Pss" not in sums:
        return None
    held = sums[b"Pss_Anon"] + sums.get(b"Pss_Shmem", 0) if b"Pss_Anon" in sums else sums.get(b"Pss", 0)
    return Memory(held + sums[b"SwapPss"], sums[b"SwapPss"], sums.get(b"Pss_Shmem", 0), True)


class Memory(NamedTuple):
    """What one process holds, in bytes; footprint: all of it, swap and shared pages included."""

    footprint: int
    swap: int
    shared: int
    exact: bool


def memory_of(pid: int, exact: bool) -> Memory | None:
    """Measure what a process holds; None when it cannot be read."""
    if exact and (sums := _rollup(pid)) is not None:
        return sums
    fields = _status(pid, (b"RssAnon", b"RssShmem", b"VmSwap"))
    if len(fields) < 3:
        return None
    return Memory(sum(fields.values()), fields[b"VmSwap"], fields[b"RssShmem"], False)


def process_memory(proc: Proc) -> ProcessMemory | None:
    """None when it has ended meanwhile.

    What it holds is one reading, its peak a later one: a process may give back 300 MiB between the two, and from two
    readings of what it holds those would be missing, or be counted twice.
    """
    sums = numbers(read(f"{PROC}/{proc.pid}/smaps_rollup", 8192), (b"Rss", b"Pss_Anon", b"Pss_Shmem", b"SwapPss"), 1024)
    fields = _status(proc.pid, (b"VmHWM", b"VmRSS", b"RssFile", b"RssAnon", b"RssShmem", b"VmSwap"))
    if len(fields) < 6:
        if _ended(proc):
            return None
        return ProcessMemory(
            pid=proc.pid, start=proc.start, footprint_bytes=None, resident_bytes=0, file_bytes=0, peak_bytes=0
        )
    if len(sums) == 4:
        held, resident = sums[b"Pss_Anon"] + sums[b"Pss_Shmem"] + sums[b"SwapPss"], sums[b"Rss"]
    else:  # not to be had (an old kernel): the upper bound
        held = fields[b"RssAnon"] + fields[b"RssShmem"] + fields[b"VmSwap"]
        resident = fields[b"VmRSS"]
    return ProcessMemory(
        pid=proc.pid,
        start=proc.start,
        footprint_bytes=held,
        resident_bytes=resident,
        file_bytes=fields[b"RssFile"],
        peak_bytes=max(fields[b"VmHWM"], resident),
    )


def has_children(pid: int) -> bool:
    tasks = f"{PROC}/{pid}/task"
    try:
        names = os.listdir(tasks)
    except OSError:
        return False  # it has ended
    listings = [read(f"{tasks}/{name}/children", 4096) for name in names]
    # None of all of them: a kernel without these files.
    return any(listings) or all(listing is None for listing in listings)


def _io_bytes(pid: int) -> int | None:
    total, seen = 0, 0
    for line in (read(f"{PROC}/{pid}/io", 1024) or b"").splitlines():
        name, _, rest = line.partition(b":")
        if name in (b"rchar", b"wchar"):
            try:
                total, seen = total + int(rest), seen + 1
            except ValueError:
                return None
    return total if seen == 2 else None


def frozen(pid: int) -> bool:
    """Is the process held by a cgroup freezer (v1 or v2)? It then shows as D or S, not as stopped."""
    for line in (read(f"{PROC}/{pid}/cgroup", 8192) or b"").decode(errors="replace").splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "freezer":
            state = read(f"/sys/fs/cgroup/freezer{path}/freezer.state", 64) or b""
            if state.strip() in (b"FROZEN", b"FREEZING"):
                return True
        elif number == "0":
            for mount in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified"):
                if b"frozen 1" in (read(f"{mount}{path}/cgroup.events", 256) or b""):
                    return True
    return False


def members(root: int, start: float, table: Mapping[int, Proc], known: Iterable[tuple[int, float]] = ()) -> list[Proc]:
    """List the processes of a trial, its root first: descendants, its session, and those seen in it earlier.

    A double-forked child of a new session has init as its parent: only `known` still tells that it is ours. Session
    membership counts only while the root lives, since its number may be used again later.
    """
    found: dict[int, Proc] = {}
    top = table.get(root)
    if top is not None and top.start == start:
        found[root] = top
        found.update({p.pid: p for p in table.values() if p.session == root and p.start >= start})
    found.update({pid: table[pid] for pid, began in known if pid in table and table[pid].start == began})
    children: dict[int, list[Proc]] = {}
    for proc in table.values():
        children.setdefault(proc.ppid, []).append(proc)
    queue = list(found)
    while queue:
        for child in children.get(queue.pop(), ()):
            if child.pid not in found:
                found[child.pid] = child
                queue.append(child.pid)
    for never in (0, 1, 2):
        found.pop(never, None)
    return list(found.values())


def _ended(proc: Proc) -> bool:
    """Has it certainly ended? A process that merely cannot be read has not."""
    now = process(proc.pid)
    if now is not None:
        return now.start != proc.start or now.state in "ZX"
    return not os.path.exists(f"{PROC}/{proc.pid}")


_shared = SharedMemory()


def shared_memory(trees: Mapping[str, list[Proc]]) -> dict[str, Shared]:
    """Shared memory of each tree that its processes need not have mapped (see `shared`); {} when there is little."""
    return _shared.of(trees, numbers(read(f"{PROC}/meminfo"), (b"Shmem",), 1024).get(b"Shmem"))


def sample(procs: list[Proc], exact: bool, shared: Shared | None = None) -> TreeSample | None:
    """Measure these processes; None when none is left. A sum that lacks a member is None, never too small.

    shared: what they hold in files of shared memory; what they have mapped of it is not counted again.
    """
    if not procs:
        return None
    footprint: int | None = 0
    swap: int | None = 0
    io: int | None = 0
    mapped, files = 0, 0 if shared is None else shared.bytes
    all_exact = exact
    for proc in procs:
        if proc.state in "ZX":
            continue
        memory = memory_of(proc.pid, exact)
        if memory is None:
            if _ended(proc):
                continue  # it holds nothing any more
            footprint = swap = None
        elif footprint is not None and swap is not None:
            footprint, swap, all_exact = footprint + memory.footprint, swap + memory.swap, all_exact and memory.exact
            mapped += memory.shared
        moved = _io_bytes(proc.pid)
        io = None if io is None or moved is None else io + moved
    # A frozen process shows as D (v1) or S (v2); only a tree that stands still is worth the look.
    still = all(p.state in "DSTtZ" for p in procs)
    unmapped = max(0, files - mapped)
    return TreeSample(
        footprint_bytes=None if footprint is None else footprint + unmapped,
        swap_bytes=swap,
        shared_bytes=max(files, mapped),
        unmapped_bytes=unmapped,
        lasting_bytes=0 if shared is None else shared.lasting,
        cpu_s=sum(p.cpu_ticks for p in procs) / _HZ,
        io_bytes=io,
        major_faults=sum(p.major_faults for p in procs),
        states="".join(p.state for p in procs),
        frozen=still and frozen(procs[0].pid),
        exact=all_exact,
        members=tuple((p.pid, p.start) for p in procs),
    )


def suspended_s() -> float | None:
    """How long the machine has slept since boot."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()


# -- the host -------------------------------------------------------------------------------------------------------


def numbers(text: bytes | None, wanted: Iterable[bytes], unit: int = 1) -> dict[bytes, int]:
    """`name value` or `name: value kB` lines as numbers; lines that cannot be read are left out."""
    want, found = set(wanted), {}
    for line in (text or b"").splitlines():
        parts = line.split()
        if len(parts) >= 2 and (name := parts[0].rstrip(b":")) in want:
            try:
                found[name] = int(parts[1]) * unit
            except ValueError:
                continue
    return found


def _one(path: str) -> int | None:
    text = (read(path, 64) or b"").strip()
    return int(text) if text.isdigit() else None


class CgroupLevel(NamedTuple):
    """One level of our own memory cgroup chain."""

    path: str
    version: int

    def limit(self) -> int | None:
        return _one(f"{self.path}/memory.{'max' if self.version == 2 else 'limit_in_bytes'}")

    def room(self, limit: int) -> int | None:
        """Bytes we may still take: the limit less what is used; file cache is not use, it goes first."""
        used = _one(f"{self.path}/memory.{'current' if self.version == 2 else 'usage_in_bytes'}")
        prefix = b"" if self.version == 2 else b"total_"
        names = (prefix + b"inactive_file", prefix + b"active_file")
        cache = numbers(read(f"{self.path}/memory.stat"), names)
        return None if used is None or not cache else max(0, limit - used + sum(cache.values()))

    def swap(self) -> tuple[int, int] | None:
        """(total, free) bytes of swap this level allows; None when it sets no limit of its own."""
        if self.version == 2:
            total, used = _one(f"{self.path}/memory.swap.max"), _one(f"{self.path}/memory.swap.current")
            return None if total is None or used is None else (total, max(0, total - used))
        both, memory = _one(f"{self.path}/memory.memsw.limit_in_bytes"), self.limit()
        names = (b"total_swap",)
        used = numbers(read(f"{self.path}/memory.stat"), names).get(b"total_swap")
        if both is None or memory is None or used is None or both >= 1 << 60:
            return None
        return max(0, both - memory), max(0, both - memory - used)

    def oom_kills(self) -> int | None:
        name = "memory.events" if self.version == 2 else "memory.oom_control"
        return numbers(read(f"{self.path}/{name}"), (b"oom_kill",)).get(b"oom_kill")


def cgroup_chain(pid: int | str = "self") -> list[CgroupLevel]:
    """List the memory cgroups that bound a process, innermost first; v1 and v2, also in a container."""
    mounts: dict[int, tuple[str, str]] = {}
    for line in (read(f"{PROC}/self/mountinfo", 1 << 20) or b"").decode(errors="replace").splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        if kind[0] == "cgroup2":
            mounts[2] = (fields[3], fields[4])
        elif kind[0] == "cgroup" and "memory" in kind[2].split(","):
            mounts[1] = (fields[3], fields[4])
    chain = []
    for line in (read(f"{PROC}/{pid}/cgroup", 8192) or b"").decode(errors="replace").splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        version = 2 if number == "0" else 1
        if (version == 1 and "memory" not in controllers.split(",")) or version not in mounts:
            continue
        base, point = mounts[version]  # in a container the mount shows only the part below `base`
        inner = path[len(base) :] if base != "/" and path.startswith(base) else path
        while True:
            level = CgroupLevel(point + inner.rstrip("/"), version)
            if os.path.isdir(level.path):
                chain.append(level)
            if not inner.strip("/"):
                break
            inner = inner.rstrip("/").rpartition("/")[0]
    return chain


def binding_cgroup() -> str | None:
    """Return the level of our own chain with the smallest limit below RAM; None where none bounds us."""
    total = numbers(read(f"{PROC}/meminfo"), (b"MemTotal",), 1024).get(b"MemTotal")
    bounds = [(limit, level) for level in cgroup_chain() if (limit := level.limit()) is not None]
    below = [(limit, level) for limit, level in bounds if total is None or limit < total]
    if not below:
        return None
    level = min(below, key=lambda pair: pair[0])[1]
    try:
        return f"cgroup{level.version}-{os.stat(level.path).st_ino}"
    except OSError:
        return f"cgroup{level.version}{level.path}"


def _pressure(text: bytes | None) -> dict[str, float]:
    found = {}
    for line in (text or b"").decode(errors="replace").splitlines():
        kind, *pairs = line.split()
        for pair in pairs:
            name, _, value = pair.partition("=")
            try:
                found[f"{kind}_{name}"] = float(value)
            except ValueError:
                continue
    return found


class HostProbe:
    """Reads the host's memory; remembers where its files are (our cgroup does not change while we run)."""

    def __init__(self) -> None:
        self.chain = cgroup_chain()

    def read(self, now: float) -> HostMemory:
        fields = (b"MemTotal", b"MemAvailable", b"SwapTotal", b"SwapFree", b"Shmem")
        info = numbers(read(f"{PROC}/meminfo"), fields, 1024)
        total, available = info.get(b"MemTotal"), info.get(b"MemAvailable")
        swap_total, swap_free = info.get(b"SwapTotal"), info.get(b"SwapFree")
        limit = total
        for level in self.chain:
            bound = level.limit()
            if bound is None or (total is not None and bound >= total):
                continue
            limit = bound if limit is None else min(limit, bound)
            room = level.room(bound)
            available = room if available is None or room is None else min(available, room)
            if (swap := level.swap()) is not None and swap_total is not None and swap_free is not None:
                swap_total, swap_free = min(swap_total, swap[0]), min(swap_free, swap[1])
        counters = numbers(read(f"{PROC}/vmstat"), (b"pswpin", b"pswpout", b"oom_kill"))
        paging = [counters[name] for name in (b"pswpin", b"pswpout") if name in counters]
        psi = _pressure(read(f"{PROC}/pressure/memory", 512))
        return HostMemory(
            at=now,
            total_bytes=total,
            limit_bytes=limit,
            available_bytes=available,
            swap_total_bytes=swap_total,
            swap_free_bytes=swap_free,
            paging_bytes=sum(paging) * _PAGE if len(paging) == 2 else None,
            shared_bytes=info.get(b"Shmem"),
            psi_some_avg10=psi.get("some_avg10"),
            psi_full_avg10=psi.get("full_avg10"),
            psi_full_avg60=psi.get("full_avg60"),
            oom_kills=oom_kills(self.chain),
        )


def oom_kills(chain: Iterable[CgroupLevel] | None = None) -> int | None:
    """Kernel OOM kills counted since boot: in /proc/vmstat (cgroup limits included), else in our own cgroups."""
    host = numbers(read(f"{PROC}/vmstat"), (b"oom_kill",)).get(b"oom_kill")
    if host is not None:
        return host
    counts = [level.oom_kills() for level in (cgroup_chain() if chain is None else chain)]
    known = [count for count in counts if count is not None]
    return max(known) if known else None

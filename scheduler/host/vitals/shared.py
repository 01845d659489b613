"""Shared memory that no process's RSS shows: memfd and files on a tmpfs (/dev/shm), filled by writing. Linux.

Covers which tree of processes such a file belongs to, and how much it holds. A file counts for the trees that have it
open for writing, also after they have closed it, for as long as its name is there; one that lay there before the tree
began counts only by what it has grown since. What nobody was seen to hold belongs to nobody: then no trial is blamed
for it. Pages that a process has mapped and touched are in its RssShmem already; whoever adds the two takes the larger.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

PROC = "/proc"
_HZ = os.sysconf("SC_CLK_TCK")
_WORTH_A_LOOK_BYTES = 64 * 2**20  # the host holds less in all: no descriptor is looked at
_MOUNTS_S = 60.0
File = tuple[int, int]  # device and inode


class Process(Protocol):
    """What must be known of a process; start: clock ticks since boot."""

    @property
    def pid(self) -> int: ...

    @property
    def start(self) -> float: ...


class _Seen(NamedTuple):
    """A file once held. before: what it held when it was first seen, if it lay there before; path: "" without one."""

    path: str
    before: int


class Shared(NamedTuple):
    """Shared memory of one tree; lasting: the part of it in files with a name, which stays when the tree has ended."""

    bytes: int = 0
    lasting: int = 0


@dataclass(slots=True)
class SharedMemory:
    """Remembers who was seen to hold what; ask with the same keys each time."""

    _held: dict[str, dict[File, _Seen]] = field(default_factory=dict)
    _devices: frozenset[int] = frozenset()
    _devices_at: float = -1e18

    def of(self, trees: Mapping[str, Sequence[Process]], shmem_bytes: int | None) -> dict[str, Shared]:
        """Shared files by tree; one held by several trees that are apart is split evenly.

        shmem_bytes: what the host holds in all of it: little or unknown, and nothing is looked at.
        """
        for gone in self._held.keys() - trees.keys():
            del self._held[gone]
        if shmem_bytes is None or shmem_bytes < _WORTH_A_LOOK_BYTES:
            return {}
        self._find_devices()
        sizes: dict[File, int] = {}
        for key, procs in trees.items():
            held = self._held.setdefault(key, {})
            now = self._open_files(procs, sizes, held)
            for file in [f for f in held if f not in now]:
                size = _size_at(held[file].path, file)
                if size is None:
                    del held[file]  # closed, and its name is gone: its memory is free
                else:
                    sizes[file] = size
        return self._shares(trees, sizes)

    def _open_files(self, procs: Sequence[Process], sizes: dict[File, int], held: dict[File, _Seen]) -> set[File]:
        """Note what these processes have open for writing."""
        found = set()
        for proc in procs:
            folder = f"{PROC}/{proc.pid}/fd"
            try:
                numbers = os.listdir(folder)
            except OSError:
                continue
            for number in numbers:
                try:
                    info = os.stat(f"{folder}/{number}")
                except OSError:
                    continue
                if info.st_dev not in self._devices or not stat.S_ISREG(info.st_mode):
                    continue
                file = (info.st_dev, info.st_ino)
                if file in found or (file not in held and not _writes(proc.pid, number)):
                    continue
                found.add(file)
                sizes[file] = info.st_blocks * 512
                if file not in held:
                    old = info.st_nlink > 0 and info.st_mtime < _wall_clock(procs[0].start) - 1.0
                    held[file] = _Seen(_path(f"{folder}/{number}"), sizes[file] if old else 0)
        return found

    def _shares(self, trees: Mapping[str, Sequence[Process]], sizes: Mapping[File, int]) -> dict[str, Shared]:
        pids = {key: frozenset(p.pid for p in procs) for key, procs in trees.items()}
        holders: dict[File, list[str]] = {}
        for key, held in self._held.items():
            for file in held:
                holders.setdefault(file, []).append(key)
        total = dict.fromkeys(trees, Shared())
        for file, keys in holders.items():
            # The tree of a whole worker contains its trials' trees: it is no second holder.
            apart = [a for a in keys if not any(pids[b] < pids[a] for b in keys)]
            for key in keys:
                size = max(0, sizes.get(file, 0) - self._held[key][file].before)
                size = size // len(apart) if key in apart else size
                lasting = size if self._held[key][file].path else 0
                total[key] = Shared(total[key].bytes + size, total[key].lasting + lasting)
        return total

    def _find_devices(self) -> None:
        """Find the devices of all tmpfs mounts, and the kernel's own, on which every memfd lies."""
        now = time.monotonic()
        if now - self._devices_at < _MOUNTS_S:
            return
        self._devices_at, found = now, set()
        try:
            with open(f"{PROC}/self/mountinfo", encoding="utf-8", errors="replace") as file:
                for line in file:
                    left, _, right = line.partition(" - ")
                    if right.startswith("tmpfs "):
                        major, minor = left.split()[2].split(":")
                        found.add(os.makedev(int(major), int(minor)))
            fd = os.memfd_create("headroom", os.MFD_CLOEXEC)
            found.add(os.fstat(fd).st_dev)
            os.close(fd)
        except (OSError, ValueError, IndexError):
            pass
        self._devices = frozenset(found)


def _writes(pid: int, number: str) -> bool:
    """Is this descriptor open for writing? A file that is only read was filled by somebody else."""
    try:
        with open(f"{PROC}/{pid}/fdinfo/{number}", "rb") as file:
            for line in file:
                if line.startswith(b"flags:"):
                    return bool(int(line.split()[1], 8) & (os.O_WRONLY | os.O_RDWR))
    except (OSError, ValueError, IndexError):
        pass
    return False


def _path(link: str) -> str:
    """Return the name of an open file; "" for one without (a memfd, or unlinked)."""
    try:
        path = os.readlink(link)
    except OSError:
        return ""
    return "" if path.startswith("/memfd:") or path.endswith(" (deleted)") else path


def _size_at(path: str, file: File) -> int | None:
    """Return what that very file holds, None when its name is gone or another's."""
    try:
        info = os.stat(path)
    except OSError:
        return None
    return info.st_blocks * 512 if (info.st_dev, info.st_ino) == file else None


def _wall_clock(ticks: float) -> float:
    """Convert an instant in clock ticks since boot to seconds of the clock that files are stamped with."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / _HZ

"""The environment a trial process is started with: how its heap behaves, and its threads.

Covers what must be decided before exec (`environment`), the heap that is wanted (`allocator`), and what a process finds
in force once it runs (`in_force`): the name that footprint corrections are kept under. Pure standard library: the agent
calls it. The peak itself is the process's own VmHWM: training.memory.

Why not glibc's defaults: large tensors are then mapped and unmapped, or not, by a threshold that follows what was
freed, so that the peak depends on history (6 to 14 % above the bytes in use, by up to 30 % under the estimate) and
each step pays thousands of page faults. Mapping everything (a threshold of 64 KiB) is exact and costs up to 1.7 times
the step. "glibc-stack" is exact to 1 % (3 at worst) and takes 0.84 to 1.01 times the CPU of the default, on five shapes
(tests/benchmarks/footprint_cost.py prints the table). It needs nothing installed:
- every block comes from one heap, nothing is given back before exit: no page fault after the first step;
- no caches of small blocks: one that is cached, not free, keeps the large blocks on either side of it apart, and the
  heap then grows instead of being used again.
It works because the model and the optimizer treat the heap as a stack: see patchtst.py and adamw.py. Others do not: an
LSTM (256 units, 2 layers, batch 128) took 765 MiB under it and 537 under glibc's defaults. So it is for the built-in
training, and for an objective that asks for it (setting `allocator`).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.context import Context

STACK = "glibc-stack"
STACK_TUNABLES = {
    "glibc.malloc.arena_max": 1,
    "glibc.malloc.mmap_max": 0,
    "glibc.malloc.trim_threshold": 2**50,
    "glibc.malloc.tcache_count": 0,
    "glibc.malloc.mxfast": 0,
}
# What Dask sets for its workers, to keep them small: a trial that is to have the system's allocator would inherit it,
# and a small LSTM's steps took twice the CPU.
TRIM_VARIABLE, DASK_TRIM = "MALLOC_TRIM_THRESHOLD_", "65536"
# Variables that older programs set, and Dask for its workers; GLIBC_TUNABLES goes before them.
ALIASES = {
    "MALLOC_ARENA_MAX": "arena_max",
    "MALLOC_ARENA_TEST": "arena_test",
    "MALLOC_MMAP_MAX_": "mmap_max",
    "MALLOC_MMAP_THRESHOLD_": "mmap_threshold",
    "MALLOC_PERTURB_": "perturb",
    "MALLOC_TOP_PAD_": "top_pad",
    "MALLOC_TRIM_THRESHOLD_": "trim_threshold",
}
MALLOC = "glibc.malloc."
# 224.9 and 508.0 here, 512 to 514 for the latter on another machine.
READY_BYTES = {"cpu": 225 * 2**20, "cuda": 514 * 2**20}
FORKED = "/forked"  # ends the name of an environment whose processes are forked: they map less of the libraries
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def allocator(context: Mapping[str, Any]) -> str:
    """Return the name of the heap a trial is to get; what it has got it says itself (`in_force`).

    context["allocator"]: "auto" takes glibc-stack where there is glibc; "default" leaves the system's as it is.
    """
    if Context.of(context).allocator in ("auto", STACK):
        return STACK if _has_glibc() else "system"
    return "glibc" if _has_glibc() else "system"


def environment(context: Mapping[str, Any]) -> dict[str, str | None]:
    """Variables to put over those of the worker when a trial process is started; None: to be taken away.

    A user's own GLIBC_TUNABLES stay, and win where they name the same one.
    """
    threads = str(Context.of(context).threads)
    variables: dict[str, str | None] = dict.fromkeys(THREAD_VARIABLES, threads)
    if allocator(context) == STACK:
        ours = [f"{name}={value}" for name, value in STACK_TUNABLES.items()]
        theirs = [entry for entry in os.environ.get("GLIBC_TUNABLES", "").split(":") if entry]
        named = {entry.partition("=")[0] for entry in theirs}
        variables["GLIBC_TUNABLES"] = ":".join(
            [entry for entry in ours if entry.partition("=")[0] not in named] + theirs
        )
    elif os.environ.get(TRIM_VARIABLE) == DASK_TRIM:
        variables[TRIM_VARIABLE] = None
    return variables


@functools.cache
def installed_torch() -> str | None:
    """Return the version of the torch that is installed, with its build ("2.13.0+cu130"), without importing it.

    Its package's metadata do not tell: the CUDA build of the public index is "2.13.0" there.
    """
    try:
        found = importlib.util.find_spec("torch")
        places = [] if found is None else found.submodule_search_locations or []
        text = "".join(Path(place, "version.py").read_text(encoding="utf-8") for place in places)
    except (OSError, ValueError):
        return None
    version = re.search(r"^__version__ = ['\"](.+)['\"]", text, re.MULTILINE)
    return None if version is None else version[1]


def ready_bytes() -> int:
    """Return what a trial process of the installed torch was measured to hold when it is ready; on Linux, x86-64."""
    torch = installed_torch() or ""
    return READY_BYTES["cuda" if "+cu" in torch else "cpu"]


def in_force() -> str:
    """Return what this process is, as far as its peak depends on it: torch's version and build, and who allocates, how.

    "torch-2.13.0+cpu/glibc-stack" is what we set up. Where the system, a preloaded library or the user's tunables have
    it otherwise, the name says so: "torch-2.13.0+cu130/libjemalloc.so.2", "torch-2.13.0+cpu/glibc-stack(arena_max=8)".
    """
    torch = sys.modules.get("torch")
    return f"{'no-torch' if torch is None else f'torch-{torch.__version__}'}/{_heap()}"


def _heap() -> str:
    if not _has_glibc():
        return "system"
    library = _malloc_library()
    if library is not None and not library.startswith(("libc.so", "libc-2.", "ld-")):
        return library
    tunables = dict(entry.split("=", 1) for entry in os.environ.get("GLIBC_TUNABLES", "").split(":") if "=" in entry)
    found = {alias: os.environ[name] for name, alias in ALIASES.items() if name in os.environ}
    found |= {name.removeprefix(MALLOC): value for name, value in tunables.items() if name.startswith(MALLOC)}
    ours = {name.removeprefix(MALLOC): str(value) for name, value in STACK_TUNABLES.items()}
    is_stack = sum(found.get(name) == value for name, value in ours.items()) > len(ours) // 2
    base = ours if is_stack else {}
    # With nothing mapped there is no threshold for it.
    odd = {k: v for k, v in found.items() if base.get(k) != v and not (is_stack and k == "mmap_threshold")}
    odd |= {k: "default" for k in base if k not in found}
    if _huge_pages_everywhere():
        odd["huge_pages"] = "always"
    return (STACK if is_stack else "glibc") + (
        f"({','.join(f'{k}={v}' for k, v in sorted(odd.items()))})" if odd else ""
    )


def _malloc_library() -> str | None:
    """Return the file that holds the `malloc` in use; None when it cannot be told."""
    try:
        address = ctypes.cast(ctypes.CDLL(None).malloc, ctypes.c_void_p).value or 0
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            for line in maps:
                first, _, last = line.partition(" ")[0].partition("-")
                if int(first, 16) <= address < int(last, 16):
                    return os.path.basename(line.split(maxsplit=5)[5].strip())
    except (OSError, AttributeError, ValueError, IndexError):
        pass
    return None


def _huge_pages_everywhere() -> bool:
    """Whether the kernel backs every heap with pages of 2 MiB, which rounds what is resident up."""
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled", encoding="ascii") as setting:
            return "[always]" in setting.read()
    except OSError:
        return False


def _has_glibc() -> bool:
    return sys.platform.startswith("linux") and platform.libc_ver()[0] == "glibc"

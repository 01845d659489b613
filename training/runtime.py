"""The environment a trial process is started with: how its heap behaves, and its threads.

Covers what must be decided before exec (`environment`) and the name of it that footprint corrections are kept under
(`allocator`). Pure standard library: the agent calls it. The peak itself is the process's own VmHWM: training.trial.

Why not glibc's defaults: large tensors are then mapped and unmapped, or not, by a threshold that follows what was
freed, so that the peak depends on history (6 to 14 % above the bytes in use, by up to 30 % under the estimate) and
each step pays thousands of page faults. Mapping everything (a threshold of 64 KiB) is exact and costs up to 1.7 times
the step. "glibc-stack" is exact to 1 % (3 at worst) and takes 0.84 to 1.01 times the CPU of the default, on five shapes
(tests/benchmarks/footprint.py prints the table). It needs nothing installed:
- every block comes from one heap, nothing is given back before exit: no page fault after the first step;
- no caches of small blocks: one that is cached, not free, keeps the large blocks on either side of it apart, and the
  heap then grows instead of being used again.
It works because the model and the optimizer treat the heap as a stack: see patchtst.py and adamw.py. Others do not: an
LSTM (256 units, 2 layers, batch 128) took 765 MiB under it and 537 under glibc's defaults. So it is for the built-in
training, and for an objective that asks for it (setting `allocator`).
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from typing import Any

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
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def allocator(context: Mapping[str, Any]) -> str:
    """The name of the heap a trial gets; part of its footprint's family, as corrections differ between heaps.

    context["allocator"]: "auto" takes glibc-stack where there is glibc; "default" leaves the system's as it is.
    """
    wanted = context.get("allocator") or "auto"
    if wanted in ("auto", STACK):
        return STACK if _has_glibc() else "system"
    return "glibc" if _has_glibc() else "system"


def environment(context: Mapping[str, Any]) -> dict[str, str | None]:
    """Variables to put over those of the worker when a trial process is started; None: to be taken away.

    A user's own GLIBC_TUNABLES stay, and win where they name the same one.
    """
    threads = str(int(context.get("threads") or 1))
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


def _has_glibc() -> bool:
    return sys.platform.startswith("linux") and platform.libc_ver()[0] == "glibc"

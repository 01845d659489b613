"""What a trial's process has taken: of the host's memory and of a device's, by the kernel's and torch's own counts.

What a trial will take, before it runs, is `training.footprint`.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from typing import Any


def peak_bytes() -> int:
    """Return this process's own largest resident size so far.

    VmHWM, not ru_maxrss: the latter is inherited through exec and would be the parent's.
    """
    found = _status("VmHWM")
    if found is not None:
        return found
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def children_peak_bytes() -> int:
    """Return the largest resident size of any process that this one has started and waited for, and of those they did.

    A child inherits its parent's peak through fork and exec: up to our own it says nothing.
    """
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def rss_bytes() -> int:
    """Return this process's resident size now (elsewhere than on Linux: the largest so far)."""
    found = _status("VmRSS")
    return peak_bytes() if found is None else found


def anonymous_bytes() -> int:
    """Return what this process holds that is no file's: all that one forked off it begins with."""
    return _status("RssAnon") or 0


def _status(key: str) -> int | None:
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))
    except (OSError, StopIteration):
        return None


def device_facts() -> dict[str, Any] | None:
    """Return the accelerator torch sees: kind and bytes (for Metal what it can safely hold), None where there is
    none."""
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    if torch.cuda.is_available():
        return {"kind": "cuda", "total_bytes": _cuda_total_bytes()}
    if torch.backends.mps.is_available():
        return {"kind": "mps", "total_bytes": torch.mps.recommended_max_memory()}
    return None


def _cuda_total_bytes() -> int:
    """Asked of the driver's tool: torch would open a CUDA context, which takes some 500 MiB in every idle spare."""
    which = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    ask = ["nvidia-smi", f"--id={which}", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    answer = subprocess.run(ask, capture_output=True, text=True, timeout=20, check=True)
    return int(answer.stdout.split()[0]) * 2**20


def device_peak_bytes() -> int:
    """Return the most this process has reserved on its device so far (MPS: holds now, there is no peak counter); 0 on
    CPU."""
    torch = sys.modules.get("torch")
    if torch is None:
        return 0
    if torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_reserved())
    if torch.backends.mps.is_available():
        return int(torch.mps.driver_allocated_memory())
    return 0

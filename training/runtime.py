"""The environment a trial process is started with: its memory allocator and its threads.

Covers what must be decided before exec (`environment`). Pure standard library: the agent calls it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any


def allocator(context: Mapping[str, Any]) -> str:
    """The allocator a trial runs on; part of the footprint's family, because corrections differ between them."""
    return "glibc" if sys.platform.startswith("linux") else "system"


def environment(context: Mapping[str, Any]) -> dict[str, str]:
    """Variables to add to the trial's environment."""
    threads = str(int(context.get("threads") or 1))
    return {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "MALLOC_ARENA_MAX": "1",
    }

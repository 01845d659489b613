"""What trial processes of this host were measured to hold when they were ready, for whoever plans before one is.

A file in the host's folder: the agent writes an entry when its first warm process is ready, the plan of the next
command reads it. Keyed by what the number depends on; the newest entries are kept. Imports none of the libraries it is
about.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from scheduler.files.durable import read_json, write_json
from scheduler.model import Environment

FILE = "runtimes.json"
KEPT = 50


def key(preload: Sequence[str] | None, allocator: str | None, fork: bool = True) -> str:
    """Return what a ready process depends on: the interpreter, the torch it finds, what it imports, who allocates how,
    and whether it may be forked."""
    try:
        found = importlib.util.find_spec("torch")
        torch = None if found is None or found.origin is None else (found.origin, os.stat(found.origin).st_mtime_ns)
    except (OSError, ValueError):
        torch = None
    heap = {k: v for k, v in os.environ.items() if k in ("LD_PRELOAD", "GLIBC_TUNABLES") or k.startswith("MALLOC_")}
    heap.pop("MALLOC_TRIM_THRESHOLD_", None)  # Dask sets it for its workers: it would tell the driver from the agent
    return json.dumps([sys.executable, torch, None if preload is None else list(preload), allocator, heap, fork])


def remember(folder: str, key: str, environment: str, runtime_bytes: int) -> None:
    """Note that a process of this key was ready: the next plan relies on it.

    Raises OSError, after which it just does not.
    """
    path = os.path.join(folder, FILE)
    entries: dict[str, Any] = {k: v for k, v in (read_json(path) or {}).items() if k != key}
    entries[key] = {"environment": environment, "runtime_bytes": runtime_bytes, "unix": round(time.time())}
    newest = sorted(entries, key=lambda each: entries[each]["unix"])[-KEPT:]
    write_json(path, {each: entries[each] for each in newest})


def known(folder: str, key: str) -> Environment | None:
    """Read what the last one of this key held; None when there was none on this host yet. Creates nothing."""
    path = os.path.join(folder, FILE)
    try:
        if os.stat(path).st_uid != os.geteuid():  # the folder may lie where everybody can make one
            return None
        entry = (read_json(path) or {})[key]
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(int(entry["unix"])))
        name, runtime_bytes = str(entry["environment"]), int(entry["runtime_bytes"])
    except (OSError, KeyError, TypeError, ValueError):
        return None
    return Environment(name=name, runtime_bytes=runtime_bytes, origin=f"measured here on {when}")

"""Headroom: a Dask-parallel batch scheduler for Optuna trials with memory-aware admission control.

From Python: `from scheduler import optimize` runs a study as `study.optimize` does, each trial in a process of its own.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
# Loaded when they are asked for: whatever imports a part of this package must not import Dask and Optuna with it.
_PUBLIC = {"optimize": "scheduler.cli.optimize", "ObjectiveFailed": "scheduler.cli.optimize"}


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

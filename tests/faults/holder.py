"""Training functions of trials that hold memory: what HOLD_MIB says of a promise of PROMISE_MIB, and then train.

Everything else is `tests.faults.tiny`. Nothing of it goes wrong by itself: these are the bystanders.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from tests.faults import tiny
from tests.faults.tiny import MIB

candidates, sample = tiny.candidates, tiny.sample


def estimate(params: Mapping[str, Any], context: Mapping[str, Any]) -> dict[str, Any]:
    """The promise."""
    size = int(os.environ["PROMISE_MIB"]) * MIB
    return {"host_bytes": size, "device_bytes": 0, "components": {"runtime": size}, "family": "holder/cpu"}


def objective(task: Mapping[str, Any], progress: Any) -> dict[str, Any]:
    """Hold it and train."""
    held = b"\xff" * (int(os.environ["HOLD_MIB"]) * MIB)
    result = tiny.objective(task, progress)
    assert len(held) == int(os.environ["HOLD_MIB"]) * MIB
    return result

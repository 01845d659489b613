"""Waiting for a condition with a deadline, and free ports: what tests of real processes need instead of sleeping."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

POLL_S = 0.02


def until(
    condition: Callable[[], Any], timeout_s: float, what: Callable[[], str] | str, every_s: float = POLL_S
) -> Any:
    """Wait until the condition is true and return its value; fail with `what` (asked then) after the deadline."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what if isinstance(what, str) else what()}")
        time.sleep(every_s)
    return value


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = 60.0) -> Any:
    """Wait as `until` does, with the deadline that is enough for most."""
    return until(condition, timeout_s, what)


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

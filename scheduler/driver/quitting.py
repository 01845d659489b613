"""A user's request to stop, and what carries it: signals. What follows from it is the brain's."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

from scheduler.model import HeadroomError


class StoppedAtStart(HeadroomError):
    """The user asked to quit while the first worker was still starting."""

    exit_code = 130

    def __init__(self, source: str) -> None:
        super().__init__(f"stopped by {source} before anything was started")


class Signals:
    """SIGINT and SIGTERM ask to quit (again: at once) while the block lasts; a hang-up of the terminal does too.

    is_last: the process ends with the block, and a request that comes after it is not heard any more: it could only put
    its own status in the place of the run's.
    """

    def __init__(self, on_quit: Callable[[str], None], *, is_last: bool) -> None:
        self._on_quit, self._is_last = on_quit, is_last
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._before[number] = signal.signal(number, self._caught)

    def __exit__(self, *error: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_IGN if self._is_last else before)

    def _caught(self, number: int, frame: object) -> None:
        self._on_quit(signal.Signals(number).name)

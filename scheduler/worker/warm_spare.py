"""The warm spare: one trial process that has imported what it needs and waits for its task.

Covers making, handing out and replacing it, from several threads. Which process that is, and what it does with its
task, is `process` and the agent.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from scheduler.model.messages import Ready
from scheduler.worker.trial_process import TrialProcess, TrialStartError

READY_TIMEOUT_S = 120.0  # importing torch took 25 s on a cold, busy disk
TRIES = 3
KILL_EVERY_S = 0.1


class WarmSpare:
    """Keeps at most one spare. `make` starts a process."""

    def __init__(self, make: Callable[[], TrialProcess]) -> None:
        self._make = make
        self._spare: TrialProcess | None = None
        self._warming = threading.Lock()  # held while one is being warmed up, by whoever does it
        self._closed = threading.Event()

    @property
    def shared_bytes(self) -> int:
        """What the spare shares with a fork server; 0 without one, or without a spare."""
        spare = self._spare
        return 0 if spare is None else spare.shared_bytes

    def warm(self) -> Ready:
        """Make the first one; returns its word that it is ready, the proof that trials can run here.

        Raises TrialStartError. A process that was killed from outside says nothing of this worker and is tried again;
        an import that fails will fail again.
        """
        with self._warming:
            for tries_left in reversed(range(TRIES)):
                self._spare = self._make()
                try:
                    return self._spare.wait_ready(READY_TIMEOUT_S)
                except TrialStartError as error:
                    self._spare.close()
                    killed = error.exit_status is not None and error.exit_status < 0
                    if not tries_left or not killed or self._closed.is_set():
                        raise
        raise AssertionError("the last try returns or raises")

    def take(self) -> TrialProcess:
        """Take a warm process, waited for while it warms up; the next one is made in the background."""
        with self._warming:
            process, self._spare = self._spare, None
            if process is None or process.exit_status is not None:
                process = self._make()
                process.wait_ready(READY_TIMEOUT_S)
        with contextlib.suppress(RuntimeError):  # no thread to be had: the next `take` makes its own
            threading.Thread(target=self._replace, name="headroom-warm-up", daemon=True).start()
        return process

    def ensure(self) -> None:
        """See to it that there is a spare: the proof that a trial could start. Raises TrialStartError, OSError."""
        with self._warming:
            if (self._spare is not None and self._spare.exit_status is None) or self._closed.is_set():
                return
            spare = self._make()
            try:
                spare.wait_ready(READY_TIMEOUT_S)
            except BaseException:
                spare.close()
                raise
            self._spare = spare

    def drop(self) -> None:
        """End the spare to free its memory; `take` makes another one."""
        with self._warming:
            if self._spare is not None:
                self._spare.kill()
                self._spare.close()
                self._spare = None

    def close(self) -> None:
        """End the spare, also one that is just being warmed up by another thread, and reap it."""
        self._closed.set()
        while not self._warming.acquire(timeout=KILL_EVERY_S):
            if (spare := self._spare) is not None:
                spare.kill()  # whoever waits for it to get ready then lets go
        try:
            if self._spare is not None:
                self._spare.kill()
                self._spare.close()
        finally:
            self._warming.release()

    def _replace(self) -> None:
        with self._warming:
            if self._spare is None and not self._closed.is_set():
                with contextlib.suppress(TrialStartError, OSError):  # `take` tries again, and tells
                    self._spare = self._make()
                    self._spare.wait_ready(READY_TIMEOUT_S)

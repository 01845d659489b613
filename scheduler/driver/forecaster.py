"""When the run will end, foreseen again and again beside it: off the driver's loop, and never for more than a share of
a core.

What is foreseen and how is `core.forecast`. Keeps the last forecast; one that fails is noted once and the run goes on.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

from scheduler.core.forecast import Forecast, Work, forecast
from scheduler.core.remaining import Past, work
from scheduler.core.state import BatchState

EVERY_S = 10.0
SHARE = 0.05  # of one core: one that took 2 s is made again after 40 s


class Forecaster:
    """Call `look` as often as one likes, always from the same thread.

    past: reads what is known of trials before this driver; it may read journals of days, so no start waits for it.
    """

    def __init__(
        self, past: Callable[[], Past], note: Callable[[Forecast], None], failed: Callable[[str], None]
    ) -> None:
        self.latest: Forecast | None = None
        self._past: Past = {}
        self._note, self._failed = note, failed
        self._busy = threading.Thread(target=self._remember, args=(past,), name="history", daemon=True)
        self._next = 0.0
        self._chance = random.Random(0)
        self._busy.start()

    def look(self, brain: BatchState, now: float) -> None:
        """Begin a forecast when one is due, there is something to go by, and the last one is done."""
        if self._busy.is_alive():
            return
        if now < self._next or brain.draining or brain.ended or not brain.studies:
            return
        left = work(brain, now, self._past)
        if not left.is_known:
            return
        self._next = now + EVERY_S
        self._busy = threading.Thread(target=self._foresee, args=(left,), name="forecast", daemon=True)
        self._busy.start()

    def _remember(self, past: Callable[[], Past]) -> None:
        try:
            self._past = past()
        except Exception as error:  # somebody else's journal, perhaps of another version: this run goes by its own
            self._failed(f"earlier runs: {type(error).__name__}: {error}")

    def _foresee(self, left: Work) -> None:
        began = time.thread_time()
        try:
            found = forecast(left, self._chance.random)
        except Exception as error:  # whatever it is, it concerns nobody's trial
            self._failed(f"{type(error).__name__}: {error}")
            self._next = float("inf")
            return
        self._next = max(self._next, left.now + (time.thread_time() - began) / SHARE)
        self.latest = found
        if found is not None:
            self._note(found)

"""The thread that foresees the end: it holds nobody up, whatever earlier runs have left."""

from __future__ import annotations

import threading

from scheduler.core.admission import parse_memory_budget
from scheduler.core.fault import RetryPolicy
from scheduler.core.remaining import Past
from scheduler.core.state import BatchState
from scheduler.core.trial import Rules
from scheduler.driver.forecaster import Forecaster
from tests.waiting import wait_until


def test_reading_earlier_runs_holds_up_no_start() -> None:
    """Journals of days take seconds: a start goes on meanwhile, and a look before they are read does nothing."""
    read = threading.Event()
    asked = threading.Event()

    def past() -> Past:
        asked.set()
        assert read.wait(60)
        return {}

    forecaster = Forecaster(past, lambda found: None, lambda error: None)
    assert asked.wait(60)
    rules = Rules(memory_budget=parse_memory_budget("100%"), reserve_bytes=0, retry=RetryPolicy())
    forecaster.look(BatchState(rules, studies=1), 0.0)
    assert forecaster.latest is None
    read.set()


def test_what_an_earlier_run_left_cannot_end_this_one() -> None:
    """A journal that raises is said once, and the forecast goes by this run's own trials."""
    said: list[str] = []

    def past() -> Past:
        raise KeyError("attempt")

    Forecaster(past, lambda found: None, said.append)
    wait_until(lambda: said, "it is said")
    assert said == ["earlier runs: KeyError: 'attempt'"]

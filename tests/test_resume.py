"""What a run survives, without minutes of waiting: what an end means, a second driver, signals, lost workers."""

from __future__ import annotations

import signal

import pytest

from scheduler.model import ExitReason
from scheduler.process import Witness, conclude


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGKILL, ExitReason.LOST),
        (signal.SIGTERM, ExitReason.LOST),
        (signal.SIGHUP, ExitReason.LOST),
        (signal.SIGSEGV, ExitReason.FAILED),
        (signal.SIGABRT, ExitReason.FAILED),
        (signal.SIGBUS, ExitReason.FAILED),
    ],
)
def test_a_signal_from_outside_loses_the_attempt_and_one_of_its_own_fails_the_trial(number, reason):
    """Somebody's SIGKILL says nothing about the trial and it is run again; a segfault does."""
    outcome = conclude(Witness(exit_status=-number))
    assert outcome.reason is reason
    assert signal.Signals(number).name in outcome.detail

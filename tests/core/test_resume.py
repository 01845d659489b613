"""What a run survives, without minutes of waiting: what an end means, a second driver, signals, lost workers."""

from __future__ import annotations

import signal

import pytest

from scheduler import model as m
from scheduler.core.admission import parse_memory_budget
from scheduler.core.fault import RetryPolicy
from scheduler.core.state import BatchState
from scheduler.core.trial import Rules
from scheduler.model import ExitReason
from scheduler.worker.witness import Witness, conclude
from tests import builders as b


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
def test_a_signal_from_outside_loses_the_attempt_and_one_of_its_own_fails_the_trial(
    number: int, reason: ExitReason
) -> None:
    """Somebody's SIGKILL says nothing about the trial and it is run again; a segfault does."""
    outcome = conclude(Witness(exit_status=-number))
    assert outcome.reason is reason
    assert signal.Signals(number).name in outcome.detail


def test_a_resumed_batch_is_not_over_when_its_first_study_is_complete() -> None:
    """The studies are opened one by one; only with the last one can the batch have nothing left to do."""
    brain = BatchState(Rules(memory_budget=parse_memory_budget("100%"), reserve_bytes=0, retry=RetryPolicy()), 2)
    commands = brain.handle(m.StudyOpened(study=b.study("one", quota=3), counted=3), 0.0)
    assert [c for c in commands if isinstance(c, m.EndBatch)] == []
    brain.handle(m.StudyOpened(study=b.study("two", quota=3), counted=2), 0.0)
    commands = brain.handle(m.WorkerJoined(facts=b.facts()), 1.0)
    assert [c.study for c in commands if isinstance(c, m.AskTrial)] == ["two"]


def test_a_batch_that_cannot_go_on_ends_with_1() -> None:
    """What ends it is nobody's wish: the loss of the cluster is not the user's 130."""
    brain = BatchState(Rules(memory_budget=parse_memory_budget("100%"), reserve_bytes=0, retry=RetryPolicy()))
    brain.handle(m.StudyOpened(study=b.study("one", quota=3)), 0.0)
    commands = brain.handle(m.QuitRequested(source="the loss of the cluster", now=True, failed=True), 1.0)
    assert [c.exit_code for c in commands if isinstance(c, m.EndBatch)] == [1]

"""How long a trial that waits will take: from its study's epochs, from those that run, from others of its kind."""

from __future__ import annotations

from typing import Any

from scheduler.core.expectation import Expectation
from scheduler.core.trial import Study, Trial
from scheduler.units import GIB
from tests.builders import footprint, study, trial_id


def trial(epochs: int | None, size: int = GIB, **changes: Any) -> Trial:
    """One with so many epochs planned."""
    prior = footprint(size)
    given = {"id": trial_id(), "params": {}, "prior": prior, "footprint": prior, "family": "f", "attempt": 1}
    return Trial(**{**given, "since": 0.0, "max_epochs": epochs, **changes})


def test_planned_epochs_at_the_pace_of_the_study() -> None:
    """Two trials took 2 s a planned epoch: one of 40 epochs is expected to take 80 s, one of 10 twenty."""
    found, own = Expectation(), Study(spec=study())
    assert found.expected_s(own, trial(40)) is None
    for epochs in (10, 30):
        found.finished(own, trial(epochs), 2.0 * epochs)
    assert [found.expected_s(own, trial(epochs)) for epochs in (40, 10)] == [80.0, 20.0]


def test_one_that_runs_foretells_until_the_first_has_ended() -> None:
    """After an epoch of 5 s one of 20 epochs is expected to take 100; the end of one that took less says more."""
    found, own = Expectation(), Study(spec=study())
    runs = trial(10, started_at=100.0)
    runs.progressed(105.0, 1, 0.5)
    found.progressed(own, runs)
    assert found.expected_s(own, trial(20)) == 100.0
    found.finished(own, trial(10), 30.0)
    found.progressed(own, runs)
    assert found.expected_s(own, trial(20)) == 60.0


def test_a_study_that_knows_nothing_asks_its_kind() -> None:
    """The same formula and about the same memory at another study; a trial eight times as large is another kind."""
    found, own, other = Expectation(), Study(spec=study("own")), Study(spec=study("other"))
    found.finished(other, trial(10), 30.0)
    assert found.expected_s(own, trial(10)) == 30.0
    assert found.expected_s(own, trial(10, 8 * GIB)) is None


def test_without_planned_epochs_a_trial_is_as_long_as_others() -> None:
    """The median of those that ended."""
    found, own = Expectation(), Study(spec=study())
    for seconds in (5.0, 9.0, 70.0):
        found.finished(own, trial(None), seconds)
    assert found.expected_s(own, trial(None)) == 9.0

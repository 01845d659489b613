"""The correction by observed peaks, tightening and growth: careful with few samples, blind to the order of events."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.model import Footprint, FootprintSource, Observation
from scheduler.policy.footprint import Corrections, grown, tightened

MIB, GIB = 2**20, 2**30
ratios = st.lists(st.floats(0.5, 1.5), min_size=0, max_size=60)


def seen(ratio: float, *, at_least: bool = False, family: str = "f") -> Observation:
    return Observation(family=family, predicted_bytes=GIB, observed_bytes=int(ratio * GIB), at_least=at_least)


def corrections(*observations: Observation) -> Corrections:
    found = Corrections()
    for observation in observations:
        found.observe(observation)
    return found


def test_nothing_observed_leaves_the_prior() -> None:
    """Factor 1, no samples, and the footprint says that it is a prior."""
    found = Corrections().correct(Footprint(host_bytes=3 * GIB, device_bytes=5), "f")
    assert (found.host_bytes, found.device_bytes, found.prior_bytes) == (3 * GIB, 5, 3 * GIB)
    assert (found.source, found.samples) == (FootprintSource.PRIOR, 0)


def test_unknown_stays_unknown() -> None:
    """A footprint nobody can size is not made known by other trials' ratios."""
    assert not corrections(seen(0.9)).correct(Footprint.unknown(), "f").is_known


@given(ratios.filter(bool))
def test_no_finished_trial_was_above_its_correction(found: list[float]) -> None:
    """Whatever was observed is covered while there are too few samples for a quantile below the largest."""
    assert corrections(*map(seen, found)).factor("f") >= max(found) - 1e-6


@given(ratios, ratios, st.randoms())
def test_order_does_not_matter(finished: list[float], killed: list[float], rng: random.Random) -> None:
    """A restart that reads the study back in another order gets the same factor."""
    events = [seen(r) for r in finished] + [seen(r, at_least=True) for r in killed]
    shuffled = rng.sample(events, len(events))
    assert corrections(*events).factor("f") == corrections(*shuffled).factor("f")


def test_few_samples_mean_a_wider_margin() -> None:
    """The same ratio seen more often brings the factor down to it, step by step."""
    factors = [corrections(*[seen(0.9)] * n).factor("f") for n in range(20)]
    assert factors[0] == 1.0
    assert factors == sorted(factors, reverse=True)
    assert factors[1] > 0.95 and factors[8] < 0.96 and factors[16] < 0.91


def test_many_samples_make_a_quantile() -> None:
    """With some hundred samples one freak no longer sets the factor."""
    found = corrections(seen(1.4), *[seen(0.9 + i / 10_000) for i in range(300)])
    assert 0.92 < found.factor("f") < 1.0


def test_a_kill_raises_the_bound() -> None:
    """Killed at 1.2 times its prediction: the next one is given more than that; it was "at least" this much."""
    found = corrections(seen(1.0), seen(1.2, at_least=True))
    assert found.factor("f") > 1.2
    assert found.samples("f") == 2


def test_a_kill_below_what_others_reached_teaches_nothing() -> None:
    """A victim of somebody else's memory that had only begun does not lower, nor raise, anything."""
    assert corrections(seen(0.9), seen(0.3, at_least=True)).factor("f") == corrections(seen(0.9)).factor("f")


def test_families_are_apart() -> None:
    """What one device or allocator shows says nothing of another."""
    found = corrections(seen(1.5, family="patchtst/mps/system"))
    assert found.factor("patchtst/cpu/glibc-stack") == 1.0
    assert found.factor("patchtst/mps/system") > 1.5


@pytest.mark.parametrize(("predicted", "observed"), [(0, GIB), (GIB, 0), (-1, GIB)])
def test_nonsense_is_not_counted(predicted: int, observed: int) -> None:
    """No prediction or no peak: no ratio."""
    found = corrections(Observation(family="f", predicted_bytes=predicted, observed_bytes=observed))
    assert found.samples("f") == 0 and found.factor("f") == 1.0


def test_correcting_twice_is_correcting_once() -> None:
    """The base is the prior, so a waiting trial can be corrected again whenever one finishes."""
    found = corrections(*[seen(0.9)] * 10)
    once = found.correct(Footprint(host_bytes=3 * GIB, device_bytes=GIB), "f")
    assert found.correct(once, "f") == once
    assert once.source is FootprintSource.CORRECTED and once.samples == 10
    assert once.host_bytes < 3 * GIB and once.device_bytes < GIB


@given(st.integers(1, 200 * GIB))
def test_tightening_keeps_little(peak: int) -> None:
    """Reserved minus used: at most 3 % of used or 48 MiB, and never nothing."""
    margin = tightened(peak) - peak
    assert 0 < margin <= max(0.03 * peak, 48 * MIB)


@given(st.integers(1, 200 * GIB))
def test_growth_is_above_use_and_more_than_tightening(used: int) -> None:
    """An attempt over its reservation gets what it holds, and room to be seen again."""
    assert grown(used) > tightened(used) > used

"""The correction by observed peaks: offset and slope, careful with few samples, blind to the order of events."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.core.correction import Corrections, correct, observed
from scheduler.model import Correction, Environment, Footprint, FootprintSource, Observation

MIB, GIB = 2**20, 2**30
FAMILY = "patchtst/cpu"
HERE = Environment(name="torch-1/glibc-stack", runtime_bytes=500 * MIB)

sizes = st.floats(50 * MIB, 20 * GIB)
points = st.lists(st.tuples(sizes, st.floats(0.5, 1.5)), min_size=1, max_size=60)


def seen(predicted: float, peak: float, *, at_least: bool = False, runtime_bytes: int = 0) -> Observation:
    """Both above the runtime."""
    return Observation(
        family=FAMILY,
        environment=HERE.name,
        predicted_bytes=int(predicted) + runtime_bytes,
        observed_bytes=int(peak) + runtime_bytes,
        runtime_bytes=runtime_bytes,
        at_least=at_least,
    )


def corrections(*observations: Observation) -> Corrections:
    found = Corrections()
    for observation in observations:
        found.observe(observation)
    return found


def corrected(found: Corrections, above: float, environment: Environment = HERE) -> int:
    """What is reserved above the runtime."""
    return found.of(FAMILY, environment).host_bytes(int(above), 0)


def test_nothing_observed_leaves_the_prior() -> None:
    """No samples, and the footprint says that it is a prior."""
    found = correct(Footprint(host_bytes=3 * GIB, device_bytes=5), Corrections().of(FAMILY, HERE))
    assert (found.host_bytes, found.device_bytes, found.prior_bytes) == (3 * GIB, 5, 3 * GIB)
    assert (found.source, found.samples) == (FootprintSource.PRIOR, 0)


def test_unknown_stays_unknown() -> None:
    """A footprint nobody can size is not made known by other trials' peaks."""
    assert not correct(Footprint.unknown(), corrections(seen(GIB, 0.9 * GIB)).of(FAMILY, HERE)).is_known


@given(points)
def test_no_finished_trial_was_above_its_correction(found: list[tuple[float, float]]) -> None:
    """Whatever was observed is covered while there are too few samples for a quantile below the largest."""
    learnt = corrections(*(seen(x, x * ratio) for x, ratio in found))
    for x, ratio in found:
        assert corrected(learnt, x) >= int(x * ratio) - 1


@given(points, points, st.randoms())
def test_order_does_not_matter(
    finished: list[tuple[float, float]], killed: list[tuple[float, float]], rng: random.Random
) -> None:
    """A restart that reads the study back in another order gets the same correction."""
    events = [seen(x, x * r) for x, r in finished] + [seen(x, x * r, at_least=True) for x, r in killed]
    shuffled = rng.sample(events, len(events))
    assert corrections(*events).of(FAMILY, HERE) == corrections(*shuffled).of(FAMILY, HERE)


@given(points, sizes, st.floats(1.0, 4.0))
def test_a_larger_trial_never_gets_less(found: list[tuple[float, float]], size: float, more: float) -> None:
    """The correction rises with the prediction."""
    learnt = corrections(*(seen(x, x * ratio) for x, ratio in found))
    assert corrected(learnt, size * more) >= corrected(learnt, size)


@given(points, st.integers(GIB, 64 * GIB), st.booleans(), st.integers(0, 600 * MIB))
def test_the_largest_prior_is_the_largest_that_fits(
    found: list[tuple[float, float]], limit: int, tells_runtime: bool, assumed: int
) -> None:
    """`largest_prior` is the inverse of `host_bytes`: what the micro-batch is sized by and what is reserved agree."""
    learnt = corrections(*(seen(x, x * ratio) for x, ratio in found)).of(FAMILY, HERE)
    runtime = max(1, assumed) if tells_runtime else 0
    most = learnt.largest_prior(limit, runtime)
    assert learnt.host_bytes(most, runtime) <= limit + 1
    assert learnt.host_bytes(most + 64, runtime) >= limit - 1


# -- offset and slope --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [286 * MIB, 100 * MIB])
def test_an_offset_is_learnt_as_an_offset(missing: int) -> None:
    """Eight small trials short of the same bytes cost a large one these and some per cent, not half as much again."""
    small = [80, 120, 150, 200, 260, 330, 420, 560]
    learnt = corrections(*(seen(x * MIB, x * MIB * 0.985 + missing) for x in small))
    for above in (60 * MIB, 500 * MIB, 4 * GIB, 16 * GIB):
        assert 0.985 * above + missing <= corrected(learnt, above) <= 1.05 * (above + missing)


def test_a_slope_is_learnt_as_a_slope() -> None:
    """A formula that gives twice of all that is taken: after enough trials of all sizes half of it is reserved."""
    learnt = corrections(*(seen(x * MIB, x * MIB * 0.5) for x in range(100, 8000, 300)))
    for above in (60 * MIB, GIB, 16 * GIB):
        assert 0.5 * above <= corrected(learnt, above) <= 0.56 * above + 16 * MIB


def test_both_are_learnt_together() -> None:
    """Twice the formula and 300 MiB: neither alone would do."""
    learnt = corrections(*(seen(x * MIB, x * MIB * 2 + 300 * MIB) for x in (80, 150, 300, 700, 1500, 3000, 6000, 9000)))
    for above in (60 * MIB, GIB, 16 * GIB):
        truth = 2 * above + 300 * MIB
        assert truth <= corrected(learnt, above) <= 1.08 * truth


@pytest.mark.parametrize("peak", [1.5, 0.7])
def test_one_observation_is_read_both_ways(peak: float) -> None:
    """One trial does not tell an offset from a slope: the larger of the two readings is reserved, to either side."""
    learnt = corrections(seen(GIB, peak * GIB))
    for above in (GIB // 8, GIB, 8 * GIB):
        assert corrected(learnt, above) >= max(above + (peak - 1) * GIB, above * peak)


def test_few_samples_mean_a_wider_margin() -> None:
    """The same ratio seen more often, of trials large and small, brings the reservation down to it, step by step."""
    spread = [MIB * 100 * 1.4**i for i in range(20)]
    found = [corrected(corrections(*(seen(x, 0.9 * x) for x in spread[:n])), GIB) / GIB for n in range(20)]
    assert found[0] == 1.0
    assert found == sorted(found, reverse=True)
    assert found[1] > 0.95 and found[8] < 0.97 and found[16] < 0.92


def test_one_size_says_little_of_another() -> None:
    """However many small trials came out lower than predicted, a large one is lowered by their bytes at most."""
    learnt = corrections(*[seen(200 * MIB, 150 * MIB)] * 40)
    assert corrected(learnt, 200 * MIB) < 160 * MIB
    assert corrected(learnt, 16 * GIB) > 16 * GIB - 60 * MIB


def test_many_samples_make_a_quantile() -> None:
    """With some hundred samples one freak no longer sets the reservation."""
    usual = [seen(GIB, (0.9 + i / 10_000) * GIB) for i in range(300)]
    assert 0.92 < corrected(corrections(seen(GIB, 1.4 * GIB), *usual), GIB) / GIB < 1.0


def test_who_keeps_within_the_formula_never_raises_it() -> None:
    """Observations below their prediction are no reason to reserve more than the prediction for the next."""
    learnt = corrections(seen(GIB, 0.999 * GIB), seen(4 * GIB, 3.7 * GIB))
    for above in (10 * MIB, GIB, 16 * GIB):
        assert corrected(learnt, above) <= above


# -- kills -------------------------------------------------------------------------------------------------------------


def test_a_kill_raises_the_bound() -> None:
    """Killed at 1.2 times its prediction: the next one is given more than that; it was "at least" this much."""
    found = corrections(seen(GIB, GIB), seen(GIB, 1.2 * GIB, at_least=True))
    assert corrected(found, GIB) > 1.2 * GIB
    assert found.of(FAMILY, HERE).samples == 2


def test_a_kill_below_what_others_reached_teaches_nothing() -> None:
    """A victim of somebody else's memory that had only begun does not lower, nor raise, anything."""
    usual = seen(GIB, 0.9 * GIB)
    with_kill = corrections(usual, seen(GIB, 0.3 * GIB, at_least=True))
    assert with_kill.of(FAMILY, HERE) == corrections(usual).of(FAMILY, HERE)


# -- families and environments -----------------------------------------------------------------------------------------


def test_families_and_environments_are_apart() -> None:
    """What one device, build or allocator shows says nothing of another."""
    found = corrections(seen(GIB, 1.5 * GIB))
    elsewhere = Environment(name="torch-1/libjemalloc.so.2", runtime_bytes=HERE.runtime_bytes)
    assert corrected(found, GIB) > 1.5 * GIB
    assert corrected(found, GIB, elsewhere) == GIB
    assert found.of("patchtst/mps", HERE).samples == 0


def test_the_runtime_is_what_the_worker_measured() -> None:
    """The runtime a formula assumed gives way to the worker's own; one that tells none apart keeps its sum."""
    plain = Corrections().of(FAMILY, HERE)
    prior = Footprint(host_bytes=725 * MIB, runtime_bytes=225 * MIB)
    assert correct(prior, plain).host_bytes == 1000 * MIB
    assert correct(Footprint(host_bytes=725 * MIB), plain).host_bytes == 725 * MIB


def test_a_peak_is_compared_above_the_very_process_it_was_of() -> None:
    """Asked with 225 MiB of runtime, run where it is 500: the prediction it is held against has 500."""
    found = observed(
        FAMILY, 725 * MIB, 225 * MIB, 990 * MIB, environment=HERE.name, ready_bytes=500 * MIB, at_least=False
    )
    assert (found.predicted_bytes, found.runtime_bytes) == (1000 * MIB, 500 * MIB)
    assert observed(FAMILY, GIB, 0, GIB, environment=None, ready_bytes=500 * MIB, at_least=False).runtime_bytes == 0


@pytest.mark.parametrize(("predicted", "peak"), [(0, GIB), (GIB, 0), (-1, GIB)])
def test_nonsense_is_not_counted(predicted: int, peak: int) -> None:
    """No prediction or no peak: nothing to compare."""
    assert corrections(seen(predicted, peak)).of(FAMILY, HERE) == Correction(runtime_bytes=HERE.runtime_bytes)


def test_correcting_twice_is_correcting_once() -> None:
    """The base is the prior, so a waiting trial can be corrected again whenever one finishes."""
    learnt = corrections(*(seen(x * GIB, 0.8 * x * GIB, runtime_bytes=HERE.runtime_bytes) for x in range(1, 30)))
    correction = learnt.of(FAMILY, HERE)
    once = correct(Footprint(host_bytes=3 * GIB, device_bytes=3 * GIB, runtime_bytes=225 * MIB), correction)
    assert correct(once, correction) == once
    assert once.source is FootprintSource.CORRECTED and once.samples == 29
    assert once.host_bytes < 3 * GIB and once.device_bytes == once.host_bytes  # unified: the same bytes


def test_a_devices_own_pool_is_not_corrected_by_host_peaks() -> None:
    """What the host's memory showed says nothing of a card's."""
    learnt = corrections(*(seen(x * GIB, 0.5 * x * GIB) for x in range(1, 30)))
    found = correct(Footprint(host_bytes=3 * GIB, device_bytes=8 * GIB), learnt.of(FAMILY, HERE))
    assert found.host_bytes < 2 * GIB and found.device_bytes == 8 * GIB


@given(st.lists(points, min_size=1, max_size=3), sizes)
def test_of_several_environments_the_most_demanding_counts(
    fleets: list[list[tuple[float, float]]], size: float
) -> None:
    """A trial that may run in any of them is placed by no less than each would reserve."""
    each = [
        corrections(*(seen(x, x * r) for x, r in found)).of(
            FAMILY, Environment(name=HERE.name, runtime_bytes=(i + 1) * 200 * MIB)
        )
        for i, found in enumerate(fleets)
    ]
    prior, assumed = int(size) + 225 * MIB, 225 * MIB
    together = Correction.largest(each)
    assert together.host_bytes(prior, assumed) >= max(one.host_bytes(prior, assumed) for one in each)
    assert together.largest_prior(64 * GIB, assumed) <= min(one.largest_prior(64 * GIB, assumed) for one in each)

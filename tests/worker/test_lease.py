"""How long an agent goes on for a driver that it does not hear of."""

from __future__ import annotations

from scheduler.worker.lease import Lease


def beats(lease: Lease, begin: float, end: float) -> None:
    """A beat each quarter of a second."""
    now = begin
    while now < end:
        lease.beat(now)
        now += 0.25


def test_it_is_over_when_nothing_was_heard_for_so_long() -> None:
    """Each sign of life begins it anew."""
    lease = Lease(60.0, now=0.0)
    beats(lease, 0.0, 59.0)
    assert not lease.is_over(59.0)
    lease.heard(59.0)
    beats(lease, 59.0, 118.0)
    assert not lease.is_over(118.0) and lease.silent_s(118.0) == 59.0
    beats(lease, 118.0, 121.0)
    assert lease.is_over(121.0)


def test_a_pause_of_our_own_is_not_the_drivers_silence() -> None:
    """A laptop that slept for an hour gives the driver its time when it wakes."""
    lease = Lease(60.0, now=0.0)
    beats(lease, 0.0, 30.0)
    lease.beat(3630.0)
    assert not lease.is_over(3630.0)
    beats(lease, 3630.0, 3665.0)
    assert lease.is_over(3665.0)

"""A real watchdog, kept: started, started again, heard, and let go."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scheduler.host.registry import HostRegistry
from scheduler.model import Pressure
from scheduler.worker import watchdog_keeper
from scheduler.worker.watchdog_keeper import WatchdogKeeper
from tests import builders as b
from tests.waiting import wait_until


@pytest.fixture
def registry(tmp_path: Path) -> HostRegistry:
    """One of its own, so that no other run's watchdog is in it."""
    return HostRegistry(tmp_path / "host")


@pytest.fixture
def keeper(registry: HostRegistry) -> Iterator[WatchdogKeeper]:
    """One that has let go of its watchdog when the test is over."""
    keeper = WatchdogKeeper(b.agent_config(watchdog_mode="on"), registry)
    yield keeper
    keeper.close()


def test_a_watchdog_that_was_killed_is_started_again(keeper: WatchdogKeeper, registry: HostRegistry) -> None:
    """Its word is what opens the host; after a kill another one says it."""
    keeper.set_thresholds()
    keeper.ensure()
    wait_until(lambda: registry.pressure() is not None, "the watchdog has said its first word", 60)
    assert keeper.pressure()[1] is None
    assert keeper._process is not None
    first = keeper._process.pid
    keeper.ensure()
    assert keeper._process.pid == first  # one that runs is left alone
    os.kill(first, signal.SIGKILL)
    keeper._process.wait(30)
    (Path(registry.root) / "host.json").unlink()
    keeper.ensure()
    assert keeper._process.pid != first
    wait_until(lambda: registry.pressure() is not None, "the other one has, too", 60)


def test_a_silent_watchdog_closes_the_host_after_a_moment(
    keeper: WatchdogKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody watches: it gets its ten seconds to say something, then nothing may be placed here."""
    assert keeper.pressure() == (Pressure.NORMAL, None)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + watchdog_keeper.GRACE_S + 1.0)
    assert keeper.pressure() == (Pressure.NORMAL, "the watchdog does not answer")


def test_thresholds_that_went_with_the_registry_are_set_again(keeper: WatchdogKeeper, registry: HostRegistry) -> None:
    """A cleaner of /tmp took them; they are set once, and it is told once."""
    keeper.set_thresholds()
    assert not keeper.restore_thresholds()
    (Path(registry.root) / "policy.json").unlink()
    assert keeper.restore_thresholds()
    assert registry.policy()[0] and not keeper.restore_thresholds()


def test_none_is_started_where_none_is_wanted_or_the_agent_closes(registry: HostRegistry) -> None:
    """--watchdog off: the host is open without a word of it. An agent that closes starts none for nobody."""
    off = WatchdogKeeper(b.agent_config(watchdog_mode="off"), registry)
    off.set_thresholds()
    off.ensure()
    assert off._process is None and not registry.policy()[0]
    assert off.pressure() == (Pressure.NORMAL, None)
    closing = WatchdogKeeper(b.agent_config(watchdog_mode="on"), registry)
    closing.begin_to_close()
    closing.ensure()
    assert closing._process is None


def test_its_watchdog_leaves_with_the_agent(keeper: WatchdogKeeper, registry: HostRegistry) -> None:
    """Nothing of ours is left on the host."""
    keeper.set_thresholds()
    keeper.ensure()
    wait_until(lambda: registry.pressure() is not None, "the watchdog has said its first word", 60)
    assert keeper._process is not None
    keeper.close()
    assert keeper._process.poll() is not None

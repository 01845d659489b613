"""Folders and files that are taken away, moved, damaged or stale under a run: noticed, told in a line, nothing wasted.

Real commands with the trials of `tiny`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.sandbox import Sandbox, until
from tests.faults.test_resume import SMALL, ends, keeps_its_promises, nothing_left, tail, training

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Sandbox]:
    """A sandbox with two small studies."""
    with Sandbox(tmp_path / "run", **SMALL) as sandbox:
        yield sandbox


# -- the host registry -------------------------------------------------------------------------------------------------


def test_a_registry_that_is_removed_is_made_again(box):
    """A cleaner of /tmp takes the folder: the trials that run are watched by a new one, and the next ones start."""
    driver = box.start()
    training(box)
    (box.root / "host").rename(box.root / "cleared")  # at once: a folder in use is never empty for long
    shutil.rmtree(box.root / "cleared")
    until(lambda: box.events("registry.remade"), 20, lambda: f"the loss noticed: {tail(box)}")
    registered = box.root / "host" / "attempts"
    until(
        lambda: len(list(registered.glob("*.json"))) == 2, 10, lambda: f"both registered: {list(registered.iterdir())}"
    )
    until(lambda: (box.root / "host" / "host.json").exists(), 20, "the watchdog goes by it")
    until(lambda: list((box.root / "host" / "agents").glob("*/socket")), 20, "the agent can be found")
    assert ends(driver, box, 120) == 0, tail(box)
    keeps_its_promises(box)
    nothing_left(box)

"""The warm spare with real processes that stand in for the trial's module."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scheduler.worker.trial_process import TrialProcess, TrialStartError
from scheduler.worker.warm_spare import WarmSpare
from tests.waiting import wait_until

Maker = tuple[Callable[[str], Callable[[], TrialProcess]], list[TrialProcess]]
READY = """
import json, sys
print(json.dumps({"type": "ready", "protocol": 1, "rss_bytes": 7}), flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def maker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Maker]:
    """A function that makes processes of the given code, and the list of those made."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    made: list[TrialProcess] = []

    def of(code: str) -> Callable[[], TrialProcess]:
        (tmp_path / "stand_in.py").write_text(code)

        def make() -> TrialProcess:
            made.append(TrialProcess.start(environment={}, log=tmp_path / "log", module="stand_in"))
            return made[-1]

        return make

    yield of, made
    for process in made:
        process.kill()
        process.close()


def test_hands_out_the_warm_one_and_makes_the_next(maker: Maker) -> None:
    """What is taken is the process that was warm already; another one is there soon."""
    of, made = maker
    spare = WarmSpare(of(READY))
    assert spare.warm().rss_bytes == 7
    assert spare.take() is made[0]
    wait_until(lambda: len(made) == 2, "the next spare is made")
    assert spare.take() is made[1]
    spare.close()


def test_a_dead_spare_is_not_handed_out(maker: Maker) -> None:
    """One that died while it waited is replaced on the spot."""
    of, made = maker
    spare = WarmSpare(of(READY))
    spare.warm()
    made[0].kill()
    wait_until(lambda: made[0].exit_status is not None, "the spare is dead")
    assert spare.take() is made[1]
    spare.close()


def test_close_ends_one_that_is_still_warming_up(maker: Maker) -> None:
    """Whoever waits for it to get ready is let go, and the process is gone."""
    of, made = maker
    spare = WarmSpare(of("import time; time.sleep(600)"))
    failed: list[BaseException] = []

    def warm() -> None:
        try:
            spare.warm()
        except TrialStartError as error:
            failed.append(error)

    thread = threading.Thread(target=warm)
    thread.start()
    wait_until(lambda: made, "a process is being warmed up")
    spare.close()
    thread.join(10)
    assert failed
    assert all(process.exit_status == -signal.SIGKILL for process in made)


def test_an_import_that_fails_is_told_at_once(maker: Maker) -> None:
    """A process that ends by itself is not tried again."""
    of, made = maker
    with pytest.raises(TrialStartError, match="no such module"):
        WarmSpare(of("import sys; sys.exit('no such module')")).warm()
    assert len(made) == 1

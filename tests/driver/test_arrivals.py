"""The wait for the first agent: what ends it, what it says when none comes, and what is kept of what was said."""

from __future__ import annotations

import queue
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scheduler import model as m
from scheduler.cluster.client import Listener
from scheduler.driver import arrivals
from scheduler.driver.arrivals import Arrivals
from scheduler.driver.dispatcher import Inbox, Item, Said
from scheduler.driver.quitting import StoppedAtStart
from scheduler.model import letters
from scheduler.model.journal_events import JournalEvent
from tests import builders as b

JOINED = Said("host:1", letters.Joined(facts=b.facts("")))
NEWS = Said("host:1", letters.Vitals(available_bytes=1))


class Workers:
    """A cluster whose workers do as they are told: `meanwhile` happens at each look while none is ready."""

    def __init__(self, *meanwhile: Callable[[Workers], None]) -> None:
        self.is_ours, self.is_connected, self.is_subscribed = True, True, True
        self.meanwhile = list(meanwhile)
        self.inbox: Inbox = queue.SimpleQueue()
        self.logged: list[tuple[JournalEvent, dict[str, Any]]] = []
        self.started: list[tuple[m.Json, list[str]]] = []
        self.listener: Listener | None = None
        self.rejoined = 0

    def start(self, plugin_config: m.Json, folders: list[str], listener: Listener) -> None:
        """Remember what agents are told."""
        self.started.append((plugin_config, folders))
        self.listener = listener

    def tend(self) -> None:
        """Let something happen."""
        if self.meanwhile:
            self.meanwhile.pop(0)(self)

    def rejoin(self) -> None:
        """The scheduler knows us again."""
        self.rejoined += 1
        self.is_subscribed = True

    def revive(self) -> None:
        """It is never gone."""

    def heard(self, worker: str, text: str, /) -> None:
        """No frame comes by this way."""

    def worker_left(self, worker: str, /) -> None:
        """None leaves."""

    def judge(self, worker: str, why: str) -> None:
        """A Dask worker cannot be used."""
        assert self.listener is not None
        self.listener.judged(worker, why)

    def begin(self, folder: Path) -> list[Item]:
        """What the driver does."""
        mine = Arrivals(self, self, self.inbox, self.log, where="tcp://here:1")
        return mine.begin(b.agent_config(), folder)

    def log(self, event: JournalEvent, durable: bool = False, **fields: Any) -> None:
        """Keep a line of the journal."""
        self.logged.append((event, fields))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for a second here."""
    monkeypatch.setattr(arrivals, "LOOK_S", 0.01)


def says(*items: Item) -> Callable[[Workers], None]:
    """An agent, or the user, says this."""

    def put(workers: Workers) -> None:
        for item in items:
            workers.inbox.put(item)

    return put


def test_it_ends_with_the_first_that_is_ready_and_loses_nothing(tmp_path: Path) -> None:
    """What was said before is the loop's to read; agents are told where attempts go."""
    workers = Workers(says(NEWS), says(JOINED, NEWS))
    assert workers.begin(tmp_path) == [NEWS, JOINED]
    assert workers.inbox.get_nowait() == NEWS
    ((told, folders),) = workers.started
    assert (told["topic"], folders) == ("test", [str(tmp_path / "attempts")])


def test_an_agent_that_cannot_run_trials_ends_the_start(tmp_path: Path) -> None:
    """Its reason is the user's answer, in one line."""
    broken = Said("host:1", letters.Broken(detail="No module named 'torch'"))
    with pytest.raises(m.HeadroomError, match="worker host:1 cannot run trials: No module named 'torch'"):
        Workers(says(broken)).begin(tmp_path)


def test_the_user_can_leave_meanwhile(tmp_path: Path) -> None:
    """Ctrl-C while torch is being imported: nothing was started, and the status says that it was stopped."""
    with pytest.raises(StoppedAtStart, match="stopped by SIGINT before anything was started") as caught:
        Workers(says(m.QuitRequested(source="SIGINT"))).begin(tmp_path)
    assert caught.value.exit_code == 130


def test_where_none_comes_it_is_said_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reasons of the workers that were there, each once; without any, what to start."""
    monkeypatch.setattr(arrivals, "FIRST_WORKER_TIMEOUT_S", 0.3)
    why = "tcp://w:1 has Python 3.9"
    workers = Workers(lambda w: w.judge("tcp://w:1", why), lambda w: w.judge("tcp://w:2", why))
    with pytest.raises(m.HeadroomError, match=f"^no worker of tcp://here:1 can be used: {why}$"):
        workers.begin(tmp_path)
    assert [event for event, _ in workers.logged] == [JournalEvent.WORKER_UNUSABLE] * 2
    monkeypatch.setattr(arrivals, "FIRST_WORKER_TIMEOUT_S", 0.0)
    with pytest.raises(m.HeadroomError, match="no worker of tcp://here:1 got ready within 0 s; start one"):
        Workers().begin(tmp_path)


def test_a_scheduler_that_was_started_again_is_joined_again(tmp_path: Path) -> None:
    """It would tell us of no worker otherwise."""

    def restarted(workers: Workers) -> None:
        workers.is_subscribed = False

    workers = Workers(restarted, says(JOINED))
    assert workers.begin(tmp_path) == [JOINED]
    assert workers.rejoined == 1

"""The dispatcher's loop with a real brain, a cluster that only notes what it is asked, and a study in memory."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scheduler import model as m
from scheduler.core.admission import parse_memory_budget
from scheduler.core.fault import RetryPolicy
from scheduler.core.state import BatchState
from scheduler.core.trial import Rules
from scheduler.driver import dispatcher
from scheduler.driver.dispatcher import Dispatcher, Ended, Item, Said
from scheduler.driver.ports import Recordable
from scheduler.model import letters, messages
from scheduler.model.messages import Task
from scheduler.units import GIB
from tests import builders as b
from tests.waiting import wait_until

JOINED = Said(b.WORKER, letters.Joined(facts=b.facts(slots=2, domain="host/")))


class FakeCluster:
    """A connection that comes and goes as the test says; and the agents behind it, all in one.

    Notes what is launched and told; the test makes attempts end.
    """

    is_ours = False

    def __init__(self) -> None:
        self.is_connected = self.is_subscribed = True
        self.in_reach = 1
        self.calls: list[str] = []
        self.tasks: list[Task] = []
        self.delivered: list[letters.Order] = []
        self.on_launch: Callable[[str], None] = lambda attempt: None
        self.on_tick: Callable[[], None] = lambda: None

    # -- the connection

    def tend(self) -> None:
        """A second has passed."""
        self.on_tick()

    def rejoin(self) -> None:
        """Note it."""
        self.calls.append("rejoin")
        self.is_subscribed = True

    def revive(self) -> None:
        """Note it."""
        self.calls.append("revive")

    # -- the agents

    def launch(self, task: Task, worker: str) -> None:
        """Note it, and let the test go on."""
        self.tasks.append(task)
        self.on_launch(task.attempt)

    def tell(self, worker: str, order: letters.Order) -> None:
        """Note it."""
        self.delivered.append(order)

    def give_up(self, attempt: str, why: str) -> None:
        """Note it."""
        self.calls.append(f"give up {attempt}")

    def disconnected(self) -> None:
        """Note it."""
        self.calls.append("disconnected")

    def tick(self) -> None:
        """Nothing to do."""


class FakeRecorder:
    """A study in memory: numbers trials, confirms every final state at once."""

    def __init__(self, post: Callable[[m.Event], None]) -> None:
        self.post, self.asked = post, 0
        self.told: list[m.TellTrial | m.EnqueueRetry] = []

    def submit(self, command: Any) -> None:
        """Answer as the study would."""
        match command:
            case m.AskTrial():
                self.asked += 1
                self.post(b.asked(self.asked - 1))
            case m.TellTrial() | m.EnqueueRetry():
                self.told.append(command)
                state = command.state if isinstance(command, m.TellTrial) else m.FinalState.FAIL
                self.post(m.TrialTold(trial=command.trial, state=state))

    def drain(self) -> None:
        """Nothing is under way."""

    def close(self, timeout_s: float) -> list[Recordable]:
        """All is written at once."""
        return []


class Loop:
    """A dispatcher and all that is around it."""

    def __init__(
        self,
        folder: Path,
        quota: int = 1,
        recover: Any = lambda attempt, outcome: outcome,
        away_timeout_s: float = 600.0,
    ) -> None:
        rules = Rules(memory_budget=parse_memory_budget("100%"), reserve_bytes=0, retry=RetryPolicy(delay_s=0.0))
        self.cluster = FakeCluster()
        self.lines: list[tuple[str, dict[str, Any]]] = []
        self.recorder: FakeRecorder
        self.inbox: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self.opened = m.StudyOpened(study=b.study(quota=quota))
        self.dispatcher = Dispatcher(
            BatchState(rules),
            self.cluster,
            self.cluster,
            self._record,
            inbox=self.inbox,
            objective="module:function",
            folder=folder,
            log=lambda event, durable=False, **fields: self.lines.append((event, fields)),
            recover=recover,
            away_timeout_s=away_timeout_s,
        )

    def _record(self, post: Callable[[m.Event], None]) -> FakeRecorder:
        self.recorder = FakeRecorder(post)
        return self.recorder

    def say(self, report: letters.Report) -> None:
        """A report of the worker."""
        self.inbox.put(Said(b.WORKER, report))

    def pass_on(self, attempt: str, message: messages.PassedOn) -> None:
        """A trial's message."""
        self.say(letters.TrialSaid(attempt=attempt, pid=7, message=message))

    def lose(self, attempt: str, why: str) -> None:
        """The end of an attempt that was given up."""
        self.inbox.put(Ended(attempt, m.Outcome(reason=m.ExitReason.LOST, detail=why)))

    def complete(self, attempt: str) -> None:
        """A whole attempt, said at once."""
        self.pass_on(attempt, messages.Started())
        self.pass_on(attempt, messages.Progress(step=1, value=0.5, peak_bytes=GIB))
        self.inbox.put(Ended(attempt, b.outcome()))

    def events(self, name: str) -> list[dict[str, Any]]:
        """The journal's lines of one name."""
        return [fields for event, fields in self.lines if event == name]


def test_a_batch_runs_from_what_was_said_before_the_loop_began(tmp_path: Path) -> None:
    """What was read while the run was being set up goes first, in order; what came since is in the same inbox."""
    loop = Loop(tmp_path)
    loop.cluster.on_launch = loop.complete
    loop.say(letters.Vitals(available_bytes=20 * GIB))
    end = loop.dispatcher.run(first=[loop.opened, JOINED])
    assert (end.exit_code, len(loop.cluster.tasks)) == (0, 1)
    assert [line["reason"] for line in loop.events("attempt.ended")] == ["completed"]


def test_nothing_that_is_put_in_at_any_moment_is_lost(tmp_path: Path) -> None:
    """Threads put events in while the loop starts and runs: each is handled, also the first and the last."""
    loop = Loop(tmp_path, quota=40)
    ready = threading.Barrier(9)
    loop.cluster.on_launch = loop.complete

    def notes(name: int) -> None:
        ready.wait()
        for number in range(50):
            loop.pass_on(f"study/{name}/1", messages.Note(text=f"{number}"))

    threads = [threading.Thread(target=notes, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    loop.inbox.put(JOINED)
    ready.wait()
    for thread in threads:
        thread.join()
    assert loop.dispatcher.run(first=[loop.opened]).exit_code == 0
    assert len(loop.events("attempt.note")) == 400
    assert len(loop.events("attempt.ended")) == 40


def test_a_message_that_cannot_be_read_is_dropped_and_noted_once(tmp_path: Path) -> None:
    """Whatever an agent of another version says: the loop goes on, and the journal has one line for each kind."""
    loop = Loop(tmp_path)
    loop.cluster.on_launch = loop.complete
    for data in (
        {"type": "joined"},
        {"type": "vitals", "pressure": "high", "available_bytes": 1},
        {"type": "vitals", "pressure": 99, "available_bytes": 1},
        {"type": "said", "attempt": "study/0/1"},
        {"type": "said", "attempt": "study/0/1", "message": {"type": "progress"}},
        {"type": "said", "attempt": 5},
        {"type": "said", "attempt": "nonsense", "message": {"type": "started"}},
        {"type": ["what"], "attempt": "study/0/1"},
        {},
    ):
        loop.inbox.put(Said(b.WORKER, letters.report(data)))
    assert loop.dispatcher.run(first=[loop.opened, JOINED]).exit_code == 0
    kinds = [line["kind"] for line in loop.events("message.dropped")]
    assert sorted(kinds) == sorted(set(kinds)) and {"joined", "vitals", "said", "TrialSaid"} <= set(kinds)


def test_started_said_twice_is_one_start(tmp_path: Path) -> None:
    """After a reconnection a worker may say it again: the trial's life goes on."""
    loop = Loop(tmp_path)

    def twice(attempt: str) -> None:
        loop.pass_on(attempt, messages.Started())
        loop.complete(attempt)

    loop.cluster.on_launch = twice
    assert loop.dispatcher.run(first=[loop.opened, JOINED]).exit_code == 0
    assert len(loop.events("attempt.started")) == 1


def test_a_lost_attempt_is_looked_into_before_it_is_told(tmp_path: Path) -> None:
    """A worker died as its trial finished: the result that is found counts, with the checkpoint that was announced."""
    seen: list[m.Outcome] = []

    def recover(attempt: m.AttemptId, outcome: m.Outcome) -> m.Outcome:
        seen.append(outcome)
        return b.outcome()

    loop = Loop(tmp_path, recover=recover)

    def lost(attempt: str) -> None:
        loop.pass_on(attempt, messages.Started())
        loop.pass_on(attempt, messages.Saved(path="/c", step=1))
        loop.inbox.put(Ended(attempt, m.Outcome(reason=m.ExitReason.LOST)))

    loop.cluster.on_launch = lost
    assert loop.dispatcher.run(first=[loop.opened, JOINED]).exit_code == 0
    assert [outcome.checkpoint for outcome in seen] == ["/c"]


def test_a_worker_that_cannot_run_trials_ends_a_batch_that_has_no_other(tmp_path: Path) -> None:
    """Its reason is the error; once another was there it is only noted, and once."""
    loop = Loop(tmp_path)
    loop.say(letters.Broken(detail="no torch"))
    with pytest.raises(m.HeadroomError, match="no torch"):
        loop.dispatcher.run(first=[loop.opened])
    loop = Loop(tmp_path)
    loop.cluster.on_launch = loop.complete
    broken = [Said("w", letters.Broken(detail="disk full"))] * 3
    first: list[Item] = [loop.opened, JOINED, *broken]
    assert loop.dispatcher.run(first=first).exit_code == 0
    assert loop.events("worker.broken") == [{"worker": "w", "detail": "disk full"}]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second is a hundredth of one, and a minute without a worker a tenth."""
    monkeypatch.setattr(dispatcher, "TICK_S", 0.01)
    monkeypatch.setattr(dispatcher, "REBUILD_AFTER_S", 0.1)


def ticks(loop: Loop, *acts: Callable[[], None]) -> None:
    """Do these, one a tick, from now on."""
    todo = list(acts)
    loop.cluster.on_tick = lambda: todo.pop(0)() if todo else None


def test_a_scheduler_that_is_away_for_a_while_ends_nothing(tmp_path: Path, quick: None) -> None:
    """Its agents are out of reach, so nothing starts there; when it is back they are asked again, and go on."""
    loop = Loop(tmp_path)

    def gone() -> None:
        loop.cluster.is_connected = False

    def back() -> None:
        loop.cluster.is_connected = True
        loop.inbox.put(JOINED)
        loop.complete("study/0/1")

    ticks(loop, gone, lambda: None, lambda: None, back)
    assert loop.dispatcher.run(first=[loop.opened, JOINED]).exit_code == 0
    assert loop.cluster.calls == ["disconnected", "rejoin"]
    assert len(loop.cluster.tasks) == 1
    assert len(loop.events("cluster.disconnected")) == len(loop.events("cluster.back")) == 1


def test_a_scheduler_that_was_replaced_between_two_looks_is_joined_anew(tmp_path: Path, quick: None) -> None:
    """The connection was lost and found again unseen: what was in reach is not, until the agents are asked again."""
    loop = Loop(tmp_path)

    def replaced() -> None:
        loop.cluster.is_subscribed = False

    def heard() -> None:
        loop.inbox.put(JOINED)
        loop.complete("study/0/1")

    ticks(loop, replaced, lambda: None, heard)
    assert loop.dispatcher.run(first=[loop.opened, JOINED]).exit_code == 0
    assert loop.cluster.calls == ["disconnected", "rejoin"]
    assert len(loop.cluster.tasks) == 1
    assert len(loop.events("cluster.disconnected")) == len(loop.events("cluster.back")) == 1


def test_a_scheduler_that_does_not_come_back_ends_the_run_resumably(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attempts are ended, or given up where they cannot be reached; the exit code is 1, and the trial is requeued."""
    loop = Loop(tmp_path, away_timeout_s=0.05)

    def gone() -> None:
        loop.cluster.is_connected = False

    ticks(loop, gone)
    monkeypatch.setattr(loop.cluster, "give_up", loop.lose)
    end = loop.dispatcher.run(first=[loop.opened, JOINED])
    assert (end.exit_code, end.reason) == (1, "stopped by the loss of the Dask scheduler")
    assert [type(told) for told in loop.recorder.told] == [m.EnqueueRetry]


def test_a_cluster_of_ones_own_without_workers_is_made_anew_and_not_for_ever(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three times in a row; then the run ends with 1, resumable."""
    loop = Loop(tmp_path)
    loop.cluster.is_ours = True

    def lost() -> None:
        loop.cluster.in_reach = 0
        loop.say(letters.Left())

    ticks(loop, lost)
    monkeypatch.setattr(loop.cluster, "give_up", loop.lose)
    end = loop.dispatcher.run(first=[loop.opened, JOINED])
    assert (end.exit_code, end.reason) == (1, "stopped by the loss of every worker")
    assert loop.cluster.calls == ["revive"] * 3
    assert [line["number"] for line in loop.events("cluster.rebuilt")] == [1, 2, 3]


def test_quit_drains_the_loop(tmp_path: Path) -> None:
    """The running attempt is asked to leave, its trial queued again, and the code says that it can be resumed."""
    loop = Loop(tmp_path, quota=9)

    def quit_then_leave(attempt: str) -> None:
        loop.pass_on(attempt, messages.Started())
        loop.dispatcher.post(m.QuitRequested(source="key q"))
        threading.Thread(target=leave, args=(attempt,)).start()

    def leave(attempt: str) -> None:
        wait_until(
            lambda: letters.Stop(attempt=attempt, reason="drain") in loop.cluster.delivered, "it was asked to leave"
        )
        loop.inbox.put(Ended(attempt, b.outcome(m.ExitReason.INTERRUPTED, checkpoint="/c")))

    loop.cluster.on_launch = quit_then_leave
    assert loop.dispatcher.run(first=[loop.opened, JOINED]).exit_code == 130
    retries = {told.trial: told for told in loop.recorder.told if isinstance(told, m.EnqueueRetry)}
    assert (retries[b.trial_id(0)].resume_from, retries[b.trial_id(0)].attempt) == ("/c", 2)

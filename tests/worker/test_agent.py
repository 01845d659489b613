"""The agent with real trial processes: what it makes of checkpoints that are not there, and of being left alone."""

from __future__ import annotations

import queue
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scheduler.files.durable import read_json
from scheduler.host.registry import HostRegistry, Registration
from scheduler.model import ExitReason, Outcome, letters, messages
from scheduler.worker.agent import Agent
from tests import builders as b
from tests import hostile
from tests.test_seams import travels
from tests.waiting import wait_until

MIB = 2**20


class Ears:
    """An agent without a watchdog, and everything it says."""

    def __init__(self, folder: Path) -> None:
        config = b.agent_config()
        self.folder = folder
        self.said: queue.SimpleQueue[letters.Report] = queue.SimpleQueue()
        self.heard: list[letters.Report] = []
        self.agent = Agent(
            config,
            HostRegistry.default(),
            post=self.said.put,
            news=lambda vitals: None,
            scratch=folder / "scratch",
            slots=2,
            worker=(0, 0.0),
        )

    def launch(
        self,
        number: int,
        *,
        older: tuple[str, ...] = (),
        resume_from: str | None = None,
        objective: str = "tests.objectives:told",
        folder: Path | None = None,
        **params: Any,
    ) -> None:
        """Send it an attempt."""
        task = b.task(
            f"s/{number}/1",
            objective=objective,
            params=params,
            folder=str((folder or self.folder) / f"a{number}"),
            resume_from=resume_from,
            older=older,
        )
        self.agent.told(letters.Launch(task=task))

    def started(self) -> None:
        """Wait until another trial has started."""
        while not isinstance(_message(self._next()), messages.Started):
            pass

    def _next(self) -> letters.Report:
        self.heard.append(report := self.said.get(timeout=60))
        return report

    def closed_reason(self) -> str | None:
        """Why nothing may start here, as the next vitals say it."""
        self.agent._door.look()
        return self.agent._vitals().closed_reason

    def outcome(self) -> Outcome:
        """The next end of an attempt."""
        while not isinstance(report := self._next(), letters.Ended):
            pass
        return report.outcome

    def restarts(self) -> list[letters.Restarted]:
        """What was heard of checkpoints that could not be read."""
        return [report for report in self.heard if isinstance(report, letters.Restarted)]


def _message(report: letters.Report) -> object:
    return report.message if isinstance(report, letters.TrialSaid) else None


@pytest.fixture
def ears(tmp_path: Path) -> Iterator[Ears]:
    """An agent that has ended all it started when the test is over."""
    ears = Ears(tmp_path)
    yield ears
    ears.agent.close()


@pytest.mark.parametrize(
    "order",
    [letters.Stop(attempt="s/0/1", reason="drain"), letters.End(attempt="s/0/1", reason="the user asked twice")],
    ids=["asked to leave", "ended"],
)
def test_an_order_between_a_process_and_its_task_is_no_failure(
    ears: Ears, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: letters.Stop | letters.End
) -> None:
    """The process has been taken and has not got its task yet: it must not take the order for its task."""
    register = ears.agent.promises.register

    def ordered_meanwhile(registration: Registration, least_bytes: int | None) -> Registration:
        ears.agent.told(order)
        return register(registration, least_bytes)

    monkeypatch.setattr(ears.agent.promises, "register", ordered_meanwhile)
    ears.launch(0, do="wait", until=str(tmp_path / "never"))
    outcome = ears.outcome()
    assert outcome.reason is ExitReason.INTERRUPTED, outcome


def test_a_checkpoint_that_is_not_there_means_the_start_and_is_told(ears: Ears, tmp_path: Path) -> None:
    """The objective never sees the path; neither does whoever settles the attempt later."""
    ears.launch(0, do="end", resume_from="/other/host/checkpoint.safetensors")
    outcome = ears.outcome()
    (told,) = ears.restarts()
    assert told.checkpoint is None
    assert told.detail.startswith("/other/host/checkpoint.safetensors on ") and "No such file" in told.detail
    assert (outcome.reason, outcome.checkpoint) == (ExitReason.COMPLETED, None)
    assert (read_json(str(tmp_path / "a0" / "spec.json")) or {})["resume_from"] is None


def test_the_newest_checkpoint_that_can_be_read_is_taken(ears: Ears, tmp_path: Path) -> None:
    """A file or a folder; what is read is said when it is not the newest."""
    saved, folder = tmp_path / "older.pt", tmp_path / "folder"
    saved.write_text("x")
    folder.mkdir()
    for number, (newest, older, chosen) in enumerate(
        [
            (str(saved), (), None),
            (str(folder), (), None),
            ("/gone", (str(saved),), str(saved)),
            ("/gone", ("/gone/too", str(folder)), str(folder)),
        ]
    ):
        ears.launch(number, do="end", resume_from=newest, older=older)
        assert ears.outcome().checkpoint == (chosen or newest)
        told = [report.checkpoint for report in ears.restarts()]
        assert told == ([] if chosen is None else [chosen])
        ears.heard.clear()


def test_attempts_that_are_let_go_leave_and_are_not_called_failures(ears: Ears, tmp_path: Path) -> None:
    """Asked by the agent itself, one checkpoints and leaves; one that hears nothing is ended when its time is over."""
    ears.launch(0, do="wait", until=str(tmp_path / "never"))
    ears.launch(1, do="ignore", until=str(tmp_path / "never"))
    for _ in range(2):
        ears.started()
    ears.agent.release("nobody is there")

    def ended() -> bool:
        ears.agent.end_overdue()
        return not ears.agent.busy

    wait_until(ended, "both have left", 60)
    outcomes = {ears.outcome().detail: 1 for _ in range(2)}
    assert set(outcomes) == {"interrupted", "ended: drain_timeout"}


def test_an_attempt_that_comes_when_the_agent_leaves_is_sent_back(ears: Ears) -> None:
    """As an interruption with the checkpoint it came with: it costs nothing."""
    ears.agent.refuse(b.task(resume_from="/c"), "its worker is being closed")
    outcome = ears.outcome()
    assert (outcome.reason, outcome.checkpoint) == (ExitReason.INTERRUPTED, "/c")


def test_the_length_of_steps_is_learnt_from_signs_of_life(ears: Ears, tmp_path: Path) -> None:
    """Of one that ticks it is the longest of the latest pauses; the present one counts when it is longer still."""
    ears.launch(0, do="wait", until=str(tmp_path / "go"))
    ears.started()
    (run,) = ears.agent._running()
    wait_until(lambda: len(run.gaps) > 2, "it has ticked", 60)
    heard_at = run.heard_at
    assert heard_at is not None
    assert run.step_s(heard_at) == max(run.gaps) > 0.0
    assert run.step_s(heard_at + 500.0) == pytest.approx(500.0)
    (tmp_path / "go").touch()
    assert ears.outcome().reason is ExitReason.COMPLETED


def arrive(reports: list[letters.Report]) -> None:
    """Each is carried, and read on the other side as it was said."""
    for report in reports:
        assert letters.report(travels(letters.to_json(report))) == report


# -- what it does not believe, and what it cannot start ----------------------------------------------------------------


def test_what_a_trial_writes_into_the_pipe_is_passed_on_only_where_it_is_a_message(ears: Ears) -> None:
    """Eleven pieces of rubbish: one start, one report, one note that something was dropped, and the result."""
    ears.launch(0, objective="tests.hostile:writes_to_the_pipe")
    outcome = ears.outcome()
    assert (outcome.reason, outcome.value, outcome.epochs) == (ExitReason.COMPLETED, 0.5, 3)
    said = [_message(report) for report in ears.heard]
    assert [sum(isinstance(each, kind) for each in said) for kind in (messages.Started, messages.Progress)] == [1, 1]
    assert len([each for each in said if isinstance(each, messages.Note) and "dropped" in each.text]) == 1
    arrive(ears.heard)


@pytest.mark.parametrize("name", hostile.NAMES)
def test_no_objective_disturbs_the_agent(ears: Ears, name: str) -> None:
    """After each of them the same agent runs the next trial, and all that it said can travel."""
    ears.launch(0, objective=f"tests.hostile:{name}")
    ears.outcome()
    ears.launch(1, objective="tests.objectives:bare_number", folder=ears.folder / "next")
    wanted = ExitReason.COMPLETED
    assert ears.outcome().reason is wanted
    arrive(ears.heard)


def test_a_folder_that_cannot_be_made_closes_the_host_until_it_can(ears: Ears, tmp_path: Path) -> None:
    """A file is where the attempts should be: not started, with that as the reason, and started once it is gone."""
    blocked = tmp_path / "attempts"
    blocked.write_text("")
    ears.launch(0, do="end", folder=blocked)
    outcome = ears.outcome()
    assert (outcome.reason, outcome.detail) == (ExitReason.NOT_STARTED, f"no folder: {blocked / 'a0'}")
    assert ears.closed_reason() == outcome.detail
    blocked.unlink()
    wait_until(lambda: ears.closed_reason() is None, "the host is open again", 30)
    ears.launch(1, do="end", folder=blocked)
    assert ears.outcome().reason is ExitReason.COMPLETED


def test_an_objective_that_cannot_be_imported_closes_the_host_until_it_can(
    ears: Ears, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A half-edited file: no trial is to blame."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    module = tmp_path / "half_edited.py"
    module.write_text("def objective(task, progress:\n")
    ears.launch(0, objective="half_edited:objective")
    outcome = ears.outcome()
    assert outcome.reason is ExitReason.NOT_STARTED and "SyntaxError" in outcome.detail
    assert ears.closed_reason() == outcome.detail
    module.write_text("def objective(task, progress):\n    return 0.5\n")
    wait_until(lambda: ears.closed_reason() is None, "the host is open again", 60)
    ears.launch(1, objective="half_edited:objective")
    assert ears.outcome().reason is ExitReason.COMPLETED


def test_a_thread_that_is_not_to_be_had_is_no_end_of_the_trial(ears: Ears, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver hears that it was not started, and the mail goes on."""

    def none(self: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr("threading.Thread.start", none)
        ears.launch(0, do="end")
    outcome = ears.outcome()
    assert (outcome.reason, outcome.detail) == (
        ExitReason.NOT_STARTED,
        "no process to be had (can't start new thread)",
    )


def test_a_scratch_folder_that_was_cleared_away_is_made_again(ears: Ears) -> None:
    """Its spares' log lies there; no trial pays for a clean-up."""
    shutil.rmtree(ears.agent.scratch, ignore_errors=True)
    ears.launch(0, do="end")
    assert ears.outcome().reason is ExitReason.COMPLETED

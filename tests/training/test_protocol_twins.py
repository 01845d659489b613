"""The two halves of the pipe, which may not import each other: what the one writes, the other reads, and the same."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from scheduler.model import messages
from scheduler.model.fields import BadMessage
from tests import builders as b
from training import protocol


class Pipe:
    """A trial's progress on one end of a pipe; what it says is read on the other."""

    def __init__(self) -> None:
        self._read, write = os.pipe()
        self._commands = os.open(os.devnull, os.O_RDONLY)
        self.outbox, self.inbox = protocol.Outbox(write), protocol.Inbox(self._commands)
        self.progress = protocol.TrialProgress(self.outbox, self.inbox)
        self._open = [self._read, write, self._commands]

    def heard(self) -> dict[str, Any]:
        """The message that was sent last."""
        found: dict[str, Any] = json.loads(os.read(self._read, 1 << 16))
        return found

    def close(self) -> None:
        """Both ends."""
        for descriptor in self._open:
            os.close(descriptor)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    """A pipe that is closed after the test."""
    pipe = Pipe()
    yield pipe
    pipe.close()


def test_both_sides_speak_one_protocol() -> None:
    """The number by which another version is refused, and the bounds of what is sent."""
    assert (messages.PROTOCOL, messages.LAST_STEP) == (protocol.PROTOCOL, protocol.LAST_STEP)


def test_each_word_of_a_trial_is_read_as_it_was_said(pipe: Pipe) -> None:
    """Every method of the progress that an objective has becomes the message of that kind, with what was given."""
    said = pipe.progress
    said.report(3, 0.5)
    assert (told := messages.parse(pipe.heard())) == messages.Progress(
        step=3, value=0.5, peak_bytes=told.peak_bytes, device_bytes=0
    )
    assert told.peak_bytes is not None and told.peak_bytes > 0
    said.tick()
    assert isinstance(tick := messages.parse(pipe.heard()), messages.Ticked) and tick.n == 1
    said.settled()
    assert isinstance(messages.parse(pipe.heard()), messages.Settled)
    said.checkpoint("/c", 4)
    assert messages.parse(pipe.heard()) == messages.Saved(path="/c", step=4)
    said.note("two\nlines")
    assert messages.parse(pipe.heard()) == messages.Note(text="two lines")
    said.tell("report", {"value": 1.0})
    assert messages.parse(pipe.heard()) == messages.Called(method="report", number=0, arguments={"value": 1.0})


def test_what_is_told_to_a_trial_is_understood(pipe: Pipe) -> None:
    """Its task is taken whole and first; a request to stop and an answer are known by the names that both sides use."""
    task = b.task(params={"lr": 0.1}, resume_from="/c")
    for told in (
        task.for_trial(),
        messages.AnswerTrial(number=5, body={"value": 2}).to_json(),
        messages.StopTrial(reason="prune").to_json(),
    ):
        pipe.inbox._take(json.dumps(told).encode())
    taken = pipe.inbox.wait_for_task()
    assert messages.Task.from_json({**taken, "reserved_bytes": task.reserved_bytes}) == task
    assert "reserved_bytes" not in taken
    assert pipe.inbox.wait_for_answer(5, 1.0) == {"value": 2, "cmd": "answer", "number": 5}
    assert pipe.progress.stop_requested == "prune"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"protocol": 2}, "speaks protocol 2, this Headroom 1: install the same version on both sides"),
        ({"protocol": None}, "speaks protocol None"),
        ({"reserved_bytes": "much"}, "Task.reserved_bytes: 'much' is no whole number"),
        ({"older": "/c"}, "Task.older: '/c' is no list"),
        ({"params": [1]}, "Task.params"),
        ({"attempt": ...}, "Task.attempt is missing"),
    ],
)
def test_a_task_that_does_not_match_is_refused_in_one_line(change: dict[str, Any], why: str) -> None:
    """Another version, or a field of another type: one line that says which and what was seen, never a KeyError."""
    data = {name: value for name, value in {**b.task().to_json(), **change}.items() if value is not ...}
    with pytest.raises(BadMessage) as refused:
        messages.Task.from_json(data)
    assert why in str(refused.value) and "\n" not in str(refused.value)

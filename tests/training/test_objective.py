"""A function called in this process: whatever it raises or returns becomes a result or an error, and whose fault."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from training import objective
from training.protocol import Inbox, Outbox, TrialProgress


class DiscardingProgress(TrialProgress):
    """A progress whose messages go to no one."""

    def __init__(self) -> None:
        super().__init__(Outbox(os.open(os.devnull, os.O_WRONLY)), Inbox(0))


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("interrupts", "KeyboardInterrupt:"),
        ("returns_nan", "NonFiniteLoss: the objective returned nan"),
        ("reports_nan", "NonFiniteLoss: value nan reported for step 1"),
        ("nothing", "TypeError: the objective returned None as its value"),
        ("missing", "ObjectiveNotImported: objective 'tests.objectives:missing' cannot be imported: AttributeError"),
    ],
)
def test_other_mistakes_become_errors(name: str, error: str) -> None:
    """Whatever a training function raises or returns wrongly is an error with a traceback."""
    last = objective.run({"protocol": 1, "objective": f"tests.objectives:{name}"}, DiscardingProgress())
    assert last["type"] == "error" and last["error"].startswith(error)
    assert "Traceback" in last["traceback"]


def test_task_of_another_protocol_is_refused() -> None:
    """A scheduler of another version gets an error that says so."""
    last = objective.run({"protocol": 9, "objective": "tests.objectives:good"}, DiscardingProgress())
    assert last["error"].startswith("OtherProtocol: the task has protocol 9, this process speaks 1")
    assert last["started"] is False


@pytest.mark.parametrize(
    ("found", "asked", "result"),
    [
        (0.25, None, {"value": 0.25, "stop_reason": "completed"}),
        ({"value": "0.5", "epochs": 3}, None, {"value": 0.5, "stop_reason": "completed", "epochs": 3}),
        ({"stop_reason": "pruned"}, None, {"value": None, "stop_reason": "pruned"}),
        ({"stop_reason": "interrupted"}, "drain", {"value": None, "stop_reason": "interrupted"}),
        ({"values": ["inf", "1.0"]}, None, {"stop_reason": "completed", "values": ["inf", "1.0"]}),
    ],
    ids=["a number", "a mapping", "prunes itself", "left as asked", "several values"],
)
def test_what_may_be_returned(found: Any, asked: str | None, result: dict[str, Any]) -> None:
    """A number, or a mapping with one; none only from who was asked to leave or prunes itself."""
    assert objective.check_result(found, asked=asked) == result


def test_leaving_without_being_asked_is_no_result() -> None:
    """A function that says `interrupted` by itself would be run again for ever."""
    with pytest.raises(TypeError, match="the objective returned None as its value"):
        objective.check_result({"stop_reason": "interrupted"})


def caused_by(inner: BaseException) -> BaseException:
    """An error of a library's, with what led to it."""
    error = RuntimeError("the library could not go on")
    error.__cause__ = inner
    return error


@pytest.mark.parametrize(
    ("error", "trace", "no_room"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "", True),
        (caused_by(OSError(errno.EDQUOT, "Disk quota exceeded")), "", True),
        (RuntimeError("PytorchStreamWriter failed: No space left on device"), "", True),
        (RuntimeError("can't start new thread"), "", True),
        (BlockingIOError(errno.EAGAIN, "try again"), "in _posixsubprocess.fork_exec", True),
        (BlockingIOError(errno.EAGAIN, "try again"), "in read", False),
        (FileNotFoundError(errno.ENOENT, "no such file"), "", False),
        (ValueError("bad"), "", False),
    ],
    ids=["disk", "quota behind it", "torch's own word", "threads", "no process", "a read", "a missing file", "other"],
)
def test_what_is_the_hosts_fault(error: BaseException, trace: str, no_room: bool, tmp_path: Path) -> None:
    """A disk that is full or a process that was not to be had; not what the function did wrong."""
    assert objective.is_no_room(error, trace, str(tmp_path)) is no_room


def test_any_file_error_while_the_attempts_folder_is_gone_is_the_hosts_fault(tmp_path: Path) -> None:
    """A disk that was taken away shows as a missing file."""
    missing = FileNotFoundError(errno.ENOENT, "no such file")
    assert objective.is_no_room(missing, "", str(tmp_path / "gone"))
    assert not objective.is_no_room(ValueError("bad"), "", str(tmp_path / "gone"))

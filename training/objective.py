"""A user's function, called: whatever it does, short of killing the process, becomes a result or an error.

Covers finding it by name, what it may return, and whether an error is the host's: a disk that is full, a process that
was not to be had. A child that it forked, and that comes back here, cannot speak for it. How the result travels is
`training.protocol`.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, cast

from training.errors import AskedToLeave, NonFiniteLoss, ObjectiveNotImported, OtherProtocol, TrainingInputError
from training.plain import MAX_TEXT, one_line, plain, text
from training.protocol import PROTOCOL, TrialProgress

TRACE_CHARS = 16_000
_HOSTS_FAULT = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENFILE)


def run(task: Mapping[str, Any], progress: TrialProgress) -> dict[str, Any]:
    """Call the task's objective; whatever it does short of killing the process becomes a result or an error."""
    me = os.getpid()
    try:
        if task.get("protocol") != PROTOCOL:
            spoken = text(plain(task.get("protocol")), 40)
            raise OtherProtocol(f"the task has protocol {spoken}, this process speaks {PROTOCOL}: install one version")
        try:
            found = resolve(task["objective"])(task, progress)
        except AskedToLeave:
            found = {"stop_reason": "interrupted"}
        _end_forked(me)
        return {"type": "result", "result": check_result(found, asked=progress.stop_requested)}
    except BaseException as error:  # also SystemExit and KeyboardInterrupt: a user's sys.exit() is an outcome
        trace = text(traceback.format_exc()[-TRACE_CHARS:], MAX_TEXT)
        with contextlib.suppress(OSError, ValueError):  # the log's disk is full, or the function has closed stderr
            print(trace, file=sys.stderr, flush=True)
        _end_forked(me, error)
        # `error` is formatted by hand: for SystemExit the last line of the traceback would be bare.
        said: dict[str, Any] = {"type": "error", "error": one_line(f"{type(error).__name__}: {text(error)}")}
        return said | {
            "traceback": trace,
            "started": getattr(error, "not_started", False) is not True,
            "fatal": getattr(error, "ends_study", False) is True,
            "no_room": is_no_room(error, trace, task.get("folder")),
        }


def _end_forked(me: int, error: BaseException | None = None) -> None:
    """End a child that the function forked and that came back here, without a word: only its parent may speak."""
    if os.getpid() != me:
        status = 0 if error is None else 1
        if isinstance(error, SystemExit):
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        os._exit(status & 0xFF)


def resolve(name: str) -> Callable[[Mapping[str, Any], TrialProgress], Any]:
    """Import the function that `module:function` names. Raises ObjectiveNotImported, whatever its module raises."""
    module_name, _, function_name = name.partition(":")
    try:
        if not function_name:
            raise TrainingInputError("write module:function")
        function: Any = importlib.import_module(module_name)
        for part in function_name.split("."):
            function = getattr(function, part)
        if not callable(function):
            raise TypeError(f"{type(function).__name__} {function_name} is no function")
    except BaseException as error:  # a module may do anything when it is imported, sys.exit() too
        raise ObjectiveNotImported(
            f"objective {name!r} cannot be imported: {type(error).__name__}: {text(error)}"
        ) from error
    return cast("Callable[[Mapping[str, Any], TrialProgress], Any]", function)


def check_result(found: Any, *, asked: str | None = None) -> dict[str, Any]:
    """Make a result mapping of what an objective returned: a mapping with `value`, or the value alone.

    asked: why it was asked to stop, None when it was not. Raises NonFiniteLoss, TypeError. `value` may be None only
    when it was asked, or prunes itself. `values`, numbers as text (JSON has no infinity), stand in its place where the
    function that was called has checked them itself.
    """
    given = dict(found) if isinstance(found, Mapping) else {"value": found}
    if "values" in given:
        return {"stop_reason": "completed", **plain(given)}
    value, stop_reason = given.pop("value", None), text(given.pop("stop_reason", None) or "completed", 64)
    if value is not None or not (stop_reason == "pruned" or (stop_reason == "interrupted" and asked)):
        try:
            value = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several elements
            shown = text(repr(plain(value)), 80)
            raise TypeError(f"the objective returned {shown} as its value: it must be a number") from None
        if not math.isfinite(value):
            raise NonFiniteLoss(f"the objective returned {value}")
    rest = plain(given)
    return {"value": value, "stop_reason": stop_reason, **(rest if isinstance(rest, dict) else {"metrics": rest})}


def is_no_room(error: BaseException | None, trace: str, folder: str | None = None) -> bool:
    """Whether this error, or one that led to it, is a disk that is full or gone, or a process that was not to be had.

    folder: the attempt's own; any OSError while it cannot be written is one.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and (error.errno in _HOSTS_FAULT or not _writable(folder)):
            return True
        # A read that would block is EAGAIN as well: here it is one only where a process was to be made.
        forking = "fork" in trace or "_posixsubprocess" in trace or "posix_spawn" in trace
        if isinstance(error, OSError) and error.errno == errno.EAGAIN and forking:
            return True
        said = text(error).lower()
        if any(word in said for word in ("no space left on device", "disk is full", "can't start new thread")):
            return True
        error = error.__cause__ or error.__context__
    return False


def _writable(folder: str | None) -> bool:
    return folder is None or os.access(folder, os.W_OK | os.X_OK)

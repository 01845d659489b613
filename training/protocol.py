"""What a trial and its agent say to each other: JSON lines, one task in, then `stop`; out what the objective reports.

Out go `ready`, `started`, `progress`, `tick`, `settled`, `checkpoint`, `note`, `call`, and one last `result` or
`error`. Covers both ends of the trial's side and the progress that an objective is given. The other side is
`scheduler.model.messages`, which a test holds equal; whose descriptors these are is `training.pipes`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from training.errors import AskedToLeave, NonFiniteLoss
from training.memory import device_peak_bytes, peak_bytes
from training.pipes import reader_gone, same_file
from training.plain import one_line, plain, text
from training.processes import ORPHANED, end_children

PROTOCOL = 1
TICK_INTERVAL_S = 1.0
LAST_STEP = 2**31 - 1  # what a study's database holds


class Outbox:
    """Writes messages, one JSON line each, whole and in order also from several threads.

    A function that closes descriptors it did not open may have closed this one, and opened a file of its own under the
    same number: then nothing is sent any more, the durable result says how it ended. A forked child is not heard.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._pipe = descriptor, same_file(descriptor)
        self._lock, self._owner = threading.Lock(), os.getpid()

    @property
    def reader_gone(self) -> bool:
        """Nobody can hear it any more."""
        return same_file(self._descriptor) == self._pipe and reader_gone(self._descriptor)

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message. A reader that is gone is no error here: the end of stdin says so more reliably."""
        data = json.dumps(message).encode() + b"\n"
        if os.getpid() != self._owner:
            return
        with self._lock, contextlib.suppress(OSError):
            while data and same_file(self._descriptor) == self._pipe:
                data = data[os.write(self._descriptor, data) :]


class Inbox:
    """Reads the task and the stop request in a thread of its own, and ends the process at the end of stdin."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._pipe = descriptor, same_file(descriptor)
        self._tasks: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.has_task = False
        self.finished = False  # the result is on its way: the end of stdin may come now
        self._ending = threading.Lock()  # held by whoever decides first: a result on its way, or an end without one
        self.stop_reason: str | None = None
        self._answers: dict[int, dict[str, Any]] = {}
        self._heard = threading.Condition()

    def start(self) -> None:
        threading.Thread(target=self._read, name="stdin", daemon=True).start()

    def wait_for_task(self) -> dict[str, Any]:
        return self._tasks.get()

    def wait_for_answer(self, number: int, timeout_s: float) -> dict[str, Any] | None:
        """Wait for the answer to a call; None when there is none yet, or the trial is asked to leave."""
        with self._heard:
            self._heard.wait_for(lambda: number in self._answers or self.stop_reason is not None, timeout_s)
            return self._answers.pop(number, None)

    def _read(self) -> None:
        pending = b""
        try:
            while chunk := os.read(self._descriptor, 65536):
                *lines, pending = (pending + chunk).split(b"\n")
                for line in lines:
                    if line.strip():
                        self._take(line)
                if same_file(self._descriptor) != self._pipe:  # what is read there now is the function's own
                    return
        except OSError:  # closed by the function: it cannot be asked to stop any more, only ended from outside
            return
        with self._ending:
            if not self.finished:
                end_children()
                os._exit(ORPHANED if self.has_task else 0)

    def finish(self) -> None:
        """Say that the result is on its way. Never returns in a process that is already ending for want of a reader:
        what a function makes of its children's death by our hand is no word of its own."""
        with self._ending:
            self.finished = True

    def _take(self, line: bytes) -> None:
        try:
            message = json.loads(line)
            if self.has_task:
                with self._heard:
                    if message["cmd"] == "stop":
                        self.stop_reason = message["reason"]
                    elif message["cmd"] == "answer":
                        self._answers[message["number"]] = message
                    self._heard.notify_all()
            else:
                self.has_task = True
                self._tasks.put(message)
        except (ValueError, KeyError, TypeError) as error:  # a thread that dies silently would orphan the process
            print(f"message not understood: {line[:200]!r}: {error}", file=sys.stderr, flush=True)


class TrialProgress:
    """What the objective reports to; see `training.progress`."""

    def __init__(self, outbox: Outbox, inbox: Inbox) -> None:
        self._outbox = outbox
        self._inbox = inbox
        self._ticks = 0
        self._next_tick = 0.0
        self._calls, self._calling = 0, threading.Lock()

    @property
    def stop_requested(self) -> str | None:
        """None, "prune" or "drain": whatever else it is asked to leave for, a checkpoint is wanted first."""
        reason = self._inbox.stop_reason
        return reason if reason in (None, "prune") else "drain"

    def leave_if_asked(self) -> None:
        """Raise AskedToLeave when it is: a function that keeps no checkpoint leaves here, and is begun anew later."""
        if self._inbox.stop_reason is not None:
            raise AskedToLeave(self._inbox.stop_reason)

    def report(self, step: int, value: float) -> None:
        """Send an epoch's value. Raises NonFiniteLoss (a study cannot hold NaN, and training on is pointless), and
        ValueError for a step that it cannot hold."""
        value, step = float(value), int(step)
        if not math.isfinite(value):
            raise NonFiniteLoss(f"value {value} reported for step {text(step, 40)}")
        if not 0 <= step <= LAST_STEP:
            raise ValueError(f"step {text(plain(step), 40)} reported: it must be from 0 to {LAST_STEP}")
        self._send("progress", step=step, value=value)

    def tick(self) -> None:
        self._ticks += 1
        now = time.monotonic()
        if now >= self._next_tick:
            self._next_tick = now + TICK_INTERVAL_S
            self._send("tick", n=self._ticks)

    def settled(self) -> None:
        self._send("settled")

    def checkpoint(self, path: str, step: int = 0) -> None:
        self._outbox.send({"type": "checkpoint", "path": str(path), "step": int(step)})

    def call(self, method: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Ask the study, and wait for the answer: a mapping with `value`, or with `error` and its `kind`.

        Raises AskedToLeave when the trial is to leave before there is one.
        """
        with self._calling:
            self._calls = number = self._calls + 1
        self._outbox.send({"type": "call", "method": method, "number": number, "arguments": dict(arguments)})
        while (answer := self._inbox.wait_for_answer(number, TICK_INTERVAL_S)) is None:
            if self._inbox.stop_reason is not None:
                raise AskedToLeave(self._inbox.stop_reason)
            self.tick()  # its study may be away for long: it is not the trial that stands still
        return answer

    def tell(self, method: str, arguments: Mapping[str, Any]) -> None:
        """Tell the study something, in order with calls and reports, without waiting."""
        self._outbox.send({"type": "call", "method": method, "number": 0, "arguments": dict(arguments)})

    def note(self, said: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # the log's disk is full, which may be what is to be noted
            print(said, file=sys.stderr, flush=True)
        self._outbox.send({"type": "note", "text": one_line(said)})

    def _send(self, kind: str, **fields: Any) -> None:
        memory = {"peak_bytes": peak_bytes(), "device_bytes": device_peak_bytes()}
        self._outbox.send({"type": kind, **fields, **memory})

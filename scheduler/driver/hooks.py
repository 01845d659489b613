"""Commands of the user's that a run calls: when a trial was killed (`--on-kill`) and when the run ends (`--on-end`).

A command goes to `/bin/sh -c`, with what happened in its environment (HOOK_EVENT, HOOK_RUN, HOOK_FOLDER, HOOK_TEXT and
more) and all of it as one JSON object on its standard input; what it prints goes nowhere. One that fails, hangs for
longer than `limit_s`, or cannot be started is a note, and nothing more: it runs in a thread and a process group of its
own, and nobody waits for it but the end of the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from scheduler.model.plain import line, plain

LIMIT_S = 30.0
MOST_AT_ONCE = 8  # of kills; a host that kills more than that in LIMIT_S has been told of enough


class Hooks:
    """Calls the commands. note: told in one line what went wrong with one."""

    def __init__(
        self,
        *,
        on_kill: str | None,
        on_end: str | None,
        run: str,
        folder: str,
        note: Callable[[str], None],
        limit_s: float = LIMIT_S,
    ) -> None:
        self._commands = {"kill": on_kill, "end": on_end}
        self._run, self._folder, self._note, self._limit_s = run, folder, note, limit_s
        self._threads: list[threading.Thread] = []

    def killed(self, text: str, fields: Mapping[str, Any]) -> None:
        """Tell of a killed trial. text: the sentence for people; fields: those of `attempt.ended`."""
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        if len(self._threads) >= MOST_AT_ONCE:
            self._note(f"--on-kill: {MOST_AT_ONCE} of its commands still run, it is not called for: {text}")
            return
        self._call("kill", text, fields)

    def ended(self, text: str, fields: Mapping[str, Any]) -> None:
        """Tell of the end of the run; waits for the commands, at most until their limit."""
        self._call("end", text, fields)
        deadline = time.monotonic() + self._limit_s + 5.0
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _call(self, event: str, text: str, fields: Mapping[str, Any]) -> None:
        command = self._commands[event]
        if command is None:
            return
        told = {"event": event, "run": self._run, "folder": self._folder, "text": text, **plain(dict(fields))}
        environ = {f"HOOK_{key.upper()}": _word(value) for key, value in told.items() if _is_word(value)}
        thread = threading.Thread(target=self._carry_out, args=(event, command, told, environ), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _carry_out(self, event: str, command: str, told: Mapping[str, Any], environ: Mapping[str, str]) -> None:
        try:
            process = subprocess.Popen(
                ["/bin/sh", "-c", command],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={**os.environ, **environ},
                start_new_session=True,
            )
        except OSError as error:
            self._note(f"--on-{event}: cannot be started: {error.strerror or error}")
            return
        try:
            _, said = process.communicate(json.dumps(told).encode(), timeout=self._limit_s)
        except subprocess.TimeoutExpired:
            self._note(f"--on-{event}: not done after {self._limit_s:g} s, ended")
            with contextlib.suppress(OSError):  # it and its children
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return
        except OSError as error:
            self._note(f"--on-{event}: {error.strerror or error}")
            return
        if process.returncode:
            last = (said.decode(errors="replace").strip().splitlines() or [""])[-1]
            self._note(f"--on-{event}: exit status {process.returncode}{f': {line(last, 200)}' if last else ''}")


def _is_word(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _word(value: Any) -> str:
    # A NUL would keep the command from starting.
    return str(value).replace("\0", "")[:4000]

"""Where trial processes come from: forked off a server where that can be, else started one by one.

Covers the choice, and saying why it is the slower one. How a process is forked is `fork_server`, which of them waits
for a task is `warm_spare`.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from scheduler.files.private import opener
from scheduler.worker import launch
from scheduler.worker.fork_server import ForkServer, NoForkServer
from scheduler.worker.trial_process import TrialProcess


class TrialMaker:
    """Makes the trial processes of one agent.

    environment: gives the variables of one. scratch: for their logs. preload: modules they import before their task is
    known; None: what the built-in training needs. why_not_forked: a reason to start every one by itself, None without.
    """

    def __init__(
        self,
        *,
        environment: Callable[[], Mapping[str, str | None]],
        scratch: Path,
        preload: Sequence[str] | None,
        why_not_forked: str | None,
    ) -> None:
        self._environment, self._scratch, self._preload = environment, scratch, preload
        self._server: ForkServer | None = None
        self.why_not_forked = why_not_forked
        if why_not_forked is None:
            self._server = ForkServer(self._start_server)

    def __call__(self) -> TrialProcess:
        """Make one, which is not ready yet. Raises OSError: no process is to be had."""
        self._scratch.mkdir(parents=True, exist_ok=True)  # below a folder for temporary files, which get cleared away
        log = self._scratch / "spare.log"
        if self._server is not None:
            try:
                return TrialProcess(self._server.fork(), log=log)
            except NoForkServer as error:
                self._say(str(error))
        return TrialProcess.start(environment=self._environment(), log=log, preload=self._preload)

    def drop(self) -> None:
        """End the server to free its memory; the next process that is made starts another one."""
        if self._server is not None:
            self._server.drop()

    def close(self) -> None:
        """End the server for good; returns when it is gone."""
        if self._server is not None:
            self._server.close()

    def _start_server(self, control: socket.socket) -> subprocess.Popen[bytes]:
        self._scratch.mkdir(parents=True, exist_ok=True)
        parent = f"--parent={os.getpid()}"
        with open(self._scratch / "fork-server.log", "wb", opener=opener) as log:
            pipes = {"stdin": control, "stdout": log, "stderr": log}
            return launch.start("training.fork_server", self._preload, self._environment(), parent, **pipes)

    def _say(self, why: str) -> None:
        if why != self.why_not_forked:
            self.why_not_forked = why
            print(f"trial processes are started one by one: {why}", file=sys.stderr, flush=True)


def why_not_forked(*, wanted: bool, device: str) -> str | None:
    """Why trial processes are not forked here, as far as that is known beforehand; None where they may be."""
    if not wanted:
        return "training.fork is off"
    if sys.platform != "linux":
        return f"there is no fork server on {sys.platform}"
    return None if device == "cpu" else f"a process that uses {device} cannot be forked"

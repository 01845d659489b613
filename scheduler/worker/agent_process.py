"""The agent's process: its way to the driver, and when it lets go of its attempts.

It is started by a plugin on a Dask worker and outlives that worker: a scheduler that restarts takes its workers along,
and none of what runs here. So it is found by the next worker (`agent_folder`), talks through whichever is there
(`agent_mail`), and decides by itself how long it goes on:

- the driver's process is certainly dead, or the driver says so: everything is ended at once;
- its worker is being closed on purpose (retired, scaled down, a walltime), or SIGTERM: attempts are asked to checkpoint
  and leave, and what became of them is kept until the driver has it;
- nothing is heard for `away_timeout_s`: the same, and it leaves when no worker is there that could carry a word;
- else it goes on.

Standard library only, as the watchdog: it is one of the processes that must still answer when memory is short.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from scheduler.host import bounds, vitals
from scheduler.host.agent_folder import AgentEntry, AgentFolder, ProcessIdentity
from scheduler.host.registry import HostRegistry
from scheduler.model import Json, frames, letters
from scheduler.model.fields import BadMessage
from scheduler.model.frames import AgentConfig
from scheduler.worker.agent import Agent
from scheduler.worker.agent_mail import Mail
from scheduler.worker.lease import Lease

BEAT_S = 0.25
OUTCOMES_KEPT_S = 86_400.0  # for a driver that was away for longer than its attempts were held


class AgentProcess:
    """One agent from its start to its end."""

    def __init__(
        self, agent_id: str, config: AgentConfig, *, slots: int, worker: tuple[int, float], limit_bytes: int | None
    ) -> None:
        self.id, self.config, self._worker_limit_bytes = agent_id, config, limit_bytes
        registry = self._registry = HostRegistry.default()
        self._folder = AgentFolder(registry)
        self._driver = ProcessIdentity(**config.driver)
        self._process = ProcessIdentity.own(vitals.start_time)
        self._listener = self._folder.listen(agent_id)
        self._lease = Lease(config.away_timeout_s, time.monotonic())
        self._over: str | None = None  # why everything is to be ended now
        self._orphaned = False  # and nobody will want another agent in its place
        self._leaving: str | None = None  # why it takes no further attempt
        self._released = False
        self.mail = Mail(
            self._listener,
            agent=agent_id,
            hello=frames.Hello(name=f"{socket.gethostname()}:{os.getpid()}", process=dataclasses.asdict(self._process)),
            on_letter=self._told,
            on_carrier=self._carrier_says,
            on_heard=self._heard,
        )
        self.agent = Agent(
            config,
            registry,
            post=self.mail.post,
            news=self.mail.news,
            scratch=Path(self._folder.path(agent_id)),
            slots=slots,
            worker=worker,
            worker_limit_bytes=limit_bytes,
        )

    def run(self) -> None:
        """Serve until it is over."""
        self.mail.start()
        self._enter()
        self.agent.start()
        while self._over is None:
            time.sleep(BEAT_S)
            self._beat(time.monotonic())
        self.agent.close()
        self.mail.close(self._over, for_good=self._orphaned)
        self._folder.remove(self.id, self._address)

    def _enter(self) -> None:
        self._address = self._listener.getsockname()
        self._folder.enter(
            AgentEntry(
                id=self.id,
                topic=self.config.topic,
                run_id=self.config.run_id,
                began_unix=self.config.began_unix,
                process=self._process,
                memory=bounds.measure(os.environ, self._worker_limit_bytes).name,
                address=self._address,
            )
        )

    def _keep_place(self) -> None:
        """Its folder went with the whole registry (a cleaner of /tmp): the next worker must find it all the same."""
        if os.path.exists(self._address):
            return
        with contextlib.suppress(OSError):  # the next beat tries again; the agent has closed admission
            self._registry.ensure()
            self._folder.make(self.id)
            self._listener = self._folder.listen(self.id)
            self.mail.listen(self._listener)
            self._enter()

    def stop(self, number: int, frame: Any) -> None:
        """SIGTERM: whoever ends the host's processes gives them some seconds."""
        self._leaving = self._leaving or signal.Signals(number).name

    # -- what is heard (on the mail's threads) ----------------------------------------------------------------------

    def _heard(self) -> None:
        self._lease.heard(time.monotonic())

    def _told(self, body: Json) -> None:
        try:
            order = letters.order(body)
        except BadMessage as error:
            print(f"an order is dropped: {error}", file=sys.stderr, flush=True)
            if (attempt := letters.launched(body)) is not None:  # nobody may wait for its end
                self.agent.not_begun(attempt, str(error))
            return
        match order:
            case letters.Dismiss(reason=reason):
                self._orphan(reason)
            case letters.Launch(task=task) if self._leaving is not None:
                # The driver did not know yet that this worker leaves: it is sent back as it came.
                self.agent.refuse(task, self._leaving)
            case _:
                self.agent.told(order)

    def _carrier_says(self, frame: frames.Leave | frames.Discharge) -> None:
        if isinstance(frame, frames.Discharge):
            self._orphan(frame.reason)
        elif self._leaving is None:
            self._leaving = frame.reason

    # -- letting go ---------------------------------------------------------------------------------------------------

    def _beat(self, now: float) -> None:
        self._lease.beat(now)
        self._keep_place()
        self.agent.end_overdue()
        if self._driver.is_dead(vitals.lives):
            self._orphan("its driver is dead")
        elif self._leaving is not None:
            self._leave(now)
        elif self._lease.is_over(now):
            self._hold_no_longer(now)
        else:
            self._released = False

    def _orphan(self, why: str) -> None:
        self._over, self._orphaned = self._over or why, True

    def _leave(self, now: float) -> None:
        if not self._released:
            self._released = True
            self.mail.post(letters.Left(detail=self._leaving or ""))
            self.agent.release(self._leaving or "")
        if not self.agent.busy and (not self.mail.unread or self._lease.is_over(now)):
            self._over = self._leaving

    def _hold_no_longer(self, now: float) -> None:
        silent_s = self._lease.silent_s(now)
        if not self._released:
            self._released = True
            self.agent.release(f"nothing heard of the driver for {silent_s:.0f} s")
        if self.agent.busy:
            return
        self.agent.rest()
        if not self.mail.has_carrier or silent_s > OUTCOMES_KEPT_S:
            self._orphan(f"nothing heard of the driver for {silent_s:.0f} s")


def main() -> int:
    """Read the configuration, one JSON line on stdin, and serve."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        start = frames.AgentStart.from_json(json.loads(sys.stdin.readline()))
    except ValueError as error:
        print(f"this agent cannot be started: {error}", file=sys.stderr, flush=True)
        return 2
    sys.stdin.close()
    process = AgentProcess(
        start.id,
        start.config,
        slots=start.slots,
        worker=start.worker,
        limit_bytes=start.worker_limit_bytes,
    )
    signal.signal(signal.SIGTERM, process.stop)
    try:
        process.run()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
    # Threads that wait for a carrier or for a trial that cannot die must not keep it.
    os._exit(0)


if __name__ == "__main__":
    threading.current_thread().name = "headroom-agent-process"
    sys.exit(main())

"""What Headroom runs inside a Dask worker: a plugin that starts the worker's agent and carries its mail.

The agent is a process of its own (`scheduler.worker.agent_process`), because a Dask worker ends whenever its scheduler
does. The plugin takes over an agent that an earlier worker of this host left behind, or starts one; it lends itself to
other agents of its driver that have no worker; and it ends those of an earlier driver of the same run. Frames pass
through unread, as text: nothing that a trial says can break a Dask worker. Also holds the functions that the driver
runs here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any, cast

from distributed import Worker, WorkerPlugin

from scheduler.host import bounds, runtimes, vitals
from scheduler.host.agent_folder import AgentEntry, AgentFolder, Connection, Ownership
from scheduler.host.facts import overhead_bytes
from scheduler.host.promises import held_by_runs
from scheduler.host.registry import HostRegistry, host_folder
from scheduler.model import Json, WorkerFacts, frames, letters
from scheduler.model.fields import BadMessage, fields_of, read

LOOK_EVERY_S = 0.5
LEND_AFTER_S = 5.0  # an agent without a worker may be about to get one: its nanny needs some 3 s
START_TIMEOUT_S = 60.0
TRIES = 3  # for an agent that is killed while it starts
REAP_S = 30.0
RETRY_S = 5.0  # after an agent that could not be started
OCCUPIED_KEPT = 1000
LEAVE_TIMEOUT_S = 3600.0  # whoever closes the worker has limits of its own; the agent ends what takes too long
_PROJECT = Path(__file__).resolve().parents[2]


# The Dask task of an attempt: it does nothing but keep a thread, so that Dask gives that to nobody else and takes the
# worker for busy. As text for `eval`, because the Dask scheduler unpickles it too and need not have Headroom.
OCCUPY = (
    "(lambda worker: name in worker.plugins and worker.plugins[name].occupied(attempt).wait())"
    "(__import__('distributed').get_worker())"
)


def plugin_name(topic: str) -> str:
    return f"headroom-{topic}"


def occupation(topic: str, attempt: str) -> tuple[Any, ...]:
    """Return function and arguments of the task that occupies a thread of the worker until the attempt has ended."""
    return eval, OCCUPY, {"name": plugin_name(topic), "attempt": attempt}


class _Line:
    """A connected agent. owned: the lock that makes it ours, None for one that we only carry for.

    What is sent is written by a thread of its own: an agent that is stopped must not hold up the worker's event loop.
    """

    def __init__(
        self, entry: AgentEntry, owned: Ownership | None, process: subprocess.Popen[bytes] | None = None
    ) -> None:
        self.entry, self.owned, self.process = entry, owned, process
        self.connection = Connection.to(entry.address)
        self.gone = threading.Event()
        self._frames: queue.SimpleQueue[Json | None] = queue.SimpleQueue()
        threading.Thread(target=self._write, name="headroom-line", daemon=True).start()

    def send(self, frame: Json) -> bool:
        """Send a frame; return False when the agent is gone."""
        self._frames.put(frame)
        return not self.gone.is_set()

    def close(self) -> None:
        """After what was sent before."""
        self._frames.put(None)

    def is_dead(self) -> bool:
        """Nobody answers any more, or its process is gone. (Where nobody reaps it, its number stays taken.)"""
        if self.process is not None:
            self.process.wait()
            return True
        try:
            Connection.to(self.entry.address).close()
        except OSError:
            return True
        return self.entry.process.is_dead(vitals.lives)

    def _write(self) -> None:
        with contextlib.suppress(OSError):
            while (frame := self._frames.get()) is not None:
                self.connection.send(frame)
        self.connection.close()


class _AgentEnded(OSError):
    """An agent's process ended before it had begun. killed: by a signal."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"the agent's process ended with status {status}{said and f': {said}'}")
        self.killed = status < 0


class AgentPlugin(WorkerPlugin):
    """One per driver and worker. config: the fields of `agent.AgentConfig`, as JSON."""

    def __init__(self, config: Json) -> None:
        self.config = config
        self.name = plugin_name(config["topic"])

    # -- Dask's side ------------------------------------------------------------------------------------------------

    def setup(self, worker: Worker) -> None:
        """Begin, on the worker's event loop; everything slow happens in the plugin's own thread."""
        self.worker = worker
        self._closing = threading.Event()
        self._lines: dict[str, _Line] = {}
        self._alone_since: dict[str, float] = {}
        self._lock = threading.Lock()
        self._tree_bytes: dict[str, int] = {}
        self._occupied: dict[str, threading.Event] = {}
        self.fenced = asyncio.Event()
        # Dask would show only the worker's own RSS; what a person wants to see is the trials' memory.
        monitor: Any = worker.monitor
        own = monitor.get_process_memory
        monitor.get_process_memory = lambda: own() + sum(self._tree_bytes.values())
        threading.Thread(target=self._live, name="headroom-plugin", daemon=True).start()

    async def teardown(self, worker: Worker) -> None:
        """Leave: the worker is closed, or the driver has removed us.

        A worker whose scheduler is gone closes without being asked, and its agent goes on. One that can still talk to
        its scheduler is closed on purpose: its attempts checkpoint and leave, and what became of them is carried.
        """
        for event in self._occupied.values():
            event.set()
        mine = [line for line in self._all() if line.owned is not None]
        if worker.status.name != "running" and not worker.batched_stream.closed():
            for line in mine:
                line.send(frames.to_json(frames.Leave(reason="its Dask worker is being closed")))
            await asyncio.to_thread(self._see_off, mine)
        self._closing.set()
        for line in self._all():
            line.close()
            if line.owned is not None:
                line.owned.release()
        self._tree_bytes.clear()

    @staticmethod
    def _see_off(lines: list[_Line]) -> None:
        deadline = time.monotonic() + LEAVE_TIMEOUT_S
        for line in lines:
            line.gone.wait(max(0.0, deadline - time.monotonic()))

    def _all(self) -> list[_Line]:
        with self._lock:
            return list(self._lines.values())

    def _say(self, text: str) -> None:
        """To the driver. As text: msgpack dies of integers of 65 bits, and a trial may have said one."""
        if not self._closing.is_set():
            self.worker.log_event(self.config["topic"], {"worker": self.worker.address, "frame": text})

    def _report(self, frame: frames.FromWorker) -> None:
        self._say(json.dumps(frames.to_json(frame)))

    # -- the plugin's own thread ------------------------------------------------------------------------------------

    def _live(self) -> None:
        retry_at = 0.0
        while not self._closing.is_set():
            try:
                self._folder = AgentFolder(HostRegistry.default())
                self._look()
                if time.monotonic() >= retry_at and not any(line.owned for line in self._all()):
                    self._own()
            except Exception as error:  # no process, no disk, no memory: another try in some seconds
                if time.monotonic() >= retry_at:
                    retry_at = time.monotonic() + RETRY_S
                    detail = f"{type(error).__name__}: {error}"
                    self._report(frames.NoAgent(reason=f"its agent cannot be started: {detail}"))
            self.worker.loop.add_callback(self.fenced.set)
            self._closing.wait(LOOK_EVERY_S)

    def _look(self) -> None:
        """Agents of earlier drivers of this run are ended, those of ours that nobody carries for are lent a hand."""
        now = time.monotonic()
        for entry in list(self._folder.agents(vitals.lives)):
            if entry.run_id == self.config["run_id"] and entry.topic != self.config["topic"]:
                if entry.began_unix < self.config["began_unix"]:
                    self._dismiss(entry)
                else:
                    self._retire()
            elif entry.topic == self.config["topic"] and entry.id not in self._lines:
                if not Ownership.is_free(self._folder, entry.id):
                    self._alone_since.pop(entry.id, None)
                elif now - self._alone_since.setdefault(entry.id, now) > LEND_AFTER_S:
                    with contextlib.suppress(OSError):
                        self._connect(entry, None)

    def _dismiss(self, entry: AgentEntry) -> None:
        """Have this agent leave: the run folder's lock is our driver's, so its own is dead, or has lost it."""
        with contextlib.suppress(OSError):
            connection = Connection.to(entry.address)
            connection.send(frames.to_json(frames.Discharge(reason="another driver has the run")))
            for data, _ in connection.frames():
                if isinstance(_read(data), frames.Bye):
                    break
            connection.close()

    def _retire(self) -> None:
        """Our driver is gone: leave this worker."""
        self._closing.set()
        self.worker.loop.add_callback(self.worker.plugin_remove, name=self.name)

    def _own(self) -> None:
        """Take over an agent that has lost its worker, or start one."""
        memory = bounds.measure(os.environ, own_limit(self.worker)).name
        for entry in list(self._folder.agents(vitals.lives)):
            if entry.topic != self.config["topic"] or entry.memory != memory:
                continue
            if (owned := Ownership.of(self._folder, entry.id)) is None:
                continue
            try:
                self._connect(entry, owned)
                return
            except OSError:  # it has just left
                owned.release()
                self._folder.remove(entry.id, entry.address)
        for tries_left in reversed(range(TRIES)):
            try:
                self._start()
                return
            except _AgentEnded as error:  # killed from outside: that says nothing of this worker
                if not tries_left or not error.killed or self._closing.is_set():
                    raise

    def _start(self) -> None:
        agent = uuid.uuid4().hex[:12]
        self._folder.make(agent)
        owned = Ownership.of(self._folder, agent)
        assert owned is not None, "nobody else knows its name"
        path = os.pathsep.join(filter(None, [str(_PROJECT), os.environ.get("PYTHONPATH", "")]))
        own = os.getpid()
        start = frames.AgentStart(
            id=agent,
            config=read(frames.AgentConfig, self.config),
            slots=self.worker.state.nthreads,
            worker=(own, vitals.start_time(own) or 0.0),
            worker_limit_bytes=own_limit(self.worker),
        )
        log = self._folder.path(agent, "log")
        try:
            with open(log, "ab") as output:
                process = subprocess.Popen(
                    [sys.executable, "-m", "scheduler.worker.agent_process"],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    env={**os.environ, "PYTHONPATH": path},
                    start_new_session=True,  # it outlives this worker, and the terminal's Ctrl-C is the driver's
                )
            assert process.stdin is not None
            with process.stdin as stdin:
                stdin.write((json.dumps(start.to_json()) + "\n").encode())
            self._connect(self._wait_for(agent, process, log), owned, process)
        except BaseException:
            owned.release()
            self._folder.remove(agent)
            raise

    def _wait_for(self, agent: str, process: subprocess.Popen[bytes], log: str) -> AgentEntry:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            for entry in self._folder.agents(vitals.lives):
                if entry.id == agent:
                    return entry
            if process.poll() is not None:
                break
            time.sleep(0.02)
        if process.poll() is None:
            process.kill()
            process.wait()
            raise OSError(f"the agent's process did not begin within {START_TIMEOUT_S:.0f} s")
        last: list[str] = []
        with contextlib.suppress(OSError), open(log, encoding="utf-8", errors="replace") as file:
            last = file.read().strip().splitlines()[-1:]
        raise _AgentEnded(process.returncode, " ".join(last))

    def _connect(
        self, entry: AgentEntry, owned: Ownership | None, process: subprocess.Popen[bytes] | None = None
    ) -> None:
        line = _Line(entry, owned, process)
        with self._lock:
            self._lines[entry.id] = line
        threading.Thread(target=self._carry, args=(line,), name="headroom-carry", daemon=True).start()
        self.greet(entry.id)

    def greet(self, agent: str | None = None) -> None:
        """Have agents say again what the driver does not know (all of them: None)."""
        for line in self._all():
            if agent in (None, line.entry.id):
                carrier = frames.Carrier(worker=self.worker.address, owner=line.owned is not None)
                line.send(frames.to_json(carrier))

    def _carry(self, line: _Line) -> None:
        """From the agent to the driver, until the agent is gone."""
        said_bye = False
        for data, text in line.connection.frames():
            frame = _read(data)
            if isinstance(frame, frames.FromAgent):
                self._look_into(line, frame)
            said_bye |= isinstance(frame, frames.Bye)
            self._say(text)
            if isinstance(frame, frames.Bye) and frame.for_good:
                self._retire()
        line.gone.set()
        line.close()
        if self._closing.is_set():
            if line.process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):  # it goes on without us, or was dismissed
                    line.process.wait(REAP_S)
            return
        if (dead := line.is_dead()) and not said_bye:
            self._report(frames.Bye(agent=line.entry.id, reason="its process has died"))
        with self._lock:
            self._lines.pop(line.entry.id, None)
        self._tree_bytes.pop(line.entry.id, None)
        if line.owned is not None:
            line.owned.release()
        if dead:
            self._folder.remove(line.entry.id, line.entry.address)

    def _look_into(self, line: _Line, frame: frames.FromAgent) -> None:
        """Take from a frame what is of use here: the memory for Dask's pages, and which attempts have ended."""
        if frame.news is not None:
            news = letters.report(frame.news)
            if isinstance(news, letters.Vitals) and news.tree_bytes is not None:
                self._tree_bytes[line.entry.id] = news.tree_bytes
        for letter in frame.letters:
            if (attempt := letters.ended(letter.body)) is not None:
                self.occupied(attempt).set()

    # -- what the driver says (on the worker's event loop: short) -----------------------------------------------------

    def pass_on(self, agent: str, frame: Json) -> bool:
        """Hand a frame to an agent; return False when it is not to be reached from here."""
        with self._lock:
            line = self._lines.get(agent)
        return line is not None and line.send(frame)

    def occupied(self, attempt: str) -> threading.Event:
        """Set when the attempt has ended. Those of the latest are kept: a task may begin after its attempt's end."""
        with self._lock:
            if len(self._occupied) > OCCUPIED_KEPT:
                ended = [name for name, event in self._occupied.items() if event.is_set()]
                for name in ended[: OCCUPIED_KEPT // 2]:
                    del self._occupied[name]
            return self._occupied.setdefault(attempt, threading.Event())


def _read(data: Json) -> frames.FromWorker | None:
    """Read an agent's frame; None for one that cannot be read: the driver, which gets it too, says why."""
    with contextlib.suppress(BadMessage):
        return frames.from_worker(data)
    return None


# -- run here by the driver -----------------------------------------------------------------------------------------


async def install(config: Json, dask_worker: Worker) -> None:
    """Put the plugin on this worker, or have the one that is here say all it knows. Returns when no agent of an earlier
    driver of this run is left on the host."""
    topic = config["topic"]
    if (there := _find(dask_worker, topic)) is not None:
        there.greet()
        return
    plugin = AgentPlugin(config)
    await dask_worker.plugin_add(plugin=plugin, name=plugin_name(topic), catch_errors=False)
    await plugin.fenced.wait()


async def remove(topic: str, dask_worker: Worker) -> None:
    """Take the plugin off this worker."""
    if plugin_name(topic) in dask_worker.plugins:
        await dask_worker.plugin_remove(name=plugin_name(topic))


def deliver(topic: str, agent: str, frame: Json, dask_worker: Worker) -> bool:
    """Carry a frame of the driver to an agent; False when it is not to be reached from here."""
    plugin = _find(dask_worker, topic)
    return plugin is not None and plugin.pass_on(agent, frame)


def _find(worker: Worker, topic: str) -> AgentPlugin | None:
    return cast("AgentPlugin | None", worker.plugins.get(plugin_name(topic)))


def describe(dask_worker: Worker, *, runtime_key: tuple[Any, ...] = (None, None)) -> Json:
    """Return a worker's facts before it has an agent, for the plan; no device is known without importing torch.

    runtime_key: the arguments of `runtimes.key`.
    """
    known = runtimes.known(host_folder(), runtimes.key(*runtime_key))
    facts = WorkerFacts(
        address=dask_worker.address,
        host=socket.gethostname(),
        slots=dask_worker.state.nthreads,
        overhead_bytes=overhead_bytes(known),
        others_held_bytes=held_by_runs(host_folder()),
        environment=known,
        **bounds.measure(os.environ, own_limit(dask_worker)).to_json(),
    )
    return fields_of(facts)


def own_limit(worker: Worker) -> int | None:
    """Return what `dask worker --memory-limit` says, None for none."""
    limit = getattr(worker.memory_manager, "memory_limit", None)
    return int(limit) if limit else None

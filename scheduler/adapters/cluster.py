"""Dask on the driver's side: a LocalCluster of our own, or an existing cluster.

Turns attempts into tasks pinned to one worker, Dask's events into ours, and reports every attempt's end exactly once,
whatever Dask does with the task. Knows neither memory nor studies.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker
from typing import Any

import dask
from distributed import Client, Future, LocalCluster, SchedulerPlugin, Security
from distributed.comm import CommClosedError
from distributed.core import rpc

from scheduler.adapters import credentials
from scheduler.model import ExitReason, HeadroomError, Json, Outcome, UsageError

CONNECT_TIMEOUT_S = 10.0
START_TRIES = 3

# Dask must neither judge our workers by their memory (it sees only their RSS) nor run an attempt a second time; and a
# worker whose host swaps must not be declared dead because its heartbeat is late.
DASK_CONFIG = {
    "distributed.scheduler.allowed-failures": 0,
    "distributed.scheduler.worker-ttl": "30 minutes",
    "distributed.scheduler.work-stealing": False,
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
    "distributed.admin.tick.limit": "30s",
    "distributed.worker.http.routes": [],  # what our own worker would tell anybody who asks; nothing of ours reads it
}
NO_PAGES: dict[str, Any] = {"distributed.scheduler.http.routes": []}

OnEnd = Callable[[str, Outcome], None]
OnMessage = Callable[[Json], None]


def check(address: str, security: Security | None = None) -> None:
    """Raise UsageError unless a Dask scheduler answers at `address` within 10 s. security: None as for `connect`."""
    arguments = (security or Security()).get_connection_args("client")

    async def ask() -> None:
        # Not a Client: one that reaches a port where nobody ever answers hangs, whatever its own timeout says.
        connection = rpc(address, timeout=CONNECT_TIMEOUT_S, connection_args=arguments)
        async with asyncio.timeout(CONNECT_TIMEOUT_S), connection as scheduler:
            await scheduler.identity(n_workers=0)

    # MemoryError: another kind of server (the dashboard's port) whose answer is read as the length of a message.
    try:
        asyncio.run(ask())
    except (OSError, TimeoutError, ValueError, AttributeError, CommClosedError, MemoryError) as error:
        raise UsageError(
            f"--cluster {address}: no Dask scheduler answers there within {CONNECT_TIMEOUT_S:.0f} s "
            f"({credentials.explained(error)}); start one with `dask scheduler`, or leave --cluster out to run on this "
            "machine"
        ) from error


class Cluster:
    """A connected cluster. `on_message` and `on_end` are called from Dask's threads: they may only enqueue."""

    def __init__(self, client: Client, local: LocalCluster | None, topic: str) -> None:
        self._client, self._local, self._topic = client, local, topic
        self._inflight: dict[str, tuple[Future, str]] = {}
        self._gone: set[str] = set()  # workers that left: a task pinned to one would wait for ever
        self._lock = threading.Lock()
        self._couriers = ThreadPoolExecutor(4, thread_name_prefix="headroom-courier")
        self._on_end: OnEnd = lambda attempt, outcome: None
        self._on_message: OnMessage = lambda message: None
        self._closing = False
        self._wants_dashboard = True

    @classmethod
    def local(cls, *, slots: int, memory_bytes: int, topic: str, dashboard: str | None, scratch: str) -> Cluster:
        """One worker process on this machine with `slots` threads; memory_bytes: the limit its dashboard shows.

        Its scheduler, nanny and worker listen on loopback and let in nobody but us. dashboard: host:port, None: none.
        """
        dask.config.set(DASK_CONFIG)
        security = credentials.of_our_own()
        for tries_left in reversed(range(START_TRIES)):
            try:
                with _deaf_to_the_terminal(), dask.config.set({} if dashboard else NO_PAGES):
                    local = LocalCluster(
                        n_workers=1,
                        threads_per_worker=slots,
                        processes=True,
                        host="127.0.0.1",
                        memory_limit=memory_bytes,
                        security=security,
                        dashboard_address=dashboard or "127.0.0.1:0",
                        scheduler_kwargs={
                            "dashboard": dashboard is not None
                        },  # else bokeh's pages are there all the same
                        local_directory=scratch,
                        silence_logs=50,
                    )
                break
            except RuntimeError as error:  # its nanny replaces a worker that dies, but not one that dies while starting
                if not tries_left:
                    why = error.__cause__ or error
                    raise HeadroomError(
                        f"Dask's worker process does not start ({type(why).__name__}: {why}); is there enough memory, "
                        "and do processes of `python -m multiprocessing` work here?"
                    ) from error
        cluster = cls(Client(local, set_as_default=False), local, topic)
        cluster._wants_dashboard = dashboard is not None
        return cluster

    @classmethod
    def connect(cls, address: str, *, topic: str, security: Security | None = None) -> Cluster:
        """An existing cluster. security: None for Dask's own configuration. Raises UsageError: it does not answer."""
        dask.config.set(DASK_CONFIG)
        try:
            client = Client(address, timeout=CONNECT_TIMEOUT_S, set_as_default=False, security=security)
        except (OSError, TimeoutError, ValueError) as error:
            why = credentials.explained(error)
            raise UsageError(f"--cluster {address}: no Dask scheduler answers ({why})") from error
        return cls(client, None, topic)

    @property
    def dashboard(self) -> str | None:
        """Address of the Dask dashboard, None when it is off."""
        if self._local is not None and not self._wants_dashboard:
            return None  # Dask listens there all the same, and answers 404 to everything
        with contextlib.suppress(Exception):
            if self._client.scheduler_info(n_workers=0)["services"].get("dashboard"):
                return str(self._client.dashboard_link)
        return None

    @property
    def is_connected(self) -> bool:
        """False once the scheduler is gone (the client then tries to reconnect)."""
        return self._client.status == "running"

    @property
    def is_lost(self) -> bool:
        """True once the client has given up reconnecting."""
        return self._client.status in ("closing", "closed")

    def start(self, agent: Any, on_message: OnMessage, on_end: OnEnd) -> None:
        """Subscribe, then put the agent on every worker there is and will be."""
        self._on_message, self._on_end = on_message, on_end
        self._agent_name = agent.name
        self._join = lambda: self._put(agent)
        self._join()

    def rejoin(self) -> None:
        """The scheduler is back, maybe a new one: what `start` did there is done again."""
        self._couriers.submit(self._join)

    def _put(self, agent: Any) -> None:
        self._client.subscribe_topic(self._topic, lambda event: self._on_message(dict(event[1])))
        self._client.subscribe_topic("all", self._on_cluster_event)
        if self._local is None:
            self._client.register_plugin(_reaper(self._client.id, agent.name))
        self._client.register_plugin(agent, name=agent.name)

    def install(self, plugin: Any) -> None:
        """Put a plugin on the Dask scheduler. Raises OSError when that is out of reach, else what the plugin raised."""
        self._client.register_plugin(plugin)

    def publish(self, topic: str, message: Json) -> None:
        """Raise an event on the Dask scheduler; blocks until it has it."""
        self._client.log_event(topic, message)

    def ask_workers(self, function: Callable[..., Json], timeout_s: float) -> list[Json]:
        """`function()` on every worker there is, waiting for the first one. Raises UsageError when it cannot run."""
        try:
            self._client.wait_for_workers(1, timeout=timeout_s)
            answers: dict[str, Json] = self._client.run(function)
        except TimeoutError:
            raise UsageError(
                f"the cluster has no worker after {timeout_s:.0f} s; start one with `dask worker ADDRESS`"
            ) from None
        except Exception as error:  # whatever a worker of another version or environment raises
            raise UsageError(
                f"a worker of the cluster cannot run Headroom ({type(error).__name__}: {error}); start `dask worker` "
                "in an environment that has it"
            ) from error
        return list(answers.values())

    def submit(self, function: Callable[..., Any], task: Mapping[str, Any], worker: str) -> None:
        """Run `function(task, topic)` on that worker; its end comes through `on_end`, once."""
        attempt = str(task["attempt"])
        try:
            future = self._client.submit(
                function,
                dict(task),
                self._topic,
                key=f"headroom-{self._topic}-{attempt}",
                workers=[worker],
                allow_other_workers=False,
                pure=False,
                retries=0,
            )
        except Exception as error:  # the connection was lost this moment: the same as if it were lost in the next
            self._on_end(attempt, Outcome(reason=ExitReason.LOST, detail=f"not sent: {type(error).__name__}: {error}"))
            return
        with self._lock:
            self._inflight[attempt] = (future, worker)
            gone = worker in self._gone
        if gone:  # it left before this was sent, and its leaving was looked at before this was noted
            self._report(attempt, Outcome(reason=ExitReason.LOST, detail=f"worker {worker} is gone"))
            return
        future.add_done_callback(lambda done: self._on_done(attempt, done))

    def deliver(self, function: Callable[..., Any], worker: str, verb: str, attempt: str, value: Any) -> None:
        """Carry a message to a worker's agent; lost with the worker, which ends the attempt anyway."""

        def carry() -> None:
            with contextlib.suppress(Exception):
                self._client.run(function, self._topic, verb, attempt, value, workers=[worker], on_error="ignore")

        if not self._closing:
            self._couriers.submit(carry)

    def abandon(self, reason: str) -> None:
        """The cluster is gone: report every attempt under way as lost."""
        with self._lock:
            attempts = list(self._inflight)
        for attempt in attempts:
            self._report(attempt, Outcome(reason=ExitReason.LOST, detail=reason))

    def close(self) -> None:
        """Leave. A cluster of our own ends with its worker processes; a foreign one only loses our agent."""
        self._closing = True
        self._couriers.shutdown(wait=False, cancel_futures=True)
        with contextlib.suppress(Exception):
            if self._local is None and self.is_connected:
                self._client.unregister_worker_plugin(self._agent_name)
        with contextlib.suppress(Exception):
            for topic in (self._topic, "all"):
                self._client.unsubscribe_topic(topic)
            self._client.close(timeout=5)
        if self._local is not None:
            with contextlib.suppress(Exception):
                self._local.close(timeout=10)

    # -- Dask's threads -----------------------------------------------------------------------------------------------

    def _on_done(self, attempt: str, future: Future) -> None:
        if future.status == "finished":
            try:
                outcome = Outcome.from_json(future.result(timeout=30))
            except Exception as error:  # the result was on a worker that died before it could be fetched
                outcome = Outcome(reason=ExitReason.LOST, detail=f"result lost: {error}")
        elif future.status == "error":
            error = future.exception(timeout=30)
            outcome = Outcome(reason=ExitReason.LOST, detail=f"{type(error).__name__}: {error}".splitlines()[0])
        else:
            outcome = Outcome(reason=ExitReason.LOST, detail=f"Dask task {future.status}")
        self._report(attempt, outcome)

    def _on_cluster_event(self, event: tuple[float, Any]) -> None:
        message = event[1]
        action = message.get("action") if isinstance(message, dict) else None
        if action not in ("add-worker", "remove-worker"):
            return
        worker = str(message.get("worker"))
        if action == "add-worker":
            with self._lock:
                self._gone.discard(worker)
            return
        self._on_message({"type": "left", "worker": worker})
        with self._lock:
            self._gone.add(worker)
            attempts = [a for a, (_, where) in self._inflight.items() if where == worker]
        # A scheduler with other settings than ours would keep the pinned task waiting for a worker that never returns.
        for attempt in attempts:
            self._report(attempt, Outcome(reason=ExitReason.LOST, detail=f"worker {worker} is gone"))

    def _report(self, attempt: str, outcome: Outcome) -> None:
        with self._lock:
            entry = self._inflight.pop(attempt, None)
        if entry is None:
            return
        if not entry[0].done() and not self._closing:
            self._couriers.submit(entry[0].cancel, force=True)  # never here: this may be the client's own event loop
        self._on_end(attempt, outcome)


def _reaper(client: str, agent: str) -> Any:
    """A plugin for a foreign Dask scheduler: when this client is gone, however it died, its agent goes too.

    Else every worker would keep the agent's spare and watchdog for a driver that never returns, and give them to each
    worker that joins later. The class is local so that it travels by value: that scheduler need not have Headroom.
    """

    class Reaper(SchedulerPlugin):
        name = f"reaper-{agent}"

        def remove_client(self, scheduler: Any, client: str) -> None:
            if client != gone:
                return
            scheduler.plugins.pop(self.name, None)
            if agent in scheduler.worker_plugins:
                scheduler._ongoing_background_tasks.call_soon(scheduler.unregister_worker_plugin, None, agent)

    gone = client
    return Reaper()


@contextlib.contextmanager
def _deaf_to_the_terminal() -> Iterator[None]:
    """Threads and processes begun in here never get Ctrl-C or a hang-up, which a terminal sends to all of a command.

    They are the driver's business: a worker that dies of them takes its trials along before they can checkpoint. What
    the driver itself gets meanwhile is delivered afterwards.
    """
    resource_tracker.ensure_running()  # it would unblock SIGINT in whichever thread starts the first worker
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

"""Dask on the driver's side: a LocalCluster of our own, or an existing cluster.

Keeps the connection (a scheduler that restarts, a cluster of our own that has lost its workers), puts the plugin on
every worker that can use it, and carries frames between driver and agents. Dask runs nothing of ours: a task per
attempt only keeps a thread of the worker. What a frame says, and what becomes of attempts, is `fleet`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any, cast

import dask
from distributed import Client, Future, LocalCluster, Security
from distributed.comm.addressing import parse_address, parse_host_port
from distributed.comm.core import CommClosedError
from distributed.core import rpc

from scheduler.cluster import agent_plugin, credentials, preflight
from scheduler.model import HeadroomError, Json, UsageError

if TYPE_CHECKING:
    from tornado.platform.asyncio import BaseAsyncIOLoop

CONNECT_TIMEOUT_S = 10.0
KNOCK_TIMEOUT_S = 2.0
ANSWER_TIMEOUT_S = 30.0  # of a worker that is asked something
JOIN_TIMEOUT_S = 60.0  # for the workers that are there at the start
LOOK_AGAIN_S = 15.0  # for workers whose coming was missed, and those that could not be used
RETRY_S = 2.0  # between tries to reach a scheduler that is gone
START_TRIES = 5  # three kills, each during the start that followed, once ended a run

REMOVE_TIMEOUT_S = 5.0
StartLocal = Callable[[], LocalCluster]

# Dask must neither judge our workers by their memory (it sees only their RSS) nor run an attempt a second time; and a
# worker whose host swaps must not be declared dead because its heartbeat is late.
DASK_CONFIG = {
    "distributed.scheduler.allowed-failures": 0,
    "distributed.scheduler.worker-ttl": "30 minutes",
    "distributed.scheduler.work-stealing": False,
    # A nanny whose worker dies twice within this is closed for good: by default 15 s, and no worker ever comes back.
    "distributed.deploy.lost-worker-timeout": "365 days",
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
    "distributed.admin.tick.limit": "30s",
    "distributed.worker.http.routes": [],  # what our own worker would tell anybody who asks; nothing of ours reads it
}
NO_PAGES: dict[str, Any] = {"distributed.scheduler.http.routes": []}


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """What hears of the cluster; called from Dask's threads, so it may only take note.

    frame: (worker, text of a frame of an agent). left: a worker is gone. judged: (worker, why it is not used).
    """

    frame: Callable[[str, str], None]
    left: Callable[[str], None]
    judged: Callable[[str, str], None]


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
            f"({_why_not(address, error)}); start one with `dask scheduler`, or leave --cluster out to run on this "
            "machine"
        ) from error


def _why_not(address: str, error: BaseException) -> str:
    """Why no scheduler answers at `address`, in a line. Dask tries until its time is up, and of the last try, which
    that cut short, nothing is known: so the door is knocked at once more, plainly."""
    try:
        host, port = parse_host_port(parse_address(address)[1])
        with socket.create_connection((host, port), timeout=KNOCK_TIMEOUT_S):
            return credentials.explained(error)
    except (OSError, ValueError) as found:
        return credentials.explained(found)


class Cluster:
    """A connected cluster. start_local: makes a cluster of our own, None for somebody else's."""

    def __init__(
        self, client: Client, topic: str, local: LocalCluster | None = None, start_local: StartLocal | None = None
    ) -> None:
        self._client, self._local, self._topic, self._start_local = client, local, topic, start_local
        self._address = str(client.scheduler_info(n_workers=0)["address"])
        self._tasks: dict[str, Future[Any]] = {}
        self._folders: list[str] = []
        self._sending: set[concurrent.futures.Future[Any]] = set()
        self._why_not: dict[str, str] = {}  # worker -> why it is not used
        self._used: set[str] = set()
        self._joining: set[str] = set()
        self._lock = threading.Lock()
        self._reviving: threading.Thread | None = None
        self._look_at = 0.0
        self._closing = False
        self._wants_dashboard = True
        self._subscribed: Any = None  # the connection on which the scheduler was told what we listen to
        self._plugin_config: Json | None = None
        self._security: Security | None = None

    @classmethod
    def local(cls, *, slots: int, memory_bytes: int, topic: str, dashboard: str | None, scratch: str) -> Cluster:
        """One worker process on this machine with `slots` threads; memory_bytes: the limit its dashboard shows.

        Its scheduler, nanny and worker listen on loopback and let in nobody but us. dashboard: host:port, None: none.
        """
        dask.config.set(DASK_CONFIG)
        # Said in a line of ours before the start, and where the dashboard is once it is there.
        warnings.filterwarnings("ignore", message=r"\s*Port \d+ is already in use", module=r"distributed\.")
        security = credentials.of_our_own()

        def start() -> LocalCluster:
            with _terminal_signals_blocked(), dask.config.set({} if dashboard else NO_PAGES):
                return LocalCluster(
                    n_workers=1,
                    threads_per_worker=slots,
                    processes=True,
                    host="127.0.0.1",
                    memory_limit=memory_bytes,
                    security=security,
                    dashboard_address=dashboard or "127.0.0.1:0",
                    scheduler_kwargs={"dashboard": dashboard is not None},  # else bokeh's pages are there all the same
                    local_directory=scratch,
                    silence_logs=50,
                )

        local = _start_with_retries(start)
        cluster = cls(Client(local, set_as_default=False), topic, local, start)
        cluster._wants_dashboard = dashboard is not None
        return cluster

    @classmethod
    def connect(cls, address: str, *, topic: str, security: Security | None = None) -> Cluster:
        """Connect to an existing cluster. security: None for Dask's own configuration.

        Raises UsageError: it does not answer.
        """
        dask.config.set(DASK_CONFIG)
        # A connection that is lost and found again is told in one line of ours; Dask writes a traceback for each try.
        for name in ("distributed.client", "distributed.core"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            client = Client(address, timeout=CONNECT_TIMEOUT_S, set_as_default=False, security=security)
        except (OSError, TimeoutError, ValueError) as error:
            why = credentials.explained(error)
            raise UsageError(f"--cluster {address}: no Dask scheduler answers ({why})") from error
        cluster = cls(client, topic)
        cluster._security = security
        return cluster

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
    def is_subscribed(self) -> bool:
        """Whether the scheduler was told over this very connection what we listen to.

        A scheduler that is killed and started again within a second is reconnected to before anybody sees
        `is_connected` False; the new one tells us nothing until `rejoin`.
        """
        return self._subscribed is not None and self._client.scheduler_comm is self._subscribed

    @property
    def is_ours(self) -> bool:
        """Whether it was started by this driver, and ends with it."""
        return self._start_local is not None

    def start(self, plugin_config: Json, folders: list[str], listener: Listener) -> None:
        """Put the plugin on every worker there is and will be; returns when those that are there have been tried.

        plugin_config: see `AgentPlugin`. folders: what a worker must be able to write to.
        """
        self._plugin_config, self._folders, self._listener = plugin_config, folders, listener
        self._subscribe()
        with contextlib.suppress(TimeoutError, OSError):
            self._call(self._join_all()).result(JOIN_TIMEOUT_S)

    def rejoin(self) -> None:
        """Do again what `start` did there: the scheduler is back, maybe a new one. Called off Dask's threads."""
        with self._lock:
            self._used.clear()
        with contextlib.suppress(Exception):  # gone again: this will be called again
            self._subscribe()
            self._call(self._join_all())

    def tend(self) -> None:
        """Once a second: get the connection back, and look for workers that can be used by now."""
        if self._client.status in ("closing", "closed"):
            self.revive()
        elif self.is_connected and time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + LOOK_AGAIN_S
            self._call(self._join_all())

    def revive(self) -> None:
        """In the background, a new connection, and a new cluster where it is our own.

        Until it is there, `is_connected` is False. Nothing while that is under way.
        """
        if self._closing or (self._reviving is not None and self._reviving.is_alive()):
            return
        self._reviving = threading.Thread(target=self._revive, name="headroom-revive", daemon=True)
        self._reviving.start()

    def _revive(self) -> None:
        if self._local is not None:
            self._take_plugins_off()  # a worker that is closed with its plugin has its attempts leave
        with contextlib.suppress(Exception):
            self._client.close(timeout=2)
        if self._local is not None:
            with contextlib.suppress(Exception):
                self._local.close(timeout=5)
        while not self._closing:
            try:
                if self._start_local is not None:
                    self._local = self._start_local()
                    self._client = Client(self._local, set_as_default=False)
                else:
                    check(self._address, self._security)
                    self._client = Client(
                        self._address, timeout=CONNECT_TIMEOUT_S, set_as_default=False, security=self._security
                    )
                return
            except Exception:  # whatever a scheduler that is just starting or ending answers
                time.sleep(RETRY_S)

    def _take_plugins_off(self) -> None:
        with contextlib.suppress(Exception):
            removals = [self._run(worker, agent_plugin.remove, self._topic) for worker in self._used]
            self._call(_all(removals)).result(REMOVE_TIMEOUT_S)

    def _subscribe(self) -> None:
        self._subscribed = self._client.scheduler_comm  # before: what is said while it is lost does not count
        self._client.subscribe_topic(self._topic, self._on_event)
        self._client.subscribe_topic("all", self._on_cluster_event)

    def install(self, plugin: Any) -> None:
        """Put a plugin on the Dask scheduler. Raises OSError when that is out of reach, else what the plugin raised."""
        self._client.register_plugin(plugin)

    def publish(self, topic: str, message: Json) -> None:
        """Raise an event on the Dask scheduler; blocks until it has it."""
        self._client.log_event(topic, message)

    def ask_workers(
        self, function: Callable[..., Any], timeout_s: float, answer_s: float = ANSWER_TIMEOUT_S
    ) -> list[Json]:
        """Call `function()` on every worker that can use Headroom, waiting for the first one; it may be a coroutine.

        timeout_s: for the first worker; answer_s: for each answer. Raises UsageError when there is none, with the
        reasons.
        """
        self._folders = []
        try:
            self._client.wait_for_workers(1, timeout=timeout_s)
        except TimeoutError:
            raise UsageError(
                f"the cluster has no worker after {timeout_s:.0f} s; start one with `dask worker ADDRESS`"
            ) from None
        workers = list(self._client.scheduler_info(n_workers=-1)["workers"])

        async def ask(worker: str) -> Json | str:
            if (why := await self._why_not_use(worker)) is not None:
                return why
            try:
                return dict(await self._run(worker, function, within_s=answer_s))
            except Exception as error:
                return _told(error)

        async def ask_all() -> list[Json | str]:
            return list(await asyncio.gather(*map(ask, workers)))

        answers = self._call(ask_all()).result()
        if not (found := [answer for answer in answers if isinstance(answer, dict)]):
            why = "; ".join(dict.fromkeys(str(answer) for answer in answers))
            raise UsageError(f"no worker of the cluster can run Headroom: {why}")
        return found

    # -- to the agents ------------------------------------------------------------------------------------------------

    def send(self, worker: str, agent: str, frame: Json) -> None:
        """Carry a frame to an agent by way of a worker; returns at once. It may be lost: whoever sends it says it again
        until it is acknowledged."""
        if self.is_connected and not self._closing:
            sending = self._call(self._run(worker, agent_plugin.deliver, self._topic, agent, frame))
            self._sending.add(sending)
            sending.add_done_callback(self._sending.discard)

    def occupy(self, attempt: str, worker: str) -> None:
        """Keep a thread of the worker until the attempt has ended; where that fails, nothing else does."""
        function, *arguments = agent_plugin.occupation(self._topic, attempt)
        with contextlib.suppress(Exception):
            self._tasks[attempt] = self._client.submit(
                function,
                *arguments,
                key=f"headroom-{self._topic}-{attempt}",
                workers=[worker],
                allow_other_workers=False,
                pure=False,
                retries=0,
            )

    def vacate(self, attempt: str) -> None:
        """Free the thread of an attempt that has ended."""
        if (task := self._tasks.pop(attempt, None)) is not None and not self._closing:
            self._call(_cancelled(task))

    def close(self) -> None:
        """Leave. A cluster of our own ends with its worker processes; a foreign one only loses our plugin."""
        self._closing = True
        concurrent.futures.wait(list(self._sending), timeout=REMOVE_TIMEOUT_S)
        if self._local is None and self.is_connected:
            self._take_plugins_off()
        with contextlib.suppress(Exception):
            for topic in (self._topic, "all"):
                self._client.unsubscribe_topic(topic)
            self._client.close(timeout=5)
        if self._local is not None:
            with contextlib.suppress(Exception):
                self._local.close(timeout=10)

    # -- on Dask's event loop -----------------------------------------------------------------------------------------

    def _call(self, coroutine: Coroutine[Any, Any, Any]) -> concurrent.futures.Future[Any]:
        """Run it on the client's event loop. A worker that does not answer then holds up nothing but its own call."""
        try:
            loop = cast("BaseAsyncIOLoop", self._client.loop)
            return asyncio.run_coroutine_threadsafe(coroutine, loop.asyncio_loop)
        except RuntimeError as error:  # the loop is gone with its client
            coroutine.close()
            failed: concurrent.futures.Future[Any] = concurrent.futures.Future()
            failed.set_exception(OSError(str(error)))
            return failed

    async def _run(
        self, worker: str, function: Callable[..., Any], *arguments: Any, within_s: float = ANSWER_TIMEOUT_S
    ) -> Any:
        """`function(*arguments)` on that worker. Raises what it raises, OSError or TimeoutError."""
        client = self._client
        async with asyncio.timeout(within_s):
            # Called on its own loop, the client's `run` gives a coroutine.
            return (await client.run(function, *arguments, workers=[worker]))[worker]

    async def _join_all(self) -> None:
        if (scheduler := self._client.scheduler) is None:  # closed meanwhile
            return
        found = await scheduler.identity(n_workers=-1)
        await asyncio.gather(*(self._join(worker) for worker in found["workers"]))

    async def _join(self, worker: str) -> None:
        """Ask a worker, and put the plugin on it if it can use it. Nothing of ours is sent to one that cannot."""
        with self._lock:
            if worker in self._used or worker in self._joining or self._plugin_config is None:
                return
            self._joining.add(worker)
        try:
            why = await self._why_not_use(worker)
            if why is None:
                try:
                    await self._run(worker, agent_plugin.install, self._plugin_config)
                except Exception as error:
                    why = _told(error)
            with self._lock:
                before = self._why_not.pop(worker, None)
                if why is None:
                    self._used.add(worker)
                else:
                    self._why_not[worker] = why
            if why is not None and why != before:
                self._listener.judged(worker, why)
        finally:
            with self._lock:
                self._joining.discard(worker)

    async def _why_not_use(self, worker: str) -> str | None:
        try:
            function, *arguments = preflight.question(self._folders)
            return preflight.judge(await self._run(worker, function, *arguments))
        except Exception as error:
            return _told(error)

    def _on_event(self, event: tuple[float, Any]) -> None:
        message = event[1]
        if isinstance(message, dict) and isinstance(message.get("frame"), str):
            self._listener.frame(str(message.get("worker")), message["frame"])

    def _on_cluster_event(self, event: tuple[float, Any]) -> None:
        message = event[1]
        action = message.get("action") if isinstance(message, dict) else None
        if action not in ("add-worker", "remove-worker") or self._closing:
            return
        worker = str(message.get("worker"))
        if action == "add-worker":
            self._call(self._join(worker))
            return
        with self._lock:
            self._used.discard(worker)
            self._why_not.pop(worker, None)
        self._listener.left(worker)


def _told(error: Exception) -> str:
    """Why a worker that was asked something cannot be used."""
    if isinstance(error, TimeoutError):
        return f"it does not answer within {ANSWER_TIMEOUT_S:.0f} s"
    return f"{type(error).__name__}: {error}".splitlines()[0]


async def _all(coroutines: list[Coroutine[Any, Any, Any]]) -> None:
    await asyncio.gather(*coroutines, return_exceptions=True)


async def _cancelled(task: Future[Any]) -> None:
    with contextlib.suppress(Exception):
        await task.cancel(force=True)


def _start_with_retries(start: StartLocal) -> LocalCluster:
    """Try several times: a nanny replaces a worker that dies, but not one that dies while starting."""
    for tries_left in reversed(range(START_TRIES)):
        try:
            return start()
        except RuntimeError as error:
            if not tries_left:
                why = error.__cause__ or error
                raise HeadroomError(
                    f"Dask's worker process does not start ({type(why).__name__}: {why}); is there enough memory, "
                    "and do processes of `python -m multiprocessing` work here?"
                ) from error
    raise AssertionError("the last try returns or raises")


@contextlib.contextmanager
def _terminal_signals_blocked() -> Iterator[None]:
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

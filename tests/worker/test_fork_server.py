"""Trial processes off a fork server: whose children they are, how their ends are told, what they do not share, and
where none is forked."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from scheduler.worker import fork_server, launch
from scheduler.worker.fork_server import ForkServer, NoForkServer
from scheduler.worker.trial_maker import TrialMaker, why_not_forked
from scheduler.worker.trial_process import TrialProcess, TrialStartError
from tests.waiting import wait_until
from training import footprint, runtime

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the fork server is Linux's")
Making = Callable[..., TrialMaker]
PR_GET_CHILD_SUBREAPER = 37
FUNCTIONS = """
    import os, random, resource, signal, sys, threading
    from pathlib import Path

    def value(task, progress):
        return 0.5

    def leave(task, progress):
        os._exit(task["params"]["status"])

    def die(task, progress):
        if task["params"]["signal"] != signal.SIGKILL:
            signal.signal(task["params"]["signal"], signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.kill(os.getpid(), task["params"]["signal"])

    def wait(task, progress):
        progress.report(1, 0.25)
        while not os.path.exists(task["params"]["until"]):
            progress.tick()
        os._exit(7)

    def describe(task, progress):
        links = {n: os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
                 if os.path.lexists(f"/proc/self/fd/{n}")}
        return {
            "value": 0.0,
            "session": os.getsid(0) == os.getpid() == os.getpgid(0),
            "parent": os.getppid(),
            "threads": sorted(thread.name for thread in threading.enumerate()),
            "open": sorted(links.values()),
            "stdin": sys.stdin.read(),
            "oom_score_adj": int(Path("/proc/self/oom_score_adj").read_text()),
            "mark": os.environ.get("MARK"),
            "name": Path("/proc/self/comm").read_text().strip(),
        }

    def draw(task, progress):
        import numpy
        return {"value": 0.0, "python": random.random(), "numpy": float(numpy.random.random())}
"""

CUDA = """
    import sys, types
    torch = sys.modules["torch"] = types.ModuleType("torch")
    torch.__version__ = "0"
    yes, no, none = (lambda: True), (lambda: False), (lambda: 0)
    torch.cuda = types.SimpleNamespace(is_initialized=yes, is_available=no, max_memory_reserved=none)
    torch.backends = types.SimpleNamespace(mps=types.SimpleNamespace(is_available=lambda: False))
"""
OF_OTHERS = """
    control.send(json.dumps({"unfit": None, "shared_bytes": 0}).encode())
    control.recv(9)
    control.send(b'{"pid": 1}')
    signal.pause()
"""


@pytest.fixture
def making(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Making]:
    """Make makers: with modules that are imported first, some of them written here. What they start ends with it."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "functions.py").write_text(textwrap.dedent(FUNCTIONS))
    made: list[TrialMaker] = []

    def make(
        preload: tuple[str, ...] | None = (), *, fork: bool = True, threads: int = 1, mark: str = "", **modules: str
    ) -> TrialMaker:
        for name, text in modules.items():
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        made.append(
            TrialMaker(
                environment=lambda: {**runtime.environment({"threads": threads}), "MARK": mark},
                scratch=tmp_path / "scratch",
                preload=preload,
                why_not_forked=None if fork else "the test wants it so",
            )
        )
        return made[-1]

    yield make
    for maker in made:
        maker.close()


def begin(maker: TrialMaker, folder: Path, function: str, **params: Any) -> TrialProcess:
    """A process of this maker at work."""
    process = maker()
    process.wait_ready(120)
    context = {"seed": 0, "device": "cpu", "early_stopping": {"patience": 10, "min_delta": 0.001}, "max_steps": 6}
    process.send(
        {
            "protocol": 1, "attempt": "s/0/1", "objective": function, "params": params, "context": context,
            "folder": str(folder / str(process.pid)), "resume_from": None, "threads": 1,
        }
    )  # fmt: skip
    return process


def result(process: TrialProcess) -> dict[str, Any]:
    """What it returned, all of it; it has ended well."""
    *_, last = process.messages()
    assert process.close() == 0, last
    assert last["type"] == "result", last
    found: dict[str, Any] = last["result"]
    return {**found, **found.get("metrics", {})}


def server_of(maker: TrialMaker) -> psutil.Process:
    """Its server's process."""
    assert maker._server is not None and maker._server.pid is not None
    return psutil.Process(maker._server.pid)


def test_a_forked_process_is_ours_and_has_everything_for_its_own(making: Making, tmp_path: Path) -> None:
    """It is the agent's child, in a session of its own, with nothing of the server's open and no thread but its own;
    it says that it was forked."""
    maker = making(mark="x")
    process = maker()
    assert (process.wait_ready(60).environment or "").endswith("/forked")
    process.close()
    found = result(begin(maker, tmp_path, "functions:describe"))
    assert found["session"] and found["parent"] == os.getpid()
    assert found["threads"] == ["MainThread", "stdin"]
    pipes = [link for link in found["open"] if link.startswith("pipe:")]
    assert len(pipes) == 4  # commands, messages, and its output twice: stdout goes where stderr goes
    assert not [link for link in found["open"] if link.startswith("socket:") or link.endswith(".log")]
    assert (found["stdin"], found["oom_score_adj"], found["mark"], found["name"]) == ("", 500, "x", "trial")
    assert maker.why_not_forked is None


@pytest.mark.parametrize(
    ("function", "params", "status"),
    [
        ("value", {}, 0),
        ("leave", {"status": 7}, 7),
        ("die", {"signal": signal.SIGSEGV}, -signal.SIGSEGV),
        ("die", {"signal": signal.SIGKILL}, -signal.SIGKILL),
        ("die", {"signal": signal.SIGTERM}, -signal.SIGTERM),
    ],
)
def test_each_end_is_told_as_that_of_one_that_was_started(
    making: Making, tmp_path: Path, function: str, params: dict[str, int], status: int
) -> None:
    """The exit code or the signal, whichever way the process came to be."""
    ends = []
    for fork in (True, False):
        process = begin(making(fork=fork), tmp_path, f"functions:{function}", **params)
        list(process.messages())
        ends.append(process.close())
    assert ends == [status, status]


def test_the_death_of_the_server_costs_a_trial_nothing(making: Making, tmp_path: Path) -> None:
    """What it has forked runs on, its end is told as ever, and the next process comes from a new server."""
    maker, until = making(), tmp_path / "until"
    process = begin(maker, tmp_path, "functions:wait", until=str(until))
    messages = process.messages()
    while next(messages)["type"] != "progress":
        pass
    before = server_of(maker)
    before.kill()
    wait_until(lambda: not before.is_running(), "the server has been waited for")
    assert process.exit_status is None
    until.touch()
    list(messages)
    assert process.close() == 7
    assert result(begin(maker, tmp_path, "functions:value"))["value"] == 0.5
    assert server_of(maker).pid != before.pid and maker.why_not_forked is None


def test_a_server_that_was_of_use_is_replaced_before_it_is_asked(
    making: Making, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next trial need not wait for its imports."""
    monkeypatch.setattr(fork_server, "STEADY_S", 0.0)
    maker = making()
    maker().kill()
    before = server_of(maker).pid
    os.kill(before, signal.SIGKILL)
    server = maker._server
    assert server is not None
    wait_until(lambda: server.pid not in (None, before), "another server is there")


def test_a_stopped_server_is_ended_and_replaced(making: Making, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not answer is no reason to wait for ever."""
    monkeypatch.setattr(fork_server, "ANSWER_TIMEOUT_S", 0.5)
    maker = making()
    maker().kill()
    before = server_of(maker)
    before.suspend()
    process = maker()
    process.wait_ready(60)
    assert process.close() == 0 and server_of(maker).pid != before.pid


def test_dropped_and_closed_it_is_gone(making: Making) -> None:
    """Its memory is free; dropped, the next process brings it back, closed, processes are started one by one."""
    maker = making()
    maker().kill()
    server = server_of(maker)
    maker.drop()
    wait_until(lambda: not server.is_running(), "the server is gone")
    maker().kill()
    server = server_of(maker)
    maker.close()
    assert not server.is_running()
    process = maker()
    assert not (process.wait_ready(60).environment or "").endswith("/forked")
    process.close()


def test_orphans_are_adopted_for_the_fork_only(making: Making) -> None:
    """What a trial leaves behind goes to init, as ever, and does not stay here as a zombie."""
    making()().kill()
    adopts = ctypes.c_int(-1)
    ctypes.CDLL(None).prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(adopts), 0, 0, 0)
    assert adopts.value == 0


def test_the_server_keeps_nothing_open_of_what_it_forks(making: Making) -> None:
    """Whoever reads a trial's pipes sees their end with the trial's."""
    maker = making()
    maker().close()
    before = server_of(maker).num_fds()
    for _ in range(3):
        maker().close()
    assert server_of(maker).num_fds() == before


def test_the_server_dies_with_whoever_started_it(tmp_path: Path) -> None:
    """Also while it imports, when it hears nothing: SIGKILL to the agent leaves no process behind."""
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(600)\n")
    agent = """
        import sys, time
        from pathlib import Path
        import threading
        from scheduler.worker.trial_maker import TrialMaker
        maker = TrialMaker(environment=dict, scratch=Path(sys.argv[1]), preload=["slow"], why_not_forked=None)
        threading.Thread(target=maker, daemon=True).start()
        while maker._server.pid is None:
            time.sleep(0.01)
        print(maker._server.pid, flush=True)
        time.sleep(600)
    """
    started = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(agent), str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(tmp_path)])},
    )
    assert started.stdout is not None
    server = psutil.Process(int(started.stdout.readline()))
    wait_until(lambda: server.name() == "fork-server", "the server has asked to die with it")
    started.kill()
    started.wait()
    wait_until(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE, "the server is gone")


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import threading, time; threading.Thread(target=time.sleep, args=(600,), daemon=True).start()", "1 threads"),
        ("import socket; kept = socket.socket()", "1 files or connections open"),
        ("kept = open(__file__)", "1 files or connections open"),
        (CUDA, "initialised CUDA"),
    ],
    ids=["a thread", "a connection", "a file", "CUDA"],
)  # fmt: skip
def test_what_cannot_be_forked_is_started(
    making: Making, tmp_path: Path, capfd: pytest.CaptureFixture[str], code: str, why: str
) -> None:
    """The trial runs all the same, the reason is told once, and the server does not stay."""
    maker = making(("imported",), imported=code)
    for _ in range(2):
        process = begin(maker, tmp_path, "functions:value")
        assert not (process.ready.environment or "").endswith("/forked")
        assert result(process)["value"] == 0.5
    assert why in (maker.why_not_forked or "")
    assert capfd.readouterr().err.count(why) == 1
    assert maker._server is not None and maker._server.pid is None


def test_what_cannot_be_imported_is_told_by_the_process(making: Making) -> None:
    """As without a server: with the last line it wrote."""
    with pytest.raises(TrialStartError, match=r"No module named .*not_there"):
        making(("not_there",))().wait_ready(60)


def test_threads_of_openblas_are_no_reason_not_to_fork(making: Making, tmp_path: Path) -> None:
    """It starts them with numpy, ends them for a fork, and makes them again."""
    maker = making(("numpy",), threads=2)
    process = begin(maker, tmp_path, "functions:draw")
    assert (process.ready.environment or "").endswith("/forked"), maker.why_not_forked
    result(process)


def test_forked_processes_draw_different_numbers(making: Making, tmp_path: Path) -> None:
    """Python's and numpy's own generators, which in a started process begin somewhere else each time."""
    maker = making(("numpy",))
    first, second = (result(begin(maker, tmp_path, "functions:draw")) for _ in range(2))
    assert first["python"] != second["python"] and first["numpy"] != second["numpy"]


def test_losses_are_those_of_a_started_process(making: Making, tmp_path: Path) -> None:
    """A real training, to the last digit, one after the other off the same server too."""
    params = {"d_model": 16, "n_layers": 1, "n_heads": 2, "d_ff": 32, "dropout": 0.1, "learning_rate": 1e-3}
    params |= {"weight_decay": 1e-3, "warmup_steps": 5, "epochs": 2, "micro_batch": 128, "accumulation_steps": 2}
    found = []
    for maker, times in ((making(None), 2), (making(None, fork=False), 1)):
        for _ in range(times):
            process = begin(maker, tmp_path, "training.hpo:objective", **params)
            losses = [message["value"] for message in process.messages() if message["type"] == "progress"]
            assert process.close() == 0
            found.append(losses)
    assert found[0] and found[0] == found[1] == found[2]


@pytest.mark.parametrize("threads", [1, 2])
def test_the_estimate_covers_a_forked_process(making: Making, tmp_path: Path, threads: int) -> None:
    """By what it held when it was ready, and what it has yet to map of the libraries; its family says how it began."""
    params = {"d_model": 64, "n_layers": 2, "n_heads": 4, "d_ff": 128, "dropout": 0.1, "learning_rate": 1e-3}
    params |= {"weight_decay": 1e-3, "warmup_steps": 5, "epochs": 1, "micro_batch": 32, "accumulation_steps": 1}
    process = begin(making(None, threads=threads), tmp_path, "training.hpo:objective", **params)
    ready = process.ready
    where = {"runtime_bytes": ready.rss_bytes, "environments": [ready.environment], "threads": threads}
    *_, last = process.messages()
    process.close()
    predicted = footprint.estimate(params, where)
    assert str(last["environment"]).endswith("/forked") and last["environment"] == ready.environment
    assert last["peak_bytes"] <= predicted["host_bytes"] <= 1.1 * last["peak_bytes"]
    assert process.shared_bytes < (ready.rss_bytes or 0)


@pytest.fixture
def answering(tmp_path: Path) -> Iterator[Callable[[str], ForkServer]]:
    """Make a fork server of other code: it has the socket as `control`."""
    made: list[ForkServer] = []

    def of(code: str) -> ForkServer:
        (tmp_path / "stand_in.py").write_text(
            "import json, os, signal, socket\ncontrol = socket.socket(fileno=0)\n" + textwrap.dedent(code)
        )

        def start(control: socket.socket) -> subprocess.Popen[bytes]:
            return launch.start("stand_in", (), {"PYTHONPATH": str(tmp_path)}, stdin=control)

        made.append(ForkServer(start))
        return made[-1]

    yield of
    for server in made:
        server.close()


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("raise SystemExit(3)", "ended with status 3"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "3 servers were killed"),
        (OF_OTHERS, "does not give this process its orphans"),
    ],
    ids=["it ends", "it is killed", "no orphans"],
)  # fmt: skip
def test_no_server_is_told_as_that(answering: Callable[[str], ForkServer], code: str, why: str) -> None:
    """Whoever asks goes on without one."""
    with pytest.raises(NoForkServer, match=why):
        answering(code).fork()


def test_no_process_to_be_had_is_the_hosts_fault(answering: Callable[[str], ForkServer]) -> None:
    """A fork that fails in the server fails as it would here."""
    said = json.dumps({"errno": 11})
    server = answering(OF_OTHERS.replace('{"pid": 1}', said))
    with pytest.raises(BlockingIOError):
        server.fork()


def test_where_it_is_known_beforehand_no_server_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switched off, on another system, on a device."""
    assert why_not_forked(wanted=True, device="cpu") is None
    assert why_not_forked(wanted=False, device="cpu") == "training.fork is off"
    assert "cuda" in (why_not_forked(wanted=True, device="cuda") or "")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "darwin" in (why_not_forked(wanted=True, device="cpu") or "")

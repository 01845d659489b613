"""What the crash tests share: a run in a folder of its own, its processes found by a mark, killed by identity.

Every process of a run inherits the variable CRASH_RUN with the folder's name, whatever becomes of its parent: so
"no process of ours is left" is a question that /proc answers. Only such processes are ever signalled. Linux.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from scheduler.host import vitals
from tests.waiting import free_port, until

REPO = Path(__file__).resolve().parents[2]
TINY = "tests.faults.tiny"
SETTINGS: dict[str, Any] = {
    "name": "crash",
    "budgets": ["2M", "20M", "200M", "2B"],
    "horizons": [1, 3, 5],
    "trials": 2,
    "max_epochs": 10,
    "threads": 1,
    "slots": 2,
    "pruner": "none",
    "dashboard": "off",
    "max_retries": 100,
    "training": {
        "objective": f"{TINY}:objective",
        "sample": f"{TINY}:sample",
        "candidates": f"{TINY}:candidates",
        "estimate": f"{TINY}:estimate",
        "micro_batch": None,
        "check_data": None,
        "preload": [],
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A process of a run. role: driver, worker, nanny, scheduler, agent, watchdog, trial (at work), spare, fork server,
    or other."""

    pid: int
    start: float
    role: str

    @property
    def lives(self) -> bool:
        """Is this very process there, and no zombie?"""
        found = vitals.system.process(self.pid)
        return found is not None and found.start == self.start and found.state not in "ZX"

    def kill(self, number: int = signal.SIGKILL) -> bool:
        """Signal it, if it is still the same one; False when it is gone."""
        if not self.lives:
            return False
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True


class Sandbox:
    """One run folder, its registry, and everything that was started for it. A context manager that ends it all."""

    def __init__(self, root: Path, **settings: Any) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        self.settings = {**SETTINGS, **settings}
        self.settings["training"] = {**SETTINGS["training"], **settings.get("training", {})}
        self.config = root / "settings.yaml"
        self.config.write_text(yaml.safe_dump(self.settings))
        self.epochs_file = root / "epochs.jsonl"
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("HEADROOM_")},
            "HEADROOM_HOST_DIR": str(root / "host"),
            "CRASH_RUN": str(root),
            "CRASH_EPOCHS": str(self.epochs_file),
            "DASK_DISTRIBUTED__DIAGNOSTICS__NVML": "False",
        }
        self.started: list[subprocess.Popen[Any]] = []
        self.starts = 0
        self.cgroup: Path | None = None  # what is started runs in it
        self.network: Network | None = None  # workers run in it

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *error: object) -> None:
        self.end_all()

    # -- starting ---------------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.root / "runs" / str(self.settings["name"])

    @property
    def database(self) -> Path:
        """The study database, where it is the default one."""
        return self.folder / "study.db"

    def command(self, *arguments: str) -> list[str]:
        """The command line of a driver."""
        base = [sys.executable, "-m", "scheduler", "--config", str(self.config), "--runs-dir", str(self.root / "runs")]
        return [*base, *arguments]

    def start(self, *arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[Any]:
        """Start a driver without a terminal; its output goes to driver.<n>.log in the root."""
        self.starts += 1
        with open(self.log, "wb") as log:
            return self.spawn(self.command(*arguments), log, environment)

    @property
    def log(self) -> Path:
        """The output of the driver that was started last."""
        return self.root / f"driver.{self.starts}.log"

    def spawn(
        self, command: list[str], output: Any, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[Any]:
        """Start a marked process in a session of its own."""
        if self.cgroup is not None:
            command = ["sh", "-c", f'echo $$ > {self.cgroup}/cgroup.procs && exec "$@"', "sh", *command]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=REPO,
            env={**self.environment, **(environment or {})},
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def start_cluster(self, workers: int = 1) -> tuple[str, subprocess.Popen[Any], list[subprocess.Popen[Any]]]:
        """A Dask scheduler and workers as a user starts them by hand: (address, scheduler, nannies)."""
        port = free_port()
        address = f"tcp://{self.host}:{port}"
        scheduler = self.start_scheduler(port)
        return address, scheduler, [self.start_worker(address) for _ in range(workers)]

    @property
    def host(self) -> str:
        """Where the Dask scheduler listens: on the loopback, or where the workers' network reaches it."""
        return "127.0.0.1" if self.network is None else self.network.outside

    def start_scheduler(self, port: int) -> subprocess.Popen[Any]:
        """`dask scheduler`."""
        arguments = ["--host", self.host, "--port", str(port), "--no-dashboard"]
        with open(self.root / "scheduler.log", "ab") as log:
            return self.spawn([sys.executable, "-m", "dask", "scheduler", *arguments], log)

    def start_worker(self, address: str, memory_limit: str = "0") -> subprocess.Popen[Any]:
        """`dask worker` with a nanny."""
        arguments = [address, "--nworkers", "1", "--nthreads", "2", "--memory-limit", memory_limit, "--no-dashboard"]
        arguments += ["--local-directory", str(self.root / "dask")]
        within = [] if self.network is None else self.network.enter
        with open(self.root / "worker.log", "ab") as log:
            return self.spawn([*within, sys.executable, "-m", "dask", "worker", *arguments], log)

    # -- looking ----------------------------------------------------------------------------------------------------

    def processes(self) -> list[Process]:
        """Every living process that carries this run's mark."""
        mark = b"CRASH_RUN=" + os.fsencode(self.root) + b"\0"
        working = set(self._registered())
        found = []
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            with contextlib.suppress(OSError):
                if mark not in Path(f"/proc/{entry}/environ").read_bytes():
                    continue
                words = Path(f"/proc/{entry}/cmdline").read_bytes().decode(errors="replace").split("\0")
                seen = vitals.system.process(int(entry))
                if seen is None or seen.state in "ZX":
                    continue
                role = _role(words)
                if role == "spare" and int(entry) in working:
                    role = "trial"
                elif role == "spare" and Path(f"/proc/{entry}/comm").read_bytes() == b"fork-server\n":
                    role = "fork server"  # what it forks has its command line
                found.append(Process(pid=int(entry), start=seen.start, role=role))
        return found

    def of_role(self, role: str) -> list[Process]:
        """Those of one role."""
        return [process for process in self.processes() if process.role == role]

    def _registered(self) -> Iterator[int]:
        for registration in self._registrations():
            yield int(registration["pid"])

    def _registrations(self) -> Iterator[dict[str, Any]]:
        with contextlib.suppress(OSError):
            for path in (self.root / "host" / "attempts").glob("*.json"):
                with contextlib.suppress(OSError, ValueError):
                    yield json.loads(path.read_text())

    def alive_attempts(self) -> list[str]:
        """The attempts of this run that the host registry has and whose process is there."""
        found = []
        for registration in self._registrations():
            process = Process(pid=registration["pid"], start=registration["start_time"], role="trial")
            if Path(registration["folder"]).is_relative_to(self.folder) and process.lives:
                found.append(registration["attempt"])
        return found

    def rival(self) -> Sandbox:
        """Another run on the same host and studies; its processes are found and ended with those of this one."""
        other = Sandbox(self.root / "rival", **{**self.settings, "storage": f"sqlite:///{self.database}"})
        other.environment |= {key: self.environment[key] for key in ("HEADROOM_HOST_DIR", "CRASH_RUN", "CRASH_EPOCHS")}
        other.started = self.started
        return other

    def journal(self) -> list[dict[str, Any]]:
        """The whole lines of the journal."""
        return read_lines(self.folder / "journal.jsonl")

    def epochs(self) -> list[dict[str, Any]]:
        """What the trials noted of their epochs."""
        return read_lines(self.epochs_file)

    def events(self, name: str) -> list[dict[str, Any]]:
        """The journal's lines of one name."""
        return [record for record in self.journal() if record["event"] == name]

    def done(self) -> int:
        """Epochs that were trained so far."""
        return sum(line["what"] == "done" for line in self.epochs())

    def trials(self, database: Path | None = None) -> list[dict[str, Any]]:
        """Every trial in the study database, read without the code under test."""
        connection = sqlite3.connect(f"file:{database or self.database}?mode=ro", uri=True, timeout=30)
        with contextlib.closing(connection):
            rows = connection.execute(
                "SELECT t.trial_id, s.study_name, t.number, t.state FROM trials t JOIN studies s USING (study_id)"
            ).fetchall()
            attrs: dict[int, dict[str, Any]] = {}
            for trial_id, key, value in connection.execute(
                "SELECT trial_id, key, value_json FROM trial_user_attributes"
            ):
                attrs.setdefault(trial_id, {})[key] = json.loads(value)
            params: dict[int, dict[str, float]] = {}
            for trial_id, name, value in connection.execute(
                "SELECT trial_id, param_name, param_value FROM trial_params"
            ):
                params.setdefault(trial_id, {})[name] = value
        return [
            {"study": s, "number": n, "state": st, "attrs": attrs.get(i, {}), "params": params.get(i, {})}
            for i, s, n, st in rows
        ]

    # -- ending -----------------------------------------------------------------------------------------------------

    def end_all(self) -> None:
        """SIGKILL to everything that carries the mark, until nothing does. AssertionError when something stays."""
        deadline = time.monotonic() + 60.0
        while (left := self.processes()) and time.monotonic() < deadline:
            for process in left:
                process.kill()
            for started in self.started:
                started.poll()
            time.sleep(0.05)
        assert not left, f"processes that SIGKILL did not end: {left}"
        for started in self.started:
            started.wait(60)


def stop_between_transactions(driver: subprocess.Popen[Any], database: Path) -> None:
    """SIGSTOP, not while it holds SQLite's lock: then nobody could go on, and no lease would help."""

    def stopped() -> bool:
        driver.send_signal(signal.SIGSTOP)
        until(lambda: (seen := vitals.system.process(driver.pid)) and seen.state in "TZX", 10, "it stands still")
        connection = sqlite3.connect(database, timeout=0.2, isolation_level=None)
        with contextlib.closing(connection):
            try:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("ROLLBACK")
                return True
            except sqlite3.OperationalError:
                driver.send_signal(signal.SIGCONT)
                return False

    until(stopped, 30, "the driver stops between two transactions")


class Disk:
    """A file system of its own under a folder, in memory; `refused` is why there is none, empty where there is.

    Needs root. A context manager. What fills it is one file, or a folder of empty ones.
    """

    def __init__(self, folder: Path, *, size: str = "64m", inodes: int = 6000) -> None:
        self.folder, self.refused = folder, "not mounted"
        self._filler = folder / "filler"
        self._options = f"size={size},nr_inodes={inodes}"

    def __enter__(self) -> Disk:
        self.folder.mkdir(parents=True, exist_ok=True)
        words = ["mount", "-t", "tmpfs", "-o", self._options, "tmpfs", str(self.folder)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        self.refused = f"a file system cannot be mounted: {done.stderr.strip()}" if done.returncode else ""
        return self

    def __exit__(self, *error: object) -> None:
        if not self.refused:
            subprocess.run(["umount", "-l", str(self.folder)], check=False)

    def fill(self) -> None:
        """Take every byte, also those that get free within a moment."""
        with contextlib.suppress(OSError), self._filler.open("ab", buffering=0) as file:
            while file.write(b"\0" * 4096):
                pass

    def take_inodes(self) -> None:
        """Take every inode."""
        with contextlib.suppress(OSError):
            self._filler.mkdir(exist_ok=True)
            for number in range(1_000_000):
                (self._filler / str(number)).touch(exist_ok=False)

    def empty(self) -> None:
        """Give it all back."""
        if self._filler.is_dir():
            shutil.rmtree(self._filler)
        else:
            self._filler.unlink(missing_ok=True)


class Network:
    """A network namespace of its own that a pair of virtual interfaces joins to this one. A context manager.

    Needs root; `refused` is why there is none, empty where there is. outside: this side's address.
    """

    def __init__(self) -> None:
        self.refused = "not made"
        self._name = f"hr{os.getpid() % 100_000}"
        self._net = f"10.{200 + os.getpid() % 50}.{os.getpid() // 50 % 250}"
        self.outside, self._inside = f"{self._net}.1", f"{self._net}.2"

    def __enter__(self) -> Network:
        near, far = f"{self._name}a", f"{self._name}b"
        steps = [
            f"netns add {self._name}",
            f"link add {near} type veth peer name {far} netns {self._name}",
            f"addr add {self.outside}/24 dev {near}",
            f"link set {near} up",
            f"-n {self._name} addr add {self._inside}/24 dev {far}",
            f"-n {self._name} link set {far} up",
            f"-n {self._name} link set lo up",
        ]
        for step in steps:
            try:
                done = subprocess.run(["ip", *step.split()], capture_output=True, text=True, check=False)
            except FileNotFoundError:
                self.refused = "there is no command `ip` to make a network with"
                return self
            if done.returncode:
                self.refused = f"a network namespace cannot be made: ip {step}: {done.stderr.strip()}"
                return self
        self.refused = ""
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(FileNotFoundError):
            subprocess.run(["ip", "link", "delete", f"{self._name}a"], capture_output=True, check=False)
            subprocess.run(["ip", "netns", "delete", self._name], capture_output=True, check=False)

    @property
    def enter(self) -> list[str]:
        """What a command is preceded by to run in it; nothing but the network is another one."""
        return ["nsenter", f"--net=/var/run/netns/{self._name}"]

    def cut(self) -> None:
        """Nothing passes any more; connections notice nothing by themselves."""
        subprocess.run(["ip", "link", "set", f"{self._name}a", "down"], check=True)

    def mend(self) -> None:
        """As before."""
        subprocess.run(["ip", "link", "set", f"{self._name}a", "up"], check=True)


def _role(words: list[str]) -> str:
    text = " ".join(words)
    for part, role in (
        ("scheduler.watchdog", "watchdog"),
        ("scheduler.worker.agent_process", "agent"),
        ("training.fork_server", "spare"),
        ("training.trial", "spare"),
        ("-m dask scheduler", "scheduler"),
        ("-m dask worker", "nanny"),
        ("resource_tracker", "other"),
        ("multiprocessing", "worker"),
        ("-m scheduler", "driver"),
    ):
        if part in text:
            return role
    return "other"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file that are whole."""
    found = []
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found

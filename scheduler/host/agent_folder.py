"""Where the agents of a host are found: each has a folder with its entry, socket and log in the host's private one.

An agent outlives the Dask worker that started it, so a worker that comes later must be able to find it. Covers the
entries, the lock that says which worker has an agent for its own, the socket's address and the frames on it (JSON
lines). Standard library only. What the frames say is the agent's and the driver's business.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from scheduler.files.durable import read_json, write_json
from scheduler.host.registry import HostRegistry, boot_id
from scheduler.model import Json

Lives = Callable[[int, float], bool]  # (pid, start time) -> whether this very process runs (`vitals.lives`)
UNENTERED_S = 600.0  # an agent enters within a minute of its folder, or not at all
LONGEST_ADDRESS = 100  # bytes of a socket's path that every system takes (104 on macOS, 108 on Linux)


def pid_space() -> str:
    """Names the set of pids this process sees: in another container the same number is another process."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessIdentity:
    """A process, so that another one of the same host can tell whether it is certainly dead."""

    pid: int
    start_time: float
    boot_id: str
    pid_space: str

    @classmethod
    def own(cls, start_time: Callable[[int], float | None]) -> ProcessIdentity:
        """Return this process. start_time: pid -> `vitals.start_time`."""
        return cls(pid=os.getpid(), start_time=start_time(os.getpid()) or 0.0, boot_id=boot_id(), pid_space=pid_space())

    def is_dead(self, lives: Lives) -> bool:
        """Return True when it is certainly gone; False while it lives, and for one of another host or container."""
        if (self.boot_id, self.pid_space) != (boot_id(), pid_space()):
            return False
        return not lives(self.pid, self.start_time)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentEntry:
    """One agent. topic: names its driver. run_id: names the run folder, the same for every driver of it; the one that
    began last has the run.

    memory: names the memory its trials draw from and what bounds them (`bounds.Bounds.name`); a worker under another
    limit (two batch jobs on one host) has no use for it.
    """

    id: str
    topic: str
    run_id: str
    began_unix: float
    process: ProcessIdentity
    memory: str
    address: str


class AgentFolder:
    """The entries under one host registry. Methods raise OSError only."""

    def __init__(self, registry: HostRegistry) -> None:
        self.root = os.path.join(registry.root, "agents")
        os.makedirs(self.root, mode=0o700, exist_ok=True)

    def path(self, agent: str, name: str = "") -> str:
        """Return the agent's own folder, or a file in it."""
        return os.path.join(self.root, agent, name)

    def make(self, agent: str) -> None:
        """Make the folder of a new agent."""
        os.makedirs(self.path(agent), mode=0o700, exist_ok=True)

    def listen(self, agent: str) -> socket.socket:
        """Open a socket for this agent; its address is `getsockname()`."""
        address = self.path(agent, "socket")
        if len(os.fsencode(address)) > LONGEST_ADDRESS:
            address = os.path.join(tempfile.mkdtemp(prefix="headroom-", dir="/tmp"), "socket")
        found = socket.socket(socket.AF_UNIX)
        found.bind(address)
        os.chmod(address, 0o600)
        found.listen(16)
        return found

    def enter(self, entry: AgentEntry) -> None:
        """From now on others find it."""
        write_json(self.path(entry.id, "agent.json"), dataclasses.asdict(entry))

    def remove(self, agent: str, address: str | None = None) -> None:
        """Forget an agent that has left or is dead. Idempotent."""
        if address is not None:  # in its folder, or in one of its own
            shutil.rmtree(os.path.dirname(address), ignore_errors=True)
        shutil.rmtree(self.path(agent), ignore_errors=True)

    def agents(self, lives: Lives) -> Iterator[AgentEntry]:
        """Every agent that lives; entries of dead ones are removed."""
        try:
            names = sorted(os.listdir(self.root))
        except FileNotFoundError:  # somebody removed the registry; each agent makes its folder again
            return
        for name in names:
            data = read_json(self.path(name, "agent.json"))
            if data is None:  # it is about to enter, or whoever made its folder was killed before it did
                self._forget_unentered(name)
                continue
            try:
                entry = AgentEntry(**{**data, "process": ProcessIdentity(**data["process"])})
            except (KeyError, TypeError):  # written by another version: leave it to its owner
                continue
            if entry.process.boot_id != boot_id() or entry.process.is_dead(lives):
                self.remove(entry.id, entry.address)
            else:
                yield entry

    def _forget_unentered(self, name: str) -> None:
        with contextlib.suppress(OSError):
            if time.time() - os.stat(self.path(name)).st_mtime > UNENTERED_S and Ownership.is_free(self, name):
                self.remove(name)


class Ownership:
    """The lock of the worker that has an agent for its own; the kernel frees it when that worker dies."""

    def __init__(self, fd: int) -> None:
        self._fd: int | None = fd

    @classmethod
    def of(cls, folder: AgentFolder, agent: str) -> Ownership | None:
        """Take it; None while another worker has it, and when the agent has left."""
        try:
            fd = os.open(folder.path(agent, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            return None
        return cls(fd)

    @staticmethod
    def is_free(folder: AgentFolder, agent: str) -> bool:
        """Whether no worker has it now."""
        if (taken := Ownership.of(folder, agent)) is None:
            return False
        taken.release()
        return True

    def release(self) -> None:
        """Give it back; again: nothing."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


class Connection:
    """One end of an agent's socket: JSON lines both ways. `send` may be called from any thread, `frames` from one."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._buffer = b""

    @classmethod
    def to(cls, address: str, timeout_s: float = 5.0) -> Connection:
        """Connect to this address. Raises OSError when nobody answers."""
        found = socket.socket(socket.AF_UNIX)
        try:
            found.settimeout(timeout_s)
            found.connect(address)
            found.settimeout(None)
        except OSError:
            found.close()
            raise
        return cls(found)

    def send(self, frame: Json) -> None:
        """Write one frame whole. Raises OSError when the other side is gone. Not for two threads at once."""
        self._socket.sendall((json.dumps(frame) + "\n").encode())

    def frames(self) -> Iterator[tuple[Json, str]]:
        """(frame, its text) until the other side is gone. Lines that are no JSON object are dropped."""
        while True:
            *lines, self._buffer = self._buffer.split(b"\n")
            for line in lines:
                with contextlib.suppress(ValueError):
                    text = line.decode()
                    if isinstance(frame := json.loads(text), dict):
                        yield frame, text
            try:
                chunk = self._socket.recv(1 << 16)
            except OSError:
                return
            if not chunk:
                return
            self._buffer += chunk

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            self._socket.close()


def identity(data: Any) -> ProcessIdentity | None:
    """Read the identity that was sent as JSON, None for anything else."""
    try:
        return ProcessIdentity(**data)
    except TypeError:
        return None
